//! How far two models are from each other outside their experts.

use moe_merge_checkpoint::{CheckpointError, Source, Weight, WeightRef};
use moe_merge_model::Spec;
use rayon::prelude::*;
use serde::Serialize;

/// How far the weights of two models are from each other, from a sample of their rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Compatibility {
    /// Tensors that both have in the same shape.
    pub tensors: usize,
    /// Root mean square, over the tensors, of `|a - b| / |a|` (Frobenius norms of the sampled rows).
    pub difference: f64,
    /// The tensor that differs most, and by how much.
    pub most: Option<(String, f64)>,
    /// Tensors of the model that the other has not, or in another shape.
    pub without: usize,
}

/// Rows of each matrix that are compared, evenly spread: enough to tell a fine-tuned matrix from a frozen one, and little
/// beside the copy of an expert. Small tensors are compared whole.
const ROWS: usize = 4;

/// Numbers up to which a tensor is compared whole.
const SMALL: usize = 4096;

/// From this difference on a person is told: rounding to bf16 alone gives about 0.002.
pub(crate) const WORTH_TELLING: f64 = 0.01;

impl Compatibility {
    /// Compares the weights of `model` outside its experts and routers with those of `other`.
    ///
    /// Queries and keys are left out where the two models pair rotary dimensions in different ways: their rows stand in
    /// another order.
    ///
    /// # Errors
    /// What computing rows meets.
    pub fn measure(
        (model, spec): (&Source, &Spec),
        (other, other_spec): (&Source, &Spec),
    ) -> Result<Self, CheckpointError> {
        let pairing = |spec: &Spec| spec.layers.first().map(|l| l.rope.pairing);
        let same_order = pairing(spec) == pairing(other_spec);
        let rotated =
            |name: &str| name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
        let compared = |name: &str| !is_routed(name) && (same_order || !rotated(name));
        let shared: Vec<(&String, &WeightRef)> =
            model.tensors.iter().filter(|(name, _)| compared(name)).collect();
        let pairs: Vec<(&String, &WeightRef, &WeightRef)> = shared
            .iter()
            .filter_map(|(name, a)| {
                let b = other.tensors.get(*name).filter(|b| b.shape() == a.shape())?;
                Some((*name, *a, b))
            })
            .collect();
        let each: Vec<f64> = pairs
            .par_iter()
            .map(|(_, a, b)| difference(a.as_ref(), b.as_ref()))
            .collect::<Result<_, _>>()?;
        let most = pairs
            .iter()
            .zip(&each)
            .max_by(|a, b| a.1.total_cmp(b.1))
            .filter(|(_, d)| **d > 0.0)
            .map(|((name, _, _), d)| ((*name).clone(), *d));
        Ok(Self {
            tensors: pairs.len(),
            difference: root_mean_square(&each),
            most,
            without: shared.len() - pairs.len(),
        })
    }

    /// What a person should know, if it is worth telling.
    pub(crate) fn note(&self, label: &str) -> Option<String> {
        let (name, most) = self.most.as_ref().filter(|_| self.difference >= WORTH_TELLING)?;
        Some(format!(
            "outside its MLPs `{label}` differs from the model by {:.1} % ({} tensors; most: `{name}`, {:.1} %): its MLPs \
             were trained beside other weights, and may be worth less here",
            100.0 * self.difference,
            self.tensors,
            100.0 * most
        ))
    }
}

/// Whether a tensor belongs to an expert, a router or an MLP that may become one.
fn is_routed(name: &str) -> bool {
    [".mlp.", ".block_sparse_moe.", ".shared_mlp."].iter().any(|part| name.contains(part))
}

/// Root mean square of differences.
pub(crate) fn root_mean_square(each: &[f64]) -> f64 {
    let sum: f64 = each.iter().map(|d| d * d).sum();
    (sum / each.len().max(1) as f64).sqrt()
}

/// `|a - b| / |a|` over sampled rows of two weights of one shape; `|b|` where `a` is zero there.
pub(crate) fn difference(a: &dyn Weight, b: &dyn Weight) -> Result<f64, CheckpointError> {
    let (rows, cols) = (a.rows(), a.cols());
    let count = if rows * cols <= SMALL { rows } else { ROWS.min(rows) };
    let (mut x, mut y) = (vec![0.0; cols], vec![0.0; cols]);
    let (mut between, mut own, mut other) = (0.0f64, 0.0f64, 0.0f64);
    for i in 0..count {
        // The middle of each of `count` equal parts.
        let row = (2 * i + 1) * rows / (2 * count);
        a.read_rows(row..row + 1, &mut x)?;
        b.read_rows(row..row + 1, &mut y)?;
        for (x, y) in x.iter().zip(&y) {
            let (x, y) = (f64::from(*x), f64::from(*y));
            between += (x - y) * (x - y);
            own += x * x;
            other += y * y;
        }
    }
    let scale = if own > 0.0 { own } else { other };
    Ok(if between == 0.0 { 0.0 } else { (between / scale).sqrt() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::OwnedWeight;

    fn weight(values: &[f32], shape: &[usize]) -> OwnedWeight {
        OwnedWeight::from_f32("w", values, shape, Dtype::F32)
    }

    #[test]
    fn differences_are_relative() {
        let a = weight(&[3.0, 4.0], &[1, 2]);
        let far = |values: &[f32]| difference(&a, &weight(values, &[1, 2])).unwrap();
        assert_eq!((far(&[3.0, 4.0]), far(&[0.0, 0.0]), far(&[3.0, 3.5])), (0.0, 1.0, 0.1));
        let zero = weight(&[0.0, 0.0], &[2]);
        assert_eq!(difference(&zero, &weight(&[2.0, 0.0], &[2])).unwrap(), 1.0);
        assert_eq!(difference(&zero, &zero).unwrap(), 0.0);
    }

    #[test]
    fn large_matrices_are_sampled_from_the_middle_of_equal_parts() {
        let values = vec![1.0; 100 * 100];
        let mut other = values.clone();
        // Of 100 rows, 12, 37, 62 and 87 are looked at.
        other[37 * 100] = 21.0;
        let (a, b) = (weight(&values, &[100, 100]), weight(&other, &[100, 100]));
        assert_eq!(difference(&a, &b).unwrap(), 1.0);
        other[37 * 100] = 1.0;
        other[38 * 100] = 21.0;
        assert_eq!(difference(&a, &weight(&other, &[100, 100])).unwrap(), 0.0);
    }
}
