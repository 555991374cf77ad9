//! Gradients through products with weights as stored.

use std::ops::Range;

use rayon::prelude::*;

use crate::cast;
use crate::dense::{Dense, Into, matmul};
use crate::error::KernelError;
use crate::view::MatView;

/// Tokens and columns of one task, and weight rows widened at a time. Fixed, so that the split (and with it every bit
/// of the result) does not depend on the number of threads.
const TOKENS: usize = 256;
const COLS: usize = 128;
const ROWS: usize = 256;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 18;

/// Gradient of [`crate::linear()`] with respect to its input: `dx[t, c] = sum_r dy[t, r] * w[r, c]`.
///
/// * `dy`: `[tokens, w.rows()]`; `dx`: `[tokens, w.cols()]`, overwritten or added to
/// * f32 sums; the weight is read as stored and widened block by block
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit the weight.
pub fn linear_backward(
    dy: &[f32],
    w: MatView<'_>,
    dx: &mut [f32],
    into: Into,
) -> Result<(), KernelError> {
    let (m, k) = (w.rows(), w.cols());
    let tokens = dy.len().checked_div(m).unwrap_or(dx.len() / k.max(1));
    KernelError::check("gradient of a linear output", tokens * m, dy.len())?;
    KernelError::check("gradient of a linear input", tokens * k, dx.len())?;
    if dx.is_empty() {
        return Ok(());
    }
    let across = k.div_ceil(COLS);
    let tile = |index: usize| {
        let (t, c) = (index / across * TOKENS, index % across * COLS);
        (t..tokens.min(t + TOKENS), c..k.min(c + COLS))
    };
    let task = |index: usize| {
        let (tokens, cols) = tile(index);
        product(&dy[tokens.start * m..tokens.end * m], w, cols)
    };
    let tiles = tokens.div_ceil(TOKENS) * across;
    let products: Vec<Vec<f32>> = if tokens * m * k < ALONE_BELOW {
        (0..tiles).map(task).collect::<Result<_, _>>()?
    } else {
        (0..tiles).into_par_iter().map(task).collect::<Result<_, _>>()?
    };
    for (index, product) in products.iter().enumerate() {
        let (tokens, cols) = tile(index);
        for (token, row) in tokens.zip(product.chunks_exact(cols.len())) {
            let out = &mut dx[token * k + cols.start..token * k + cols.end];
            match into {
                Into::Overwrite => out.copy_from_slice(row),
                Into::Add => out.iter_mut().zip(row).for_each(|(o, v)| *o += v),
            }
        }
    }
    Ok(())
}

/// `dy w[:, cols]`, `[tokens, cols.len()]`, summed over blocks of weight rows from the first to the last.
fn product(dy: &[f32], w: MatView<'_>, cols: Range<usize>) -> Result<Vec<f32>, KernelError> {
    let (m, size) = (w.rows(), w.dtype().size());
    let tokens = dy.len().checked_div(m).unwrap_or(0);
    let mut out = vec![0.0; tokens * cols.len()];
    let mut wide = vec![0.0; m.min(ROWS) * cols.len()];
    for from in (0..m).step_by(ROWS) {
        let rows = from..m.min(from + ROWS);
        let wide = &mut wide[..rows.len() * cols.len()];
        for (row, wide) in rows.clone().zip(wide.chunks_exact_mut(cols.len())) {
            cast::widen(&w.row(row)[cols.start * size..cols.end * size], w.dtype(), wide);
        }
        let dy = Dense::new(dy, tokens, m)?.columns(rows.clone());
        matmul(dy, Dense::new(wide, rows.len(), cols.len())?, &mut out, Into::Add)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 61) as f32 / 32.0 - 1.0).collect()
    }

    #[test]
    fn equals_the_transposed_sum() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (tokens, rows, cols) in [(1, 1, 1), (3, 5, 130), (300, 17, 9), (4, 600, 140)] {
                let (w, dy) = (numbers(rows * cols, 1), numbers(tokens * rows, 2));
                // At an odd offset, as tensors may lie in a file; the values are exact in every dtype.
                let mut bytes = vec![0; w.len() * dtype.size() + 1];
                cast::narrow(&w, dtype, &mut bytes[1..]);
                let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
                let mut dx = vec![1.0; tokens * cols];
                linear_backward(&dy, view, &mut dx, Into::Overwrite).unwrap();
                let mut twice = dx.clone();
                linear_backward(&dy, view, &mut twice, Into::Add).unwrap();
                for (i, (once, twice)) in dx.iter().zip(twice).enumerate() {
                    let (t, c) = (i / cols, i % cols);
                    let sum: f64 = (0..rows)
                        .map(|r| f64::from(dy[t * rows + r]) * f64::from(w[r * cols + c]))
                        .sum();
                    assert!((f64::from(*once) - sum).abs() < 1e-3, "{dtype} {t} {c}");
                    assert_eq!(twice, 2.0 * once);
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (w, dy) = (numbers(500 * 300, 3), numbers(600 * 500, 4));
        let mut bytes = vec![0; w.len() * 2];
        cast::narrow(&w, Dtype::BF16, &mut bytes);
        let view = MatView::new(&bytes, Dtype::BF16, 500, 300).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut dx = vec![0.0; 600 * 300];
            pool.install(|| linear_backward(&dy, view, &mut dx, Into::Overwrite)).unwrap();
            dx.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let view = MatView::new(&[0; 24], Dtype::F32, 2, 3).unwrap();
        assert!(linear_backward(&[0.0; 3], view, &mut [0.0; 3], Into::Add).is_err());
        assert!(linear_backward(&[0.0; 2], view, &mut [0.0; 2], Into::Add).is_err());
        assert!(linear_backward(&[], view, &mut [], Into::Add).is_ok());
    }
}
