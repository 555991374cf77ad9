//! `arcee_fusion`: the changes that matter most.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::order::{Keyed, ordered, unordered};
use super::{Base, Combine, Group, Method, Once, read, round, scan};

/// Takes over the numbers whose importance `|W - B| * KL(softmax W | softmax B)`, the divergence taken along the last axis,
/// is at least `median + 1.5 (upper quartile - lower quartile)` of the tensor.
pub(super) const METHOD: Method = Method {
    name: "arcee_fusion",
    summary: "the base with the most important changes of one other model",
    formula: "B + (W - B) where |W - B| KL(softmax W, softmax B) >= Q(.5) + 1.5 (Q(.75) - Q(.25)), \
              KL along the last axis, quantiles over the tensor",
    parameters: &[],
    base: Base::Required,
    models: (1, 1),
    whole_tensor: true,
    activations: None,
    source: "mergekit `merge_methods/arcee_fusion.py`; differs: exact quantiles for tensors above a million numbers",
    build,
};

#[derive(Debug)]
struct ArceeFusion {
    base: usize,
    dtype: Dtype,
    facts: Once<Facts>,
}

#[derive(Debug)]
struct Facts {
    /// Divergence of each row.
    divergences: Vec<f64>,
    /// Importance from which on numbers are taken over.
    threshold: f32,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let base = group.required_base()?;
    Ok(Box::new(ArceeFusion { base, dtype: group.dtype, facts: Once::default() }))
}

/// Softmax of a row plus 1e-8, in f64.
fn softmax(row: &[f32]) -> Vec<f64> {
    let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f64> = row.iter().map(|v| f64::from(v - greatest).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p = *p / sum + 1e-8);
    p
}

/// Divergence of one row of the model from the base's.
fn divergence(model: &[f32], base: &[f32]) -> f64 {
    let (p, q) = (softmax(model), softmax(base));
    p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum()
}

/// Importance of a number in a row with this divergence.
fn importance(model: f32, base: f32, divergence: f64) -> f32 {
    (f64::from((model - base).abs()) * divergence) as f32
}

impl ArceeFusion {
    fn facts(&self, inputs: &[WeightRef]) -> Result<&Facts, CheckpointError> {
        self.facts.get(|| {
            let (base, model) = (&inputs[self.base], &inputs[1 - self.base]);
            let (cols, n) = (base.cols().max(1), base.len() as u64);
            let pair = [model, base];
            let parts = scan(
                &pair,
                |_| Vec::new(),
                |found: &mut Vec<f64>, _, blocks| {
                    let rows = blocks[0].chunks(cols).zip(blocks[1].chunks(cols));
                    found.extend(rows.map(|(model, base)| divergence(model, base)));
                },
            )?;
            let divergences = parts.concat();
            if n == 0 {
                return Ok(Facts { divergences, threshold: 0.0 });
            }
            let keys = |first: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
                let rows = blocks[0].chunks(cols).zip(blocks[1].chunks(cols));
                for ((model, base), d) in rows.zip(&divergences[first / cols..]) {
                    let numbers = model.iter().zip(base);
                    out.extend(numbers.map(|(w, b)| ordered(importance(*w, *b, *d))));
                }
            };
            // Element `trunc(q (n - 1))` from below is this one from above.
            let rank = |q: f64| n - (q * (n - 1) as f64) as u64;
            let keyed = Keyed { inputs: &pair, keys, short: false };
            let found = keyed.at(&[rank(0.25), rank(0.5), rank(0.75)])?;
            let [lower, median, upper] = [found[0], found[1], found[2]].map(unordered);
            Ok(Facts { threshold: median + 1.5 * (upper - lower), divergences })
        })
    }
}

impl Combine for ArceeFusion {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        self.facts(inputs).map(|_| ())
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let facts = self.facts(inputs)?;
        let cols = inputs[self.base].cols().max(1);
        inputs[self.base].read_rows(rows.clone(), out)?;
        let model = read(&inputs[1 - self.base], rows.clone())?;
        let divergences = &facts.divergences[rows.start..];
        for ((out, model), d) in out.chunks_mut(cols).zip(model.chunks(cols)).zip(divergences) {
            for (o, &w) in out.iter_mut().zip(model) {
                if importance(w, *o, *d) >= facts.threshold {
                    *o = round(*o + round(w - *o, self.dtype), self.dtype);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn importance_by_hand() {
        // softmax (ln 3, 0) = (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
        let found = divergence(&[3f32.ln(), 0.0], &[0.0, 0.0]);
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((found - expected).abs() < 1e-6);
        assert!((f64::from(importance(3f32.ln(), 0.0, found)) - 3f64.ln() * expected).abs() < 1e-6);
        assert_eq!(importance(0.5, 0.5, found), 0.0);
    }
}
