//! Texts cut into windows, and the order in which they are drawn.

use std::ops::Range;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::TrainingText;

/// A window of a text, with the text's leading tokens before it.
#[derive(Debug)]
pub(super) struct Piece {
    /// A number of its own.
    pub id: usize,
    /// The group whose mean it counts in.
    pub group: usize,
    pub expert: Option<usize>,
    pub skip: usize,
    pub tokens: Vec<u32>,
}

impl Piece {
    /// Places of the tokens whose prediction counts; each is predicted from the place before.
    pub fn scored(&self) -> Range<usize> {
        self.skip.max(1)..self.tokens.len()
    }
}

/// All windows.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// The expert of each group: `None` is the group of texts whose expert is not known.
    pub groups: Vec<Option<usize>>,
    /// Windows to train on, by group.
    pub train: Vec<Vec<Piece>>,
    /// Windows that are held out.
    pub held_out: Vec<Piece>,
    /// Numbers of texts that have no token to predict.
    pub unused: Vec<usize>,
}

impl Pieces {
    /// Cuts texts into windows of at most `window` tokens, leading ones included.
    pub fn cut(texts: &[TrainingText<'_>], window: usize) -> Self {
        let mut groups: Vec<Option<usize>> = texts.iter().map(|t| t.expert).collect();
        groups.sort();
        groups.dedup();
        let train = groups.iter().map(|_| Vec::new()).collect();
        let mut pieces = Self { groups, train, ..Self::default() };
        let mut id = 0;
        for (number, text) in texts.iter().enumerate() {
            let skip = text.skip.min(text.tokens.len());
            let (lead, content) = text.tokens.split_at(skip);
            let group = pieces.groups.iter().position(|g| *g == text.expert).unwrap_or(0);
            let mut used = false;
            for part in content.chunks(window.saturating_sub(skip).max(1)) {
                let tokens = [lead, part].concat();
                let piece = Piece { id, group, expert: text.expert, skip, tokens };
                // Without leading tokens, a last window of one token has nothing to predict it from.
                if piece.scored().is_empty() {
                    continue;
                }
                (used, id) = (true, id + 1);
                if text.held_out {
                    pieces.held_out.push(piece);
                } else {
                    pieces.train[group].push(piece);
                }
            }
            if !used {
                pieces.unused.push(number);
            }
        }
        pieces
    }

    /// The next batch: from each group in turn, windows until its share of `tokens` is reached, at least one.
    ///
    /// Each group goes through its windows in an order of its own for every round, which `seed`, group and round fix;
    /// `drawn` counts the windows that each group has given so far.
    pub fn draw(&self, drawn: &mut [u64], seed: u64, tokens: usize) -> Vec<&Piece> {
        let groups = self.train.iter().filter(|g| !g.is_empty()).count().max(1);
        let mut batch = Vec::new();
        for (group, pieces) in self.train.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            let count = pieces.len() as u64;
            let mut order = (u64::MAX, Vec::new());
            let mut held = 0;
            while held == 0 || held < tokens / groups {
                let (round, place) = (drawn[group] / count, drawn[group] % count);
                if order.0 != round {
                    order = (round, shuffled(pieces.len(), seed, group, round));
                }
                let piece = &pieces[order.1[place as usize]];
                held += piece.tokens.len();
                drawn[group] += 1;
                batch.push(piece);
            }
        }
        batch
    }
}

/// `0..count` in random order (Fisher and Yates).
fn shuffled(count: usize, seed: u64, group: usize, round: u64) -> Vec<usize> {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    random.set_stream(((group as u64) << 40) | round);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tokens: &[u32], expert: Option<usize>, held_out: bool) -> TrainingText<'_> {
        TrainingText { tokens, expert, held_out, skip: 1 }
    }

    #[test]
    fn leading_tokens_stand_before_each_window() {
        let tokens = [9, 1, 2, 3, 4, 5];
        let pieces = Pieces::cut(
            &[
                text(&tokens, Some(2), false),
                text(&tokens[..1], None, false),
                text(&tokens, None, true),
            ],
            4,
        );
        assert_eq!(pieces.groups, [None, Some(2)]);
        let found: Vec<_> = pieces.train[1].iter().map(|p| p.tokens.clone()).collect();
        assert_eq!(found, [vec![9, 1, 2, 3], vec![9, 4, 5]]);
        assert_eq!(pieces.train[1][0].scored(), 1..4);
        assert_eq!((pieces.held_out.len(), pieces.unused), (2, vec![1]));
    }

    #[test]
    fn groups_take_turns_and_no_window_comes_twice_in_a_round() {
        let tokens: Vec<u32> = (0..41).collect();
        let texts = [text(&tokens, Some(0), false), text(&tokens[..11], Some(1), false)];
        let pieces = Pieces::cut(&texts, 6);
        assert_eq!((pieces.train[0].len(), pieces.train[1].len()), (8, 2));
        let mut drawn = vec![0; 2];
        let mut seen = Vec::new();
        for _ in 0..4 {
            let batch = pieces.draw(&mut drawn, 5, 24);
            assert_eq!(batch.iter().filter(|p| p.group == 0).count(), 2);
            assert_eq!(batch.iter().filter(|p| p.group == 1).count(), 2);
            seen.extend(batch.iter().filter(|p| p.group == 0).map(|p| p.id));
        }
        assert_ne!(seen, (0..8).collect::<Vec<_>>());
        seen.sort();
        assert_eq!(seen, (0..8).collect::<Vec<_>>());
        let (mut again, mut other) = (vec![4, 0], vec![4, 0]);
        let ids = |batch: Vec<&Piece>| batch.iter().map(|p| p.id).collect::<Vec<_>>();
        let first = ids(pieces.draw(&mut again, 5, 48));
        assert_ne!(first, ids(pieces.draw(&mut other, 6, 48)));
        assert_eq!(again, other);
    }
}
