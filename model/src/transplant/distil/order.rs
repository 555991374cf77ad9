//! Which texts a step draws.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Texts in an order of their own for every round.
pub(super) struct Order {
    lengths: Vec<usize>,
    random: ChaCha12Rng,
    left: Vec<usize>,
}

impl Order {
    /// * `stream`: orders with the same seed and another stream have nothing to do with each other
    pub fn new(texts: &[Vec<u32>], seed: u64, stream: u64) -> Self {
        let lengths = texts.iter().map(Vec::len).collect();
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        random.set_stream(stream);
        Self { lengths, random, left: Vec::new() }
    }

    /// Numbers of the next texts: of `tokens` tokens or a little more, and not more texts than there are.
    pub fn next(&mut self, tokens: usize) -> Vec<usize> {
        let (mut batch, mut filled) = (Vec::new(), 0);
        while filled < tokens && batch.len() < self.lengths.len() {
            let Some(text) = self.left.pop() else {
                self.left = (0..self.lengths.len()).collect();
                for i in (1..self.left.len()).rev() {
                    let j = self.random.next_u64() % (i as u64 + 1);
                    self.left.swap(i, j as usize);
                }
                continue;
            };
            filled += self.lengths[text];
            batch.push(text);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_is_drawn_once_a_round() {
        let texts = vec![vec![0; 10]; 6];
        let mut order = Order::new(&texts, 1, 0);
        let mut seen: Vec<usize> = (0..3).flat_map(|_| order.next(20)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        assert_eq!(order.next(1000).len(), 6);
    }
}
