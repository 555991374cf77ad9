//! What the methods on singular values have in common: whole matrices, one at a time.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::KernelError;
use moe_merge_kernels::svd::{Svd, truncated_svd};

use super::gram::subtract;
use super::{Combine, Group, Parameter, Scope, number, read, round};

pub(super) const PARAMETERS: &[Parameter] = &[
    number("weight", Scope::Model, Some(1.0), "weight of this model's task vector"),
    number("lambda", Scope::Global, Some(1.0), "factor on the merged task vector"),
];

/// `B + lambda f(w_m (W_m - B))` where `f` sees whole matrices; the mean of the task vectors for all other tensors.
#[derive(Debug)]
pub(super) struct Matrices {
    base: usize,
    others: Vec<usize>,
    /// One for each of the others.
    weights: Vec<f32>,
    lambda: f32,
    dtype: Dtype,
    name: String,
    /// Whether this tensor is a matrix that maps hidden states.
    matrix: bool,
    merge: Merge,
    found: Mutex<Option<Arc<Vec<f32>>>>,
}

/// Merges weighted task vectors `[rows, cols]` into one.
pub(super) type Merge = fn(&[Vec<f32>], usize, usize) -> Result<Vec<f32>, KernelError>;

impl Matrices {
    pub fn build(group: &Group, merge: Merge) -> Result<Box<dyn Combine>, String> {
        let others = group.others();
        let shape = group.inputs[0].shape();
        let table = ["embed", "lm_head", "wte", "wpe"].iter().any(|part| group.name.contains(part));
        Ok(Box::new(Self {
            base: group.required_base()?,
            weights: others.iter().map(|&m| group.own[m][0] as f32).collect(),
            others,
            lambda: group.global[0] as f32,
            dtype: group.dtype,
            name: group.name.clone(),
            matrix: shape.len() == 2 && !table,
            merge,
            found: Mutex::default(),
        }))
    }

    fn task_vectors(
        &self,
        inputs: &[WeightRef],
        base: &[f32],
        rows: Range<usize>,
    ) -> Result<Vec<Vec<f32>>, CheckpointError> {
        let mut vectors = Vec::new();
        for (&m, weight) in self.others.iter().zip(&self.weights) {
            let mut d = Vec::new();
            subtract(&read(&inputs[m], rows.clone())?, base, self.dtype, &mut d);
            d.iter_mut().for_each(|d| *d *= weight);
            vectors.push(d);
        }
        Ok(vectors)
    }

    /// The merged task vector of a matrix.
    fn merged(&self, inputs: &[WeightRef]) -> Result<Arc<Vec<f32>>, CheckpointError> {
        let kept = || self.found.lock().unwrap_or_else(|e| e.into_inner());
        // Threads of the pool wait for the first of them. Another thread does not hold what they would wait for while it
        // may itself wait for them.
        let mut held = rayon::current_thread_index().map(|_| kept());
        let known = match &held {
            Some(held) => (**held).clone(),
            None => kept().clone(),
        };
        if let Some(found) = known {
            return Ok(found);
        }
        let base = &inputs[self.base];
        let (rows, cols) = (base.rows(), base.cols());
        let vectors = self.task_vectors(inputs, &base.to_f32()?, 0..rows)?;
        let merged = (self.merge)(&vectors, rows, cols).map_err(|e| self.failed(inputs, &e))?;
        let merged = Arc::new(merged);
        match &mut held {
            Some(held) => **held = Some(merged.clone()),
            None => *kept() = Some(merged.clone()),
        }
        Ok(merged)
    }

    fn failed(&self, inputs: &[WeightRef], error: &KernelError) -> CheckpointError {
        CheckpointError::Malformed {
            what: "a matrix has no singular values".into(),
            file: inputs[self.base].origin().0,
            tensor: Some(self.name.clone()),
            expected: "finite numbers in all models".into(),
            found: error.to_string(),
            hint: Some("`moe-merge verify` finds numbers that are not finite".into()),
        }
    }
}

impl Combine for Matrices {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        if self.matrix { self.merged(inputs).map(|_| ()) } else { Ok(()) }
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        inputs[self.base].read_rows(rows.clone(), out)?;
        if self.matrix {
            let merged = self.merged(inputs)?;
            let cols = inputs[self.base].cols();
            let part = &merged[rows.start * cols..rows.end * cols];
            out.iter_mut()
                .zip(part)
                .for_each(|(o, d)| *o = round(*o + self.lambda * d, self.dtype));
            return Ok(());
        }
        let vectors = self.task_vectors(inputs, out, rows)?;
        let count = vectors.len().max(1) as f32;
        for (i, o) in out.iter_mut().enumerate() {
            let mean = vectors.iter().map(|d| d[i]).sum::<f32>() / count;
            *o = round(*o + self.lambda * mean, self.dtype);
        }
        Ok(())
    }

    fn release(&self) {
        *self.found.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

/// `sum_i scale(i) u_i v_i^T` as `[rows, cols]`.
pub(super) fn product(
    svd: &Svd,
    rows: usize,
    cols: usize,
    scale: impl Fn(usize) -> f64,
) -> Vec<f32> {
    let mut out = vec![0f32; rows * cols];
    for i in 0..svd.values.len() {
        let (u, v) = (&svd.left[i * rows..(i + 1) * rows], &svd.right[i * cols..(i + 1) * cols]);
        for (u, line) in u.iter().zip(out.chunks_exact_mut(cols)) {
            let factor = (scale(i) * f64::from(*u)) as f32;
            line.iter_mut().zip(v).for_each(|(o, v)| *o += factor * v);
        }
    }
    out
}

/// The matrix with orthonormal rows that is nearest to `matrix: [rows, cols]`, `rows <= cols`.
pub(super) fn nearest_orthonormal(
    matrix: &[f32],
    rows: usize,
    cols: usize,
) -> Result<Vec<f32>, KernelError> {
    let svd = truncated_svd(matrix, rows, cols, rows.min(cols))?;
    Ok(product(&svd, rows, cols, |_| 1.0))
}
