//! Products of dense matrices of working numbers (not stored weights), on one thread.

use crate::error::KernelError;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The numbers [`matmul`] works on: `f32` and `f64`.
pub trait Real: sealed::Sealed + Copy + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Widened.
    fn to_f64(self) -> f64;
    /// Rounded to nearest.
    fn from_f64(value: f64) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// A dense matrix `[rows, cols]`, row-major or its transpose.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Real> Dense<'a, T> {
    /// Views `data` as row-major `[rows, cols]`.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not exactly `rows * cols` numbers.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self, KernelError> {
        check_length("matrix", rows, cols, data.len())?;
        Ok(Self { data, rows, cols, row_stride: cols, col_stride: 1 })
    }

    /// The transpose; no number moves.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Some of its columns; no number moves.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not so many.
    pub fn columns(self, range: std::ops::Range<usize>) -> Result<Self, KernelError> {
        if range.start > range.end || range.end > self.cols {
            return Err(KernelError::Length {
                what: "columns of a matrix",
                expected: self.cols,
                found: range.end,
            });
        }
        let from = (range.start * self.col_stride).min(self.data.len());
        Ok(Self { data: &self.data[from..], cols: range.len(), ..self })
    }
}

/// What happens to the numbers that [`matmul`] finds in its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// They are overwritten.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `out = a · b` or `out += a · b`; `out` is row-major `[a.rows, b.cols]`, accumulated in `T`.
///
/// One thread: the caller splits the work, so the result does not depend on the thread count.
///
/// # Errors
/// [`KernelError::Length`] if the inner sizes differ or `out` has the wrong length.
pub fn matmul<T: Real>(
    a: Dense<'_, T>,
    b: Dense<'_, T>,
    out: &mut [T],
    into: Into,
) -> Result<(), KernelError> {
    if a.cols != b.rows {
        return Err(KernelError::Length {
            what: "inner size of a product",
            expected: a.cols,
            found: b.rows,
        });
    }
    check_length("product", a.rows, b.cols, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    if a.cols == 0 {
        if into == Into::Overwrite {
            out.fill(T::ZERO);
        }
        return Ok(());
    }
    let stride = |s: usize| s as isize;
    // SAFETY: the strides of a `Dense` are those of a row-major matrix or of its transpose,
    // and its data begins with its first number and reaches to the end of that matrix (of all its columns, where it is some
    // of them), so every index the product reads lies inside `data`; `out` was checked to hold a.rows * b.cols
    // numbers, is row-major, and is borrowed mutably, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            stride(b.cols),
            into == Into::Add,
            a.data.as_ptr(),
            stride(a.col_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.col_stride),
            stride(b.row_stride),
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    Ok(())
}

fn check_length(
    what: &'static str,
    rows: usize,
    cols: usize,
    found: usize,
) -> Result<(), KernelError> {
    match rows.checked_mul(cols) {
        Some(expected) if expected == found => Ok(()),
        expected => {
            Err(KernelError::Length { what, expected: expected.unwrap_or(usize::MAX), found })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_by_hand_and_transposed() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2, 3]
        let b = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]; // [3, 2]
        let (a, b) = (Dense::new(&a, 2, 3).unwrap(), Dense::new(&b, 3, 2).unwrap());
        let mut out = [9f64; 4];
        matmul(a, b, &mut out, Into::Overwrite).unwrap();
        assert_eq!(out, [4.0, 5.0, 10.0, 11.0]);
        matmul(b.transposed(), a.transposed(), &mut out, Into::Add).unwrap();
        assert_eq!(out, [8.0, 15.0, 15.0, 22.0]);
        // The last two columns of a, as they are and of its transpose.
        let mut out = [0f64; 2];
        matmul(
            a.columns(2..3).unwrap(),
            b.columns(1..2).unwrap().transposed().columns(0..1).unwrap(),
            &mut out,
            Into::Overwrite,
        )
        .unwrap();
        assert_eq!(out, [0.0, 0.0]);
        matmul(
            a.columns(1..3).unwrap(),
            b.transposed().columns(1..3).unwrap().transposed().columns(0..1).unwrap(),
            &mut out,
            Into::Overwrite,
        )
        .unwrap();
        assert_eq!(out, [3.0, 6.0]);
        assert!(a.columns(2..4).is_err());
    }

    #[test]
    fn agrees_with_three_loops_at_odd_sizes() {
        for (m, n, k) in [(1, 1, 1), (7, 24, 37), (33, 3, 129), (5, 64, 2)] {
            let a: Vec<f32> = (0..m * k).map(|i| ((i * 37 % 11) as f32) - 5.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| ((i * 53 % 13) as f32) - 6.0).collect();
            let mut out = vec![0.0; m * n];
            let (va, vb) = (Dense::new(&a, m, k).unwrap(), Dense::new(&b, k, n).unwrap());
            matmul(va, vb, &mut out, Into::Overwrite).unwrap();
            for i in 0..m {
                for j in 0..n {
                    // Small integers: exact in f32 in any order of summation.
                    let sum: f32 = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
                    assert_eq!(out[i * n + j], sum);
                }
            }
        }
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let x = [0f32; 6];
        assert!(Dense::new(&x, 2, 2).is_err());
        let a = Dense::new(&x, 2, 3).unwrap();
        assert!(matmul(a, a, &mut [0.0; 4], Into::Overwrite).is_err());
        assert!(matmul(a, a.transposed(), &mut [0.0; 5], Into::Overwrite).is_err());
        assert!(matmul(a, a.transposed(), &mut [0.0; 4], Into::Overwrite).is_ok());
    }

    #[test]
    fn an_empty_inner_size_gives_zeros() {
        let none: [f64; 0] = [];
        let (a, b) = (Dense::new(&none, 2, 0).unwrap(), Dense::new(&none, 0, 1).unwrap());
        let mut out = [3.0; 2];
        matmul(a, b, &mut out, Into::Overwrite).unwrap();
        assert_eq!(out, [0.0, 0.0]);
    }
}
