//! `arcee_fusion`: the changes that matter most.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::order::{Keyed, ordered, unordered};
use super::{Base, Combine, Group, Method, Once, read, round};

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
    threshold: Once<f32>,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let base = group.required_base()?;
    Ok(Box::new(ArceeFusion { base, dtype: group.dtype, threshold: Once::default() }))
}

/// Softmax of a row plus 1e-8, in f64.
fn softmax(row: &[f32]) -> Vec<f64> {
    let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f64> = row.iter().map(|v| f64::from(v - greatest).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p = *p / sum + 1e-8);
    p
}

/// Importance of each number of one row.
fn importance(model: &[f32], base: &[f32]) -> impl Iterator<Item = f32> {
    let (p, q) = (softmax(model), softmax(base));
    let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
    model.iter().zip(base).map(move |(w, b)| (f64::from((w - b).abs()) * divergence) as f32)
}

impl ArceeFusion {
    fn threshold(&self, inputs: &[WeightRef]) -> Result<f32, CheckpointError> {
        let found = self.threshold.get(|| {
            let (base, model) = (&inputs[self.base], &inputs[1 - self.base]);
            let (cols, n) = (base.cols().max(1), base.len() as u64);
            let keys = |blocks: &[Vec<f32>], out: &mut Vec<u32>| {
                for (model, base) in blocks[0].chunks(cols).zip(blocks[1].chunks(cols)) {
                    out.extend(importance(model, base).map(ordered));
                }
            };
            if n == 0 {
                return Ok(0.0);
            }
            // Element `trunc(q (n - 1))` from below is this one from above.
            let rank = |q: f64| n - (q * (n - 1) as f64) as u64;
            let keyed = Keyed { inputs: &[model, base], keys, short: false };
            let found = keyed.at(&[rank(0.25), rank(0.5), rank(0.75)])?;
            let [lower, median, upper] = [found[0], found[1], found[2]].map(unordered);
            Ok(median + 1.5 * (upper - lower))
        })?;
        Ok(*found)
    }
}

impl Combine for ArceeFusion {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        self.threshold(inputs).map(|_| ())
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let threshold = self.threshold(inputs)?;
        let cols = inputs[self.base].cols().max(1);
        inputs[self.base].read_rows(rows.clone(), out)?;
        let model = read(&inputs[1 - self.base], rows)?;
        for (out, model) in out.chunks_mut(cols).zip(model.chunks(cols)) {
            let importance: Vec<f32> = importance(model, out).collect();
            for ((o, &w), i) in out.iter_mut().zip(model).zip(importance) {
                if i >= threshold {
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
        let found: Vec<f32> = importance(&[3f32.ln(), 0.0], &[0.0, 0.0]).collect();
        let divergence = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((f64::from(found[0]) - 3f64.ln() * divergence).abs() < 1e-6);
        assert_eq!(found[1], 0.0);
    }
}
