//! Neurons of MLPs put into the order of another model's.

use std::sync::Arc;

use moe_merge_checkpoint::weight::PermutedRows;
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use super::assign::assign;
use crate::compose::PermutedColumns;
use crate::error::MergeError;

/// Neurons of one MLP that can be matched: 20 bytes for each pair.
const MOST: usize = 8192;

/// Neurons of the reference that are compared together.
const ROWS: usize = 64;

/// A gated MLP by the names of its tensors.
struct Mlp {
    /// Rows are neurons: gate and up, or both in one.
    ins: Vec<String>,
    /// Columns are neurons.
    down: String,
}

/// Every gated MLP of a model, experts and shared experts too.
fn mlps(source: &Source) -> Vec<Mlp> {
    let mut found = Vec::new();
    for name in source.tensors.keys() {
        for (down, ins) in [
            ("down_proj.weight", &["gate_proj.weight", "up_proj.weight"][..]),
            ("down_proj.weight", &["gate_up_proj.weight"]),
            (".w2.weight", &[".w1.weight", ".w3.weight"]),
        ] {
            let Some(module) = name.strip_suffix(down) else { continue };
            let ins: Vec<String> = ins.iter().map(|i| format!("{module}{i}")).collect();
            if ins.iter().all(|i| source.tensors.contains_key(i)) {
                found.push(Mlp { ins, down: name.clone() });
            }
        }
    }
    found
}

/// `source` with the neurons of each MLP in the order of those of `reference` that they are most like, and a note of what was
/// moved. What the model computes stays the same.
///
/// The order maximises the sum of inner products of matched neurons: of their rows in gate and up projection and their columns in
/// the down projection.
///
/// # Errors
/// [`MergeError::Argument`] for MLPs of more than 8192 neurons; [`MergeError::Checkpoint`] for matrices that `reference` lacks or
/// has in another shape.
///
/// # Source
/// Ainsworth et al. 2023, Git Re-Basin, arXiv:2209.04836, section 3.2, for one MLP at a time: residual stream and heads stay.
pub(crate) fn matched_neurons(
    reference: &Source,
    mut source: Source,
) -> Result<Source, MergeError> {
    let all = mlps(&source);
    let (count, mut moved, mut neurons) = (all.len(), 0, 0);
    for mlp in all {
        let own = Rows::of(&source, &mlp)?;
        let order = order(&Rows::of(reference, &mlp)?, &own)?;
        let elsewhere = order.iter().enumerate().filter(|(i, j)| i != *j).count();
        if elsewhere == 0 {
            continue;
        }
        (moved, neurons) = (moved + 1, neurons + elsewhere);
        let rows: Vec<u32> = order.iter().map(|j| *j as u32).collect();
        let parts = if mlp.ins.len() == 1 { 2 } else { 1 };
        let both: Vec<u32> =
            (0..parts).flat_map(|p| rows.iter().map(move |j| j + (p * own.count) as u32)).collect();
        for name in &mlp.ins {
            for name in [name.clone(), name.replace(".weight", ".bias")] {
                let Some(weight) = source.tensors.get(&name).cloned() else { continue };
                let weight: WeightRef = Arc::new(PermutedRows::new(weight, Arc::new(both.clone())));
                source.tensors.insert(name, weight);
            }
        }
        let down = source.weight(&mlp.down)?.clone();
        let down: WeightRef = Arc::new(PermutedColumns::new(down, Arc::new(rows)));
        source.tensors.insert(mlp.down, down);
    }
    let (label, other) = (&source.label, &reference.label);
    source.notes.push(format!(
        "`{label}`: neurons matched to those of `{other}` in {count} MLPs, {neurons} of them moved, in {moved} MLPs"
    ));
    Ok(source)
}

/// The neurons of an MLP as vectors.
struct Rows {
    count: usize,
    /// Of gate and up projection, `[count, hidden]` each, and the transposed down projection.
    matrices: Vec<Vec<f32>>,
}

impl Rows {
    fn of(source: &Source, mlp: &Mlp) -> Result<Self, MergeError> {
        let down = source.weight(&mlp.down)?;
        let (hidden, count) = (down.rows(), down.cols());
        if count > MOST {
            return Err(MergeError::Argument {
                what: format!(
                    "`{}` of `{}` has too many neurons to be matched",
                    mlp.down, source.label
                ),
                name: "match_neurons".into(),
                expected: format!("at most {MOST}"),
                found: count.to_string(),
                hint: Some("leave `match_neurons` out".into()),
            });
        }
        let mut matrices = Vec::new();
        for name in &mlp.ins {
            let weight = source.weight(name)?;
            let rows = if mlp.ins.len() == 1 { 2 * count } else { count };
            weight.expect_shape(&[rows, hidden], "one row for each neuron")?;
            matrices.extend(weight.to_f32()?.chunks_exact(count * hidden).map(<[f32]>::to_vec));
        }
        let values = down.to_f32()?;
        let column = |i: usize| (0..hidden).map(move |r| (r, i));
        let turned = (0..count).flat_map(column).map(|(r, i)| values[r * count + i]);
        matrices.push(turned.collect());
        Ok(Self { count, matrices })
    }
}

/// For each neuron of `reference` one of `own`.
fn order(reference: &Rows, own: &Rows) -> Result<Vec<usize>, MergeError> {
    let count = reference.count;
    if own.count != count || own.matrices[0].len() != reference.matrices[0].len() {
        return Err(MergeError::Argument {
            what: "MLPs of different sizes cannot be matched".into(),
            name: "match_neurons".into(),
            expected: format!("{count} neurons, as in the first model"),
            found: own.count.to_string(),
            hint: Some("all models of a merge need the same sizes".into()),
        });
    }
    let mut score = vec![0f32; count * count];
    score.par_chunks_mut((ROWS * count).max(1)).enumerate().for_each(|(i, out)| {
        let rows = i * ROWS..count.min((i + 1) * ROWS);
        for (a, b) in reference.matrices.iter().zip(&own.matrices) {
            let hidden = a.len() / count;
            let left = Dense::new(&a[rows.start * hidden..rows.end * hidden], rows.len(), hidden);
            let right = Dense::new(b, count, hidden);
            let made = left.and_then(|l| matmul(l, right?.transposed(), out, Into::Add));
            debug_assert!(made.is_ok(), "views were made for these sizes");
        }
    });
    let score: Vec<f64> = score.into_iter().map(f64::from).collect();
    Ok(assign(&score, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neurons_are_found_again() {
        let number = |i: usize| ((i * 7919 + 31) % 1009) as f32 / 504.5 - 1.0;
        let (count, hidden) = (90, 7);
        let matrix = |m: usize| -> Vec<f32> {
            (0..count * hidden).map(|i| number(i + m * 10_007)).collect()
        };
        let reference = Rows { count, matrices: (0..3).map(matrix).collect() };
        // Row i of the other is row 37 i of the reference.
        let at = |i: usize| i * 37 % count;
        let moved = |m: &Vec<f32>| {
            (0..count).flat_map(|i| m[at(i) * hidden..][..hidden].to_vec()).collect()
        };
        let own = Rows { count, matrices: reference.matrices.iter().map(moved).collect() };
        for (i, j) in order(&reference, &own).unwrap().into_iter().enumerate() {
            assert_eq!(at(j), i);
        }
    }
}
