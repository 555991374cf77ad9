//! Micro-kernels: some weight rows times one panel, sums in registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::Form;
#[cfg(target_arch = "x86_64")]
use crate::vector::Avx512;
use crate::vector::Vector;

/// A way to multiply.
pub(crate) trait Engine {
    /// Vectors of the sums.
    type S: Vector;
    /// How panels and weight rows stand in memory.
    const FORM: Form;

    /// `sums[0][r] = sum_c a[r, c] * panel[c]` and `sums[1][r]` so of `b`, `H` rows each, `stride` bytes from row to row, in a
    /// fixed order over `c`.
    ///
    /// # Safety
    /// Rows hold `cols` numbers (f32, or bf16 for pairs) at any alignment, the panel `V * N` lanes; the processor has the set.
    unsafe fn tile<const H: usize, const V: usize>(
        a: *const u8,
        b: *const u8,
        stride: usize,
        panel: *const f32,
        cols: usize,
    ) -> [[[<Self::S as Vector>::V; V]; H]; 2];

    /// Two rows of numbers as one row of pairs.
    ///
    /// # Safety
    /// The processor has the set, and the engine's form is pairs.
    unsafe fn interleave(
        low: <Self::S as Vector>::V,
        high: <Self::S as Vector>::V,
    ) -> <Self::S as Vector>::V;
}

/// Fused multiply-adds in f32.
pub(crate) struct F32<S>(PhantomData<S>);

impl<S: Vector> Engine for F32<S> {
    type S = S;
    const FORM: Form = Form::Wide;

    #[inline(always)]
    unsafe fn tile<const H: usize, const V: usize>(
        a: *const u8,
        b: *const u8,
        stride: usize,
        panel: *const f32,
        cols: usize,
    ) -> [[[S::V; V]; H]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[[S::zero(); V]; H]; 2];
            let (mut panel, mut at) = (panel, 0);
            for _ in 0..cols {
                let mut x = [S::zero(); V];
                for (v, x) in x.iter_mut().enumerate() {
                    *x = S::load(panel.add(v * S::N));
                }
                for (sums, rows) in sums.iter_mut().zip([a, b]) {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let w = rows.add(r * stride + at).cast::<f32>().read_unaligned();
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = S::fma(S::splat(w), x, *sum);
                        }
                    }
                }
                panel = panel.add(V * S::N);
                at += 4;
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn interleave(low: S::V, _: S::V) -> S::V {
        low
    }
}

/// The dot products of AVX512-BF16: two columns at once, sums in f32.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Bf16Dot;

#[cfg(target_arch = "x86_64")]
impl Engine for Bf16Dot {
    type S = Avx512;
    const FORM: Form = Form::Pairs;

    #[inline(always)]
    unsafe fn tile<const H: usize, const V: usize>(
        a: *const u8,
        b: *const u8,
        stride: usize,
        panel: *const f32,
        cols: usize,
    ) -> [[[__m512; V]; H]; 2] {
        // SAFETY: the caller's. Where `cols` is odd the last weight is read alone, and the panel holds a zero beside its partner.
        unsafe {
            let mut sums = [[[_mm512_setzero_ps(); V]; H]; 2];
            let (mut panel, mut at) = (panel, 0);
            for _ in 0..cols / 2 {
                let mut x = [_mm512_setzero_ps(); V];
                for (v, x) in x.iter_mut().enumerate() {
                    *x = _mm512_loadu_ps(panel.add(16 * v));
                }
                for (sums, rows) in sums.iter_mut().zip([a, b]) {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let w = rows.add(r * stride + at).cast::<i32>().read_unaligned();
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = dot(*sum, _mm512_set1_epi32(w), x);
                        }
                    }
                }
                panel = panel.add(16 * V);
                at += 4;
            }
            if cols % 2 == 1 {
                for (sums, rows) in sums.iter_mut().zip([a, b]) {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let w = i32::from(rows.add(r * stride + at).cast::<u16>().read_unaligned());
                        for (v, sum) in sums.iter_mut().enumerate() {
                            let x = _mm512_loadu_ps(panel.add(16 * v));
                            *sum = dot(*sum, _mm512_set1_epi32(w), x);
                        }
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn interleave(low: __m512, high: __m512) -> __m512 {
        // SAFETY: the caller's; both sides of the changes of type are 256 bits.
        unsafe {
            let low = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(low));
            let high = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(high));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
            _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low), high))
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn dot(sum: __m512, w: __m512i, x: __m512) -> __m512 {
    // SAFETY: the caller's processor has AVX512-BF16; all types are 512 bits.
    unsafe {
        _mm512_dpbf16_ps(
            sum,
            std::mem::transmute::<__m512i, __m512bh>(w),
            std::mem::transmute::<__m512, __m512bh>(x),
        )
    }
}

/// Numbers rounded to bf16, to nearest, ties to even, two in each word; what is missing is 0.
#[inline(always)]
pub(super) fn pairs(part: &[f32], words: &mut [f32]) {
    let halves: &mut [u16] = bytemuck::cast_slice_mut(words);
    for (half, x) in halves.iter_mut().zip(part) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        *half = if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16;
    }
    halves[part.len()..].fill(0);
}
