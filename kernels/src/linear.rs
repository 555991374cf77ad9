//! Products of activations with weights as stored.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::dot::dot_for;
use crate::error::KernelError;
use crate::view::MatView;

/// Weight rows of one task. Fixed, so that the split (and with it every bit of the result) does not depend on the
/// number of threads.
const ROWS: usize = 128;

/// From this many tokens on, weights are widened by blocks and multiplied as matrices.
const GEMM_FROM: usize = 4;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 18;

/// Linear layer: `out[t, r] = sum_c x[t, c] * w[r, c] + bias[r]`.
///
/// * `x`: `[tokens, w.cols()]`; `out`: `[tokens, w.rows()]`; `bias`: `[w.rows()]`
/// * f32 sums; the weight is read as stored, 16-bit blocks are widened into scratch of one block per thread
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit the weight.
pub fn linear(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let (m, k) = (w.rows(), w.cols());
    let tokens = x.len().checked_div(k).unwrap_or(out.len() / m.max(1));
    KernelError::check("linear input", tokens * k, x.len())?;
    KernelError::check("linear output", tokens * m, out.len())?;
    if let Some(bias) = bias {
        KernelError::check("linear bias", m, bias.len())?;
    }
    if out.is_empty() {
        return Ok(());
    }
    let out = Columns { start: out.as_mut_ptr(), width: m };
    let block = |from: usize| {
        let part = w.slice_rows(from, m.min(from + ROWS));
        let bias = bias.map(|b| &b[from..from + part.rows()]);
        if tokens < GEMM_FROM {
            rows_by_dot(x, tokens, part, bias, out, from);
        } else {
            rows_by_gemm(x, tokens, part, bias, out, from);
        }
    };
    if tokens * m * k < ALONE_BELOW {
        (0..m.div_ceil(ROWS)).for_each(|b| block(b * ROWS));
    } else {
        (0..m.div_ceil(ROWS)).into_par_iter().for_each(|b| block(b * ROWS));
    }
    Ok(())
}

/// The output `[tokens, width]`, of which each task writes columns of its own.
#[derive(Clone, Copy)]
struct Columns {
    start: *mut f32,
    width: usize,
}
// SAFETY: tasks write disjoint columns, and `linear` outlives them all.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// Columns `from..from + len` of row `token`.
    ///
    /// # Safety
    /// Row and columns exist, and no other task touches these columns.
    unsafe fn row<'a>(self, token: usize, from: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: see above.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(token * self.width + from), len) }
    }
}

fn rows_by_dot(
    x: &[f32],
    tokens: usize,
    part: MatView<'_>,
    bias: Option<&[f32]>,
    out: Columns,
    from: usize,
) {
    let dot = dot_for(part.dtype());
    let k = part.cols();
    for row in 0..part.rows() {
        for token in 0..tokens {
            // SAFETY: row `from + row` is one of this task's columns.
            let o = unsafe { out.row(token, from + row, 1) };
            let sum = dot(part.row(row), &x[token * k..(token + 1) * k]);
            o[0] = sum + bias.map_or(0.0, |b| b[row]);
        }
    }
}

fn rows_by_gemm(
    x: &[f32],
    tokens: usize,
    part: MatView<'_>,
    bias: Option<&[f32]>,
    out: Columns,
    from: usize,
) {
    let (rows, k) = (part.rows(), part.cols());
    let wide = widened(part);
    // SAFETY: `dst` covers `rows` columns of each of the `tokens` rows of the output, all of them this task's own;
    // `lhs` is `x [tokens, k]`, `rhs` the transpose of `wide [rows, k]`; all strides in elements.
    unsafe {
        gemm::gemm(
            tokens,
            rows,
            k,
            out.start.add(from),
            1,
            out.width as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            wide.as_ptr(),
            k as isize,
            1,
            0f32,
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    if let Some(bias) = bias {
        for token in 0..tokens {
            // SAFETY: this task's columns.
            let row = unsafe { out.row(token, from, rows) };
            row.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
        }
    }
}

/// The numbers of `part` as `f32`: in place where they are stored so and aligned.
fn widened<'a>(part: MatView<'a>) -> Cow<'a, [f32]> {
    if part.dtype() == crate::Dtype::F32
        && let Ok(values) = bytemuck::try_cast_slice(part.bytes())
    {
        return Cow::Borrowed(values);
    }
    let mut values = vec![0.0; part.rows() * part.cols()];
    crate::cast::widen(part.bytes(), part.dtype(), &mut values);
    Cow::Owned(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn weight(rows: usize, cols: usize, dtype: Dtype) -> (Vec<f32>, Vec<u8>) {
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 29 % 61) as f32 - 30.0) / 32.0).collect();
        let mut bytes = vec![0; values.len() * dtype.size() + 1];
        crate::cast::narrow(&values, dtype, &mut bytes[1..]);
        (values, bytes)
    }

    #[test]
    fn both_paths_equal_the_plain_sum() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (tokens, rows, cols) in [(1, 5, 3), (3, 100, 33), (4, 97, 17), (50, 200, 64)] {
                let (w, bytes) = weight(rows, cols, dtype);
                let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
                let x: Vec<f32> = (0..tokens * cols).map(|i| (i % 13) as f32 / 8.0).collect();
                let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
                let mut out = vec![f32::NAN; tokens * rows];
                linear(&x, view, Some(&bias), &mut out).unwrap();
                for t in 0..tokens {
                    for r in 0..rows {
                        let sum: f64 = (0..cols)
                            .map(|c| x[t * cols + c] as f64 * w[r * cols + c] as f64)
                            .sum();
                        let found = out[t * rows + r] as f64;
                        assert!((found - sum - r as f64).abs() < 1e-3, "{dtype} {t} {r}");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (_, bytes) = weight(500, 300, Dtype::BF16);
        let view = MatView::new(&bytes[1..], Dtype::BF16, 500, 300).unwrap();
        for tokens in [2, 20] {
            let x: Vec<f32> = (0..tokens * 300).map(|i| (i as f32 * 0.7).sin()).collect();
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; tokens * 500];
                pool.install(|| linear(&x, view, None, &mut out)).unwrap();
                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(run(1), run(2));
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let view = MatView::new(&[0; 24], Dtype::F32, 2, 3).unwrap();
        let mut out = [0.0; 2];
        assert!(linear(&[0.0; 4], view, None, &mut out).is_err());
        assert!(linear(&[0.0; 3], view, None, &mut out[..1]).is_err());
        assert!(linear(&[0.0; 3], view, Some(&[0.0]), &mut out).is_err());
        assert!(linear(&[], view, None, &mut []).is_ok());
    }
}
