//! `ties`: trim, elect a sign, merge what agrees.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::task_arithmetic::{Common, parameters};
use super::{Base, Combine, Group, Method, Once, read, round, scan};

/// Keeps the `density` largest differences of each model, then per number sums the weighted differences whose sign is the
/// sign of the weighted sum, divided by the weights of those models with `normalize`.
pub(super) const METHOD: Method = Method {
    name: "ties",
    summary: "task arithmetic on the largest differences that agree in sign",
    parameters: &parameters(true),
    base: Base::Required,
    models: (1, usize::MAX),
    whole_tensor: true,
    source: "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    build,
};

#[derive(Debug)]
struct Ties {
    common: Common,
    /// Share kept, per input.
    density: Vec<f64>,
    rescale: bool,
    /// What is kept of each input.
    cuts: Vec<Once<Cut>>,
}

/// Which differences of one model are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    /// Bits of the smallest absolute value that is kept.
    threshold: u32,
    /// Of those that equal it, the ones up to this flat index are kept.
    last_equal: usize,
    /// Factor on what is kept.
    scale: f32,
}

impl Cut {
    /// Keeps everything.
    const ALL: Cut = Cut { threshold: 0, last_equal: usize::MAX, scale: 1.0 };
    /// Keeps nothing.
    const NONE: Cut = Cut { threshold: u32::MAX, last_equal: 0, scale: 1.0 };

    fn keeps(&self, value: f32, index: usize) -> bool {
        let bits = magnitude(value);
        bits > self.threshold || bits == self.threshold && index <= self.last_equal
    }
}

/// Bits of `|value|`, which are ordered as the values are.
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let common = Common::new(group)?;
    let cuts = group.inputs.iter().map(|_| Once::default()).collect();
    Ok(Box::new(Ties { common, density: group.own(1), rescale: group.global[2] != 0.0, cuts }))
}

impl Ties {
    /// Three passes over the tensor, 512 KiB of counters: upper halves of the magnitudes, lower halves within the bucket
    /// of the k-th largest, then the place where the last of equal magnitudes is kept.
    fn find(&self, inputs: &[WeightRef], m: usize) -> Result<Cut, CheckpointError> {
        let (base, model, dtype) = (&inputs[self.common.base], &inputs[m], self.common.dtype);
        let differences = |visit: &mut dyn FnMut(usize, f32)| {
            scan(&[model, base], |first, blocks| {
                for (i, (w, b)) in blocks[0].iter().zip(&blocks[1]).enumerate() {
                    visit(first + i, round(w - b, dtype));
                }
            })
        };
        let density = self.density[m];
        if density >= 1.0 {
            return Ok(Cut::ALL);
        }
        if density <= 0.0 || model.is_empty() {
            return Ok(Cut::NONE);
        }
        let keep = ((density * model.len() as f64) as u64).max(1);
        let mut counts = vec![0u64; 1 << 16];
        differences(&mut |_, d| counts[(magnitude(d) >> 16) as usize] += 1)?;
        let (upper, above) = from_the_top(&counts, keep);
        counts.fill(0);
        differences(&mut |_, d| {
            if magnitude(d) >> 16 == upper {
                counts[(magnitude(d) & 0xffff) as usize] += 1;
            }
        })?;
        let (lower, above_here) = from_the_top(&counts, keep - above);
        let mut equal_left = keep - above - above_here;
        let mut cut = Cut { threshold: upper << 16 | lower, last_equal: 0, scale: 1.0 };
        let (mut all, mut kept) = (0f64, 0f64);
        differences(&mut |i, d| {
            let bits = magnitude(d);
            let equal = bits == cut.threshold && equal_left > 0;
            if equal {
                equal_left -= 1;
                cut.last_equal = i;
            }
            all += d.abs() as f64;
            if equal || bits > cut.threshold {
                kept += d.abs() as f64;
            }
        })?;
        if self.rescale && all >= 1e-7 && kept >= 1e-7 {
            cut.scale = (all / kept) as f32;
        }
        Ok(cut)
    }
}

/// The bucket in which the `k`-th largest lies, and how many lie in larger ones.
fn from_the_top(counts: &[u64], k: u64) -> (u32, u64) {
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if above + count >= k {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, above)
}

impl Combine for Ties {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let (common, dtype) = (&self.common, self.common.dtype);
        let first = rows.start * inputs[common.base].cols();
        let base = read(&inputs[common.base], rows.clone())?;
        let mut weighted = Vec::new(); // [models][values of these rows]
        out.fill(0.0);
        for m in common.others(inputs) {
            let cut = *self.cuts[m].get(|| self.find(inputs, m))?;
            let mut values = read(&inputs[m], rows.clone())?;
            for (i, (v, b)) in values.iter_mut().zip(&base).enumerate() {
                let d = round(*v - b, dtype);
                let d = if cut.keeps(d, first + i) { d } else { 0.0 };
                let d = if cut.scale != 1.0 { round(d * cut.scale, dtype) } else { d };
                *v = round(common.weights[m] * d, dtype);
            }
            // `out` holds the vote until the sums are made.
            out.iter_mut().zip(&values).for_each(|(o, v)| *o += v);
            weighted.push((common.weights[m], values));
        }
        for (i, (o, b)) in out.iter_mut().zip(base).enumerate() {
            let positive = round(*o, dtype) >= 0.0;
            let (mut sum, mut divisor) = (0f32, 0f32);
            for (weight, values) in &weighted {
                let v = values[i];
                if v != 0.0 && (v > 0.0) == positive {
                    sum += v;
                    divisor += weight;
                }
            }
            let divisor = match round(divisor, dtype) {
                0.0 => 1.0,
                divisor => divisor,
            };
            *o = common.finish(b, round(sum, dtype), divisor);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::OwnedWeight;
    use std::sync::Arc;

    fn weight(values: &[f32]) -> WeightRef {
        Arc::new(OwnedWeight::from_f32("w", values, &[values.len()], Dtype::F32))
    }

    fn cut(values: &[f32], density: f64) -> (Cut, usize) {
        let inputs = [weight(&vec![0.0; values.len()]), weight(values)];
        let common = Common {
            base: 0,
            weights: vec![0.0, 1.0],
            normalize: true,
            lambda: 1.0,
            dtype: Dtype::F32,
        };
        let cuts = vec![Once::default(), Once::default()];
        let ties = Ties { common, density: vec![1.0, density], rescale: false, cuts };
        let cut = ties.find(&inputs, 1).unwrap();
        let kept = values.iter().enumerate().filter(|(i, v)| cut.keeps(**v, *i)).count();
        (cut, kept)
    }

    #[test]
    fn exactly_k_are_kept_and_of_equals_the_first() {
        let values = [1.0, -3.0, 3.0, 0.5, -3.0, 2.0];
        let (found, kept) = cut(&values, 0.34); // trunc(2.04) = 2
        assert_eq!((kept, found.threshold, found.last_equal), (2, 3f32.to_bits(), 2));
        assert_eq!(cut(&values, 0.01).1, 1);
        assert_eq!(cut(&values, 0.0).1, 0);
        assert_eq!(cut(&values, 1.0).1, 6);
        assert_eq!(cut(&[0.0; 10], 0.3).1, 3);
        for k in 0..=6 {
            assert_eq!(cut(&values, (k as f64 + 0.5) / 6.0).1, k.max(1));
        }
    }
}
