//! Weights made of others while they are read: noise added, scaled, side by side.

use std::ops::Range;
use std::slice;
use std::sync::Arc;

use moe_merge_checkpoint::weight::Retyped;
use moe_merge_checkpoint::{CheckpointError, Dtype, Weight, WeightRef};
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// `scale * (weight + noise * N(0, 1))`, in f32.
///
/// # Source
/// mergekit `moe/common.py::noise_and_scale`. Differs: noise has a stream of its own per tensor, one rounding at the end.
#[derive(Debug, Clone)]
pub struct Adjusted {
    inner: WeightRef,
    normals: Normals,
    noise: f32,
    scale: f32,
}

impl Adjusted {
    /// Adds `noise` times a normal number to each value of `inner`, then multiplies by `scale`.
    pub fn new(inner: WeightRef, seed: u64, name: &str, noise: f32, scale: f32) -> Self {
        Self { inner, normals: Normals::new(seed, name), noise, scale }
    }
}

/// A matrix with its columns in another order.
#[derive(Debug, Clone)]
pub(crate) struct PermutedColumns {
    inner: WeightRef,
    /// `order[i]` is the column of `inner` that becomes column `i`.
    order: Arc<Vec<u32>>,
}

impl PermutedColumns {
    /// Column `i` becomes column `order[i]` of `inner`; each stands once in `order`.
    pub fn new(inner: WeightRef, order: Arc<Vec<u32>>) -> Self {
        debug_assert_eq!(order.len(), inner.cols(), "one entry for each column");
        Self { inner, order }
    }
}

impl Weight for PermutedColumns {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let cols = self.inner.cols().max(1);
        let mut row = vec![0.0; cols];
        for (at, out) in rows.zip(out.chunks_exact_mut(cols)) {
            self.inner.read_rows(at..at + 1, &mut row)?;
            out.iter_mut().zip(self.order.iter()).for_each(|(o, from)| *o = row[*from as usize]);
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

/// Normal numbers, one for each place in a tensor.
///
/// They come from a ChaCha stream keyed by the BLAKE3 hash of seed and name, two 32-bit words per pair of numbers
/// (Box-Muller): any range can be had alone, on any thread, with the same result.
#[derive(Debug, Clone)]
pub(crate) struct Normals {
    key: [u8; 32],
}

impl Normals {
    /// The numbers of the tensor `name`.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        Self { key: *hasher.finalize().as_bytes() }
    }

    /// Adds `scale` times those from place `first` on.
    pub fn add(&self, first: usize, scale: f32, out: &mut [f32]) {
        let mut rng = ChaCha8Rng::from_seed(self.key);
        rng.set_word_pos(2 * (first as u128 / 2));
        let mut pair = [0.0; 2];
        for (i, value) in out.iter_mut().enumerate() {
            let index = first + i;
            if i == 0 || index.is_multiple_of(2) {
                pair = normal_pair(rng.next_u32(), rng.next_u32());
            }
            *value += scale * pair[index % 2];
        }
    }
}

/// Box-Muller: two independent normal numbers from two uniform words. The first is taken from (0, 1].
fn normal_pair(a: u32, b: u32) -> [f32; 2] {
    const UNIT: f64 = 1.0 / 4_294_967_296.0;
    let radius = (-2.0 * ((f64::from(a) + 1.0) * UNIT).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * f64::from(b) * UNIT).sin_cos();
    [(radius * cos) as f32, (radius * sin) as f32]
}

impl Weight for Adjusted {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let first = rows.start * self.inner.cols();
        self.inner.read_rows(rows, out)?;
        if self.noise != 0.0 {
            self.normals.add(first, self.noise, out);
        }
        if self.scale != 1.0 {
            out.iter_mut().for_each(|v| *v *= self.scale);
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

/// Matrices of equal height side by side: the down projections of several shared experts as one.
#[derive(Debug, Clone)]
pub struct SideBySide {
    parts: Vec<WeightRef>,
    shape: [usize; 2],
}

impl SideBySide {
    /// `parts` from left to right.
    ///
    /// # Panics
    /// If their heights differ: callers have checked the shapes.
    pub fn new(parts: Vec<WeightRef>) -> Self {
        let rows = parts.first().map_or(0, |p| p.rows());
        assert!(parts.iter().all(|p| p.rows() == rows), "heights differ");
        let cols = parts.iter().map(|p| p.cols()).sum();
        Self { parts, shape: [rows, cols] }
    }
}

impl Weight for SideBySide {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        let first = self.parts.first().map_or(Dtype::F32, |p| p.dtype());
        if self.parts.iter().all(|p| p.dtype() == first) { first } else { Dtype::F32 }
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let width = self.shape[1].max(1);
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            let mut rest = out;
            for part in &self.parts {
                let (left, right) = rest.split_at_mut(part.cols());
                part.read_rows(row..row + 1, left)?;
                rest = right;
            }
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        &self.parts
    }
}

/// `weight` as it will be read back once it was written in `dtype`.
pub fn rounded(weight: WeightRef, dtype: Dtype) -> WeightRef {
    let as_it_is = weight.dtype() == dtype && (weight.bytes().is_some() || dtype == Dtype::F32);
    if as_it_is { weight } else { Arc::new(Retyped::new(weight, dtype)) }
}

#[cfg(test)]
mod tests {
    use moe_merge_checkpoint::weight::OwnedWeight;

    use super::*;

    fn owned(values: &[f32], shape: &[usize]) -> WeightRef {
        Arc::new(OwnedWeight::from_f32("w", values, shape, Dtype::F32))
    }

    #[test]
    fn noise_is_normal_keyed_by_name_and_readable_by_rows() {
        let (rows, cols) = (301, 333);
        let zero = owned(&vec![0.0; rows * cols], &[rows, cols]);
        let noisy: WeightRef = Arc::new(Adjusted::new(zero.clone(), 7, "a", 0.5, 2.0));
        let all = noisy.to_f32().unwrap();
        let n = all.len() as f64;
        let mean = all.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = all.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 5.0 / n.sqrt() && (variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
        let mut part = vec![0.0; 3 * cols];
        noisy.read_rows(101..104, &mut part).unwrap();
        assert_eq!(part, all[101 * cols..104 * cols]);
        for (seed, name) in [(7, "b"), (8, "a")] {
            let other: WeightRef = Arc::new(Adjusted::new(zero.clone(), seed, name, 0.5, 2.0));
            let other = other.to_f32().unwrap();
            let same = other.iter().zip(&all).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} equal numbers");
        }
    }

    #[test]
    fn scaling_without_noise() {
        let weight: WeightRef =
            Arc::new(Adjusted::new(owned(&[1.0, -2.0], &[1, 2]), 0, "a", 0.0, 0.5));
        assert_eq!(weight.to_f32().unwrap(), [0.5, -1.0]);
    }

    #[test]
    fn columns_stand_side_by_side() {
        let weight: WeightRef = Arc::new(SideBySide::new(vec![
            owned(&[1.0, 2.0, 5.0, 6.0], &[2, 2]),
            owned(&[3.0, 7.0], &[2, 1]),
        ]));
        assert_eq!(weight.shape(), [2, 3]);
        assert_eq!(weight.to_f32().unwrap(), [1.0, 2.0, 3.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn numbers_are_rounded_as_they_will_be_stored() {
        // 1 + 2^-9 lies halfway between bf16 neighbours 1 and 1 + 2^-8: to even.
        let values = [1.0, 1.0 + 1.0 / 512.0, 1.0 + 3.0 / 512.0, -3.25];
        let exact = owned(&values, &[2, 2]);
        let read = rounded(exact.clone(), Dtype::BF16);
        assert_eq!(read.to_f32().unwrap(), [1.0, 1.0, 1.0 + 1.0 / 128.0, -3.25]);
        assert_eq!(read.dtype(), Dtype::BF16);
        assert!(Arc::ptr_eq(&rounded(exact.clone(), Dtype::F32), &exact));
    }
}
