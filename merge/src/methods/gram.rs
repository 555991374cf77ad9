//! Sums of products between tensors, and results that are linear in the tensors once these are known.

use std::fmt::Debug;
use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;

use super::{Combine, Group, Once, read, scan};

/// `x_i . x_j` for all pairs of some vectors, in f64.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Gram {
    size: usize,
    /// `[size, size]`, symmetric.
    sums: Vec<f64>,
}

impl Gram {
    /// Of `points` among `inputs`, as whole tensors; of their differences to `base`, if there is one.
    pub fn of(
        inputs: &[WeightRef],
        points: &[usize],
        base: Option<usize>,
        dtype: Dtype,
    ) -> Result<Self, CheckpointError> {
        let tensors: Vec<&WeightRef> =
            points.iter().chain(base.iter()).map(|&m| &inputs[m]).collect();
        let size = points.len();
        let parts = scan(
            &tensors,
            |_| (Self::zero(size), Vec::<Vec<f32>>::new()),
            |(gram, differences), _, blocks| match base {
                None => gram.add(blocks),
                Some(_) => {
                    differences.resize_with(size, Vec::new);
                    for (d, w) in differences.iter_mut().zip(blocks) {
                        subtract(w, &blocks[size], dtype, d);
                    }
                    gram.add(differences);
                }
            },
        )?;
        let mut total = Self::zero(size);
        for (part, _) in &parts {
            total.sums.iter_mut().zip(&part.sums).for_each(|(t, p)| *t += p);
        }
        Ok(total)
    }

    /// Of the given vectors.
    pub fn of_vectors<V: AsRef<[f32]>>(vectors: &[V]) -> Self {
        let mut gram = Self::zero(vectors.len());
        gram.add(vectors);
        gram
    }

    /// Of a known matrix.
    #[cfg(test)]
    pub fn known(size: usize, sums: &[f64]) -> Self {
        Self { size, sums: sums.to_vec() }
    }

    fn zero(size: usize) -> Self {
        Self { size, sums: vec![0.0; size * size] }
    }

    fn add<V: AsRef<[f32]>>(&mut self, vectors: &[V]) {
        if let ([a, b], [aa, ab, ba, bb]) = (vectors, self.sums.as_mut_slice()) {
            let mut sums = [0.0; 3];
            elementwise::add_dots_of_two(a.as_ref(), b.as_ref(), &mut sums);
            *aa += sums[0];
            *bb += sums[1];
            *ab += sums[2];
            *ba += sums[2];
            return;
        }
        for i in 0..self.size {
            for j in i..self.size {
                let mut sum = 0.0;
                elementwise::add_dot(vectors[i].as_ref(), vectors[j].as_ref(), &mut sum);
                self.sums[i * self.size + j] += sum;
                if i != j {
                    self.sums[j * self.size + i] += sum;
                }
            }
        }
    }

    /// Number of vectors.
    pub fn size(&self) -> usize {
        self.size
    }

    /// `x_i . x_j`
    pub fn dot(&self, i: usize, j: usize) -> f64 {
        self.sums[i * self.size + j]
    }

    /// `|x_i|`
    pub fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).sqrt()
    }

    /// `a' G b`
    pub fn form(&self, a: &[f64], b: &[f64]) -> f64 {
        (0..self.size)
            .map(|i| a[i] * (0..self.size).map(|j| self.dot(i, j) * b[j]).sum::<f64>())
            .sum()
    }
}

/// `round(w - b)` into `out`, which grows or shrinks to it.
pub(super) fn subtract(w: &[f32], b: &[f32], dtype: Dtype, out: &mut Vec<f32>) {
    out.resize(w.len(), 0.0);
    elementwise::subtract(w, b, dtype, out);
}

/// A method whose result is a [`Weighted`] sum.
pub(super) trait GramMethod: Debug + Send + Sync {
    /// The sum.
    fn sum(&self) -> &Weighted;

    /// Its coefficients, one for each point.
    fn find(&self, gram: &Gram, inputs: &[WeightRef]) -> Result<Vec<f64>, CheckpointError>;
}

impl<T: GramMethod> Combine for T {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        self.sum().coefficients(inputs, |gram| self.find(gram, inputs)).map(|_| ())
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let found = self.sum().coefficients(inputs, |gram| self.find(gram, inputs))?;
        self.sum().rows(found, inputs, rows, out)
    }
}

/// `sum_m c_m W_m`, or `B + sum_m c_m (W_m - B)` where there is a base, with coefficients that follow from the Gram
/// matrix of whole tensors; in f32, rounded once.
#[derive(Debug)]
pub(super) struct Weighted {
    /// Which inputs are summed.
    pub points: Vec<usize>,
    /// What they are taken relative to.
    pub base: Option<usize>,
    /// Dtype of the arithmetic.
    pub dtype: Dtype,
    coefficients: Once<Vec<f32>>,
}

impl Weighted {
    pub fn new(group: &Group, base: Option<usize>) -> Self {
        let points = (0..group.inputs.len()).filter(|m| Some(*m) != base).collect();
        Self { points, base, dtype: group.dtype, coefficients: Once::default() }
    }

    /// The coefficients, one for each point, found by `find` from the Gram matrix.
    pub fn coefficients(
        &self,
        inputs: &[WeightRef],
        find: impl FnOnce(&Gram) -> Result<Vec<f64>, CheckpointError>,
    ) -> Result<&[f32], CheckpointError> {
        let found = self.coefficients.get(|| {
            let gram = Gram::of(inputs, &self.points, self.base, self.dtype)?;
            Ok(find(&gram)?.into_iter().map(|c| c as f32).collect())
        })?;
        Ok(found)
    }

    /// Rows of the sum.
    pub fn rows(
        &self,
        coefficients: &[f32],
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let base = self.base.map(|b| read(&inputs[b], rows.clone())).transpose()?;
        out.fill(0.0);
        for (&m, &c) in self.points.iter().zip(coefficients).filter(|(_, c)| **c != 0.0) {
            let values = read(&inputs[m], rows.clone())?;
            match &base {
                None => elementwise::add_scaled(out, c, &values),
                Some(base) => elementwise::add_scaled_difference(out, c, &values, base),
            }
        }
        if let Some(base) = base {
            elementwise::add(out, &base);
        }
        elementwise::round(out, self.dtype);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let a: Vec<f32> = (0..11).map(|i| i as f32).collect();
        let b = vec![2f32; 11];
        let gram = Gram::of_vectors(&[&a, &b]);
        assert_eq!((gram.dot(0, 0), gram.dot(0, 1), gram.dot(1, 0)), (385.0, 110.0, 110.0));
        assert_eq!(gram.norm(1), 44f64.sqrt());
        assert_eq!(gram.form(&[1.0, -1.0], &[1.0, -1.0]), 385.0 - 220.0 + 44.0);
    }
}
