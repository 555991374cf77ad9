//! mergekit's `hidden_avg`, without its padding.

use super::{ExpertPrompts, add_tokens, gate_of};
use crate::error::RouterError;
use crate::gate::Gate;

/// Gate rows from the residual stream entering the layer, averaged over positions.
///
/// `gate[e] = unit(mean(avg(pos[e])) - mean(avg(neg[e])))`: mean over a prompt's tokens, then over prompts, so every
/// prompt weighs the same.
///
/// * prompts: `[tokens, hidden]` f32 each, bos included
/// * returns `[experts, hidden]`, each row of norm 1; sums in f64
///
/// # Errors
/// As [`super::hidden::gate`].
///
/// # Source
/// mergekit `moe/router.py::get_gate_params`. Differs: padding is left out, which the reference averages in; equal
/// where the prompts of a batch have the same number of tokens.
pub fn gate(experts: &[ExpertPrompts<'_>], hidden: usize) -> Result<Gate, RouterError> {
    gate_of(experts, hidden, |prompts| {
        let mut mean = vec![0.0; hidden];
        for prompt in prompts {
            let tokens = prompt.len() / hidden;
            add_tokens(&mut mean, prompt, 1.0 / (tokens * prompts.len()) as f64);
        }
        mean
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_weighs_as_much_as_a_short_one() {
        // Averages (2, 0) and (4, 8): mean (3, 4).
        let e =
            ExpertPrompts { positive: vec![&[1.0, 0.0, 3.0, 0.0], &[4.0, 8.0]], negative: vec![] };
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.6, 0.8]);
    }

    #[test]
    fn negatives_equal_to_positives_give_zero() {
        let p: Vec<&[f32]> = vec![&[0.1, 0.2, 0.3, 0.7], &[4.0, 8.0]];
        let e = ExpertPrompts { positive: p.clone(), negative: p };
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.0, 0.0]);
    }
}
