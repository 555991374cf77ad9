//! Weights with trained factors on top, computed when they are read.

use std::ops::Range;
use std::sync::Arc;

use moe_merge_checkpoint::weight::{Update, Updated};
use moe_merge_checkpoint::{CheckpointError, Source, WeightRef};
use moe_merge_model::Spec;
use moe_merge_model::expert_training::{FactorPair, Factors, Part, TrainedFactors};
use moe_merge_model::spec::{ExpertNames, Mlp};

/// `scale b a` of a pair.
#[derive(Debug)]
struct Product {
    pair: FactorPair,
    scale: f32,
}

impl Update for Product {
    fn shape(&self) -> [usize; 2] {
        [self.pair.output, self.pair.input]
    }

    fn add(&self, rows: Range<usize>, out: &mut [f32]) {
        let FactorPair { rank, input, a, b, trained, .. } = &self.pair;
        for (row, out) in rows.zip(out.chunks_exact_mut((*input).max(1))) {
            match trained {
                // One factor is the identity.
                TrainedFactors::A if *rank > 1 => {
                    add(self.scale, &a[row * input..(row + 1) * input], out);
                }
                TrainedFactors::B => add(self.scale, &b[row * rank..(row + 1) * rank], out),
                TrainedFactors::A | TrainedFactors::Both => {
                    let mut sum = vec![0.0; *input];
                    let b = &b[row * rank..(row + 1) * rank];
                    for (b, a) in b.iter().zip(a.chunks_exact(*input)) {
                        add(*b, a, &mut sum);
                    }
                    add(self.scale, &sum, out);
                }
            }
        }
    }
}

fn add(factor: f32, from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += factor * f);
}

/// The tensors that the factors change, under their names in `source`, with their new values.
///
/// # Errors
/// [`CheckpointError::MissingTensor`].
pub fn tensors(
    source: &Source,
    spec: &Spec,
    expert: Option<usize>,
    factors: &Factors,
) -> Result<Vec<(String, WeightRef)>, CheckpointError> {
    let mut found: Vec<(String, WeightRef)> = Vec::new();
    for ((layer, part), pair) in &factors.pairs {
        let (name, from) = place(spec, *layer, *part, expert, pair.output);
        let name = format!("model.layers.{layer}.{name}");
        let at = match found.iter().position(|(n, _)| *n == name) {
            Some(at) => at,
            None => {
                found.push((name.clone(), source.weight(&name)?.clone()));
                found.len() - 1
            }
        };
        let base = found[at].1.clone();
        let (pair, scale) = (pair.clone(), factors.scale);
        found[at].1 = Arc::new(Updated::new(base, from, Product { pair, scale }));
    }
    Ok(found)
}

/// Tensors by name.
type Named = Vec<(String, WeightRef)>;

/// Routers, and all other tensors.
pub fn routers_apart(spec: &Spec, tensors: Named) -> (Named, Named) {
    let ending = spec.moe_layers().next().map(|(_, moe)| moe.names.router());
    tensors.into_iter().partition(|(name, _)| ending.is_some_and(|e| name.ends_with(e)))
}

/// The tensor, below its layer, that holds a projection, and the row that it begins at there.
fn place(
    spec: &Spec,
    layer: usize,
    part: Part,
    expert: Option<usize>,
    rows: usize,
) -> (String, usize) {
    match &spec.layers[layer].mlp {
        Mlp::Moe(moe) if part == Part::Router => {
            (moe.names.router().to_owned(), expert.unwrap_or(0))
        }
        Mlp::Dense(mlp) if mlp.fused && part != Part::Down => {
            ("mlp.gate_up_proj.weight".into(), part as usize * rows)
        }
        Mlp::Dense(_) => (format!("mlp.{}_proj.weight", part.name()), 0),
        Mlp::Moe(moe) => {
            let expert = expert.unwrap_or(0);
            match (moe.names.expert(expert), part) {
                (Some(names), _) => (names[part as usize].clone(), 0),
                (None, Part::Down) => {
                    debug_assert_eq!(moe.names, ExpertNames::Granite);
                    ("block_sparse_moe.output_linear.weight".into(), expert * rows)
                }
                (None, _) => (
                    "block_sparse_moe.input_linear.weight".into(),
                    (2 * expert + part as usize) * rows,
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::{OwnedWeight, Weight};

    use super::*;

    #[test]
    fn updates_by_hand() {
        let base = OwnedWeight::from_f32("w", &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0], &[3, 2], Dtype::F32);
        let base: WeightRef = Arc::new(base);
        let pair = |rank, a: &[f32], b: &[f32], trained| FactorPair {
            rank,
            input: 2,
            output: 2,
            a: a.to_vec(),
            b: b.to_vec(),
            trained,
        };
        let read = |pair: FactorPair| {
            let updated = Updated::new(base.clone(), 1, Product { pair, scale: 0.5 });
            let whole = (&updated as &dyn Weight).to_f32().unwrap();
            // Any rows alone are the same.
            let mut row = [0.0; 2];
            for (i, wanted) in whole.chunks_exact(2).enumerate() {
                updated.read_rows(i..i + 1, &mut row).unwrap();
                assert_eq!(row, wanted);
            }
            whole
        };
        let low = pair(1, &[2.0, 4.0], &[1.0, -1.0], TrainedFactors::Both);
        assert_eq!(read(low), [1.0, 1.0, 3.0, 4.0, 2.0, 1.0]);
        let identity = [1.0, 0.0, 0.0, 1.0];
        let any = [2.0, 0.0, 0.0, 4.0];
        let wanted = [1.0, 1.0, 3.0, 2.0, 3.0, 5.0];
        assert_eq!(read(pair(2, &any, &identity, TrainedFactors::A)), wanted);
        assert_eq!(read(pair(2, &identity, &any, TrainedFactors::B)), wanted);
    }
}
