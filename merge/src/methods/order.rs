//! Numbers by rank, of tensors that do not fit in memory.

use moe_merge_checkpoint::{CheckpointError, WeightRef};
use moe_merge_kernels::elementwise;

use super::scan::scan_some;

/// The bits of `value` as a number that is ordered as the values are, negative ones included.
pub(super) fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// The value whose [`ordered`] bits are `key`.
pub(super) fn unordered(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// Bits of `|value|`, which are ordered as the values are.
pub(super) fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// One counter for each half of a key.
type Counts = Vec<u32>;

/// The greatest numbers of a tensor; of equal ones those with the lower index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// The smallest key that is kept.
    key: u32,
    /// Of those that equal it, the ones up to this flat index are kept.
    last_equal: usize,
}

impl Cut {
    /// Keeps nothing.
    pub const NONE: Cut = Cut { key: u32::MAX, last_equal: 0 };

    /// Whether the number with this key and flat index is kept.
    #[cfg(test)]
    fn keeps(&self, key: u32, index: usize) -> bool {
        key > self.key || key == self.key && index <= self.last_equal
    }

    /// Zeroes those of `values`, from the flat index `first` on, whose magnitude is not kept.
    pub fn keep(&self, values: &mut [f32], first: usize) {
        let (equal, none) = self.split(values, first);
        elementwise::zero_below(equal, self.key, true);
        elementwise::zero_below(none, self.key, false);
    }

    /// Zeroes those of `values` for which the magnitude of `gauge` in the same place is not kept.
    pub fn keep_where(&self, gauge: &[f32], values: &mut [f32], first: usize) {
        let (equal, none) = self.split(values, first);
        let (gauge_equal, gauge_none) = gauge.split_at(equal.len());
        elementwise::zero_where_below(equal, gauge_equal, self.key, true);
        elementwise::zero_where_below(none, gauge_none, self.key, false);
    }

    /// Zeroes those of `values`, from the flat index `first` on, whose magnitude is kept.
    pub fn drop(&self, values: &mut [f32], first: usize) {
        let (none, equal) = self.split(values, first);
        elementwise::zero_above(none, self.key, false);
        elementwise::zero_above(equal, self.key, true);
    }

    /// Cuts behind the last number that is kept although it only equals the smallest key.
    fn split<'v>(&self, values: &'v mut [f32], first: usize) -> (&'v mut [f32], &'v mut [f32]) {
        let place = self.last_equal.saturating_add(1).saturating_sub(first);
        values.split_at_mut(place.min(values.len()))
    }
}

/// Keys of the numbers of tensors that are read by blocks.
pub(super) struct Keyed<'a, F> {
    /// The tensors.
    pub inputs: &'a [&'a WeightRef],
    /// Pushes one key for each number of blocks that begin at a flat index.
    pub keys: F,
    /// Whether the lower halves of all keys are zero, as those of bf16 numbers are: then they are not counted.
    pub short: bool,
}

/// A number found by its rank.
struct Ranked {
    key: u32,
    /// How many are greater.
    above: u64,
    /// How many equal it, in each segment.
    equal: Vec<u64>,
}

impl<F: Fn(usize, &[Vec<f32>], &mut Vec<u32>) + Sync> Keyed<'_, F> {
    /// Visits all keys of the segments that are wanted, with a state for each segment.
    fn visit<T: Send>(
        &self,
        wanted: impl Fn(usize) -> bool + Sync,
        start: impl Fn(usize) -> T + Sync,
        see: impl Fn(&mut T, usize, u32) + Sync,
    ) -> Result<Vec<T>, CheckpointError> {
        let states = scan_some(
            self.inputs,
            wanted,
            |i| (start(i), Vec::new()),
            |(state, keys), first, blocks| {
                keys.clear();
                (self.keys)(first, blocks, keys);
                keys.iter().enumerate().for_each(|(i, key)| see(state, first + i, *key));
            },
        )?;
        Ok(states.into_iter().map(|(state, _)| state).collect())
    }

    /// Upper halves of all keys, or lower halves of the keys with the upper half `below`, counted.
    fn count(&self, below: Option<u32>) -> Result<Vec<Counts>, CheckpointError> {
        let start = |_| vec![0u32; 1 << 16];
        match below {
            None => self.visit(|_| true, start, |counts, _, key| counts[(key >> 16) as usize] += 1),
            Some(upper) => self.visit(
                |_| true,
                start,
                |counts, _, key| {
                    if key >> 16 == upper {
                        counts[(key & 0xffff) as usize] += 1;
                    }
                },
            ),
        }
    }

    /// The numbers that stand at `ranks` from the top (1: the greatest), in two to `1 + ranks` passes, or one if keys are short.
    fn ranked(&self, ranks: &[u64]) -> Result<Vec<Ranked>, CheckpointError> {
        let uppers = self.count(None)?;
        let mut lowers: Vec<(u32, Vec<Counts>)> = Vec::new();
        let mut found = Vec::new();
        for &rank in ranks {
            let (upper, above) = bucket(&uppers, rank);
            if self.short {
                let equal = uppers.iter().map(|c| u64::from(c[upper as usize])).collect();
                found.push(Ranked { key: upper << 16, above, equal });
                continue;
            }
            if lowers.iter().all(|(u, _)| *u != upper) {
                lowers.push((upper, self.count(Some(upper))?));
            }
            let counts = lowers.iter().find(|(u, _)| *u == upper).map_or(&[][..], |(_, c)| c);
            let (lower, above_here) = bucket(counts, rank.saturating_sub(above));
            let equal = counts.iter().map(|c| u64::from(c[lower as usize])).collect();
            found.push(Ranked { key: upper << 16 | lower, above: above + above_here, equal });
        }
        Ok(found)
    }

    /// The keys at `ranks` from the top, counted from 1.
    pub fn at(&self, ranks: &[u64]) -> Result<Vec<u32>, CheckpointError> {
        Ok(self.ranked(ranks)?.into_iter().map(|r| r.key).collect())
    }

    /// The cuts that keep so many numbers each.
    pub fn cuts(&self, keep: &[u64]) -> Result<Vec<Cut>, CheckpointError> {
        let ranks: Vec<u64> = keep.iter().copied().filter(|k| *k > 0).collect();
        let mut ranked =
            if ranks.is_empty() { Vec::new() } else { self.ranked(&ranks)? }.into_iter();
        let mut cuts = Vec::new();
        for &keep in keep {
            let Some(found) = (keep > 0).then(|| ranked.next()).flatten() else {
                cuts.push(Cut::NONE);
                continue;
            };
            let wanted = keep.saturating_sub(found.above);
            let last_equal = match found.equal.iter().sum::<u64>() > wanted {
                true => self.last_equal(&found, wanted)?,
                false => usize::MAX,
            };
            cuts.push(Cut { key: found.key, last_equal });
        }
        Ok(cuts)
    }

    /// Index of the `wanted`-th of equal numbers, in one pass over the segment in which it lies.
    fn last_equal(&self, found: &Ranked, wanted: u64) -> Result<usize, CheckpointError> {
        let before = |i: usize| found.equal[..i].iter().sum::<u64>();
        let left = |i: usize| wanted.saturating_sub(before(i));
        let places = self.visit(
            |i| left(i) > 0 && left(i) <= found.equal[i],
            |i| (left(i), None),
            |(left, place), index, key| {
                if key == found.key && *left > 0 {
                    *left -= 1;
                    *place = (*left == 0).then_some(index);
                }
            },
        )?;
        Ok(places.into_iter().find_map(|(_, place)| place).unwrap_or(usize::MAX))
    }
}

/// The counter in which the number of `rank` from the top lies, and how many lie in higher ones.
fn bucket(segments: &[Counts], rank: u64) -> (u32, u64) {
    let mut above = 0;
    for bucket in (0..1 << 16).rev() {
        let count: u64 = segments.iter().map(|c| u64::from(c[bucket])).sum();
        if above + count >= rank {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, above)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::OwnedWeight;

    use super::*;

    fn weight(values: &[f32], cols: usize) -> WeightRef {
        let shape = [values.len() / cols, cols];
        Arc::new(OwnedWeight::from_f32("w", values, &shape, Dtype::F32))
    }

    #[test]
    fn keys_keep_the_order_of_numbers() {
        let values = [f32::NEG_INFINITY, -2.0, -1e-30, -0.0, 0.0, 1e-30, 1.5, 2.0];
        for pair in values.windows(2) {
            assert!(ordered(pair[0]) < ordered(pair[1]), "{pair:?}");
        }
        for value in values {
            assert_eq!(unordered(ordered(value)).to_bits(), value.to_bits());
        }
    }

    #[test]
    fn ranks_and_cuts_by_sorting() {
        // Several segments, each value several times.
        let n = 1 << 20;
        let values: Vec<f32> =
            (0..n).map(|i| ((i * 7919) % 52_361) as f32 * 0.01 - 300.0).collect();
        let weight = weight(&values, 1024);
        let keys = |_: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            out.extend(blocks[0].iter().map(|v| ordered(*v)));
        };
        let keyed = Keyed { inputs: &[&weight], keys, short: false };
        let ranks: Vec<u64> = vec![1, 2, 250, 500_000, 999_999, n as u64];
        let found = keyed.at(&ranks).unwrap();
        let cuts = keyed.cuts(&ranks).unwrap();
        let mut sorted: Vec<usize> = (0..n).collect();
        sorted.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        for ((rank, found), cut) in ranks.iter().zip(&found).zip(&cuts) {
            let rank = *rank as usize;
            assert_eq!(unordered(*found), values[sorted[rank - 1]]);
            for (place, &i) in sorted.iter().enumerate() {
                assert_eq!(cut.keeps(ordered(values[i]), i), place < rank, "{rank} {place}");
            }
        }
    }

    #[test]
    fn short_keys_have_the_cuts_of_long_ones() {
        // Several segments of bf16 numbers, with many equal ones at every cut.
        let n = 1 << 20;
        let mut values: Vec<f32> = (0..n).map(|i| ((i * 7919) % 523) as f32 - 261.0).collect();
        elementwise::round(&mut values, Dtype::BF16);
        let weight = weight(&values, 1024);
        let keys = |_: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            out.extend(blocks[0].iter().map(|v| magnitude(*v)));
        };
        let wanted = [1, 3, 1000, 600_001, n as u64 - 1];
        let cuts = |short| Keyed { inputs: &[&weight], keys, short }.cuts(&wanted).unwrap();
        assert_eq!(cuts(true), cuts(false));
        for (wanted, cut) in wanted.iter().zip(cuts(true)) {
            let kept = (0..n).filter(|&i| cut.keeps(magnitude(values[i]), i)).count();
            assert_eq!(kept as u64, *wanted);
        }
    }

    #[test]
    fn exactly_k_are_kept_and_of_equals_the_first() {
        let values = [1.0, -3.0, 3.0, 0.5, -3.0, 2.0];
        let weight = weight(&values, 6);
        let keys = |_: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            out.extend(blocks[0].iter().map(|v| magnitude(*v)));
        };
        let cuts =
            Keyed { inputs: &[&weight], keys, short: false }.cuts(&[0, 1, 2, 3, 4, 5, 6]).unwrap();
        let kept = |cut: &Cut| -> Vec<usize> {
            (0..6).filter(|&i| cut.keeps(magnitude(values[i]), i)).collect()
        };
        let kept: Vec<_> = cuts.iter().map(kept).collect();
        assert_eq!(kept[2], [1, 2]);
        assert_eq!(kept[4], [1, 2, 4, 5]);
        assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    }
}
