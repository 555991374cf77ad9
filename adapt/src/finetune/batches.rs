//! Which lessons come together, and in which order.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use moe_merge_model::expert_training::Lesson;

use super::data::Corpus;
use super::error::FinetuneError;

/// The batches of one round through some documents. Nothing is padded: a batch is lessons of any length, as many as its
/// tokens hold, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// Documents in their order.
    order: Vec<usize>,
    /// Place in the order, and lesson of that document, at which each batch begins; the end comes last.
    starts: Vec<(usize, usize)>,
}

impl Round {
    /// Cuts `order` into batches of at most `tokens` tokens.
    pub fn new(corpus: &Corpus<'_>, order: Vec<usize>, tokens: usize) -> Self {
        let lengths = |document: usize| corpus.lengths(document).collect();
        Self::cut(order, tokens, &lengths)
    }

    fn cut(order: Vec<usize>, tokens: usize, lengths: &dyn Fn(usize) -> Vec<usize>) -> Self {
        let (mut starts, mut held) = (vec![(0, 0)], 0);
        for (place, document) in order.iter().enumerate() {
            for (lesson, length) in lengths(*document).into_iter().enumerate() {
                if held > 0 && held + length > tokens {
                    starts.push((place, lesson));
                    held = 0;
                }
                held += length;
            }
        }
        starts.push((order.len(), 0));
        Self { order, starts }
    }

    /// Batches.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The lessons of a batch.
    ///
    /// # Errors
    /// As [`Corpus::lessons`].
    pub fn batch(&self, corpus: &Corpus<'_>, batch: usize) -> Result<Vec<Lesson>, FinetuneError> {
        let (from, to) = (self.starts[batch], self.starts[batch + 1]);
        let mut lessons = Vec::new();
        for place in from.0..self.order.len().min(to.0 + 1) {
            let all = corpus.lessons(self.order[place])?;
            let first = if place == from.0 { from.1 } else { 0 };
            let last = if place == to.0 { to.1 } else { all.len() };
            lessons.extend(all.into_iter().take(last).skip(first));
        }
        Ok(lessons)
    }
}

/// `items` in random order (Fisher and Yates), which `seed` and `stream` fix.
pub fn shuffled(mut items: Vec<usize>, seed: u64, stream: u64) -> Vec<usize> {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    random.set_stream(stream);
    for last in (1..items.len()).rev() {
        let other = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        items.swap(last, other as usize);
    }
    items
}

/// A number that seed, round and batch fix.
pub fn random_key(seed: u64, round: u64, batch: usize) -> u64 {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    random.set_stream(round);
    // Behind all that an order takes of this stream.
    random.set_word_pos((1 << 40) + 2 * batch as u128);
    random.next_u64()
}

/// Documents `0..count` to train on, and a share of them that is held out: at least one where there are two.
pub fn hold_out(count: usize, share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let order = shuffled((0..count).collect(), seed, u64::MAX);
    let wanted = match share > 0.0 && count > 1 {
        true => ((share * count as f64).round() as usize).clamp(1, count - 1),
        false => 0,
    };
    let (held, train) = order.split_at(wanted);
    let sorted = |part: &[usize]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part
    };
    (sorted(train), sorted(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_as_many_lessons_as_fit() {
        let lengths =
            |document: usize| [vec![4, 4, 2], vec![3], vec![9], vec![1]][document].clone();
        let round = Round::cut(vec![0, 1, 2, 3], 8, &lengths);
        // 4 + 4, 2 + 3, 9 alone, 1.
        assert_eq!(round.starts, [(0, 0), (0, 2), (2, 0), (3, 0), (4, 0)]);
        assert_eq!(round.len(), 4);
    }

    #[test]
    fn something_is_held_out_where_there_are_two() {
        assert_eq!(hold_out(1, 0.5, 0), (vec![0], vec![]));
        let (train, held) = hold_out(40, 0.05, 7);
        assert_eq!((train.len(), held.len()), (38, 2));
        assert_eq!(hold_out(2, 0.01, 0).1.len(), 1);
        assert_eq!(hold_out(40, 0.05, 7), (train, held));
        assert_eq!(hold_out(3, 0.0, 0).1.len(), 0);
        assert_ne!(shuffled((0..9).collect(), 1, 0), shuffled((0..9).collect(), 1, 1));
        let keys =
            [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)].map(|(s, r, b)| random_key(s, r, b));
        assert!((1..4).all(|i| !keys[i..].contains(&keys[i - 1])), "{keys:?}");
    }
}
