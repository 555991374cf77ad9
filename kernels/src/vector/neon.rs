use std::arch::aarch64::*;

use half::f16;

use super::Vector;

/// 128-bit vectors of 64-bit Arm: four numbers.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

// SAFETY of every block: all 64-bit Arm processors have the set, and the caller the memory that the trait asks for.
impl Vector for Neon {
    type V = float32x4_t;
    const N: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        unsafe { vreinterpretq_f32_u8(vld1q_u8(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: float32x4_t) {
        unsafe { vst1q_u8(p.cast(), vreinterpretq_u8_f32(v)) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn sum(v: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(v) }
    }
    #[inline(always)]
    unsafe fn two_to(shifted: float32x4_t) -> float32x4_t {
        unsafe {
            let n = vaddq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(127));
            vreinterpretq_f32_u32(vshlq_n_u32::<23>(n))
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const u8) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p)))) }
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const u8) -> float32x4_t {
        // The instruction's intrinsic is not stable yet.
        unsafe {
            let bits = p.cast::<[u16; 4]>().read_unaligned();
            let wide = bits.map(|b| f16::from_bits(b).to_f32());
            vld1q_f32(wide.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn split_bf16(p: *const u8) -> (float32x4_t, float32x4_t) {
        unsafe {
            let bits = vreinterpretq_u32_u8(vld1q_u8(p));
            let odd = vandq_u32(bits, vdupq_n_u32(!0xffff));
            (vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)), vreinterpretq_f32_u32(odd))
        }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, from: usize, dst: *mut f32, to: usize) {
        unsafe {
            let rows = [0, 1, 2, 3].map(|i| Self::load(src.add(i * from)));
            let (ab_low, ab_high) = (vtrn1q_f32(rows[0], rows[1]), vtrn2q_f32(rows[0], rows[1]));
            let (cd_low, cd_high) = (vtrn1q_f32(rows[2], rows[3]), vtrn2q_f32(rows[2], rows[3]));
            let wide = |v| vreinterpretq_f64_f32(v);
            let columns = [
                vtrn1q_f64(wide(ab_low), wide(cd_low)),
                vtrn1q_f64(wide(ab_high), wide(cd_high)),
                vtrn2q_f64(wide(ab_low), wide(cd_low)),
                vtrn2q_f64(wide(ab_high), wide(cd_high)),
            ];
            for (j, column) in columns.into_iter().enumerate() {
                Self::store(dst.add(j * to), vreinterpretq_f32_f64(column));
            }
        }
    }
}
