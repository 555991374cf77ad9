//! The sequences that routers are fitted to: the prompts, and what can be made of them.
//!
//! A handful of short prompts shows a router little of what it will meet: few beginnings of texts, and no long contexts. Both can
//! be made of the prompts themselves: parts of them begin at every place, and several of one expert one after the other are as
//! long as a window.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;

use moe_merge_router::Sign;
use moe_merge_router::estimators::output_matching::Wanted;

use crate::gates::TokenPrompts;

/// Tokens of a sequence made of several prompts.
const LONG: usize = 128;

/// Such sequences for each expert, at most.
const MOST_LONG: usize = 20;

/// Prompts whose mean length reaches this are long enough as they are.
const LONG_ENOUGH: usize = 96;

/// Tokens of a beginning.
const SHORT: usize = 24;

/// Beginnings for each expert, at most.
const MOST_SHORT: usize = 40;

/// How much the beginnings count beside everything else.
const SHORT_SHARE: f64 = 0.15;

/// Tokens beyond the prompts, at most: more changes nothing.
const MOST_TOKENS: u64 = 24_000;

/// Multiplications that the tokens beyond the prompts may cost, all experts computed for each.
const MOST_WORK: u64 = 250_000_000_000;

/// Tokens that are made of prompts, at most, for a model with so many numbers in its layers.
pub(crate) fn room(weights: u64) -> usize {
    (MOST_WORK / weights.max(1)).min(MOST_TOKENS) as usize
}

/// Sequences with what is wanted of their tokens.
#[derive(Debug, Default)]
pub(crate) struct Lessons {
    /// Each with its bos, where the tokenizer has one.
    pub sequences: Vec<Vec<u32>>,
    /// What is wanted of every token of all sequences.
    pub tokens: Vec<Wanted>,
    /// The prompts themselves, which come first: whose, for or against, and the rows of their tokens without bos.
    pub prompts: Vec<(usize, Sign, std::ops::Range<usize>)>,
}

/// Which sequences count together.
#[derive(Clone, Copy, PartialEq)]
enum Group {
    Whole,
    Short,
    Against,
}

impl Lessons {
    /// * `experts`: prompts of each, with bos if `bos`
    /// * `weights`: numbers in all layers of the model: what a token costs
    /// * `context`: tokens that the model takes at most
    pub fn new(
        experts: &[TokenPrompts],
        bos: bool,
        weights: u64,
        context: usize,
        seed: u64,
    ) -> Self {
        let skip = usize::from(bos);
        let mut made = Vec::new();
        for (expert, prompts) in experts.iter().enumerate() {
            let positive = prompts.positive.iter().map(|p| (p.clone(), expert, Group::Whole));
            let negative = prompts.negative.iter().map(|p| (p.clone(), expert, Group::Against));
            made.extend(positive.chain(negative));
        }
        let prompts = made.len();
        let room = room(weights) / experts.len().max(1);
        for (expert, prompts) in experts.iter().enumerate() {
            // A stream of its own: what one expert gets does not depend on the others.
            let mut random = ChaCha12Rng::seed_from_u64(seed);
            random.set_stream(expert as u64);
            let own: Vec<&[u32]> = prompts
                .positive
                .iter()
                .map(|p| &p[skip.min(p.len())..])
                .filter(|p| !p.is_empty())
                .collect();
            let start = |tokens: &[u32], from: &[u32]| -> Vec<u32> {
                from[..skip].iter().chain(tokens).copied().collect()
            };
            let Some(first) = prompts.positive.first() else { continue };
            let length = LONG.min(context.saturating_sub(skip));
            let total: usize = own.iter().map(|p| p.len()).sum();
            if own.len() > 1 && total < LONG_ENOUGH * own.len() {
                let count = MOST_LONG.min(room * 4 / 5 / length.max(1));
                for _ in 0..count {
                    made.push((
                        start(&joined(&own, length, &mut random), first),
                        expert,
                        Group::Whole,
                    ));
                }
            }
            let long: Vec<&&[u32]> = own.iter().filter(|p| p.len() > SHORT + 2).collect();
            let count = MOST_SHORT.min(room / 5 / SHORT);
            if !long.is_empty() {
                for _ in 0..count {
                    let text = long[random.random_range(0..long.len())];
                    let from = random.random_range(1..text.len() - SHORT);
                    made.push((start(&text[from..from + SHORT], first), expert, Group::Short));
                }
            }
        }
        Self::weigh(made, prompts, experts.len(), skip)
    }

    /// Every expert counts the same, its beginnings with [`SHORT_SHARE`] of that, its negative prompts as much again.
    fn weigh(
        made: Vec<(Vec<u32>, usize, Group)>,
        prompts: usize,
        experts: usize,
        skip: usize,
    ) -> Self {
        let mut counts = vec![[0usize; 3]; experts];
        for (tokens, expert, group) in &made {
            counts[*expert][*group as usize] += tokens.len().saturating_sub(skip);
        }
        let mut lessons = Self::default();
        for (i, (tokens, expert, group)) in made.into_iter().enumerate() {
            let of = counts[expert];
            let share = match group {
                Group::Whole if of[Group::Short as usize] == 0 => 1.0,
                Group::Whole => 1.0 - SHORT_SHARE,
                Group::Short => SHORT_SHARE,
                Group::Against => 1.0,
            };
            let weight = share / of[group as usize].max(1) as f64;
            let start = lessons.tokens.len();
            lessons.tokens.extend((0..tokens.len()).map(|at| Wanted {
                expert,
                against: group == Group::Against,
                weight: if at < skip { 0.0 } else { weight },
            }));
            if i < prompts {
                let sign = if group == Group::Against { Sign::Negative } else { Sign::Positive };
                let rows = (start + skip).min(lessons.tokens.len())..lessons.tokens.len();
                lessons.prompts.push((expert, sign, rows));
            }
            lessons.sequences.push(tokens);
        }
        lessons
    }
}

/// Prompts drawn one after the other until there are `length` tokens; the first from a place in its middle.
fn joined(prompts: &[&[u32]], length: usize, random: &mut ChaCha12Rng) -> Vec<u32> {
    let mut tokens = Vec::new();
    while tokens.len() < length {
        let prompt = prompts[random.random_range(0..prompts.len())];
        let from = match tokens.len() {
            0 => random.random_range(0..prompt.len().saturating_sub(4).max(1)),
            _ => 0,
        };
        tokens.extend_from_slice(&prompt[from..]);
    }
    tokens.truncate(length);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(lengths: &[usize]) -> TokenPrompts {
        let text = |&n: &usize| [1].into_iter().chain(10..10 + n as u32).collect();
        TokenPrompts { positive: lengths.iter().map(text).collect(), negative: Vec::new() }
    }

    #[test]
    fn experts_count_the_same_and_bos_nothing() {
        let mut second = prompts(&[30]);
        second.negative = vec![vec![1, 5, 6]];
        let lessons = Lessons::new(&[prompts(&[40, 50, 60]), second], true, 1000, 512, 0);
        let sum = |expert, against| -> f64 {
            let of = |t: &&Wanted| t.expert == expert && t.against == against;
            lessons.tokens.iter().filter(of).map(|t| t.weight).sum()
        };
        assert!((sum(0, false) - 1.0).abs() < 1e-9 && (sum(1, false) - 1.0).abs() < 1e-9);
        assert!((sum(1, true) - 1.0).abs() < 1e-9);
        let mut at = 0;
        for sequence in &lessons.sequences {
            assert_eq!((sequence[0], lessons.tokens[at].weight), (1, 0.0));
            at += sequence.len();
        }
        assert_eq!(at, lessons.tokens.len());
        assert_eq!(lessons.prompts.len(), 5);
        assert_eq!(lessons.prompts[0], (0, Sign::Positive, 1..41));
        assert!(lessons.sequences.len() > 60, "beginnings and joined prompts");
        assert!(lessons.sequences.iter().any(|s| s.len() == 1 + LONG));
    }

    #[test]
    fn a_large_model_gets_its_prompts_alone() {
        let lessons = Lessons::new(&[prompts(&[40]), prompts(&[40])], true, u64::MAX, 512, 0);
        assert_eq!(lessons.sequences.len(), 2);
    }
}
