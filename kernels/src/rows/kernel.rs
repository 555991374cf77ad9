//! Sums of products of one row after another.

use super::FEW;
use crate::cast::Dtype;
use crate::vector::{Job, Vector};

/// How far ahead of the row it works on a kernel asks for weights, in bytes. It asks for one line after another whatever the
/// number of rows at work: two streams side by side take half the speed of memory.
const AHEAD: usize = 4096;

/// Bytes that come from memory together.
const LINE: usize = 64;

/// Bytes of the widest block: `2 N` numbers of f32 in AVX-512.
const BLOCK: usize = 128;

/// Asks for the line that `p` lies in; any address will do.
#[inline(always)]
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults; the instruction belongs to every 64-bit x86.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// A dtype as a type.
trait Stored {
    const SIZE: usize;
    /// `2 N` numbers, in the order that [`super::Form`] of the dtype gives activations.
    ///
    /// # Safety
    /// They can be read at `p`, and the processor has the instruction set.
    unsafe fn load<S: Vector>(p: *const u8) -> (S::V, S::V);
}

struct F32;
struct F16;
struct BF16;

impl Stored for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Vector>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's.
        unsafe { (S::load(p.cast()), S::load(p.add(4 * S::N).cast())) }
    }
}

impl Stored for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Vector>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's.
        unsafe { (S::widen_f16(p), S::widen_f16(p.add(2 * S::N))) }
    }
}

impl Stored for BF16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Vector>(p: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's.
        unsafe { S::split_bf16(p) }
    }
}

/// `sums[r, t] = sum_c rows[r, c] * x[t, c]` for all rows in `bytes`.
pub(super) struct Rows<'a> {
    /// `[rows, cols]` as stored.
    pub bytes: &'a [u8],
    pub dtype: Dtype,
    pub cols: usize,
    /// The first `tokens` of them are activations in the form of the dtype, zero behind `cols` up to a multiple of `2 N`.
    pub x: [&'a [f32]; FEW],
    pub tokens: usize,
    /// `[rows, tokens]`.
    pub sums: &'a mut [f32],
}

impl Job for Rows<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        // SAFETY: the caller's.
        unsafe {
            match self.dtype {
                Dtype::F32 => self.with::<S, F32>(),
                Dtype::F16 => self.with::<S, F16>(),
                Dtype::BF16 => self.with::<S, BF16>(),
            }
        }
    }
}

impl Rows<'_> {
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn with<S: Vector, F: Stored>(self) {
        // Activations are read once for two rows where that pays: f32 has half as many of them for each byte.
        let two_rows = F::SIZE == 2;
        // SAFETY: the caller's. More sums side by side where few tokens leave registers for them.
        unsafe {
            match (self.tokens, two_rows) {
                (1, _) => self.each_row::<S, F, 1, 4, 1>(),
                (2, false) => self.each_row::<S, F, 2, 2, 1>(),
                (2, true) => self.each_row::<S, F, 2, 2, 2>(),
                (_, false) => self.each_row::<S, F, FEW, 2, 1>(),
                (_, true) => self.each_row::<S, F, FEW, 1, 2>(),
            }
        }
    }

    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn each_row<S: Vector, F: Stored, const T: usize, const U: usize, const R: usize>(self) {
        let padded = self.cols.next_multiple_of(2 * S::N);
        assert!(T == self.tokens && self.x[..T].iter().all(|x| x.len() >= padded));
        let (rows, width) = (self.sums.len() / T, self.cols * F::SIZE);
        assert_eq!(self.bytes.len(), rows * width);
        let x: [*const f32; T] = std::array::from_fn(|t| self.x[t].as_ptr());
        let (bytes, sums) = (self.bytes.as_ptr(), self.sums.as_mut_ptr());
        let mut r = 0;
        // SAFETY: every row has `width` bytes and `T` sums, every activation vector `padded` numbers.
        unsafe {
            while r + R <= rows {
                some_rows::<S, F, T, U, R>(bytes.add(r * width), self.cols, x, sums.add(r * T));
                r += R;
            }
            while r < rows {
                some_rows::<S, F, T, U, 1>(bytes.add(r * width), self.cols, x, sums.add(r * T));
                r += 1;
            }
        }
    }
}

/// Sums of `R` rows with `T` vectors, `U` blocks side by side. The order of a sum does not depend on `R`.
///
/// # Safety
/// `R * cols` numbers can be read at `rows`, `cols` in whole blocks at each of `x`, and `R * T` written at `sums`; the
/// processor has the instruction set.
#[inline(always)]
unsafe fn some_rows<S: Vector, F: Stored, const T: usize, const U: usize, const R: usize>(
    rows: *const u8,
    cols: usize,
    x: [*const f32; T],
    sums: *mut f32,
) {
    let block = 2 * S::N;
    let (blocks, tail) = (cols / block, cols % block);
    let (width, step) = (cols * F::SIZE, block * F::SIZE);
    // SAFETY: `blocks` whole blocks and `tail` numbers lie in a row of `width` bytes.
    unsafe {
        let rows: [*const u8; R] = std::array::from_fn(|r| rows.add(r * width));
        let ahead = rows[0].wrapping_add(AHEAD.max(R * width));
        let mut sum = [[[[S::zero(); 2]; U]; T]; R];
        let mut b = 0;
        while b + U <= blocks {
            for line in (0..R * U * step).step_by(LINE) {
                prefetch(ahead.wrapping_add(R * b * step + line));
            }
            for u in 0..U {
                let at = b + u;
                let w: [_; R] = std::array::from_fn(|r| F::load::<S>(rows[r].add(at * step)));
                for t in 0..T {
                    let x = halves::<S>(x[t].add(at * block));
                    for r in 0..R {
                        add::<S>(&mut sum[r][t][u], w[r], x);
                    }
                }
            }
            b += U;
        }
        while b < blocks {
            for line in (0..R * step).step_by(LINE) {
                prefetch(ahead.wrapping_add(R * b * step + line));
            }
            for r in 0..R {
                let w = F::load::<S>(rows[r].add(b * step));
                for t in 0..T {
                    add::<S>(&mut sum[r][t][0], w, halves::<S>(x[t].add(b * block)));
                }
            }
            b += 1;
        }
        if tail > 0 {
            for r in 0..R {
                let mut rest = [0u8; BLOCK];
                let from = rows[r].add(blocks * step);
                std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), tail * F::SIZE);
                let w = F::load::<S>(rest.as_ptr());
                for t in 0..T {
                    add::<S>(&mut sum[r][t][U - 1], w, halves::<S>(x[t].add(blocks * block)));
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                *sums.add(r * T + t) = total::<S, U>(sum[r][t]);
            }
        }
    }
}

/// The activations of a block.
///
/// # Safety
/// `2 N` numbers can be read at `x`, and the processor has the instruction set.
#[inline(always)]
unsafe fn halves<S: Vector>(x: *const f32) -> (S::V, S::V) {
    // SAFETY: the caller's.
    unsafe { (S::load(x), S::load(x.add(S::N))) }
}

/// `sum += w * x`, for both halves of a block.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn add<S: Vector>(sum: &mut [S::V; 2], w: (S::V, S::V), x: (S::V, S::V)) {
    // SAFETY: the caller's.
    unsafe {
        sum[0] = S::fma(w.0, x.0, sum[0]);
        sum[1] = S::fma(w.1, x.1, sum[1]);
    }
}

/// All sums in one.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn total<S: Vector, const U: usize>(sums: [[S::V; 2]; U]) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let mut all = S::add(sums[0][0], sums[0][1]);
        for pair in &sums[1..] {
            all = S::add(all, S::add(pair[0], pair[1]));
        }
        S::sum(all)
    }
}
