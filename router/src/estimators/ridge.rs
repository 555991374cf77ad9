//! Ridge regression to one-hot targets on true router inputs.

use moe_merge_kernels::dense::{Dense, Into, matmul};

use super::closed_form::ClosedForm;
use crate::error::RouterError;
use crate::moments::{Grams, Group, Moments};
use crate::samples::{Fit, Options, Samples, Sign};

/// Penalties tried, strongest first; features have unit RMS, class weights sum to one, so the mean eigenvalue of the second
/// moments is 1.
const PENALTIES: [f64; 9] = [10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001];

/// The penalty when no prompt can be held out.
const WITHOUT_HELD_OUT: f64 = 1.0;

/// Gate rows by class-balanced ridge regression to centred one-hot targets, without bias.
///
/// `W = argmin Σ_i weight_i · ‖W x_i - t_i‖² + penalty · ‖W‖² = B · (G + penalty)⁻¹`, `G = Σ_i weight_i x_i x_iᵀ`,
/// `B = Σ_i weight_i t_i x_iᵀ`, `x = z / rms(z)`.
///
/// * `t_i` is the distribution that the router should give minus the uniform one: for a token of expert `y`
///   `onehot(y) - 1/E`, for one of a negative prompt of `y` `(1 - onehot(y)) / (E - 1) - 1/E`: nobody knows which of the
///   others it is for
/// * every expert weighs `1 / experts`, shared evenly by its tokens; its negative prompts weigh as much again
/// * primal (`hidden × hidden` Cholesky) with many tokens; with few the dual form, in coordinates of the tokens' span
/// * penalty and scale: lowest loss on held-out prompts, as in [`super::logistic::fit`]; without held-out prompts the
///   logits of given tokens have RMS 1
/// * rows sum to zero and logits are bounded as in [`super::logistic::fit`]; f64 throughout
///
/// # Errors
/// As [`super::logistic::fit`].
///
/// # Source
/// Hoerl and Kennard 1970, "Ridge regression: biased estimation for nonorthogonal problems".
pub fn fit(samples: &Samples<'_>, options: &Options) -> Result<Fit, RouterError> {
    ClosedForm::new(samples, options, Grams::Needed)?.fit(
        options,
        &PENALTIES,
        WITHOUT_HELD_OUT,
        |form, m, penalty| rows(m, &form.groups, form.table.experts, penalty),
    )
}

/// The solution for one set of moments: `[experts, width]`.
pub(super) fn rows(
    moments: &Moments,
    groups: &[Group],
    experts: usize,
    penalty: f64,
) -> Result<Vec<f64>, RouterError> {
    let width = moments.means.len() / groups.len();
    let mut targets = Vec::with_capacity(groups.len() * experts); // [groups, experts], weighted
    for (group, weight) in groups.iter().zip(&moments.weights) {
        let uniform = 1.0 / experts as f64;
        let (own, other) = match group.target.sign {
            Sign::Positive => (1.0 - uniform, -uniform),
            Sign::Negative => (-uniform, 1.0 / (experts - 1) as f64 - uniform),
        };
        let of = |e| if e == group.target.expert { own } else { other };
        targets.extend((0..experts).map(|e| weight * of(e)));
    }
    let mut right = vec![0.0; experts * width];
    let targets = Dense::new(&targets, groups.len(), experts)?;
    let means = Dense::new(&moments.means, groups.len(), width)?;
    matmul(targets.transposed(), means, &mut right, Into::Overwrite)?;
    let Some(gram) = &moments.gram else { return Ok(right) };
    let mut gram = gram.clone();
    gram.add_to_diagonal(penalty);
    gram.cholesky()?.solve(&right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::Example;

    #[test]
    fn one_feature_by_hand() {
        // x = ±1, t = (1/2, -1/2) and its opposite: G = 1, B = (1/2, -1/2), W = B / (1 + penalty).
        // A negative prompt of expert 0 at x = -1 has t = (-1/2, 1/2) and weight 1/2: G = 3/2, B = (3/4, -3/4).
        let (right, left, more) = ([1.0f32], [-1.0f32; 5], [-1.0f32; 2]);
        let example = |expert, sign, inputs| Example { expert, sign, inputs };
        let mut examples =
            vec![example(0, Sign::Positive, &right[..]), example(1, Sign::Positive, &left[..])];
        let of = |examples: &[Example<'_>]| {
            let samples = Samples { experts: 2, hidden: 1, examples: examples.to_vec() };
            let form = ClosedForm::new(&samples, &Options::default(), Grams::Needed).unwrap();
            rows(form.all(), &form.groups, 2, 0.25).unwrap()
        };
        let near = |a: Vec<f64>, b: f64| {
            assert!((a[0] - b).abs() < 1e-7 && (a[1] + b).abs() < 1e-7, "{a:?} {b}");
        };
        near(of(&examples), 0.4);
        examples.push(example(0, Sign::Negative, &more[..]));
        near(of(&examples), 0.75 / 1.75);
    }
}
