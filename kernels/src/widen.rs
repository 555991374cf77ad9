//! Blocks of stored weights as f32.

use std::ops::Range;

use crate::Dtype;
use crate::attention::KeptNumber;
use crate::cast;
use crate::exec::Isa;
use crate::vector::{Job, Vector, run};
use crate::view::MatView;

/// The numbers of some rows and columns of `w`, into rows of `width >= cols.len()` numbers; what is beyond the columns
/// stays as it is.
///
/// # Panics
/// If the rows or columns do not exist or `out` has no room for them: callers cut matrices whose sizes they know.
pub(crate) fn widen(
    isa: Isa,
    w: MatView<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    out: &mut [f32],
    width: usize,
) {
    if rows.is_empty() || cols.is_empty() {
        return;
    }
    let (w, size) = (w.slice_rows(rows.start, rows.end), w.dtype().size());
    assert!(cols.end <= w.cols() && cols.len() <= width, "columns {cols:?} of {}", w.cols());
    assert!((rows.len() - 1) * width + cols.len() <= out.len(), "room for rows {rows:?}");
    let bytes = &w.bytes()[cols.start * size..];
    let (rows, cols, stride) = (rows.len(), cols.len(), w.cols() * size);
    run(isa, Widen { bytes, dtype: w.dtype(), rows, cols, stride, out, width });
}

/// The first `cols` numbers of `rows` rows that begin `stride` numbers apart, as `[rows, cols]`.
pub(crate) fn widen_strided<T: KeptNumber>(
    isa: Isa,
    numbers: &[T],
    stride: usize,
    [rows, cols]: [usize; 2],
    out: &mut [f32],
) {
    let (bytes, stride) = (bytemuck::cast_slice(numbers), stride * size_of::<T>());
    run(isa, Widen { bytes, dtype: T::DTYPE, rows, cols, stride, out, width: cols });
}

struct Widen<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// Bytes from one row to the next.
    stride: usize,
    out: &'a mut [f32],
    width: usize,
}

impl Job for Widen<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let size = self.dtype.size();
        for row in 0..self.rows {
            let from = &self.bytes[row * self.stride..][..self.cols * size];
            let to = &mut self.out[row * self.width..][..self.cols];
            let mut at = 0;
            while at + S::N <= self.cols {
                // SAFETY: `N` numbers from `at` on are on both sides; the processor has the set.
                unsafe {
                    let numbers = stored::<S>(from.as_ptr().add(at * size), self.dtype);
                    S::store(to.as_mut_ptr().add(at), numbers);
                }
                at += S::N;
            }
            cast::widen(&from[at * size..], self.dtype, &mut to[at..]);
        }
    }
}

/// `N` stored numbers.
///
/// # Safety
/// The processor has the set, and there are so many bytes.
#[inline(always)]
pub(crate) unsafe fn stored<S: Vector>(from: *const u8, dtype: Dtype) -> S::V {
    // SAFETY: the caller's; loads need no alignment.
    unsafe {
        match dtype {
            Dtype::F32 => S::load(from.cast()),
            Dtype::BF16 => S::widen_bf16(from),
            Dtype::F16 => S::widen_f16(from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_hold_their_numbers_and_nothing_else_changes() {
        let (rows, cols, width) = (5, 41, 40);
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 - 100.0).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                let mut bytes = vec![0; values.len() * dtype.size() + 1];
                cast::narrow(&values, dtype, &mut bytes[1..]);
                let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
                let mut out = vec![-1000.0; 3 * width];
                widen(isa, view, 1..4, 2..40, &mut out, width);
                for (at, o) in out.iter().enumerate() {
                    let (r, c) = (at / width, at % width);
                    let expected = if c < 38 { values[(r + 1) * cols + c + 2] } else { -1000.0 };
                    assert_eq!(*o, expected, "{isa:?} {dtype} {r} {c}");
                }
                widen(isa, view, 2..2, 0..41, &mut [], width + 1);
            }
        }
    }
}
