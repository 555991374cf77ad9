//! mergekit's `cheap_embed`.

use super::{ExpertPrompts, add_tokens, gate_of, scale_to_unit};
use crate::error::RouterError;
use crate::gate::Gate;

/// Gate rows from the input embeddings of the prompts' tokens; the same gate serves every layer.
///
/// `gate[e] = unit(unit(sum(pos[e])) - unit(sum(neg[e])))`: summed over prompts and tokens, so longer prompts weigh more.
///
/// * prompts: rows of `model.embed_tokens.weight` as stored (no embedding multiplier), `[tokens, hidden]`, bos included
/// * returns `[experts, hidden]`, each row of norm 1; sums in f64
///
/// # Errors
/// As [`super::hidden::gate`].
///
/// # Source
/// mergekit `moe/router.py::get_cheap_embedding`. Differs: f64 sums instead of f32.
pub fn gate(experts: &[ExpertPrompts<'_>], hidden: usize) -> Result<Gate, RouterError> {
    gate_of(experts, hidden, |prompts| {
        let mut sum = vec![0.0; hidden];
        for prompt in prompts {
            add_tokens(&mut sum, prompt, 1.0);
        }
        scale_to_unit(&mut sum);
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_tokens_and_prompts() {
        let e =
            ExpertPrompts { positive: vec![&[1.0, 0.0, 1.0, 0.0], &[1.0, 4.0]], negative: vec![] };
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.6, 0.8]);
    }

    #[test]
    fn both_signs_have_norm_one_before_the_difference() {
        // (0, 1) - (1, 0), whatever the lengths.
        let e = ExpertPrompts { positive: vec![&[0.0, 9.0]], negative: vec![&[0.5, 0.0]] };
        let half = 0.5f32.sqrt();
        assert_eq!(gate(&[e], 2).unwrap().rows, [-half, half]);
    }

    #[test]
    fn scaling_all_embeddings_changes_nothing() {
        let (p, n) = ([0.3f32, -0.7, 1.1, 0.2], [0.9f32, 0.4]);
        let scaled = |v: &[f32]| v.iter().map(|x| x * 1024.0).collect::<Vec<_>>();
        let (ps, ns) = (scaled(&p), scaled(&n));
        let of = |p, n| gate(&[ExpertPrompts { positive: vec![p], negative: vec![n] }], 2).unwrap();
        assert_eq!(of(&p[..], &n[..]), of(&ps, &ns));
    }

    #[test]
    fn negatives_equal_to_positives_give_zero() {
        let e = ExpertPrompts { positive: vec![&[0.3, 0.4]], negative: vec![&[0.3, 0.4]] };
        assert_eq!(gate(&[e], 2).unwrap().rows, [0.0, 0.0]);
    }
}
