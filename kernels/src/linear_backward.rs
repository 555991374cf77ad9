//! Gradients through products with weights as stored.

use std::ops::Range;

use rayon::prelude::*;

use crate::cast;
use crate::dense::{Dense, Into, matmul};
use crate::error::KernelError;
use crate::exec::{Batching, Exec, Isa};
use crate::product::{Left, padded, prefetch, product};
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::turned;
use crate::vector::{Job, Vector, run};
use crate::view::MatView;
use crate::widen::{stored, widen};

/// Tokens and columns of one task, and weight rows widened at a time. Fixed, so that the split (and with it every bit
/// of the result) does not depend on the number of threads.
const TOKENS: usize = 256;
const COLS: usize = 96;
const ROWS: usize = 128;

/// Below this many tokens, weight rows are read one after another from the first to the last.
const BLOCKS_FROM: usize = 4;
/// Then rows of one task, and tasks at most: each has a sum of its own.
const STREAM_ROWS: usize = 96;
const STREAMS: usize = 16;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 20;

/// Gradient of [`crate::linear()`] with respect to its input: `dx[t, c] = sum_r dy[t, r] * w[r, c]`.
///
/// * `dy`: `[tokens, w.rows()]`; `dx`: `[tokens, w.cols()]`, overwritten or added to
/// * f32 sums; many tokens through a bf16 weight are rounded to bf16 where `exec` is fast, and the weight is turned for them;
///   otherwise it is read as stored and widened block by block
/// * the same bits for any number of threads; with [`Batching::Together`] also for any number of tokens
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit the weight.
pub fn linear_backward(
    dy: &[f32],
    w: MatView<'_>,
    dx: &mut [f32],
    into: Into,
    exec: &Exec,
) -> Result<(), KernelError> {
    let (m, k) = (w.rows(), w.cols());
    let tokens = dy.len().checked_div(m).unwrap_or(dx.len() / k.max(1));
    KernelError::check("gradient of a linear output", tokens * m, dy.len())?;
    KernelError::check("gradient of a linear input", tokens * k, dx.len())?;
    if dx.is_empty() {
        return Ok(());
    }
    if tokens < BLOCKS_FROM && exec.batching != Batching::Together {
        stream(dy, tokens, w, exec, tokens * m * k >= ALONE_BELOW, dx, into);
        return Ok(());
    }
    shares_backward(&[Share { rows: 0..tokens, w }], dy, dx, into, exec)
}

/// Some rows of `dy` and `dx`, and the weight that is theirs.
pub(crate) struct Share<'a> {
    pub rows: Range<usize>,
    pub w: MatView<'a>,
}

/// As [`linear_backward`], with a weight for each of some runs of rows, all of one shape; sizes are checked.
pub(crate) fn shares_backward(
    shares: &[Share<'_>],
    dy: &[f32],
    dx: &mut [f32],
    into: Into,
    exec: &Exec,
) -> Result<(), KernelError> {
    let (m, k) = shares.first().map_or((0, 0), |share| (share.w.rows(), share.w.cols()));
    let turn = exec.batching != Batching::Together;
    let (turned, blocks): (Vec<_>, Vec<_>) =
        shares.iter().partition(|share| turn && turned::worth(share.w, share.rows.len(), exec));
    for Share { rows, w } in turned {
        let (dy, dx) = (&dy[rows.start * m..rows.end * m], &mut dx[rows.start * k..rows.end * k]);
        turned::product(dy, *w, dx, into, exec)?;
    }
    let tasks: Vec<_> = blocks
        .iter()
        .flat_map(|share| share.rows.clone().step_by(TOKENS).map(move |from| (share, from)))
        .flat_map(|(share, from)| (0..k).step_by(COLS).map(move |c| (share, from, c)))
        .collect();
    let shared = blocks.iter().map(|share| share.rows.len()).sum::<usize>() * m * k >= ALONE_BELOW;
    let out = Parts::new(dx);
    for_each(tasks.len(), shared, |index| {
        let (share, from, c) = tasks[index];
        let (rows, cols) = (from..share.rows.end.min(from + TOKENS), c..k.min(c + COLS));
        let mut sums = Scratch::new(rows.len() * cols.len());
        block(&dy[from * m..rows.end * m], share.w, cols.clone(), exec.isa, &mut sums);
        for (row, sums) in rows.zip(sums.chunks_exact(cols.len())) {
            // SAFETY: no other task has these columns of this row.
            put(sums, unsafe { out.range(row * k + c, sums.len()) }, into);
        }
    });
    Ok(())
}

/// Gradient of [`crate::linear()`] with respect to its weight: `dw[r, c] = sum_t dy[t, r] * x[t, c]`.
///
/// * `x`: `[tokens, cols]`; `dy`: `[tokens, rows]`; `dw`: `[rows, cols]`, overwritten or added to
/// * f32 sums over the tokens; the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit each other.
pub fn linear_weight_backward(
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    [rows, cols]: [usize; 2],
    into: Into,
) -> Result<(), KernelError> {
    /// Rows of one task.
    const ROWS: usize = 64;
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let (x, dy) = (Dense::new(x, tokens, cols)?, Dense::new(dy, tokens, rows)?);
    KernelError::check("gradient of a weight", rows * cols, dw.len())?;
    dw.par_chunks_mut((ROWS * cols).max(1)).enumerate().try_for_each(|(task, dw)| {
        let rows = task * ROWS..rows.min((task + 1) * ROWS);
        matmul(dy.columns(rows)?.transposed(), x, dw, into)
    })
}

fn put(sums: &[f32], out: &mut [f32], into: Into) {
    match into {
        Into::Overwrite => out.copy_from_slice(sums),
        Into::Add => out.iter_mut().zip(sums).for_each(|(o, v)| *o += v),
    }
}

/// `out = dy w[:, cols]`, summed over blocks of weight rows from the first to the last.
fn block(dy: &[f32], w: MatView<'_>, cols: Range<usize>, isa: Isa, out: &mut [f32]) {
    let (m, size) = (w.rows(), w.dtype().size());
    let tokens = out.len() / cols.len();
    if m == 0 {
        return out.fill(0.0);
    }
    let width = padded(cols.len());
    let mut wide = Scratch::new(ROWS.min(m) * width);
    for from in (0..m).step_by(ROWS) {
        let rows = from..m.min(from + ROWS);
        widen(isa, w, rows.clone(), cols.clone(), &mut wide, width);
        let into = if from == 0 { Into::Overwrite } else { Into::Add };
        // What is widened next is far: in the file's pages, a few lines of each row.
        for row in rows.end..m.min(rows.end + ROWS) {
            let bytes = &w.row(row)[cols.start * size..cols.end * size];
            bytes.chunks(64).for_each(|line| prefetch(line.as_ptr()));
        }
        let sizes = (tokens, rows.len(), cols.len());
        product(isa, sizes, Left::rows(&dy[from..], m), (&wide, width), (out, cols.len()), into);
    }
}

/// The same for few tokens: every weight row once, from the first to the last, times each token's number for it.
fn stream(
    dy: &[f32],
    tokens: usize,
    w: MatView<'_>,
    exec: &Exec,
    shared: bool,
    dx: &mut [f32],
    into: Into,
) {
    let (m, len) = (w.rows(), dx.len());
    let rows = m.div_ceil(STREAMS).max(STREAM_ROWS);
    let streams = m.div_ceil(rows).max(1);
    let mut sums = Scratch::zeroed(streams * len); // [streams, tokens, w.cols()]
    let parts = Parts::new(&mut sums);
    for_each(streams, shared, |index| {
        let (from, to) = (index * rows, m.min((index + 1) * rows));
        // SAFETY: the sums of this task.
        let sums = unsafe { parts.range(index * len, len) };
        run(
            exec.isa,
            Stream { dy: &dy[from..], stride: m, tokens, w: w.slice_rows(from, to), sums },
        );
    });
    let (first, rest) = sums.split_at_mut(len);
    for more in rest.chunks_exact(len) {
        put(more, first, Into::Add);
    }
    put(first, dx, into);
}

struct Stream<'a> {
    /// Numbers of one token are `stride` apart.
    dy: &'a [f32],
    stride: usize,
    tokens: usize,
    w: MatView<'a>,
    /// `[tokens, w.cols()]`, added to.
    sums: &'a mut [f32],
}

impl Job for Stream<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let Stream { dy, stride, tokens, w, sums } = self;
        let (cols, size) = (w.cols(), w.dtype().size());
        let whole = cols / S::N * S::N;
        let mut tail = [0.0; 16];
        let tail = &mut tail[..cols - whole];
        for row in 0..w.rows() {
            let bytes = w.row(row);
            for token in 0..tokens {
                let sums = sums[token * cols..(token + 1) * cols].as_mut_ptr();
                // SAFETY: `N` columns from `c` on are in the row and in the token's sums; the processor has the set.
                unsafe {
                    let d = S::splat(dy[token * stride + row]);
                    for c in (0..whole).step_by(S::N) {
                        let weights = stored::<S>(bytes.as_ptr().add(c * size), w.dtype());
                        S::store(sums.add(c), S::fma(d, weights, S::load(sums.add(c))));
                    }
                }
            }
            cast::widen(&bytes[whole * size..], w.dtype(), tail);
            for token in 0..tokens {
                let d = dy[token * stride + row];
                let sums = &mut sums[token * cols + whole..(token + 1) * cols];
                sums.iter_mut().zip(&*tail).for_each(|(sum, w)| *sum += d * w);
            }
        }
    }
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
        let isas = Isa::ALL.into_iter().filter(|isa| isa.available());
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16];
        for (isa, dtype) in isas.flat_map(|isa| dtypes.map(|dtype| (isa, dtype))) {
            let exec = Exec::on(isa).unwrap();
            for (tokens, rows, cols) in
                [(1, 1, 1), (2, 250, 37), (3, 5, 130), (300, 17, 9), (4, 600, 140), (13, 0, 5)]
            {
                let (w, dy) = (numbers(rows * cols, 1), numbers(tokens * rows, 2));
                // At an odd offset, as tensors may lie in a file; the values are exact in every dtype.
                let mut bytes = vec![0; w.len() * dtype.size() + 1];
                cast::narrow(&w, dtype, &mut bytes[1..]);
                let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
                let mut dx = vec![1.0; tokens * cols];
                linear_backward(&dy, view, &mut dx, Into::Overwrite, &exec).unwrap();
                let mut twice = dx.clone();
                linear_backward(&dy, view, &mut twice, Into::Add, &exec).unwrap();
                for (i, (once, twice)) in dx.iter().zip(twice).enumerate() {
                    let (t, c) = (i / cols, i % cols);
                    let sum: f64 = (0..rows)
                        .map(|r| f64::from(dy[t * rows + r]) * f64::from(w[r * cols + c]))
                        .sum();
                    assert!((f64::from(*once) - sum).abs() < 1e-3, "{isa:?} {dtype} {t} {c}");
                    assert_eq!(twice, 2.0 * once);
                }
            }
        }
    }

    #[test]
    fn the_weight_gradient_is_the_sum_over_tokens() {
        let (tokens, rows, cols) = (13, 130, 7);
        let (x, dy) = (numbers(tokens * cols, 1), numbers(tokens * rows, 2));
        let mut dw = vec![1.0; rows * cols];
        let of = |dw: &mut [f32], into| linear_weight_backward(&x, &dy, dw, [rows, cols], into);
        of(&mut dw, Into::Overwrite).unwrap();
        let mut twice = dw.clone();
        of(&mut twice, Into::Add).unwrap();
        for (i, (once, twice)) in dw.iter().zip(twice).enumerate() {
            let (r, c) = (i / cols, i % cols);
            let sum: f32 = (0..tokens).map(|t| dy[t * rows + r] * x[t * cols + c]).sum();
            assert!((once - sum).abs() < 1e-4 && (twice - 2.0 * once).abs() < 1e-4, "{r} {c}");
        }
        assert!(of(&mut [0.0; 3], Into::Add).is_err());
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (w, dy) = (numbers(500 * 300, 3), numbers(600 * 500, 4));
        let invariant = Exec { batching: Batching::Together, ..Exec::default() };
        let mut bytes = vec![0; w.len() * 2];
        cast::narrow(&w, Dtype::BF16, &mut bytes);
        let view = MatView::new(&bytes, Dtype::BF16, 500, 300).unwrap();
        let run = |threads, tokens: usize, exec: &Exec| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (dy, mut dx) = (&dy[..tokens * 500], vec![0.0; tokens * 300]);
            pool.install(|| linear_backward(dy, view, &mut dx, Into::Overwrite, exec)).unwrap();
            dx.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        for tokens in [3, 600] {
            let one = run(1, tokens, &Exec::default());
            assert_eq!(one, run(2, tokens, &Exec::default()));
            assert_eq!(one, run(3, tokens, &Exec::default()));
        }
        assert_eq!(run(1, 3, &invariant), run(1, 600, &invariant)[..900]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let view = MatView::new(&[0; 24], Dtype::F32, 2, 3).unwrap();
        let run = |dy: &[f32], dx: &mut [f32]| {
            linear_backward(dy, view, dx, Into::Add, &Exec::default()).is_ok()
        };
        assert!(!run(&[0.0; 3], &mut [0.0; 3]));
        assert!(!run(&[0.0; 2], &mut [0.0; 2]));
        assert!(run(&[], &mut []));
    }
}
