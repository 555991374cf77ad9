use half::f16;

use super::Vector;

/// Plain Rust: four numbers side by side, which compilers turn into vector code.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Four = [f32; 4];

#[inline(always)]
fn each(a: Four, b: Four, f: impl Fn(f32, f32) -> f32) -> Four {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

impl Vector for Portable {
    type V = Four;
    const N: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Four {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Four {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Four {
        // SAFETY: the caller has four numbers there.
        unsafe { p.cast::<Four>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Four) {
        // SAFETY: the caller has room for four numbers there.
        unsafe { p.cast::<Four>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Four, b: Four) -> Four {
        each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Four, b: Four) -> Four {
        each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Four, b: Four) -> Four {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Four, b: Four) -> Four {
        each(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Four, b: Four) -> Four {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Four, b: Four) -> Four {
        each(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Four, b: Four, c: Four) -> Four {
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }
    #[inline(always)]
    unsafe fn sum(v: Four) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn two_to(shifted: Four) -> Four {
        shifted.map(|v| f32::from_bits(v.to_bits().wrapping_add(127) << 23))
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const u8) -> Four {
        // SAFETY: the caller has eight bytes there.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const u8) -> Four {
        // SAFETY: the caller has eight bytes there.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn split_bf16(p: *const u8) -> (Four, Four) {
        // SAFETY: the caller has sixteen bytes there.
        let bits = unsafe { p.cast::<[u32; 4]>().read_unaligned() };
        (bits.map(|b| f32::from_bits(b << 16)), bits.map(|b| f32::from_bits(b & !0xffff)))
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, from: usize, dst: *mut f32, to: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller has a block of four by four on both sides.
                unsafe { *dst.add(j * to + i) = *src.add(i * from + j) };
            }
        }
    }
}
