//! Choosing the next token from logits.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::text_error::TextError;

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 means greedy.
    pub temperature: f32,
    /// Only this many of the likeliest tokens can be chosen; 0 means all.
    pub top_k: usize,
    /// Only the smallest set of likeliest tokens whose probabilities reach this sum can be chosen; 1 means all.
    pub top_p: f32,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses tokens; the same parameters and logits give the same tokens on every machine.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha12Rng,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// [`TextError::Parameter`] if a parameter is out of range.
    pub fn new(sampling: Sampling) -> Result<Self, TextError> {
        Self::numbered(sampling, 0)
    }

    /// The sampler of one of many sequences: each `number` has a random stream of its own, that of 0 is
    /// [`Sampler::new`]'s.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn numbered(sampling: Sampling, number: u64) -> Result<Self, TextError> {
        let Sampling { temperature, top_p, seed, .. } = sampling;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(TextError::Parameter {
                name: "temperature",
                expected: "0 (greedy) or more".into(),
                found: temperature.to_string(),
            });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(TextError::Parameter {
                name: "top_p",
                expected: "above 0, at most 1".into(),
                found: top_p.to_string(),
            });
        }
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        random.set_stream(number);
        Ok(Self { sampling, random })
    }

    /// The next token.
    ///
    /// Probabilities are `softmax(logits / temperature)` over the `top_k` largest logits, of which the smallest set
    /// that reaches `top_p` stays; sums in f64. Among equal logits the lower id counts as the likelier one. Greedy
    /// draws nothing from the random stream, anything else exactly one number a token.
    ///
    /// * `logits`: `[vocab]`
    ///
    /// # Errors
    /// [`TextError::NotANumber`] if a logit is NaN, or none is above negative infinity.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, TextError> {
        if let Some(token) = logits.iter().position(|l| l.is_nan()) {
            return Err(TextError::NotANumber { token });
        }
        let best = argmax(logits).ok_or(TextError::NotANumber { token: 0 })?;
        if self.sampling.temperature == 0.0 || self.sampling.top_k == 1 {
            return Ok(best);
        }
        // 53 random bits: every f64 of that grid in [0, 1).
        let uniform = (self.random.next_u64() >> 11) as f64 * (0.5f64).powi(53);
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if top_p == 1.0 && (top_k == 0 || top_k >= logits.len()) {
            // Every token can be chosen, so their order does not matter and sorting them would be most of the work.
            let best = logits[best as usize];
            let weights: Vec<f64> = logits.iter().map(|&l| weight(l, best, temperature)).collect();
            return Ok(pick(weights.iter().copied().enumerate(), uniform) as u32);
        }
        let candidates = self.candidates(logits, logits[best as usize]);
        let at = pick(candidates.iter().map(|c| c.1).enumerate(), uniform);
        Ok(candidates[at].0)
    }

    /// Tokens that can be chosen with `exp((logit - best) / temperature)`, likeliest first.
    fn candidates(&self, logits: &[f32], best: f32) -> Vec<(u32, f64)> {
        let likelier = |a: &u32, b: &u32| {
            let (la, lb) = (logits[*a as usize], logits[*b as usize]);
            lb.total_cmp(&la).then(a.cmp(b))
        };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let keep = match self.sampling.top_k {
            0 => ids.len(),
            k => k.min(ids.len()),
        };
        if keep < ids.len() {
            ids.select_nth_unstable_by(keep - 1, likelier);
            ids.truncate(keep);
        }
        ids.sort_unstable_by(likelier);
        let mut weighted: Vec<(u32, f64)> = ids
            .into_iter()
            .map(|id| (id, weight(logits[id as usize], best, self.sampling.temperature)))
            .collect();
        if self.sampling.top_p < 1.0 {
            let enough = self.sampling.top_p as f64 * weighted.iter().map(|c| c.1).sum::<f64>();
            let mut sum = 0.0;
            let keep = weighted.iter().position(|c| {
                sum += c.1;
                sum >= enough
            });
            weighted.truncate(keep.map_or(weighted.len(), |k| k + 1));
        }
        weighted
    }
}

/// `exp((logit - best) / temperature)`.
fn weight(logit: f32, best: f32, temperature: f32) -> f64 {
    // Two infinities would make a NaN of their difference.
    let distance = if logit == best { 0.0 } else { (logit - best) as f64 };
    (distance / temperature as f64).exp()
}

/// The index whose share of the sum of all weights holds `uniform`, from `[0, 1)`. One weight at least is 1.
fn pick(weights: impl Iterator<Item = (usize, f64)> + Clone, uniform: f64) -> usize {
    let mut left = uniform * weights.clone().map(|(_, w)| w).sum::<f64>();
    let mut last = 0;
    for (at, weight) in weights.filter(|(_, w)| *w > 0.0) {
        left -= weight;
        if left < 0.0 {
            return at;
        }
        // Rounding can leave a rest behind the last one.
        last = at;
    }
    last
}

/// Index of the largest logit, the lowest one among equals; `None` if there is none above negative infinity.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<usize> = None;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > best.map_or(f32::NEG_INFINITY, |b| logits[b]) {
            best = Some(i);
        }
    }
    best.map(|b| b as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_k, top_p, seed }).unwrap()
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sampler(0.0, 0, 1.0, 0).next(&[1.0, 3.0, 3.0, 2.0]).unwrap(), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn a_nan_is_an_error_that_names_the_token() {
        let error = sampler(1.0, 0, 1.0, 0).next(&[0.0, f32::NAN]).unwrap_err();
        assert!(matches!(error, TextError::NotANumber { token: 1 }), "{error:?}");
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
            let sampling = Sampling { temperature, top_p, ..Sampling::default() };
            assert!(matches!(Sampler::new(sampling), Err(TextError::Parameter { .. })));
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        // softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let mut s = sampler(1.0, 0, 1.0, 7);
        let mut counts = [0usize; 3];
        for _ in 0..8000 {
            counts[s.next(&logits).unwrap() as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([1000.0, 2000.0, 5000.0]) {
            assert!((*count as f64 - expected).abs() < 150.0, "{counts:?}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        // 5/8 alone reaches 0.6; 0.7 needs 2/8 more.
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let kept = |p| sampler(1.0, 0, p, 0).candidates(&logits, logits[2]).len();
        assert_eq!((kept(0.6), kept(0.7), kept(0.9), kept(1.0)), (1, 2, 3, 3));
    }

    #[test]
    fn infinite_logits_are_handled() {
        let mut s = sampler(0.5, 0, 0.9, 3);
        for _ in 0..20 {
            assert_eq!(s.next(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).unwrap(), 1);
            assert_eq!(s.next(&[1.0, f32::INFINITY]).unwrap(), 1);
        }
    }

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_same_seed_gives_the_same_tokens(
            logits in proptest::collection::vec(-5.0f32..5.0, 1..50), seed: u64, k in 0usize..60, p in 0.05f32..1.0
        ) {
            let (mut a, mut b) = (sampler(0.8, k, p, seed), sampler(0.8, k, p, seed));
            for _ in 0..10 {
                prop_assert_eq!(a.next(&logits).unwrap(), b.next(&logits).unwrap());
            }
        }

        #[test]
        fn only_the_k_likeliest_are_chosen(
            logits in proptest::collection::vec(-5.0f32..5.0, 1..50), seed: u64, k in 1usize..8
        ) {
            let mut s = sampler(2.0, k, 1.0, seed);
            for _ in 0..10 {
                let token = s.next(&logits).unwrap() as usize;
                let above = logits.iter().filter(|&&l| l > logits[token]).count();
                prop_assert!(above < k, "{above} tokens are likelier than the chosen one");
            }
        }

        #[test]
        fn adding_a_constant_changes_nothing(
            logits in proptest::collection::vec(-5i32..5, 1..50), seed: u64, shift in -8i32..8
        ) {
            // Whole numbers, so that the shift is exact.
            let logits: Vec<f32> = logits.iter().map(|&l| l as f32).collect();
            let shifted: Vec<f32> = logits.iter().map(|l| l + shift as f32).collect();
            let (mut a, mut b) = (sampler(0.7, 0, 0.9, seed), sampler(0.7, 0, 0.9, seed));
            for _ in 0..5 {
                prop_assert_eq!(a.next(&logits).unwrap(), b.next(&shifted).unwrap());
            }
        }
    }
}
