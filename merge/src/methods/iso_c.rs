//! `iso_c`: the sum of the task vectors, with all its singular values alike.

use moe_merge_kernels::KernelError;
use moe_merge_kernels::svd::truncated_svd;

use super::matrix::{Matrices, PARAMETERS, product};
use super::{Base, Combine, Group, Method};

/// `B + lambda s U V^T` for matrices, where `U S V^T` is the sum of the weighted task vectors and `s` the mean of its singular
/// values: directions that many models share no longer drown those of one. Other tensors, and the tables of embedding and
/// head, get the mean of the task vectors.
pub(super) const METHOD: Method = Method {
    name: "iso_c",
    summary: "the sum of the task vectors with equal singular values",
    formula: "B + lambda mean(S) U V' with U S V' = sum w (W - B), for matrices; B + lambda mean(w (W - B)) else",
    parameters: PARAMETERS,
    base: Base::Required,
    models: (1, usize::MAX),
    whole_tensor: false,
    activations: None,
    source: "Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Matrices::build(group, merge)
}

fn merge(vectors: &[Vec<f32>], rows: usize, cols: usize) -> Result<Vec<f32>, KernelError> {
    let mut sum = vec![0f32; rows * cols];
    for d in vectors {
        sum.iter_mut().zip(d).for_each(|(s, d)| *s += d);
    }
    let rank = rows.min(cols);
    let svd = truncated_svd(&sum, rows, cols, rank)?;
    let mean = svd.values.iter().sum::<f64>() / rank.max(1) as f64;
    Ok(product(&svd, rows, cols, |_| mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_values_become_their_mean() {
        // diag(3, 1) over two models: both directions get 2.
        let found = merge(&[vec![1.0, 0.0, 0.0, 1.0], vec![2.0, 0.0, 0.0, 0.0]], 2, 2).unwrap();
        for (f, e) in found.iter().zip([2.0, 0.0, 0.0, 2.0]) {
            assert!((f - e).abs() < 1e-6, "{found:?}");
        }
        assert_eq!(merge(&[vec![0.0; 6]], 2, 3).unwrap(), [0.0; 6]);
    }
}
