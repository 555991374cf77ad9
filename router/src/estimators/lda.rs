//! Linear discriminant analysis on true router inputs.

use moe_merge_kernels::dense::{Dense, Into, matmul};
use rayon::prelude::*;

use super::closed_form::ClosedForm;
use crate::error::RouterError;
use crate::moments::{Grams, Moments, differences};
use crate::samples::{Fit, Options, Samples};
use crate::symmetric::Symmetric;

/// Least shrinkage: keeps the matrix invertible where the formula finds no noise at all.
const LEAST: f64 = 1e-6;

/// Mean variance that is rounding: features have unit RMS.
const NOTHING: f64 = 1e-14;

/// Rows that one product takes at a time.
const BLOCK: usize = 128;

/// Gate rows by linear discriminant analysis with a shared, shrunk covariance, without bias.
///
/// `W ∝ D · ((1 - ρ) S + ρ ν)⁻¹`, `D[e] = (μ_e - m) - (ν_e - m)` as in [`super::mean::fit`], `S` the covariance of tokens
/// about the mean of their class, `ν = tr S / hidden`.
///
/// * every expert weighs the same, shared evenly by its tokens; negative prompts of an expert are a class of their own in
///   `S`, of the same weight
/// * shrinkage `ρ`: the analytic intensity of Ledoit and Wolf from all prompts, with weights:
///   `ρ = min(b², d²) / d²`, `d² = ‖S - ν‖²`, `b² = Σ_i w_i² ‖y_i y_iᵀ - S‖²` over the centred tokens `y_i`, `Σ w_i = 1`
///   (`w_i = 1/n` is their case); reported as the fit's penalty
/// * fewer tokens than features: all of it in coordinates of the tokens' span, where nothing is lost, so the cost
///   is that of matrices `tokens × tokens`
/// * scale: lowest loss on held-out prompts, as in [`super::logistic::fit`]; without held-out prompts the logits of given
///   tokens have RMS 1
/// * rows sum to zero and logits are bounded as in [`super::logistic::fit`]; f64 throughout
///
/// # Errors
/// As [`super::logistic::fit`].
///
/// # Source
/// Fisher 1936 and Rao 1948; Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices",
/// equations 8 to 14.
pub fn fit(samples: &Samples<'_>, options: &Options) -> Result<Fit, RouterError> {
    let form = ClosedForm::new(samples, options, Grams::Needed)?;
    let shrinkage = intensity(&form)?;
    form.fit(options, &[shrinkage], shrinkage, rows)
}

/// The solution for one set of moments: `[experts, width]`. Where no token differs from the mean of its class, every
/// direction counts the same.
pub(super) fn rows(
    form: &ClosedForm,
    moments: &Moments,
    shrinkage: f64,
) -> Result<Vec<f64>, RouterError> {
    let right = differences(moments, &form.groups, form.table.experts);
    let Some(mut covariance) = covariance(moments)? else { return Ok(right) };
    let scale = covariance.trace() / form.table.hidden as f64;
    if scale <= NOTHING {
        return Ok(right);
    }
    covariance.scale(1.0 - shrinkage);
    covariance.add_to_diagonal(shrinkage * scale);
    covariance.cholesky()?.solve(&right)
}

/// `S = (G - Σ_g w_g · m_g · m_gᵀ) / Σ_g w_g` over the groups.
fn covariance(moments: &Moments) -> Result<Option<Symmetric>, RouterError> {
    let Some(gram) = &moments.gram else { return Ok(None) };
    let mut out = gram.clone();
    let width = out.width;
    let weighted: Vec<f64> = moments
        .means
        .chunks_exact(width)
        .zip(&moments.weights)
        .flat_map(|(mean, w)| mean.iter().map(move |m| w * m))
        .collect();
    out.subtract_product(&weighted, &moments.means)?;
    out.scale(1.0 / moments.weights.iter().sum::<f64>());
    Ok(Some(out))
}

/// Ledoit and Wolf's shrinkage for the covariance of all prompts.
pub(super) fn intensity(form: &ClosedForm) -> Result<f64, RouterError> {
    let Some(covariance) = covariance(form.all())? else { return Ok(1.0) };
    let (width, hidden) = (covariance.width, form.table.hidden as f64);
    let scale = covariance.trace() / hidden;
    let full = covariance.full();
    let square: f64 = full.iter().map(|v| v * v).sum();
    let distance = square - hidden * scale * scale;
    if distance <= 0.0 || scale <= NOTHING {
        return Ok(1.0);
    }
    let total: f64 = form.all().weights.iter().sum();
    let matrix = Dense::new(&full, width, width)?;
    let mut noise = 0.0;
    for (g, group) in form.groups.iter().enumerate() {
        let mean = &form.all().means[g * width..(g + 1) * width];
        let weight = form.all().weights[g] / (total * group.rows.len() as f64);
        let rows = &form.features.x64[group.rows.start * width..group.rows.end * width];
        let sums: Vec<f64> = rows
            .par_chunks(BLOCK * width)
            .map(|block| {
                let y: Vec<f64> = block
                    .chunks_exact(width)
                    .flat_map(|x| x.iter().zip(mean).map(|(x, m)| x - m))
                    .collect();
                let mut product = vec![0.0; y.len()];
                let view = Dense::new(&y, y.len() / width, width)?;
                matmul(view, matrix, &mut product, Into::Overwrite)?;
                let of = |(y, p): (&[f64], &[f64])| {
                    let norm: f64 = y.iter().map(|v| v * v).sum();
                    let inner: f64 = y.iter().zip(p).map(|(a, b)| a * b).sum();
                    norm * norm - 2.0 * inner + square
                };
                Ok(y.chunks_exact(width).zip(product.chunks_exact(width)).map(of).sum())
            })
            .collect::<Result<_, RouterError>>()?;
        noise += weight * weight * sums.iter().sum::<f64>();
    }
    Ok((noise / distance).clamp(LEAST, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Example, Sign};

    #[test]
    fn intensity_by_hand() {
        // Two classes of two tokens each about (0, ±3): centred tokens (±1, 0) and (0, ±1) before scaling to unit RMS, so
        // S = 1/2 · I: d² = 0 and nothing is left but the identity.
        let of = |a: [f32; 4], b: [f32; 4]| {
            let example = |expert, inputs| Example { expert, sign: Sign::Positive, inputs };
            let examples = vec![example(0, &a[..]), example(1, &b[..])];
            let samples = Samples { experts: 2, hidden: 2, examples };
            intensity(&ClosedForm::new(&samples, &Options::default(), Grams::Needed).unwrap())
                .unwrap()
        };
        assert_eq!(of([1.0, 3.0, -1.0, 3.0], [0.0, -2.0, 0.0, -4.0]), 1.0);
        // Centred tokens (±2, 0) and (0, ±1): S = diag(2, 1/2), ν = 5/4, d² = 2 · (3/4)² = 9/8.
        // ‖y yᵀ - S‖²: (4 - 2)² + 1/4 = 17/4 for the first class, 4 + (1 - 1/2)² = 17/4 for the second;
        // b² = 4 · (1/16) · 17/4 = 17/16; ρ = (17/16) / (9/8) = 17/18.
        let found = of([2.0, 3.0, -2.0, 3.0], [0.0, -2.0, 0.0, -4.0]);
        assert!((found - 17.0 / 18.0).abs() < 1e-6, "{found}");
    }
}
