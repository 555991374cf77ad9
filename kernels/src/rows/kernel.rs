//! Sums of products of one row after another.
//!
//! Measured over buffers larger than the caches: two rows side by side take half the speed of memory (0.38 of the plain
//! read speed against 0.76), asking for lines ahead a tenth of it (0.76 against 0.87); the processor does that best alone.

// Indices of registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::FEW;
use crate::cast::Dtype;
use crate::vector::{Job, Vector};

/// Bytes of rows that vectors are multiplied with two at a time: the second two find them in the first cache. Three at once
/// do not leave activations their place in it (0.36 of the plain read speed at 1536 columns).
const CHUNK: usize = 8 << 10;

/// Bytes of the widest block: `2 N` numbers of f32 in AVX-512.
const BLOCK: usize = 128;

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
    unsafe fn with<S: Vector, F: Stored>(mut self) {
        let (rows, width) = (self.sums.len() / self.tokens, self.cols * F::SIZE);
        assert_eq!(self.bytes.len(), rows * width);
        let chunk = if self.tokens > 2 { CHUNK / width.max(1) } else { rows }.max(1);
        for from in (0..rows).step_by(chunk) {
            let rows = from..rows.min(from + chunk);
            let mut first = 0;
            // SAFETY: the caller's. With one token it takes more sums side by side to keep the units busy.
            unsafe {
                while first + 2 <= self.tokens {
                    self.each_row::<S, F, 2, 1>(rows.clone(), first);
                    first += 2;
                }
                if first < self.tokens {
                    self.each_row::<S, F, 1, 4>(rows, first);
                }
            }
        }
    }

    /// `T` vectors from `first` on.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn each_row<S: Vector, F: Stored, const T: usize, const U: usize>(
        &mut self,
        rows: Range<usize>,
        first: usize,
    ) {
        let padded = self.cols.next_multiple_of(2 * S::N);
        let x: [*const f32; T] = std::array::from_fn(|t| self.x[first + t][..padded].as_ptr());
        let width = self.cols * F::SIZE;
        let bytes = &self.bytes[rows.start * width..rows.end * width];
        let sums = &mut self.sums[rows.start * self.tokens..rows.end * self.tokens];
        for (r, sums) in sums.chunks_exact_mut(self.tokens).enumerate() {
            // SAFETY: every row has `width` bytes, every activation vector `padded` numbers.
            let row = unsafe { one_row::<S, F, T, U>(bytes.as_ptr().add(r * width), self.cols, x) };
            sums[first..first + T].copy_from_slice(&row);
        }
    }
}

/// Sums of one row with `T` vectors, `U` blocks side by side.
///
/// # Safety
/// `cols` numbers can be read at `row`, and `cols` rounded up to whole blocks at each of `x`; the processor has the
/// instruction set.
#[inline(always)]
unsafe fn one_row<S: Vector, F: Stored, const T: usize, const U: usize>(
    row: *const u8,
    cols: usize,
    x: [*const f32; T],
) -> [f32; T] {
    let block = 2 * S::N;
    let (blocks, tail, step) = (cols / block, cols % block, block * F::SIZE);
    // SAFETY: `blocks` whole blocks and `tail` numbers lie in a row.
    unsafe {
        let mut sum = [[[S::zero(); 2]; U]; T];
        let mut b = 0;
        while b + U <= blocks {
            for u in 0..U {
                let w = F::load::<S>(row.add((b + u) * step));
                for t in 0..T {
                    add::<S>(&mut sum[t][u], w, x[t].add((b + u) * block));
                }
            }
            b += U;
        }
        while b < blocks {
            let w = F::load::<S>(row.add(b * step));
            for t in 0..T {
                add::<S>(&mut sum[t][0], w, x[t].add(b * block));
            }
            b += 1;
        }
        if tail > 0 {
            let mut rest = [0u8; BLOCK];
            let from = row.add(blocks * step);
            std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), tail * F::SIZE);
            let w = F::load::<S>(rest.as_ptr());
            for t in 0..T {
                add::<S>(&mut sum[t][U - 1], w, x[t].add(blocks * block));
            }
        }
        let mut out = [0.0; T];
        for t in 0..T {
            out[t] = total::<S, U>(sum[t]);
        }
        out
    }
}

/// `sum += w * x`, for both halves of a block.
///
/// # Safety
/// `2 N` numbers can be read at `x`, and the processor has the instruction set.
#[inline(always)]
unsafe fn add<S: Vector>(sum: &mut [S::V; 2], w: (S::V, S::V), x: *const f32) {
    // SAFETY: the caller's.
    unsafe {
        sum[0] = S::fma(w.0, S::load(x), sum[0]);
        sum[1] = S::fma(w.1, S::load(x.add(S::N)), sum[1]);
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
