//! mergekit's `hidden`.

use super::{ExpertPrompts, add_tokens, gate_of};
use crate::error::RouterError;
use crate::gate::Gate;

/// Gate rows from the residual stream entering the layer, at each prompt's last position.
///
/// `gate[e] = unit(mean(last(pos[e])) - mean(last(neg[e])))`, `unit(g) = g / max(‖g‖, 1e-8)`
///
/// * prompts: `[tokens, hidden]` f32 each; only the last row is read, so `[1, hidden]` will do
/// * returns `[experts, hidden]`, each row of norm 1; sums in f64
///
/// # Errors
/// An expert without positive prompts, an empty prompt, a number that is not finite, a wrong size.
///
/// # Source
/// mergekit `moe/router.py::get_gate_params`. Differs: f64 sums where the reference holds bf16.
pub fn gate(experts: &[ExpertPrompts<'_>], hidden: usize) -> Result<Gate, RouterError> {
    gate_of(experts, hidden, |prompts| {
        let mut mean = vec![0.0; hidden];
        for prompt in prompts {
            add_tokens(&mut mean, &prompt[prompt.len() - hidden..], 1.0 / prompts.len() as f64);
        }
        mean
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts<'a>(positive: &[&'a [f32]], negative: &[&'a [f32]]) -> ExpertPrompts<'a> {
        ExpertPrompts { positive: positive.to_vec(), negative: negative.to_vec() }
    }

    #[test]
    fn last_position_mean_and_norm_by_hand() {
        // Last rows (2, 0) and (4, 8): mean (3, 4), norm 5.
        let e = prompts(&[&[9.0, 9.0, 2.0, 0.0], &[4.0, 8.0]], &[]);
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.6, 0.8]);
    }

    #[test]
    fn negatives_are_subtracted_before_the_norm() {
        let e = prompts(&[&[5.0, 4.0]], &[&[2.0, 0.0]]);
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.6, 0.8]);
    }

    #[test]
    fn negatives_equal_to_positives_give_zero() {
        let e = prompts(&[&[5.0, 4.0]], &[&[5.0, 4.0]]);
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.0, 0.0]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let fine = prompts(&[&[1.0, 2.0]], &[]);
        let of = |e: ExpertPrompts<'_>| gate(&[fine.clone(), e], 2).unwrap_err();
        assert_eq!(of(prompts(&[], &[])), RouterError::NoPrompts { expert: 1 });
        assert_eq!(of(prompts(&[&[]], &[])), RouterError::NoTokens { expert: 1 });
        assert_eq!(
            of(prompts(&[&[1.0, 2.0], &[1.0, 2.0, f32::NAN, 0.0]], &[])),
            RouterError::NotFinite { expert: 1, prompt: 1, token: 1 }
        );
        assert!(matches!(
            of(prompts(&[&[1.0, 2.0, 3.0]], &[])),
            RouterError::Shape { expected: 4, .. }
        ));
    }
}
