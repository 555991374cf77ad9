use std::arch::x86_64::*;

use super::Vector;

/// AVX-512: sixteen numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY of every block: the caller's processor has the set, and the memory that the trait asks for.
impl Vector for Avx512 {
    type V = __m512;
    const N: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn two_to(shifted: __m512) -> __m512 {
        unsafe {
            let n = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const u8) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn split_bf16(p: *const u8) -> (__m512, __m512) {
        unsafe {
            let bits = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(bits, _mm512_set1_epi32(!0xffff));
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, from: usize, dst: *mut f32, to: usize) {
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, row) in r.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(src.add(i * from));
            }
            let r = columns(r);
            for (j, column) in r.iter().enumerate() {
                _mm512_storeu_ps(dst.add(j * to), *column);
            }
        }
    }
}

/// The columns of sixteen rows.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
pub(crate) unsafe fn columns(r: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: the caller's.
    unsafe {
        let zero = _mm512_setzero_ps();
        let (mut pairs, mut quads) = ([zero; 16], [zero; 16]);
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // quads[4 * h + c]: in quarter q, column 4q + c of rows 4h to 4h + 3.
        for h in 0..4 {
            let at = 4 * h;
            quads[at] = _mm512_shuffle_ps::<0x44>(pairs[at], pairs[at + 2]);
            quads[at + 1] = _mm512_shuffle_ps::<0xee>(pairs[at], pairs[at + 2]);
            quads[at + 2] = _mm512_shuffle_ps::<0x44>(pairs[at + 1], pairs[at + 3]);
            quads[at + 3] = _mm512_shuffle_ps::<0xee>(pairs[at + 1], pairs[at + 3]);
        }
        let mut out = [zero; 16];
        for c in 0..4 {
            // Quarters 0 and 2, or 1 and 3, of two rows of quads; then the same again.
            let low_even = _mm512_shuffle_f32x4::<0x88>(quads[c], quads[4 + c]);
            let low_odd = _mm512_shuffle_f32x4::<0xdd>(quads[c], quads[4 + c]);
            let high_even = _mm512_shuffle_f32x4::<0x88>(quads[8 + c], quads[12 + c]);
            let high_odd = _mm512_shuffle_f32x4::<0xdd>(quads[8 + c], quads[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0x88>(low_even, high_even);
            out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low_even, high_even);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(low_odd, high_odd);
            out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(low_odd, high_odd);
        }
        out
    }
}
