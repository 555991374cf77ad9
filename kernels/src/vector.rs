//! Vectors of `f32`, one type for each instruction set, and the functions that are compiled once for each of them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

use crate::exec::Isa;

/// Vectors of one instruction set.
///
/// # Safety
/// All functions demand that the processor has the instruction set, which holds inside [`Job::run`]. They are always inlined into
/// a function that is compiled for the set. Pointers need no alignment.
pub(crate) trait Vector: Copy + 'static {
    /// A vector.
    type V: Copy;
    /// Numbers in it.
    const N: usize;

    /// All zero.
    unsafe fn zero() -> Self::V;
    /// All `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// The `N` numbers from `p` on.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes the `N` numbers from `p` on.
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, with one rounding where the set has it.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of all numbers, in an order of its own that never changes.
    unsafe fn sum(v: Self::V) -> f32;
    /// `2^n` for vectors that hold `n + 1.5 * 2^23`, `-126 <= n <= 127`.
    unsafe fn two_to(shifted: Self::V) -> Self::V;
    /// `N` bf16 numbers.
    unsafe fn widen_bf16(p: *const u8) -> Self::V;
    /// `N` f16 numbers.
    unsafe fn widen_f16(p: *const u8) -> Self::V;
    /// `2 N` bf16 numbers: those at even places, and those at odd ones.
    unsafe fn split_bf16(p: *const u8) -> (Self::V, Self::V);
    /// `dst[j * to + i] = src[i * from + j]` for a block of `N` by `N` numbers.
    unsafe fn transpose(src: *const f32, from: usize, dst: *mut f32, to: usize);

    /// `exp(x)` to 3e-7 of itself between -87 and 88, as at these ends outside; NaN stays NaN.
    ///
    /// Source: range reduction by `ln 2` in two parts (Cody and Waite) and the Taylor polynomial of degree 7.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
        // SAFETY: the caller's processor has the set.
        unsafe {
            let x = Self::min(Self::splat(88.0), Self::max(Self::splat(-87.0), x));
            let round = Self::splat(ROUND);
            let shifted = Self::fma(x, Self::splat(std::f32::consts::LOG2_E), round);
            let n = Self::sub(shifted, round);
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.0 / 5040.0);
            for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::mul(p, Self::two_to(shifted))
        }
    }
}

/// Work that is compiled once for each instruction set.
pub(crate) trait Job {
    type Out;
    /// Does it. Implementations are `#[inline(always)]`, and so is all they call that handles vectors.
    ///
    /// # Safety
    /// The processor has the instruction set of `S`.
    unsafe fn run<S: Vector>(self) -> Self::Out;
}

/// Does `job` with the vectors of `isa`; with plainer ones if the processor does not have them.
pub(crate) fn run<J: Job>(isa: Isa, job: J) -> J::Out {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512<J: Job>(job: J) -> J::Out {
            // SAFETY: this function has the features.
            unsafe { job.run::<Avx512>() }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<J: Job>(job: J) -> J::Out {
            // SAFETY: this function has the features.
            unsafe { job.run::<Avx2>() }
        }
        if isa >= Isa::Avx512 && Isa::Avx512.available() {
            // SAFETY: the features were detected.
            return unsafe { avx512(job) };
        }
        if isa >= Isa::Avx2 && Isa::Avx2.available() {
            // SAFETY: the features were detected.
            return unsafe { avx2(job) };
        }
    }
    #[cfg(target_arch = "aarch64")]
    if isa == Isa::Neon {
        // SAFETY: every 64-bit Arm processor has them.
        return unsafe { job.run::<Neon>() };
    }
    let _ = isa;
    // SAFETY: plain Rust has no demands.
    unsafe { job.run::<Portable>() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    /// Every operation on numbers that tell lanes apart.
    struct Everything;

    impl Job for Everything {
        type Out = ();
        #[inline(always)]
        unsafe fn run<S: Vector>(self) {
            let n = S::N;
            let a: Vec<f32> = (0..n).map(|i| i as f32 - 2.5).collect();
            let b: Vec<f32> = (0..n).map(|i| 0.5 * i as f32 + 1.0).collect();
            let mut out = vec![0.0; n];
            // SAFETY: all slices hold `N` numbers; `run` chose a set that the processor has.
            unsafe {
                let (va, vb) = (S::load(a.as_ptr()), S::load(b.as_ptr()));
                let mut check = |v: S::V, expected: &dyn Fn(usize) -> f32| {
                    S::store(out.as_mut_ptr(), v);
                    for (i, o) in out.iter().enumerate() {
                        assert_eq!(*o, expected(i), "lane {i} of {n}");
                    }
                };
                check(S::zero(), &|_| 0.0);
                check(S::splat(3.0), &|_| 3.0);
                check(S::add(va, vb), &|i| a[i] + b[i]);
                check(S::sub(va, vb), &|i| a[i] - b[i]);
                check(S::mul(va, vb), &|i| a[i] * b[i]);
                check(S::div(va, vb), &|i| a[i] / b[i]);
                check(S::max(va, vb), &|i| a[i].max(b[i]));
                check(S::min(va, vb), &|i| a[i].min(b[i]));
                check(S::fma(va, vb, vb), &|i| a[i] * b[i] + b[i]);
                let whole = S::add(va, S::splat(2.5));
                check(S::two_to(S::add(whole, S::splat(12_582_912.0))), &|i| (i as f32).exp2());
                assert_eq!(S::sum(va), a.iter().sum::<f32>());
                for (dtype, wide) in [
                    (Dtype::BF16, S::widen_bf16 as unsafe fn(*const u8) -> S::V),
                    (Dtype::F16, S::widen_f16),
                ] {
                    let mut bytes = vec![0; 2 * n + 1];
                    crate::cast::narrow(&a, dtype, &mut bytes[1..]);
                    check(wide(bytes[1..].as_ptr()), &|i| a[i]);
                }
                let twice: Vec<f32> = (0..2 * n).map(|i| i as f32 - 2.5).collect();
                let mut bytes = vec![0; 4 * n + 1];
                crate::cast::narrow(&twice, Dtype::BF16, &mut bytes[1..]);
                let (even, odd) = S::split_bf16(bytes[1..].as_ptr());
                check(even, &|i| twice[2 * i]);
                check(odd, &|i| twice[2 * i + 1]);
                let exp = S::exp(S::mul(va, S::splat(-3.0)));
                S::store(out.as_mut_ptr(), exp);
                for (x, e) in a.iter().zip(&out) {
                    assert!((e / (x * -3.0).exp() - 1.0).abs() < 1e-6);
                }
                S::store(out.as_mut_ptr(), S::exp(S::splat(f32::NAN)));
                assert!(out.iter().all(|v| v.is_nan()));
                S::store(out.as_mut_ptr(), S::exp(S::splat(-1000.0)));
                assert!(out.iter().all(|v| *v >= 0.0 && *v < 1e-36));
                let (from, to) = (n + 3, n + 1);
                let src: Vec<f32> = (0..n * from).map(|i| i as f32).collect();
                let mut dst = vec![-1.0; n * to];
                S::transpose(src.as_ptr(), from, dst.as_mut_ptr(), to);
                for i in 0..n {
                    for j in 0..n {
                        assert_eq!(dst[j * to + i], src[i * from + j]);
                    }
                    assert_eq!(dst[i * to + n], -1.0);
                }
            }
        }
    }

    #[test]
    fn every_set_computes_alike() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            run(isa, Everything);
        }
    }
}
