//! Sums of products of one row after another.
//!
//! Measured over buffers larger than the caches: two rows side by side take half the speed of memory (0.38 of the plain
//! read speed against 0.76). Asking for lines ahead takes a tenth of it on Zen 4 (0.76 against 0.87), which does that best
//! alone, and is worth a third on Emerald Rapids (0.81 against 0.59): see [`Ahead`].

// Indices of registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;
use std::sync::OnceLock;

use super::{FEW, Sums};
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

/// Bytes from the weights at hand to the lines that are asked for: 1 KiB gave 0.72 of the plain read speed, 2 KiB 0.78, and
/// 4 KiB, a page, 0.81. The processor's own looking ahead ends with the page.
const AHEAD: usize = 4 << 10;

/// Whether weights are asked for before they are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ahead {
    Ask,
    LeaveToProcessor,
}

impl Ahead {
    /// What is faster on this processor. No number depends on it.
    pub fn here() -> Self {
        static HERE: OnceLock<Ahead> = OnceLock::new();
        *HERE.get_or_init(|| if made_by_intel() { Ahead::Ask } else { Ahead::LeaveToProcessor })
    }
}

#[cfg(target_arch = "x86_64")]
fn made_by_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn made_by_intel() -> bool {
    false
}

/// Asks for the lines of a block [`AHEAD`] of `at`, which may lie behind the weights: asking faults at no address.
#[inline(always)]
fn ask(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE belongs to every x86-64 processor, and nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
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
    pub ahead: Ahead,
    /// `[rows, tokens]`.
    pub sums: &'a mut [f32],
    pub how: Sums,
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
        // SAFETY: the caller's.
        unsafe {
            match self.ahead {
                Ahead::Ask => self.all::<S, F, true>(),
                Ahead::LeaveToProcessor => self.all::<S, F, false>(),
            }
        }
    }

    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn all<S: Vector, F: Stored, const ASK: bool>(mut self) {
        let (rows, width) = (self.sums.len() / self.tokens, self.cols * F::SIZE);
        assert_eq!(self.bytes.len(), rows * width);
        let at_once = if self.how == Sums::Pairs { 2 } else { 1 };
        let chunk = if self.tokens > at_once { CHUNK / width.max(1) } else { rows }.max(1);
        for from in (0..rows).step_by(chunk) {
            let rows = from..rows.min(from + chunk);
            let mut first = 0;
            // SAFETY: the caller's. With one token it takes more sums side by side to keep the units busy.
            unsafe {
                while self.how == Sums::Pairs && first + 2 <= self.tokens {
                    self.each_row::<S, F, 2, 1, ASK>(rows.clone(), first);
                    first += 2;
                }
                while first < self.tokens {
                    self.each_row::<S, F, 1, 4, ASK>(rows.clone(), first);
                    first += 1;
                }
            }
        }
    }

    /// `T` vectors from `first` on.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn each_row<S: Vector, F: Stored, const T: usize, const U: usize, const ASK: bool>(
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
            let row =
                unsafe { one_row::<S, F, T, U, ASK>(bytes.as_ptr().add(r * width), self.cols, x) };
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
unsafe fn one_row<S: Vector, F: Stored, const T: usize, const U: usize, const ASK: bool>(
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
            if ASK {
                ask(row.add(b * step), U * step);
            }
            for u in 0..U {
                let w = F::load::<S>(row.add((b + u) * step));
                for t in 0..T {
                    add::<S>(&mut sum[t][u], w, x[t].add((b + u) * block));
                }
            }
            b += U;
        }
        while b < blocks {
            if ASK {
                ask(row.add(b * step), step);
            }
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
