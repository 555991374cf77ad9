//! Centred class means of true router inputs.

use super::closed_form::ClosedForm;
use crate::error::RouterError;
use crate::moments::{Grams, differences};
use crate::samples::{Fit, Options, Samples};

/// Gate rows from the mean router input of each expert's tokens.
///
/// `W[e] ∝ (μ_e - m) - (ν_e - m)`, `m = mean_e μ_e`; `μ_e` is the mean of `x = z / rms(z)` over the expert's tokens, `ν_e`
/// over those of its negative prompts (without any, the second term is left out).
///
/// * the mean over experts is taken from negatives too: without that an expert with negatives would lose the direction
///   that all tokens share, and with it every token
/// * scale: lowest loss on held-out prompts, as in [`super::logistic::fit`]; without held-out prompts the logits of given
///   tokens have RMS 1
/// * rows sum to zero and logits are bounded as in [`super::logistic::fit`]; sums in f64
///
/// # Errors
/// As [`super::logistic::fit`].
///
/// # Source
/// Nearest class mean on the router's own input; mergekit's `hidden_avg` without its two structural mistakes (the residual
/// stream in place of the router input, and no centring).
pub fn fit(samples: &Samples<'_>, options: &Options) -> Result<Fit, RouterError> {
    ClosedForm::new(samples, options, Grams::Spared)?.fit(options, &[0.0], 0.0, |form, m, _| {
        Ok(differences(m, &form.groups, form.table.experts))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Example, Sign};

    /// Rows of `W` by hand, each a multiple of the same number.
    fn proportional(found: &[f32], wanted: [f32; 6]) {
        let at = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
        let scale = at(found) / at(&wanted);
        assert!(found.iter().zip(wanted).all(|(f, w)| (f - scale * w).abs() < 1e-6 * at(found)));
    }

    #[test]
    fn centred_means_by_hand() {
        // Means (4, 0), (1, 3), (1, 0), of which (2, 1) is the mean.
        let inputs = [&[5.0f32, 1.0, 3.0, -1.0][..], &[1.0, 3.0], &[1.0, 0.0], &[8.0, 1.0]];
        let mut examples: Vec<_> = (0..3)
            .map(|e| Example { expert: e, sign: Sign::Positive, inputs: inputs[e] })
            .collect();
        let of = |examples: &[Example<'_>]| {
            let samples = Samples { experts: 3, hidden: 2, examples: examples.to_vec() };
            fit(&samples, &Options::default()).unwrap().gate.rows
        };
        proportional(&of(&examples), [2.0, -1.0, -1.0, 2.0, -1.0, -1.0]);
        // A negative prompt of expert 2 at (8, 1), (6, 0) from the mean: (-7, -1), then (-2, 0) from all rows.
        examples.push(Example { expert: 2, sign: Sign::Negative, inputs: inputs[3] });
        proportional(&of(&examples), [4.0, -1.0, 1.0, 2.0, -5.0, -1.0]);
    }
}
