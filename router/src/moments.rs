//! Weighted sums over the tokens of each fit: all that a closed form needs.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use crate::error::RouterError;
use crate::features::Features;
use crate::folds::Folds;
use crate::samples::{Sign, Table, Target};
use crate::symmetric::{Symmetric, tile_rows, tiles};

/// The tokens of one expert and sign: a run of rows.
pub(crate) struct Group {
    pub target: Target,
    pub rows: std::ops::Range<usize>,
}

/// What one fit knows of the tokens it may use.
pub(crate) struct Moments {
    /// Weight of each group: `1 / experts`, or 0 where every token of it is held out.
    pub weights: Vec<f64>, // [groups]
    /// Mean of each group's tokens.
    pub means: Vec<f64>, // [groups, width]
    /// `Σ_i weight_i · x_i · x_iᵀ`, if asked for.
    pub gram: Option<Symmetric>,
}

/// Whether a formula needs second moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grams {
    Needed,
    Spared,
}

/// Runs of rows with the same label.
pub(crate) fn groups(table: &Table) -> Vec<Group> {
    let mut out: Vec<Group> = Vec::new();
    for prompt in &table.prompts {
        match out.last_mut() {
            Some(last) if last.target == prompt.target => last.rows.end = prompt.rows.end,
            _ => out.push(Group { target: prompt.target, rows: prompt.rows.clone() }),
        }
    }
    out
}

/// Moments of the fits without each fold, then of the fit with every prompt, weighted as [`Folds::weights`] says.
///
/// A token's weight within a fit depends on its group alone. So the sum over each group is made once and scaled for every
/// fit, and each fold's own tokens are taken off again: two passes over the tokens instead of one per fold.
pub(crate) fn moments(
    table: &Table,
    features: &Features,
    folds: &Folds,
    groups: &[Group],
    grams: Grams,
) -> Result<Vec<Moments>, RouterError> {
    let (width, fits) = (features.width, folds.count + 1);
    let mut fold_of_row = vec![None; table.rows()];
    for (prompt, fold) in table.prompts.iter().zip(&folds.of_prompt) {
        fold_of_row[prompt.rows.clone()].fill(*fold);
    }
    let mut out = Vec::with_capacity(fits);
    let mut shares = Vec::with_capacity(fits); // [fits, groups]
    for fit in 0..fits {
        let used = |i: usize| fold_of_row[i] != Some(fit);
        let mut means = vec![0.0; groups.len() * width];
        let mut counts = Vec::with_capacity(groups.len());
        for (group, mean) in groups.iter().zip(means.chunks_exact_mut(width)) {
            let mut count = 0;
            for i in group.rows.clone().filter(|&i| used(i)) {
                let x = &features.x64[i * width..(i + 1) * width];
                mean.iter_mut().zip(x).for_each(|(m, x)| *m += x);
                count += 1;
            }
            mean.iter_mut().for_each(|m| *m /= f64::from(count.max(1)));
            counts.push(count);
        }
        let one = 1.0 / table.experts as f64;
        shares.push(counts.iter().map(|&c| if c > 0 { one / f64::from(c) } else { 0.0 }).collect());
        let weights = counts.iter().map(|&c| if c > 0 { one } else { 0.0 }).collect();
        out.push(Moments { weights, means, gram: None });
    }
    if grams == Grams::Needed {
        let all = gram_matrices(features, groups, &fold_of_row, &shares)?;
        out.iter_mut().zip(all).for_each(|(m, gram)| m.gram = Some(gram));
    }
    Ok(out)
}

/// The second moments of every fit, a tile at a time for all fits.
fn gram_matrices(
    features: &Features,
    groups: &[Group],
    fold_of_row: &[Option<usize>],
    shares: &[Vec<f64>],
) -> Result<Vec<Symmetric>, RouterError> {
    let (width, fits) = (features.width, shares.len());
    let count = tiles(width);
    // Rows of each fold with their groups, and all rows in columns of tiles.
    let mut held: Vec<Vec<(usize, usize)>> = vec![Vec::new(); fits];
    for (g, group) in groups.iter().enumerate() {
        for i in group.rows.clone() {
            if let Some(fold) = fold_of_row[i] {
                held[fold].push((i, g));
            }
        }
    }
    let panels: Vec<Vec<f64>> = (0..count)
        .into_par_iter()
        .map(|p| {
            let at = tile_rows(p, width);
            features.x64.chunks_exact(width).flat_map(|x| x[at.clone()].to_vec()).collect()
        })
        .collect();
    let tile = |i: usize, k: usize| -> Result<Vec<Vec<f64>>, RouterError> {
        let (rows, cols) = (tile_rows(i, width).len(), tile_rows(k, width).len());
        let mut out = vec![vec![0.0; rows * cols]; fits];
        let mut sum = vec![0.0; rows * cols];
        for (g, group) in groups.iter().enumerate() {
            let (from, to, n) = (group.rows.start, group.rows.end, group.rows.len());
            let a = Dense::new(&panels[i][from * rows..to * rows], n, rows)?;
            let b = Dense::new(&panels[k][from * cols..to * cols], n, cols)?;
            matmul(a.transposed(), b, &mut sum, Into::Overwrite)?;
            for (out, shares) in out.iter_mut().zip(shares) {
                out.iter_mut().zip(&sum).for_each(|(o, s)| *o += shares[g] * s);
            }
        }
        for ((out, shares), held) in out.iter_mut().zip(shares).zip(&held) {
            let a: Vec<f64> = held
                .iter()
                .flat_map(|&(r, g)| {
                    panels[i][r * rows..(r + 1) * rows].iter().map(move |v| -shares[g] * v)
                })
                .collect();
            let b: Vec<f64> = held
                .iter()
                .flat_map(|&(r, _)| panels[k][r * cols..(r + 1) * cols].iter().copied())
                .collect();
            let (a, b) = (Dense::new(&a, held.len(), rows)?, Dense::new(&b, held.len(), cols)?);
            matmul(a.transposed(), b, out, Into::Add)?;
        }
        Ok(out)
    };
    let places: Vec<(usize, usize)> =
        (0..count).flat_map(|k| (k..count).map(move |i| (i, k))).collect();
    let mut found: Vec<Vec<Vec<f64>>> =
        places.into_par_iter().map(|(i, k)| tile(i, k)).collect::<Result<_, _>>()?;
    Ok((0..fits)
        .map(|fit| {
            let mut next = found.iter_mut();
            Symmetric::from_tiles(width, |_, _| {
                next.next().map_or_else(Vec::new, |tile| std::mem::take(&mut tile[fit]))
            })
        })
        .collect())
}

/// `(μ_e - m) - (ν_e - m)` of each expert, `m` the mean of all `μ_e`: `[experts, width]`.
///
/// `μ_e` is the mean of the expert's tokens and `ν_e` that of its negative prompts (the second term is left out where
/// there are none). `m` is taken from both, so that the direction all tokens share favours nobody.
pub(crate) fn differences(moments: &Moments, groups: &[Group], experts: usize) -> Vec<f64> {
    let width = moments.means.len() / groups.len();
    let mut common = vec![0.0; width];
    let mut out = vec![0.0; experts * width];
    let of = |sign| {
        let rows = groups.iter().zip(moments.means.chunks_exact(width)).zip(&moments.weights);
        rows.filter(move |((g, _), weight)| g.target.sign == sign && **weight > 0.0)
            .map(|((g, mean), _)| (g.target.expert, mean))
    };
    for (_, mean) in of(Sign::Positive) {
        common.iter_mut().zip(mean).for_each(|(c, m)| *c += m / experts as f64);
    }
    for (sign, factor) in [(Sign::Positive, 1.0), (Sign::Negative, -1.0)] {
        for (e, mean) in of(sign) {
            let row = &mut out[e * width..(e + 1) * width];
            for ((r, m), c) in row.iter_mut().zip(mean).zip(&common) {
                *r += factor * (m - c);
            }
        }
    }
    out
}
