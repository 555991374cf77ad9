//! Which numbers of a task vector are kept.

use blake3::Hasher;
use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};
use moe_merge_kernels::elementwise;
use moe_merge_kernels::random::Words;

use super::gram::subtract;
use super::order::{Cut, Keyed, magnitude};
use super::scan;

/// How the numbers are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sparsifier {
    /// All of them.
    None,
    /// The largest.
    Magnitude,
    /// The largest but for the very largest.
    Outliers,
    /// Each by chance, all alike.
    Random,
    /// Each by chance, larger ones of a row with a better one.
    ByRank,
}

/// What is to be kept of one task vector.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub sparsifier: Sparsifier,
    /// Share that is kept.
    pub density: f64,
    /// `gamma`: share of the largest that go; `epsilon`: half the spread of the chances in a row.
    pub extra: f64,
    /// Whether the sum of absolute values is restored.
    pub rescale: bool,
    /// Key of the random stream.
    pub key: [u8; 32],
}

/// The key of the random stream for one tensor of one model.
pub(super) fn key(seed: u64, tensor: &str, model: usize) -> [u8; 32] {
    let mut hasher = Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&(model as u64).to_le_bytes());
    hasher.update(tensor.as_bytes());
    *hasher.finalize().as_bytes()
}

/// What is kept of one task vector, and its factor.
#[derive(Debug, Clone)]
pub(super) struct Sparse {
    keep: Keep,
    scale: f32,
}

#[derive(Debug, Clone)]
enum Keep {
    All,
    Nothing,
    Largest(Cut),
    /// Kept by the first cut, but not by the second.
    Between(Cut, Cut),
    Random {
        words: Words,
        density: f64,
    },
    ByRank {
        words: Words,
        density: f64,
        epsilon: f64,
    },
}

impl Wanted {
    /// Finds out what is kept of `model - base`.
    pub fn find(
        &self,
        model: &WeightRef,
        base: &WeightRef,
        dtype: Dtype,
    ) -> Result<Sparse, CheckpointError> {
        let everything = self.density >= 1.0 || self.sparsifier == Sparsifier::None;
        if everything || model.is_empty() {
            return Ok(Sparse { keep: Keep::All, scale: 1.0 });
        }
        let keep = self.choose(model, base, dtype)?;
        let mut sparse = Sparse { keep, scale: 1.0 };
        if self.rescale {
            sparse.scale = restoring_factor(&sparse, model, base, dtype)?;
        }
        Ok(sparse)
    }

    fn choose(
        &self,
        model: &WeightRef,
        base: &WeightRef,
        dtype: Dtype,
    ) -> Result<Keep, CheckpointError> {
        let keys = |_: usize, blocks: &[Vec<f32>], out: &mut Vec<u32>| {
            let mut differences = Vec::new();
            subtract(&blocks[0], &blocks[1], dtype, &mut differences);
            out.resize(differences.len(), 0);
            elementwise::magnitudes(&differences, out);
        };
        let keyed = Keyed { inputs: &[model, base], keys, short: dtype == Dtype::BF16 };
        let n = model.len() as f64;
        let (words, density) = (Words::new(self.key), self.density);
        Ok(match self.sparsifier {
            _ if density <= 0.0 && self.sparsifier != Sparsifier::Outliers => Keep::Nothing,
            Sparsifier::None => Keep::All,
            Sparsifier::Magnitude => {
                let keep = ((density * n) as u64).max(1);
                keyed.cuts(&[keep])?.first().map_or(Keep::Nothing, |c| Keep::Largest(*c))
            }
            Sparsifier::Outliers => {
                let (all, target) = (model.len() as u64, (density * n) as u64);
                let largest = (self.extra * n) as u64;
                // Positions from the bottom: those below `from` go, and those from `from + target` on.
                let from = all.saturating_sub(target).saturating_sub(largest);
                match keyed.cuts(&[all - from, all - from - target])?.as_slice() {
                    [low, high] => Keep::Between(*low, *high),
                    _ => Keep::Nothing,
                }
            }
            Sparsifier::Random => Keep::Random { words, density },
            Sparsifier::ByRank => Keep::ByRank { words, density, epsilon: self.extra },
        })
    }
}

/// The sum of all absolute values over that of the kept ones; 1 where either is nearly zero.
fn restoring_factor(
    sparse: &Sparse,
    model: &WeightRef,
    base: &WeightRef,
    dtype: Dtype,
) -> Result<f32, CheckpointError> {
    let cols = model.cols();
    let parts = scan(
        &[model, base],
        |_| ([0f64; 2], Vec::new()),
        |(sums, values), first, blocks| {
            subtract(&blocks[0], &blocks[1], dtype, values);
            elementwise::add_absolute(values, &mut sums[0]);
            sparse.mask(first, cols, values);
            elementwise::add_absolute(values, &mut sums[1]);
        },
    )?;
    let sum = |i: usize| parts.iter().map(|(sums, _)| sums[i]).sum::<f64>();
    let (all, kept) = (sum(0), sum(1));
    Ok(if all < 1e-7 || kept < 1e-7 { 1.0 } else { (all / kept) as f32 })
}

/// Words of a random stream that lie below this are a share `p` of all.
fn threshold(p: f64) -> u64 {
    (p.clamp(0.0, 1.0) * 4_294_967_296.0) as u64
}

impl Sparse {
    /// Zeroes what is not kept and scales the rest. `values`: whole rows of differences from the flat index `first` on.
    pub fn apply(&self, first: usize, cols: usize, dtype: Dtype, values: &mut [f32]) {
        self.mask(first, cols, values);
        if self.scale != 1.0 {
            elementwise::scale(values, self.scale, dtype);
        }
    }

    fn mask(&self, first: usize, cols: usize, values: &mut [f32]) {
        match &self.keep {
            Keep::All => {}
            Keep::Nothing => values.fill(0.0),
            Keep::Largest(cut) => cut.keep(values, first),
            Keep::Between(low, high) => {
                low.keep(values, first);
                high.drop(values, first);
            }
            Keep::Random { words: stream, density } => {
                let mut words = [0; DRAWN];
                for (i, values) in values.chunks_mut(DRAWN).enumerate() {
                    let words = &mut words[..values.len()];
                    stream.fill((first + i * DRAWN) as u64, words);
                    elementwise::zero_by_chance(values, words, threshold(*density));
                }
            }
            Keep::ByRank { words, density, epsilon } => {
                let cols = cols.max(1);
                let mut by_rank = ByRank::new(cols, *density, *epsilon);
                for (i, row) in values.chunks_mut(cols).enumerate() {
                    by_rank.mask(row, words, first + i * cols);
                }
            }
        }
    }
}

/// Random words drawn at a time.
const DRAWN: usize = 1024;

/// Keeps each number of a row with a chance that rises with its rank.
struct ByRank {
    /// Words of the random stream below which a number is kept, by rank.
    below: Vec<u32>,
    /// Magnitudes and places of a row, in order, and room to sort them.
    order: Vec<u64>,
    room: Vec<u64>,
    /// The same words by place.
    thresholds: Vec<u32>,
    words: Vec<u32>,
}

impl ByRank {
    /// With the chance `density - epsilon + 2 epsilon rank/(cols-1)`, `rank` by magnitude from 0.
    fn new(cols: usize, density: f64, epsilon: f64) -> Self {
        let last = cols.saturating_sub(1);
        let place = |rank: usize| if last == 0 { 0.5 } else { rank as f64 / last as f64 };
        // A chance is below 1: the threshold fits.
        let chance = |rank| threshold(density - epsilon + 2.0 * epsilon * place(rank)) as u32;
        let below = (0..cols).map(chance).collect();
        let (order, room) = (Vec::new(), vec![0; cols]);
        Self { below, order, room, thresholds: vec![0; cols], words: vec![0; cols] }
    }

    /// `first`: the flat index at which the row begins.
    fn mask(&mut self, row: &mut [f32], words: &Words, first: usize) {
        // Magnitude above, place below: sorted by the former, equal ones stay in place.
        let key = |(i, v): (usize, &f32)| u64::from(magnitude(*v)) << 32 | i as u64;
        self.order.clear();
        self.order.extend(row.iter().enumerate().map(key));
        sort_upper(&mut self.order, &mut self.room);
        words.fill(first as u64, &mut self.words);
        for (key, below) in self.order.iter().zip(&self.below) {
            self.thresholds[*key as u32 as usize] = *below;
        }
        elementwise::zero_by_chances(row, &self.words, &self.thresholds);
    }
}

/// Sorts by the upper halves, byte by byte; what is equal there stays in order. `room` is as long as `keys`.
fn sort_upper(keys: &mut Vec<u64>, room: &mut Vec<u64>) {
    let first = keys.first().copied().unwrap_or_default();
    let differing = keys.iter().fold(0, |all, key| all | key ^ first);
    // Where all have the same byte, as the lower ones of bf16 numbers, there is nothing to sort.
    for shift in (32..64).step_by(8).filter(|shift| differing >> shift & 0xff != 0) {
        let byte = |key: &u64| (key >> shift) as usize & 0xff;
        // Equal neighbours would wait for each other's counter.
        let mut counts = [[0u32; 256]; 2];
        for pair in keys.chunks(2) {
            pair.iter().zip(&mut counts).for_each(|(key, counts)| counts[byte(key)] += 1);
        }
        let [mut counts, others] = counts;
        counts.iter_mut().zip(others).for_each(|(count, other)| *count += other);
        let mut start = 0;
        for count in &mut counts {
            start += std::mem::replace(count, start);
        }
        for key in keys.iter() {
            let place = &mut counts[byte(key)];
            room[*place as usize] = *key;
            *place += 1;
        }
        std::mem::swap(keys, room);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_takes_one_word_of_the_stream_for_each_number() {
        let (words, first, n) = (Words::new(key(7, "w", 1)), 77, 3003);
        let keep = Keep::Random { words, density: 0.3 };
        let mut values: Vec<f32> = (1..=n).map(|i| i as f32).collect();
        Sparse { keep, scale: 1.0 }.mask(first, n, &mut values);
        let (mut drawn, below) = (vec![0; n], threshold(0.3));
        words.fill(first as u64, &mut drawn);
        for (i, (v, word)) in values.iter().zip(drawn).enumerate() {
            let expected = if u64::from(word) < below { (i + 1) as f32 } else { 0.0 };
            assert_eq!(*v, expected, "number {i}");
        }
    }

    #[test]
    fn upper_halves_are_sorted_and_equal_ones_keep_their_order() {
        for mask in [u32::MAX, 0xffff_0000, 0x3f, 0] {
            let key = |i: u64| (u64::from((i * 2_654_435_761) as u32 & mask) << 32) | i;
            let mut keys: Vec<u64> = (0..1003).map(key).collect();
            let mut expected = keys.clone();
            expected.sort_unstable();
            sort_upper(&mut keys, &mut vec![0; 1003]);
            assert_eq!(keys, expected);
        }
        sort_upper(&mut Vec::new(), &mut Vec::new());
    }
}
