//! How alike the experts of two models are.

use std::collections::BTreeMap;

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::dense::{Dense, Into, matmul};
use moe_merge_model::side_by_side::compare_experts;
use rayon::prelude::*;

use super::ExpertLayer;
use crate::error::MergeError;
use crate::families::Matrix;

/// Numbers of each expert that are looked at together.
const BLOCK: usize = 1 << 15;

/// Squares of one model's experts, summed.
#[derive(Debug, Clone, Default)]
struct Squares {
    /// After the mean was taken off.
    centred: Vec<f64>, // [experts]
    /// Before.
    whole: Vec<f64>, // [experts]
}

impl Squares {
    fn zero(experts: usize) -> Self {
        Self { centred: vec![0.0; experts], whole: vec![0.0; experts] }
    }

    fn add(&mut self, other: &Self) {
        self.centred.iter_mut().zip(&other.centred).for_each(|(t, f)| *t += f);
        self.whole.iter_mut().zip(&other.whole).for_each(|(t, f)| *t += f);
    }

    /// Length of expert `i` after the mean was taken off; 0 if that is no more than rounding.
    fn length(&self, i: usize) -> f64 {
        match self.centred[i] > 1e-11 * self.whole[i] {
            true => self.centred[i].sqrt(),
            false => 0.0,
        }
    }
}

/// Sums of products between experts.
#[derive(Debug, Clone, Default)]
struct Products {
    cross: Vec<f64>, // [experts, experts], centred
    left: Squares,
    right: Squares,
}

impl Products {
    fn zero(experts: usize) -> Self {
        let squares = Squares::zero(experts);
        Self { cross: vec![0.0; experts * experts], left: squares.clone(), right: squares }
    }

    fn add(&mut self, other: &Self) {
        self.cross.iter_mut().zip(&other.cross).for_each(|(t, f)| *t += f);
        self.left.add(&other.left);
        self.right.add(&other.right);
    }

    fn correlation(self, experts: usize) -> Vec<f64> {
        let Self { cross: mut correlation, left, right } = self;
        for (i, line) in correlation.chunks_exact_mut(experts.max(1)).enumerate() {
            for (j, c) in line.iter_mut().enumerate() {
                let lengths = left.length(i) * right.length(j);
                *c = if lengths > 0.0 { *c / lengths } else { 0.0 };
            }
        }
        correlation
    }
}

/// `[experts, experts]`: correlation of expert `i` of `a` and expert `j` of `b` in one layer, all three matrices as one
/// vector, after the mean of all experts of each model has been taken off. 0 where an expert is that mean.
///
/// # Errors
/// [`MergeError::Checkpoint`] for matrices that are missing or of different shapes.
pub(crate) fn weight_correlation(
    a: (&Source, &ExpertLayer),
    b: (&Source, &ExpertLayer),
) -> Result<Vec<f64>, MergeError> {
    Ok(all_products(a, b)?.correlation(a.1.experts))
}

/// By layer, `[experts, experts]`: correlation of what expert `i` of `a` and expert `j` of `b` make of the tokens of `texts`, each
/// in its own model, after the mean of all experts of each model has been taken off. 0 where an expert is that mean.
///
/// # Errors
/// As [`compare_experts`]; interruption.
pub(crate) fn activation_correlation(
    a: &Source,
    b: &Source,
    texts: &[Vec<u32>],
) -> Result<BTreeMap<usize, Vec<f64>>, MergeError> {
    let mut sums: BTreeMap<usize, (usize, Products)> = BTreeMap::new();
    compare_experts([a, b], texts, &mut |seen| {
        let [x, y] = seen.outputs.map(|outputs| centre(outputs.concat(), outputs.len()));
        let experts = seen.outputs[0].len();
        let made = Products { cross: products(&x.0, &y.0, experts), left: x.1, right: y.1 };
        let sum = sums.entry(seen.layer).or_insert_with(|| (experts, Products::zero(experts)));
        sum.1.add(&made);
        Ok(())
    })?;
    Ok(sums.into_iter().map(|(l, (experts, sum))| (l, sum.correlation(experts))).collect())
}

/// Squared distances between the experts of a layer, and the sum of their squares.
#[derive(Debug, Clone)]
pub(crate) struct Distances {
    /// `|W_i - W_j|^2`
    pub squared: Vec<f64>, // [experts, experts]
    /// `sum_i |W_i|^2`
    pub energy: f64,
}

/// How far the experts of one layer are from each other.
///
/// # Errors
/// As [`weight_correlation`].
pub(crate) fn weight_distances(
    source: &Source,
    layer: &ExpertLayer,
) -> Result<Distances, MergeError> {
    let Products { mut cross, left, .. } = all_products((source, layer), (source, layer))?;
    let experts = layer.experts;
    let length = |i: usize| left.length(i).powi(2);
    for i in 0..experts {
        for j in 0..=i {
            let product = 0.5 * (cross[i * experts + j] + cross[j * experts + i]);
            let squared =
                if i == j { 0.0 } else { (length(i) + length(j) - 2.0 * product).max(0.0) };
            (cross[i * experts + j], cross[j * experts + i]) = (squared, squared);
        }
    }
    Ok(Distances { squared: cross, energy: left.whole.iter().sum() })
}

fn all_products(
    (a, of_a): (&Source, &ExpertLayer),
    (b, of_b): (&Source, &ExpertLayer),
) -> Result<Products, MergeError> {
    let experts = of_a.experts;
    let mut total = Products::zero(experts);
    for matrix in Matrix::ALL {
        let all = |s: &Source, l: &ExpertLayer| -> Result<Vec<WeightRef>, MergeError> {
            (0..experts).map(|e| l.weight(s, e, matrix).cloned()).collect()
        };
        let (left, right) = (all(a, of_a)?, all(b, of_b)?);
        for weight in left.iter().chain(&right) {
            weight.expect_shape(left[0].shape(), "as the first expert")?;
        }
        let (rows, cols) = (left[0].rows(), left[0].cols());
        let step = (BLOCK / cols.max(1)).max(1);
        let starts: Vec<usize> = (0..rows).step_by(step).collect();
        let parts: Vec<Products> = starts
            .into_par_iter()
            .map(|from| {
                let rows = from..rows.min(from + step);
                let (x, left) = centred(&left, rows.clone())?;
                let (y, right) = centred(&right, rows)?;
                Ok(Products { cross: products(&x, &y, experts), left, right })
            })
            .collect::<Result<_, MergeError>>()?;
        parts.iter().for_each(|p| total.add(p));
        left.iter().chain(&right).for_each(|w| w.release());
    }
    Ok(total)
}

/// The same rows of all experts, minus their mean, `[experts, numbers]`.
fn centred(
    weights: &[WeightRef],
    rows: std::ops::Range<usize>,
) -> Result<(Vec<f32>, Squares), MergeError> {
    let numbers = (rows.len() * weights[0].cols()).max(1);
    let mut all = vec![0.0; weights.len() * numbers];
    for (out, weight) in all.chunks_exact_mut(numbers).zip(weights) {
        weight.read_rows(rows.clone(), out)?;
    }
    Ok(centre(all, weights.len()))
}

/// `all: [count, numbers]` minus its mean over `count`.
fn centre(mut all: Vec<f32>, count: usize) -> (Vec<f32>, Squares) {
    let numbers = (all.len() / count.max(1)).max(1);
    let whole = squares(&all, numbers);
    let mut mean = vec![0f32; numbers];
    for line in all.chunks_exact(numbers) {
        mean.iter_mut().zip(line).for_each(|(m, v)| *m += v);
    }
    mean.iter_mut().for_each(|m| *m /= count as f32);
    for line in all.chunks_exact_mut(numbers) {
        line.iter_mut().zip(&mean).for_each(|(v, m)| *v -= m);
    }
    let centred = squares(&all, numbers);
    (all, Squares { centred, whole })
}

fn squares(all: &[f32], numbers: usize) -> Vec<f64> {
    let square = |line: &[f32]| line.iter().map(|x| f64::from(*x).powi(2)).sum();
    all.chunks_exact(numbers).map(square).collect()
}

/// `x y^T` of `[experts, numbers]` each.
fn products(x: &[f32], y: &[f32], experts: usize) -> Vec<f64> {
    let numbers = x.len() / experts.max(1);
    let mut cross = vec![0f32; experts * experts];
    let view = |v| Dense::new(v, experts, numbers);
    let product =
        view(x).and_then(|x| matmul(x, view(y)?.transposed(), &mut cross, Into::Overwrite));
    debug_assert!(product.is_ok(), "both views were made for these sizes");
    cross.into_iter().map(f64::from).collect()
}
