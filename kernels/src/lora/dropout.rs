//! Dropout of what enters a factor `a`.

use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};

/// Inverted dropout: each number of an input becomes 0 with probability `share`, and `1 / (1 - share)` times itself
/// otherwise.
///
/// Whether the number in row `t` and column `c` of `x [tokens, in]` stays depends on `key`, `t` and `c` alone (splitmix64 as a
/// counter), so the way back and any number of threads see what the way forward saw.
///
/// # Source
/// Srivastava et al., Dropout (2014); where PEFT has it: `lora_B(lora_A(lora_dropout(x)))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability with which a number becomes 0; below 1.
    pub share: f32,
    /// Which numbers do.
    pub key: u64,
}

/// Rows of one task. Fixed, as everything that splits work.
const ROWS: usize = 96;

impl Dropout {
    /// `x [tokens, cols]` with some numbers left out.
    pub(crate) fn of(&self, x: &[f32], cols: usize) -> Scratch {
        let mut out = Scratch::new(x.len());
        let parts = Parts::new(&mut out);
        for_each(x.len().div_ceil((ROWS * cols).max(1)), x.len() >= 1 << 16, |task| {
            let from = task * ROWS * cols;
            let x = &x[from..x.len().min(from + ROWS * cols)];
            // SAFETY: the rows of this task.
            let out = unsafe { parts.range(from, x.len()) };
            out.copy_from_slice(x);
            self.apply(from, out);
        });
        out
    }

    /// Leaves out some of `values`, the first of which is number `from` of the matrix, counted row by row.
    pub(crate) fn apply(&self, from: usize, values: &mut [f32]) {
        let least = (f64::from(self.share) * (1u64 << 32) as f64) as u32;
        let scale = 1.0 / (1.0 - self.share);
        for (i, value) in values.iter_mut().enumerate() {
            let stays = (mixed(self.key, (from + i) as u64) >> 32) as u32 >= least;
            *value *= if stays { scale } else { 0.0 };
        }
    }
}

/// Number `at` of the stream that `key` begins (splitmix64).
fn mixed(key: u64, at: u64) -> u64 {
    let mut z = key.wrapping_add(at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe_block::tests::{bytes, lora_linear, lora_linear_backward, numbers};
    use crate::view::MatView;
    use crate::{Activation, Dtype, Exec, ExpertLora, ExpertView, LoraPair, MoeBlock, Routing};

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn a_share_is_left_out_and_the_mean_stays() {
        for share in [0.1, 0.5] {
            let x = vec![1.0; 40_000];
            let dropped = Dropout { share, key: 7 }.of(&x, 100);
            let gone = dropped.iter().filter(|v| **v == 0.0).count() as f32 / 40_000.0;
            assert!((gone - share).abs() < 0.01, "{gone}");
            assert!(dropped.iter().all(|v| *v == 0.0 || *v == 1.0 / (1.0 - share)));
            // Each row and each column alike.
            for row in dropped.chunks_exact(100) {
                let gone = row.iter().filter(|v| **v == 0.0).count() as f32 / 100.0;
                assert!((gone - share).abs() < 0.25, "{gone}");
            }
            let other = Dropout { share, key: 8 }.of(&x, 100);
            assert!(*other != *dropped);
        }
    }

    #[test]
    fn the_mean_over_many_keys_is_the_layer_without_dropout() {
        let (tokens, cols, rows, rank) = (3, 20, 5, 2);
        let (w, x) = (bytes(rows * cols, 1), numbers(tokens * cols, 2));
        let (a, b) = (numbers(rank * cols, 3), numbers(rows * rank, 4));
        let view = MatView::new(&w, Dtype::BF16, rows, cols).unwrap();
        let exec = Exec::default();
        let run = |dropout| {
            let pair = LoraPair { a: &a, b: &b, rank, scale: 0.5, dropout };
            let mut out = vec![0.0; tokens * rows];
            lora_linear(&x, view, None, &pair, &mut out, &exec).unwrap();
            out
        };
        let plain = run(None);
        assert_eq!(run(Some(Dropout { share: 0.0, key: 3 })), plain);
        let mut mean = vec![0.0; plain.len()];
        let keys = 20_000;
        for key in 0..keys {
            let found = run(Some(Dropout { share: 0.3, key: mixed(1, key) }));
            mean.iter_mut().zip(found).for_each(|(m, f)| *m += f64::from(f) / keys as f64);
        }
        for (mean, plain) in mean.iter().zip(plain) {
            // The sum of some 40 terms around 0.1: its mean over so many keys has a deviation of about 0.005.
            assert!((mean - f64::from(plain)).abs() < 0.03, "{mean} {plain}");
        }
    }

    #[test]
    fn gradients_see_what_the_way_forward_saw() {
        let (tokens, hidden, inter) = (6, 5, 4);
        let spare = [[1, 2, 3], [4, 5, 6]].map(|seeds| seeds.map(|s| bytes(hidden * inter, s)));
        let experts = spare.each_ref().map(|[gate, up, down]| ExpertView {
            gate: MatView::new(gate, Dtype::BF16, inter, hidden).unwrap(),
            up: MatView::new(up, Dtype::BF16, inter, hidden).unwrap(),
            down: MatView::new(down, Dtype::BF16, hidden, inter).unwrap(),
        });
        let routing = Routing {
            tokens,
            top_k: 1,
            ids: vec![0, 1, 1, 0, 1, 1],
            weights: vec![0.5, 0.25, 1.0, 0.75, 0.5, 1.5],
        };
        let exec = Exec::default();
        let d_out = numbers(tokens * hidden, 9);
        // x, then a and b of gate, up and down, of rank 2.
        let sizes =
            [tokens * hidden, 2 * hidden, inter * 2, 2 * hidden, inter * 2, 2 * inter, hidden * 2];
        let start: Vec<Vec<f32>> =
            sizes.iter().enumerate().map(|(i, n)| numbers(*n, 20 + i)).collect();
        fn block<'a>(
            shared: (&'a Routing, &'a [ExpertView<'a>], &'a Exec),
            x: &'a [f32],
            lora: ExpertLora<'a>,
        ) -> MoeBlock<'a> {
            let ((routing, experts, exec), activation) = (shared, Activation::Silu);
            MoeBlock { x, routing, experts, activation, lora: Some(lora), exec }
        }
        let shared = (&routing, &experts[..], &exec);
        let value = |inputs: &[Vec<f32>]| {
            let [gate, up, down] = pairs_of(inputs).map(Some);
            let lora = ExpertLora { expert: 1, gate, up, down };
            let block = block(shared, &inputs[0], lora);
            let mut out = vec![0.0; tokens * hidden];
            block.forward(&block.inner().unwrap(), &mut out).unwrap();
            dot(&out, &d_out)
        };
        let [gate, up, down] = pairs_of(&start).map(Some);
        let pairs = ExpertLora { expert: 1, gate, up, down };
        let mut d_x = vec![0.0; tokens * hidden];
        let block = block(shared, &start[0], pairs);
        let back =
            |d_x: Option<&mut [f32]>| block.backward(block.inner().unwrap(), &d_out, d_x).unwrap();
        let found = back(Some(&mut d_x));
        let [gate, up, down] = [found.gate, found.up, found.down].map(Option::unwrap);
        let found = [d_x, gate.a, gate.b, up.a, up.b, down.a, down.b];
        for (which, found) in found.iter().enumerate() {
            for (i, found) in found.iter().enumerate() {
                let moved = |by: f32| {
                    let mut inputs = start.clone();
                    inputs[which][i] += by;
                    value(&inputs)
                };
                let slope = (moved(3e-3) - moved(-3e-3)) / 6e-3;
                let near = 3e-3 * slope.abs().max(1.0);
                assert!((f64::from(*found) - slope).abs() < near, "{which} {i}: {found} {slope}");
            }
        }
        // Without an input gradient the factors' stay.
        assert_eq!(back(None).down.unwrap().a, found[5]);
    }

    /// The pairs among what a test moves, each with a key of its own.
    fn pairs_of(inputs: &[Vec<f32>]) -> [LoraPair<'_>; 3] {
        [1, 3, 5].map(|at| {
            let dropout = Some(Dropout { share: 0.4, key: at as u64 });
            LoraPair { a: &inputs[at], b: &inputs[at + 1], rank: 2, scale: 0.5, dropout }
        })
    }

    #[test]
    fn a_linear_layer_has_the_gradients_of_its_differences() {
        let (tokens, cols, rows) = (5, 6, 4);
        let w = bytes(rows * cols, 5);
        let view = MatView::new(&w, Dtype::BF16, rows, cols).unwrap();
        let (exec, dropout) = (Exec::default(), Some(Dropout { share: 0.3, key: 11 }));
        let start = [numbers(tokens * cols, 1), numbers(2 * cols, 2), numbers(rows * 2, 3)];
        let dy = numbers(tokens * rows, 4);
        let value = |[x, a, b]: &[Vec<f32>; 3]| {
            let pair = LoraPair { a, b, rank: 2, scale: 0.5, dropout };
            let mut out = vec![0.0; tokens * rows];
            lora_linear(x, view, None, &pair, &mut out, &exec).unwrap();
            dot(&out, &dy)
        };
        let [x, a, b] = &start;
        let pair = LoraPair { a, b, rank: 2, scale: 0.5, dropout };
        let mut dx = vec![0.0; tokens * cols];
        let found = lora_linear_backward(x, view, &pair, &dy, Some(&mut dx), &exec);
        let found = found.unwrap();
        for (which, found) in [dx, found.a, found.b].iter().enumerate() {
            for (i, found) in found.iter().enumerate() {
                let moved = |by: f32| {
                    let mut inputs = start.clone();
                    inputs[which][i] += by;
                    value(&inputs)
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((f64::from(*found) - slope).abs() < 2e-3, "{which} {i}: {found} {slope}");
            }
        }
    }
}
