//! Transposes of f32 working numbers.

use crate::exec::Isa;
use crate::vector::{Job, Vector, run};

/// `dst[c * to + r] = src[r * from + c]` for `rows` by `cols` numbers.
///
/// # Panics
/// If a slice does not reach to the end of its matrix: callers have checked what they were given.
pub(crate) fn transpose(
    isa: Isa,
    (rows, cols): (usize, usize),
    (src, from): (&[f32], usize),
    (dst, to): (&mut [f32], usize),
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!((rows - 1) * from + cols <= src.len(), "numbers to turn");
    assert!((cols - 1) * to + rows <= dst.len() && rows <= to, "room for turned numbers");
    run(isa, Transpose { rows, cols, src, from, dst, to });
}

struct Transpose<'a> {
    rows: usize,
    cols: usize,
    src: &'a [f32],
    from: usize,
    dst: &'a mut [f32],
    to: usize,
}

impl Job for Transpose<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let Transpose { rows, cols, src, from, dst, to } = self;
        let (whole_rows, whole_cols) = (rows / S::N * S::N, cols / S::N * S::N);
        for r in (0..whole_rows).step_by(S::N) {
            for c in (0..whole_cols).step_by(S::N) {
                // SAFETY: the block lies in both matrices, which `transpose` checked; the processor has the set.
                unsafe {
                    let src = src.as_ptr().add(r * from + c);
                    S::transpose(src, from, dst.as_mut_ptr().add(c * to + r), to);
                }
            }
        }
        for r in 0..rows {
            let rest = if r < whole_rows { whole_cols } else { 0 };
            for c in rest..cols {
                dst[c * to + r] = src[r * from + c];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_size_on_every_set() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (rows, cols) in [(1, 1), (3, 40), (33, 17), (16, 16), (0, 5)] {
                let (from, to) = (cols + 2, rows + 1);
                let src: Vec<f32> = (0..rows * from).map(|i| i as f32).collect();
                let mut dst = vec![-1.0; cols * to];
                transpose(isa, (rows, cols), (&src, from), (&mut dst, to));
                for (at, v) in dst.iter().enumerate() {
                    let (c, r) = (at / to, at % to);
                    let expected = if r < rows { (r * from + c) as f32 } else { -1.0 };
                    assert_eq!(*v, expected, "{isa:?} {rows} {cols}");
                }
            }
        }
    }
}
