//! Products of matrices of f32 working numbers on the vectors of an instruction set.
//!
//! One micro-kernel: some numbers of the left matrix, each multiplied into whole vectors of a row of the right one. Nothing
//! is packed: the left matrix may have any strides (so also be a transpose), rows of the right one stand as they are.

use crate::dense::Into;
use crate::exec::Isa;
use crate::scratch::Scratch;
use crate::vector::{Job, Vector, run};

/// A left matrix: element `(i, k)` stands at `i * row + k * col`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

impl<'a> Left<'a> {
    /// Rows of `width` numbers.
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, row: width, col: 1 }
    }

    /// The transpose of rows of `width` numbers.
    pub fn transposed(data: &'a [f32], width: usize) -> Self {
        Self { data, row: 1, col: width }
    }
}

/// A row length of at least `cols` at which neither rows nor columns crowd into few sets of a cache.
pub(crate) fn padded(cols: usize) -> usize {
    (cols.div_ceil(16) | 1) * 16
}

/// `out = a b` or `out += a b`, summed over `k` from the first to the last.
///
/// * `(m, k, n)`: `a` is `[m, k]`; `b` is `[k, n]` with rows `b_row` apart; `out` is `[m, n]` with rows `out_row` apart
///
/// # Panics
/// If a slice does not reach to the end of its matrix: callers have checked what they were given.
pub(crate) fn product(
    isa: Isa,
    (m, k, n): (usize, usize, usize),
    a: Left<'_>,
    (b, b_row): (&[f32], usize),
    (out, out_row): (&mut [f32], usize),
    into: Into,
) {
    if m == 0 || n == 0 {
        return;
    }
    let reach = |rows: usize, row: usize, cols: usize, col: usize| match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row + (cols - 1) * col + 1,
    };
    assert!(reach(m, a.row, k, a.col) <= a.data.len(), "left matrix");
    assert!(reach(k, b_row, n, 1) <= b.len(), "right matrix");
    assert!(n <= out_row && reach(m, out_row, n, 1) <= out.len(), "product");
    let add = into == Into::Add;
    run(isa, Product { m, k, n, a, b, b_row, out, out_row, add });
}

struct Product<'a> {
    m: usize,
    k: usize,
    n: usize,
    a: Left<'a>,
    b: &'a [f32],
    b_row: usize,
    out: &'a mut [f32],
    out_row: usize,
    add: bool,
}

impl Job for Product<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let Product { m, k, n, a, b, b_row, out, out_row, add } = self;
        let at = |j: usize| Columns {
            m,
            k,
            a: a.data.as_ptr(),
            a_row: a.row,
            a_col: a.col,
            b: b[j.min(b.len())..].as_ptr(),
            b_row,
            out_row,
            add,
        };
        let mut j = 0;
        // SAFETY: `product` checked that the matrices lie in their slices; columns from `j` on are taken in whole vectors as
        // long as there are so many, and the rest from copies with rows of one vector.
        unsafe {
            while j + 2 * S::N <= n {
                at(j).run::<S, 2>(out.as_mut_ptr().add(j));
                j += 2 * S::N;
            }
            if j + S::N <= n {
                at(j).run::<S, 1>(out.as_mut_ptr().add(j));
                j += S::N;
            }
            if j == n {
                return;
            }
            let mut right = Scratch::zeroed(k * S::N);
            for (p, row) in right.chunks_exact_mut(S::N).enumerate() {
                row[..n - j].copy_from_slice(&b[p * b_row + j..p * b_row + n]);
            }
            let mut rest = Scratch::zeroed(m * S::N);
            let columns =
                Columns { b: right.as_ptr(), b_row: S::N, out_row: S::N, add: false, ..at(j) };
            columns.run::<S, 1>(rest.as_mut_ptr());
            for (i, rest) in rest.chunks_exact(S::N).enumerate() {
                for (o, v) in out[i * out_row + j..i * out_row + n].iter_mut().zip(rest) {
                    *o = if add { *o + v } else { *v };
                }
            }
        }
    }
}

/// Some vectors of columns of a product.
#[derive(Clone, Copy)]
struct Columns {
    m: usize,
    k: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    out_row: usize,
    add: bool,
}

impl Columns {
    /// All rows of `V` vectors of columns.
    ///
    /// # Safety
    /// The processor has the set; the matrices hold as many numbers as the sizes say, `b` and `out` rows of `V` vectors.
    #[inline(always)]
    unsafe fn run<S: Vector, const V: usize>(self, out: *mut f32) {
        let mut i = 0;
        // SAFETY: the caller's; tiles end at row `m`.
        unsafe {
            // As many rows as leave registers for the vectors of `b`.
            if S::N == 16 {
                while i + 12 <= self.m {
                    self.tile::<S, 12, V>(i, out);
                    i += 12;
                }
                if i + 8 <= self.m {
                    self.tile::<S, 8, V>(i, out);
                    i += 8;
                }
            } else {
                while i + 6 <= self.m {
                    self.tile::<S, 6, V>(i, out);
                    i += 6;
                }
            }
            if i + 4 <= self.m {
                self.tile::<S, 4, V>(i, out);
                i += 4;
            }
            if i + 2 <= self.m {
                self.tile::<S, 2, V>(i, out);
                i += 2;
            }
            if i < self.m {
                self.tile::<S, 1, V>(i, out);
            }
        }
    }

    /// `R` rows from row `i` on, of `V` vectors.
    ///
    /// # Safety
    /// As [`Columns::run`]; the rows exist.
    #[inline(always)]
    unsafe fn tile<S: Vector, const R: usize, const V: usize>(self, i: usize, out: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[S::zero(); V]; R];
            let (mut a, mut b) = (self.a.add(i * self.a_row), self.b);
            for p in 0..self.k {
                // Rows of the next tile, a cache line of each at a time: they may be far.
                if p % 16 == 0 && self.a_col == 1 {
                    (R..2 * R).for_each(|r| prefetch(a.wrapping_add(r * self.a_row)));
                }
                let mut right = [S::zero(); V];
                for (v, right) in right.iter_mut().enumerate() {
                    *right = S::load(b.add(v * S::N));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let left = S::splat(*a.add(r * self.a_row));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = S::fma(left, right, *sum);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let at = out.add((i + r) * self.out_row + v * S::N);
                    S::store(at, if self.add { S::add(S::load(at), sum) } else { sum });
                }
            }
        }
    }
}

/// Tells the processor that the line at `at` will be read; any address will do.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every 64-bit x86 processor has it, and it neither reads nor faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 31) as f32 - 15.0).collect()
    }

    #[test]
    fn agrees_with_three_loops_on_every_set() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (m, k, n) in
                [(1, 1, 1), (13, 7, 16), (31, 40, 48), (12, 0, 32), (6, 33, 77), (24, 3, 5)]
            {
                let (a_row, b_row, out_row) = (k + 2, n + 3, n + 1);
                let (a, b) = (whole(m * a_row, 1), whole(k * b_row + n, 2));
                let before = whole(m * out_row, 3);
                for (transposed, into) in [(false, Into::Overwrite), (true, Into::Add)] {
                    let a_t: Vec<f32> = (0..k * (m + 1))
                        .map(|i| a.get(i % (m + 1) * a_row + i / (m + 1)).copied().unwrap_or(0.0))
                        .collect();
                    let left = match transposed {
                        true => Left::transposed(&a_t, m + 1),
                        false => Left::rows(&a, a_row),
                    };
                    let mut out = before.clone();
                    product(isa, (m, k, n), left, (&b, b_row), (&mut out, out_row), into);
                    for (at, o) in out.iter().enumerate() {
                        let (i, j) = (at / out_row, at % out_row);
                        // Small whole numbers: exact in f32 in any order of summation.
                        let sum: f32 = (0..k)
                            .map(|p| a[i * a_row + p] * b.get(p * b_row + j).unwrap_or(&0.0))
                            .sum();
                        let expected = match (j < n, into) {
                            (false, _) => before[at],
                            (true, Into::Overwrite) => sum,
                            (true, Into::Add) => before[at] + sum,
                        };
                        assert_eq!(*o, expected, "{isa:?} {m} {k} {n} at {i} {j}");
                    }
                }
            }
        }
    }
}
