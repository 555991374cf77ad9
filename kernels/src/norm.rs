//! Normalisation and softmax of rows.

use crate::dense::Into;
use crate::error::KernelError;
use crate::simd::{each_set, exp};
use crate::tasks::{Parts, for_each};

/// Numbers of the rows of one task.
const CHUNK: usize = 1 << 14;

/// Root mean square normalisation of rows.
///
/// `out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * (offset + weight[i])`
///
/// * `x`, `out`: `[rows, weight.len()]` f32; the mean is accumulated in f64
/// * `offset`: 0, or 1 for Gemma, whose weights are stored as the distance from 1
///
/// # Errors
/// [`KernelError::Length`] if `x` is not a whole number of rows or `out` differs from it.
pub fn rms_norm(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    offset: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    KernelError::check("norm output", x.len(), out.len())?;
    let width = weight.len().max(1);
    KernelError::check("norm input", x.len().div_ceil(width) * weight.len(), x.len())?;
    in_rows(x.len(), width, out, |part, out| norm_rows(&x[part], weight, eps, offset, out));
    Ok(())
}

/// Calls `work` with ranges of whole rows and what they are of `out`, on all threads.
fn in_rows(
    len: usize,
    width: usize,
    out: &mut [f32],
    work: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) {
    let chunk = CHUNK.div_ceil(width) * width;
    let out = Parts::new(out);
    for_each(len.div_ceil(chunk), len > chunk, |task| {
        let part = task * chunk..len.min((task + 1) * chunk);
        // SAFETY: the rows of this task.
        let out = unsafe { out.range(part.start, part.len()) };
        work(part, out);
    });
}

each_set! {
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, offset: f32, out: &mut [f32]) {
        let width = weight.len();
        for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mut lanes = [0f64; 8];
            for chunk in row.chunks(8) {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane += *v as f64 * *v as f64;
                }
            }
            let mean = lanes.iter().sum::<f64>() / width as f64;
            let inverse = 1.0 / (mean as f32 + eps).sqrt();
            for ((o, v), w) in out.iter_mut().zip(row).zip(weight) {
                *o = v * inverse * (offset + w);
            }
        }
    }
}

/// Gradient of [`rms_norm`] with respect to its input.
///
/// With `r = 1 / sqrt(mean(x^2) + eps)` and `a_i = dy_i (offset + weight_i)`: `dx_i = r a_i - x_i r^3 mean_j(a_j x_j)`.
///
/// * `x`, `dy`, `dx` (overwritten or added to): `[rows, weight.len()]` f32; means are accumulated in f64
///
/// # Errors
/// [`KernelError::Length`] if `x` is not a whole number of rows, or `dy` or `dx` differ from it.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    offset: f32,
    dy: &[f32],
    dx: &mut [f32],
    into: Into,
) -> Result<(), KernelError> {
    KernelError::check("gradient of a norm", x.len(), dy.len())?;
    KernelError::check("gradient of a norm's input", x.len(), dx.len())?;
    let width = weight.len().max(1);
    KernelError::check("norm input", x.len().div_ceil(width) * weight.len(), x.len())?;
    let add = into == Into::Add;
    in_rows(x.len(), width, dx, |part, dx| {
        norm_rows_backward(&x[part.clone()], weight, eps, offset, &dy[part], dx, add);
    });
    Ok(())
}

each_set! {
    fn norm_rows_backward(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        offset: f32,
        dy: &[f32],
        dx: &mut [f32],
        add: bool,
    ) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let (mut squares, mut products) = ([0f64; 8], [0f64; 8]);
            for ((x, dy), w) in x.chunks(8).zip(dy.chunks(8)).zip(weight.chunks(8)) {
                for (i, ((x, dy), w)) in x.iter().zip(dy).zip(w).enumerate() {
                    let a = dy * (offset + w);
                    squares[i] += *x as f64 * *x as f64;
                    products[i] += *x as f64 * a as f64;
                }
            }
            let mean = squares.iter().sum::<f64>() / width as f64;
            let inverse = 1.0 / (mean as f32 + eps).sqrt();
            let back = products.iter().sum::<f64>() / width as f64 * (inverse as f64 * inverse as f64);
            let back = back as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                let d = inverse * (dy * (offset + w) - x * back);
                *dx = if add { *dx + d } else { d };
            }
        }
    }
}

/// Softmax of one row in place, the largest value subtracted first.
pub fn softmax(row: &mut [f32]) {
    let mut sum = 0.0;
    let max = largest(row);
    exp_and_sum(row, max, &mut sum);
    let inverse = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= inverse);
}

/// Sums side by side: vectors of any width, and the same bits with all of them.
const LANES: usize = 32;

each_set! {
    /// `row = exp(row - max)`, and its sum.
    fn exp_and_sum(row: &mut [f32], max: f32, sum: &mut f32) {
        let mut lanes = [0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (v, lane) in chunk.iter_mut().zip(&mut lanes) {
                *v = exp(*v - max);
                *lane += *v;
            }
        }
        let mut rest = 0.0;
        for v in chunks.into_remainder() {
            *v = exp(*v - max);
            rest += *v;
        }
        *sum = lanes.iter().sum::<f32>() + rest;
    }
}

each_set! {
    fn largest_into(row: &[f32], max: &mut f32) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = row.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (v, lane) in chunk.iter().zip(&mut lanes) {
                *lane = if *v > *lane { *v } else { *lane };
            }
        }
        *max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    }
}

fn largest(row: &[f32]) -> f32 {
    let mut max = 0.0;
    largest_into(row, &mut max);
    max
}

each_set! {
    /// Sum of `exp(v - max)`: products and exponentials in f32, sums of at most 128 of them side by side, the rest in f64.
    fn sum_exp(row: &[f32], max: f32, sum: &mut f64) {
        for block in row.chunks(128 * LANES) {
            let mut lanes = [0f32; LANES];
            let chunks = block.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                for (v, lane) in chunk.iter().zip(&mut lanes) {
                    *lane += exp(*v - max);
                }
            }
            for v in lanes {
                *sum += f64::from(v);
            }
            for v in rest {
                *sum += f64::from(exp(*v - max));
            }
        }
    }
}

/// `ln(sum(exp(x)))` of numbers that come piece by piece; to about 1e-7 of the sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSumExp {
    max: f32,
    sum: f64,
}

impl Default for LogSumExp {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl LogSumExp {
    /// Adds `row`.
    pub fn add(&mut self, row: &[f32]) {
        let max = largest(row);
        if max > self.max {
            self.sum *= f64::from(self.max - max).exp();
            self.max = max;
        }
        let from = if self.max == f32::NEG_INFINITY { 0.0 } else { self.max };
        sum_exp(row, from, &mut self.sum);
    }

    /// The logarithm; NaN if one of the numbers was.
    pub fn value(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sum_exp_in_pieces() {
        let row: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 1009) as f32 / 30.0 - 17.0).collect();
        let expected: f64 = row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
        for piece in [1, 37, 4096, 5000] {
            let mut sum = LogSumExp::default();
            row.chunks(piece).for_each(|p| sum.add(p));
            assert!((sum.value() - expected).abs() < 2e-7, "{piece} {}", sum.value() - expected);
        }
        let mut sum = LogSumExp::default();
        sum.add(&[1.0, f32::NAN]);
        assert!(sum.value().is_nan());
        sum = LogSumExp::default();
        sum.add(&[f32::NEG_INFINITY]);
        sum.add(&[3.0]);
        assert_eq!(sum.value(), 3.0);
    }

    #[test]
    fn rms_norm_by_hand() {
        let mut out = [0.0; 4];
        // Mean squares: 25/2 and 2/2.
        rms_norm(&[3.0, 4.0, 1.0, -1.0], &[1.0, 2.0], 0.0, 0.0, &mut out).unwrap();
        let r = 12.5f32.sqrt();
        assert_eq!(out[2..], [1.0, -2.0]);
        assert!((out[0] - 3.0 / r).abs() < 1e-6 && (out[1] - 8.0 / r).abs() < 1e-6);
        rms_norm(&[1.0, 1.0], &[0.0, 1.0], 0.0, 1.0, &mut out[..2]).unwrap();
        assert_eq!(out[..2], [1.0, 2.0]);
    }

    #[test]
    fn rms_norm_backward_equals_differences() {
        let x = [0.5f32, -1.0, 2.0, 0.1, 0.2, -0.3];
        let dy = [1.0f32, 0.5, -2.0, 0.3, -0.4, 1.5];
        let weight = [0.7f32, -1.1, 0.4];
        for offset in [0.0, 1.0] {
            let value = |x: &[f64]| -> f64 {
                let rows = x.chunks(3).zip(dy.chunks(3));
                rows.map(|(x, dy)| {
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / 3.0 + 0.01;
                    let terms = x.iter().zip(dy).zip(&weight);
                    terms
                        .map(|((x, dy), w)| x / mean.sqrt() * f64::from((offset + w) * dy))
                        .sum::<f64>()
                })
                .sum()
            };
            let mut dx = [f32::NAN; 6];
            rms_norm_backward(&x, &weight, 0.01, offset, &dy, &mut dx, Into::Overwrite).unwrap();
            for i in 0..6 {
                let moved = |by: f64| {
                    let mut x = x.map(f64::from);
                    x[i] += by;
                    value(&x)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((f64::from(dx[i]) - slope).abs() < 1e-5, "{i} {} {slope}", dx[i]);
            }
        }
        let mut dx = [0.0; 6];
        assert!(rms_norm_backward(&x, &weight, 0.0, 0.0, &dy[..5], &mut dx, Into::Add).is_err());
        assert!(
            rms_norm_backward(&x, &weight[..2], 0.0, 0.0, &dy, &mut dx[..5], Into::Add).is_err()
        );
    }

    #[test]
    fn rms_norm_refuses_half_rows() {
        let mut out = [0.0; 3];
        assert!(rms_norm(&[1.0; 3], &[1.0; 2], 0.0, 0.0, &mut out).is_err());
    }

    #[test]
    fn softmax_by_hand() {
        let mut row = [0.0, 3f32.ln(), 1000f32.ln() - 1000.0];
        softmax(&mut row);
        assert!((row[0] - 0.25).abs() < 1e-6 && (row[1] - 0.75).abs() < 1e-6 && row[2] == 0.0);
        let mut large = [1000.0, 1000.0];
        softmax(&mut large);
        assert_eq!(large, [0.5, 0.5]);
    }
}
