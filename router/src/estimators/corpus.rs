//! Made-up prompts for the tests of learned estimators.

use super::random;
use crate::samples::{Example, Fit, Samples, Sign};

/// Prompts of each expert as `[tokens, hidden]` values: a centre per expert, one per prompt, and noise.
pub struct Corpus {
    pub hidden: usize,
    pub prompts: Vec<(usize, Vec<f32>)>,
}

impl Corpus {
    pub fn new(
        experts: usize,
        prompts: usize,
        tokens: usize,
        hidden: usize,
        distance: f32,
    ) -> Self {
        let centres = random::gate(experts, hidden, 1, 0);
        let mut out = Vec::new();
        for e in 0..experts {
            for p in 0..prompts {
                let tokens = tokens + p % 3;
                let noise = random::gate(tokens + 1, hidden, 2, (e * 100 + p) as u64);
                let values = (0..tokens * hidden).map(|i| {
                    let common = if i % hidden == 0 { 3.0 } else { 0.0 };
                    let of_prompt = 0.5 * noise.row(tokens)[i % hidden];
                    distance * centres.row(e)[i % hidden] + common + of_prompt + noise.rows[i]
                });
                out.push((e, values.collect()));
            }
        }
        Self { hidden, prompts: out }
    }

    pub fn samples(&self) -> Samples<'_> {
        let experts = self.prompts.iter().map(|p| p.0).max().unwrap() + 1;
        let examples = self
            .prompts
            .iter()
            .map(|p| Example { expert: p.0, sign: Sign::Positive, inputs: &p.1 })
            .collect();
        Samples { experts, hidden: self.hidden, examples }
    }
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    let scale = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / scale
}

pub fn accuracy(fit: &Fit, samples: &Samples<'_>) -> f64 {
    let (mut right, mut all) = (0, 0);
    for example in &samples.examples {
        for z in example.inputs.chunks_exact(samples.hidden) {
            let s = fit.gate.logits(z);
            all += 1;
            right += usize::from((0..s.len()).all(|e| s[e] <= s[example.expert]));
        }
    }
    right as f64 / all as f64
}
