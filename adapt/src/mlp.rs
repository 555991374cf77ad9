//! The three matrices of an MLP, in whatever way a family stores them.

use std::sync::Arc;

use moe_merge_checkpoint::weight::{RowSlice, Stacked};
use moe_merge_checkpoint::{CheckpointError, Source, WeightRef};
use moe_merge_model::spec::{Mlp, MoeMlp};

/// Gate and up, `[inter, hidden]`, and down, `[hidden, inter]`.
pub(crate) type Matrices = [WeightRef; 3];

fn name(layer: usize, below: &str) -> String {
    format!("model.layers.{layer}.{below}")
}

/// Consecutive rows of a weight.
fn rows(weight: &WeightRef, from: usize, count: usize) -> WeightRef {
    Arc::new(RowSlice::new(weight.clone(), from..from + count))
}

/// A weight, with its shape checked.
fn weight(source: &Source, name: &str, shape: &[usize]) -> Result<WeightRef, CheckpointError> {
    let weight = source.weight(name)?;
    weight.expect_shape(shape, "as the model's own configuration says")?;
    Ok(weight.clone())
}

/// The MLP of a dense layer, or one expert of a layer with experts.
///
/// # Errors
/// A tensor that is missing or has another shape than the configuration says.
pub(crate) fn matrices(
    source: &Source,
    hidden: usize,
    layer: usize,
    mlp: &Mlp,
    expert: usize,
) -> Result<Matrices, CheckpointError> {
    let get = |below: &str, shape: &[usize]| weight(source, &name(layer, below), shape);
    match mlp {
        Mlp::Dense(dense) if dense.fused => {
            let both = get("mlp.gate_up_proj.weight", &[2 * dense.inter, hidden])?;
            let down = get("mlp.down_proj.weight", &[hidden, dense.inter])?;
            Ok([rows(&both, 0, dense.inter), rows(&both, dense.inter, dense.inter), down])
        }
        Mlp::Dense(dense) => Ok([
            get("mlp.gate_proj.weight", &[dense.inter, hidden])?,
            get("mlp.up_proj.weight", &[dense.inter, hidden])?,
            get("mlp.down_proj.weight", &[hidden, dense.inter])?,
        ]),
        Mlp::Moe(moe) => match moe.names.expert(expert) {
            Some([gate, up, down]) => Ok([
                get(&gate, &[moe.inter, hidden])?,
                get(&up, &[moe.inter, hidden])?,
                get(&down, &[hidden, moe.inter])?,
            ]),
            None => {
                let [both, down] = stacked(source, hidden, layer, moe)?;
                Ok([
                    rows(&both, 2 * expert * moe.inter, moe.inter),
                    rows(&both, (2 * expert + 1) * moe.inter, moe.inter),
                    rows(&down, expert * hidden, hidden),
                ])
            }
        },
    }
}

/// Names of the tensors that hold all experts of a layer, where a family has such.
pub(crate) const STACKED: [&str; 2] =
    ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"];

/// `[experts, 2 * inter, hidden]`, gates above ups, and `[experts, hidden, inter]`.
fn stacked(
    source: &Source,
    hidden: usize,
    layer: usize,
    moe: &MoeMlp,
) -> Result<[WeightRef; 2], CheckpointError> {
    let get = |below: &str, shape: &[usize]| weight(source, &name(layer, below), shape);
    Ok([
        get(STACKED[0], &[moe.experts, 2 * moe.inter, hidden])?,
        get(STACKED[1], &[moe.experts, hidden, moe.inter])?,
    ])
}

/// The tensors of a layer in which `expert` has new matrices, under their names.
///
/// # Errors
/// As [`matrices`].
pub(crate) fn replaced(
    source: &Source,
    hidden: usize,
    layer: usize,
    moe: &MoeMlp,
    expert: usize,
    new: Matrices,
) -> Result<Vec<(String, WeightRef)>, CheckpointError> {
    if let Some(names) = moe.names.expert(expert) {
        return Ok(names.into_iter().map(|n| name(layer, &n)).zip(new).collect());
    }
    let old = stacked(source, hidden, layer, moe)?;
    let [gate, up, down] = new;
    let each = [(2 * moe.inter, vec![gate, up]), (hidden, vec![down])];
    let tensors = STACKED.iter().zip(old).zip(each).map(|((below, old), (height, parts))| {
        let (before, after) = (expert * height, (expert + 1) * height);
        let mut all = Vec::new();
        if before > 0 {
            all.push(rows(&old, 0, before));
        }
        all.extend(parts);
        if after < old.rows() {
            all.push(rows(&old, after, old.rows() - after));
        }
        let shape = old.shape().to_vec();
        (name(layer, below), Arc::new(Stacked::new(all, shape)) as WeightRef)
    });
    Ok(tensors.collect())
}
