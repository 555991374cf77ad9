//! `tsv`: the leading singular directions of each task vector, made orthogonal to each other.

use moe_merge_kernels::KernelError;
use moe_merge_kernels::svd::truncated_svd;

use super::matrix::{Matrices, PARAMETERS, nearest_orthonormal};
use super::{Base, Combine, Group, Method};

/// `B + lambda U S V^T` for matrices: each of the `N` models gives the `r/N` leading singular triples of its task vector
/// (`r` the smaller side), and the left and the right vectors of all are replaced by the nearest orthonormal ones, so that
/// models do not disturb each other. Other tensors get the mean of the task vectors.
pub(super) const METHOD: Method = Method {
    name: "tsv",
    summary: "leading singular directions of each task vector, made orthogonal to each other",
    formula: "B + lambda U S V' with the leading r/N singular triples of each w (W - B), U and V made orthonormal, \
              for matrices; B + lambda mean(w (W - B)) else",
    parameters: PARAMETERS,
    base: Base::Required,
    models: (1, usize::MAX),
    whole_tensor: false,
    activations: None,
    source: "Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Matrices::build(group, merge)
}

fn merge(vectors: &[Vec<f32>], rows: usize, cols: usize) -> Result<Vec<f32>, KernelError> {
    let rank = (rows.min(cols) / vectors.len().max(1)).max(1);
    let (mut values, mut left, mut right) = (Vec::new(), Vec::new(), Vec::new());
    for d in vectors {
        let svd = truncated_svd(d, rows, cols, rank)?;
        values.extend(svd.values);
        left.extend(svd.left);
        right.extend(svd.right);
    }
    let mut out = vec![0f32; rows * cols];
    let count = values.len();
    if count == 0 {
        return Ok(out);
    }
    // With more models than the smaller side has directions, no orthonormal set is left to find.
    if count <= rows.min(cols) {
        left = nearest_orthonormal(&left, count, rows)?;
        right = nearest_orthonormal(&right, count, cols)?;
    }
    for (i, value) in values.iter().enumerate() {
        let (u, v) = (&left[i * rows..(i + 1) * rows], &right[i * cols..(i + 1) * cols]);
        for (u, line) in u.iter().zip(out.chunks_exact_mut(cols)) {
            let factor = (value * f64::from(*u)) as f32;
            line.iter_mut().zip(v).for_each(|(o, v)| *o += factor * v);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonal_tasks_add_up_and_equal_ones_do_not_double() {
        let (a, b) = (vec![3.0, 0.0, 0.0, 0.0], vec![0.0, 0.0, 0.0, 2.0]);
        for (f, e) in merge(&[a.clone(), b], 2, 2).unwrap().iter().zip([3.0, 0.0, 0.0, 2.0]) {
            assert!((f - e).abs() < 1e-6);
        }
        // The same direction twice: its nearest orthonormal pair shares it, and keeps it no larger than once.
        let twice = merge(&[a.clone(), a], 2, 2).unwrap();
        assert!(twice[0] <= 3.0 + 1e-5, "{twice:?}");
        assert!(twice.iter().all(|v| v.is_finite()));
    }
}
