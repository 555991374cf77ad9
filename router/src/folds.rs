//! Which prompts are held out together.

use crate::samples::{Sign, Table};

/// Groups of prompts for holding out, and how much each row weighs.
pub(crate) struct Folds {
    /// How many groups; zero if nothing can be held out.
    pub count: usize,
    /// Group of each prompt; none: always used for the fit.
    pub of_prompt: Vec<Option<usize>>,
}

impl Folds {
    /// Splits prompts so that each group holds out one prompt of every expert (or one in `count` of many).
    ///
    /// Holding one prompt of *each* expert out at once needs as many fits as an expert has prompts instead of as many
    /// as there are prompts, and keeps the classes balanced. The forecast errs on the careful side, since each fit lacks
    /// a prompt of every expert. Equal text never stands on both sides: prompts with equal inputs share a group.
    pub fn new(table: &Table, max_folds: usize) -> Self {
        let most = (0..table.experts).map(|e| table.of(e, Sign::Positive).count()).max();
        // Fits run side by side; with many experts fewer of them keep a pass over the tokens affordable.
        let limit = max_folds.min((128 / table.experts).max(2));
        let count = most.unwrap_or(0).min(limit);
        let mut of_prompt = vec![None; table.prompts.len()];
        if count < 2 {
            return Self { count: 0, of_prompt };
        }
        for sign in [Sign::Positive, Sign::Negative] {
            for e in 0..table.experts {
                for (rank, p) in table.of(e, sign).enumerate() {
                    let twin = (0..table.prompts.len())
                        .find(|&q| of_prompt[q].is_some() && table.inputs(q) == table.inputs(p));
                    of_prompt[p] = twin.map_or(Some(rank % count), |q| of_prompt[q]);
                }
            }
        }
        keep_every_expert(table, &mut of_prompt, count);
        let count = if of_prompt.iter().all(Option::is_none) { 0 } else { count };
        Self { count, of_prompt }
    }

    /// Weight of each row in the fit without group `fold` (none: the fit with everything): `[n]`.
    ///
    /// Every expert weighs `1 / experts`, shared evenly by the tokens used; its negatives weigh as much again. Tokens, not prompts,
    /// share evenly: a router is judged token by token, and with equal shares per prompt a prompt of three tokens would
    /// count each of them twenty times as much as one of sixty, though a text's first tokens tell the least.
    pub fn weights(&self, table: &Table, fold: Option<usize>) -> Vec<f64> {
        let mut weights = vec![0.0; table.rows()];
        for e in 0..table.experts {
            for sign in [Sign::Positive, Sign::Negative] {
                let used =
                    || table.of(e, sign).filter(|&p| fold.is_none() || self.of_prompt[p] != fold);
                let tokens: usize = used().map(|p| table.prompts[p].rows.len()).sum();
                let share = 1.0 / (tokens * table.experts) as f64;
                for p in used() {
                    weights[table.prompts[p].rows.clone()].fill(share);
                }
            }
        }
        weights
    }
}

/// No fit may lack an expert: where a group would take the last positive prompt, the expert keeps its prompts.
fn keep_every_expert(table: &Table, of_prompt: &mut [Option<usize>], count: usize) {
    for e in 0..table.experts {
        for fold in 0..count {
            if table.of(e, Sign::Positive).all(|p| of_prompt[p] == Some(fold)) {
                table.of(e, Sign::Positive).for_each(|p| of_prompt[p] = None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Example, Samples};

    fn table(counts: &[usize]) -> Table {
        let values: Vec<Vec<f32>> =
            (0..20).map(|i| (0..2 * (i % 3 + 1)).map(|j| (i * 7 + j) as f32).collect()).collect();
        let mut examples = Vec::new();
        for (expert, &count) in counts.iter().enumerate() {
            for _ in 0..count {
                let inputs = &values[examples.len()][..];
                examples.push(Example { expert, sign: Sign::Positive, inputs });
            }
        }
        Table::new(&Samples { experts: counts.len(), hidden: 2, examples }).unwrap()
    }

    #[test]
    fn one_prompt_of_each_expert_at_a_time() {
        let t = table(&[3, 3]);
        let folds = Folds::new(&t, 8);
        assert_eq!(folds.count, 3);
        assert_eq!(folds.of_prompt, [Some(0), Some(1), Some(2), Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn a_single_prompt_is_never_held_out() {
        let t = table(&[3, 1]);
        assert_eq!(Folds::new(&t, 8).of_prompt, [Some(0), Some(1), Some(2), None]);
        assert_eq!(Folds::new(&table(&[1, 1]), 8).count, 0);
    }

    #[test]
    fn classes_weigh_the_same() {
        let t = table(&[3, 2]);
        let folds = Folds::new(&t, 8);
        for fold in [None, Some(0), Some(1), Some(2)] {
            let w = folds.weights(&t, fold);
            for e in 0..2 {
                let sum: f64 = t
                    .of(e, Sign::Positive)
                    .flat_map(|p| w[t.prompts[p].rows.clone()].to_vec())
                    .sum();
                assert!((sum - 0.5).abs() < 1e-12);
            }
        }
        let w = folds.weights(&t, Some(1));
        assert!(w[t.prompts[1].rows.clone()].iter().all(|&v| v == 0.0));
    }
}
