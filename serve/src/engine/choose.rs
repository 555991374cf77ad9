//! From logits to the next token of an answer.

use std::collections::BTreeMap;

use moe_merge_model::{Sampler, Sampling, TextError};

/// How the tokens of an answer are chosen.
#[derive(Debug, Clone)]
pub struct Choosing {
    /// Temperature, top-k, top-p, seed.
    pub sampling: Sampling,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Taken from the logit of a token that the answer has.
    pub presence: f32,
    /// Taken from the logit of a token for every time that the answer has it.
    pub frequency: f32,
    /// Tokens whose probabilities are told beside the one that is chosen.
    pub logprobs: Option<usize>,
}

/// Logarithms of probabilities, before bias, penalties and sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub struct Chooser {
    how: Choosing,
    sampler: Sampler,
    /// Tokens of the answer, and how often; kept where it matters only.
    counts: BTreeMap<u32, u32>,
}

impl Chooser {
    /// For answer `number` of a prompt, which has a random stream of its own.
    ///
    /// # Errors
    /// [`TextError::Parameter`].
    pub fn new(how: &Choosing, number: usize) -> Result<Self, TextError> {
        let sampler = Sampler::numbered(how.sampling, number as u64)?;
        Ok(Self { how: how.clone(), sampler, counts: BTreeMap::new() })
    }

    /// The next token.
    ///
    /// `logit[t] + bias[t] - frequency * count[t] - presence * (count[t] > 0)`, then as [`Sampler::next`].
    ///
    /// # Errors
    /// [`TextError::NotANumber`].
    pub fn next(&mut self, logits: &[f32]) -> Result<(u32, Option<Logprobs>), TextError> {
        let penalised = self.how.presence != 0.0 || self.how.frequency != 0.0;
        let token = if penalised || !self.how.bias.is_empty() {
            let mut changed = logits.to_vec();
            for (token, bias) in &self.how.bias {
                if let Some(logit) = changed.get_mut(*token as usize) {
                    *logit += bias;
                }
            }
            for (token, count) in &self.counts {
                changed[*token as usize] -= self.how.presence + self.how.frequency * *count as f32;
            }
            self.sampler.next(&changed)?
        } else {
            self.sampler.next(logits)?
        };
        if penalised {
            *self.counts.entry(token).or_default() += 1;
        }
        Ok((token, self.how.logprobs.map(|top| logprobs(logits, token, top))))
    }
}

/// `logit - ln(sum of exp(logits))` of `token` and of the `top` likeliest; among equals the lower id comes first.
fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
    let total = f64::from(most) + sum.ln();
    // JSON has no infinity: this is what OpenAI says for the unlikely.
    let of = |id: u32| ((f64::from(logits[id as usize]) - total) as f32).max(-9999.0);
    let likelier =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(ids.len());
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top - 1, likelier);
    }
    ids.truncate(top);
    ids.sort_unstable_by(likelier);
    Logprobs { chosen: of(token), top: ids.into_iter().map(|id| (id, of(id))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greedy() -> Choosing {
        Choosing {
            sampling: Sampling::default(),
            bias: Vec::new(),
            presence: 0.0,
            frequency: 0.0,
            logprobs: None,
        }
    }

    #[test]
    fn bias_and_penalties_by_hand() {
        let logits = [1.0, 3.0, 2.0];
        let mut plain = Chooser::new(&greedy(), 0).unwrap();
        assert_eq!(plain.next(&logits).unwrap().0, 1);
        let bias = vec![(0, 2.5), (9, 100.0)];
        let mut biased = Chooser::new(&Choosing { bias, ..greedy() }, 0).unwrap();
        assert_eq!(biased.next(&logits).unwrap().0, 0);
        // 3, then 3 - 1.5 against 2, then 2 - 1.5 against 1.5, then 1.5 - 0.5 against 1 and 0.5: the lower id of equals.
        let how = Choosing { presence: 1.0, frequency: 0.5, ..greedy() };
        let mut penalised = Chooser::new(&how, 0).unwrap();
        let found: Vec<u32> = (0..4).map(|_| penalised.next(&logits).unwrap().0).collect();
        assert_eq!(found, [1, 2, 1, 0]);
    }

    #[test]
    fn logprobs_by_hand() {
        // Probabilities 1/2, 1/4, 1/4.
        let logits = [2f32.ln(), 0.0, 0.0];
        let found = logprobs(&logits, 2, 2);
        assert!((found.chosen - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((found.top[0].1 - 0.5f32.ln()).abs() < 1e-6);
        assert!(logprobs(&logits, 0, 0).top.is_empty());
        assert_eq!(logprobs(&logits, 0, 99).top.len(), 3);
        assert_eq!(logprobs(&[0.0, f32::NEG_INFINITY], 1, 0).chosen, -9999.0);
    }
}
