//! Backward products with bf16 weights on bf16 dot products: the weight is turned, block by block, and then multiplied like any
//! other.

use crate::cast::Dtype;
use crate::dense::Into;
use crate::error::KernelError;
use crate::exec::Exec;
use crate::linear::linear;
use crate::panel::Form;
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;
use crate::view::MatView;

/// Tokens from which turning a weight costs less than it gains.
const WORTH: usize = 64;

/// Columns of a weight that one task turns.
const COLS: usize = 128;

/// Whether a product backwards, with so many tokens, is made so.
pub(crate) fn worth(w: MatView<'_>, tokens: usize, exec: &Exec) -> bool {
    tokens >= WORTH && Form::of(w.dtype(), exec) == Form::Pairs && w.rows().is_multiple_of(2)
}

/// A bf16 weight `[rows, cols]`, turned: `[cols, rows]`.
struct Turned {
    /// Pairs of numbers as bits, `[cols, rows / 2]`.
    words: Scratch,
    rows: usize,
    cols: usize,
}

impl Turned {
    fn new(w: MatView<'_>, exec: &Exec) -> Self {
        let (rows, cols) = (w.rows(), w.cols());
        let half = rows / 2;
        let mut words = Scratch::new(half * cols);
        let out = Parts::new(&mut words);
        for_each(cols.div_ceil(COLS), rows * cols >= 1 << 16, |task| {
            let from = task * COLS;
            let width = COLS.min(cols - from);
            let mut pairs = Scratch::new(half * width); // [rows / 2, width], a pair of rows in each word
            for (pair, words) in pairs.chunks_exact_mut(width).enumerate() {
                let part = |row: usize| &w.row(row)[2 * from..2 * (from + width)];
                let (low, high) = (part(2 * pair), part(2 * pair + 1));
                for ((word, low), high) in
                    words.iter_mut().zip(low.chunks_exact(2)).zip(high.chunks_exact(2))
                {
                    *word = f32::from_bits(u32::from_le_bytes([low[0], low[1], high[0], high[1]]));
                }
            }
            // SAFETY: the rows of this task.
            let to = unsafe { out.range(from * half, width * half) };
            transpose(exec.isa, (half, width), (&pairs, width), (to, half));
        });
        Self { words, rows, cols }
    }

    fn view(&self) -> Result<MatView<'_>, KernelError> {
        MatView::new(bytemuck::cast_slice(&self.words), Dtype::BF16, self.cols, self.rows)
    }
}

/// `dx = dy w`, or added to it.
pub(crate) fn product(
    dy: &[f32],
    w: MatView<'_>,
    dx: &mut [f32],
    into: Into,
    exec: &Exec,
) -> Result<(), KernelError> {
    let turned = Turned::new(w, exec);
    match into {
        Into::Overwrite => linear(dy, turned.view()?, None, dx, exec),
        Into::Add => {
            let mut more = Scratch::new(dx.len());
            linear(dy, turned.view()?, None, &mut more, exec)?;
            dx.iter_mut().zip(&*more).for_each(|(d, m)| *d += m);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe_block::tests::{apart, bytes, numbers};
    use crate::{Isa, linear_backward};

    fn fast() -> Option<Exec> {
        let exec = Exec { isa: Isa::Avx512Bf16, ..Exec::fast() };
        exec.isa.available().then_some(exec)
    }

    #[test]
    fn turned_weights_are_transposes() {
        let exec = Exec::default();
        for (rows, cols) in [(2, 1), (6, 5), (34, 300), (128, 129)] {
            let w = bytes(rows * cols, 3);
            let turned = Turned::new(MatView::new(&w, Dtype::BF16, rows, cols).unwrap(), &exec);
            let view = turned.view().unwrap();
            assert_eq!((view.rows(), view.cols()), (cols, rows));
            for r in 0..rows {
                for c in 0..cols {
                    let at = 2 * (r * cols + c);
                    assert_eq!(view.row(c)[2 * r..2 * r + 2], w[at..at + 2], "{r} {c}");
                }
            }
        }
    }

    #[test]
    fn fast_products_are_near_exact_ones() {
        let Some(exec) = fast() else { return };
        let (tokens, rows, cols) = (70, 96, 130);
        let w = bytes(rows * cols, 1);
        let view = MatView::new(&w, Dtype::BF16, rows, cols).unwrap();
        let dy = numbers(tokens * rows, 2);
        let run = |exec: &Exec| {
            let mut dx = vec![1.0; tokens * cols];
            linear_backward(&dy, view, &mut dx, Into::Add, exec).unwrap();
            dx
        };
        assert!(worth(view, tokens, &exec));
        assert!(apart(&run(&exec), &run(&Exec::default())) < 5e-3);
    }
}
