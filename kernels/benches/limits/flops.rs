//! The limit of prefilling: how fast registers are multiplied and added.

use std::hint::black_box;

use moe_merge_kernels::Isa;
use rayon::prelude::*;

/// Rounds of one run: about 2 ms.
const ROUNDS: usize = 1 << 17;

/// A loop that touches registers only.
#[derive(Clone, Copy)]
pub struct FlopLimit {
    /// What it does, for the report.
    pub name: &'static str,
    /// Multiplications and additions of one run on one thread.
    pub flops: f64,
    run: fn(),
}

impl FlopLimit {
    /// Runs it on every thread of the current pool; the work is then `flops` times the threads.
    pub fn run(&self) {
        match rayon::current_num_threads() {
            1 => (self.run)(),
            n => (0..n).into_par_iter().with_max_len(1).for_each(|_| (self.run)()),
        }
    }
}

/// f32 multiply-adds of `isa`, which this processor must have.
pub fn f32_limit(isa: Isa) -> FlopLimit {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::AVX2,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => arm::NEON,
        _ => PORTABLE,
    }
}

/// bf16 dot products where `isa` has them, else f32 multiply-adds.
pub fn bf16_limit(isa: Isa) -> FlopLimit {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 {
        return x86::AVX512_BF16;
    }
    f32_limit(isa)
}

const PORTABLE: FlopLimit = FlopLimit {
    name: "f32 multiply and add, plain Rust",
    flops: (2 * PORTABLE_LANES * ROUNDS) as f64,
    run: portable,
};

/// Ten vectors of four, so that sums and factors fit the sixteen registers of plain x86-64.
const PORTABLE_LANES: usize = 40;

fn portable() {
    let (a, b) = (black_box([0.999_999f32; 4]), black_box([1e-6f32; 4]));
    let mut sums = [[1f32; 4]; PORTABLE_LANES / 4];
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            for i in 0..4 {
                sum[i] = sum[i] * a[i] + b[i];
            }
        }
    }
    black_box(sums);
}

/// Writes `$run`: `$n` sums that are each changed once per round.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! register_loop {
    ($limit:ident, $run:ident, $inner:ident, $feature:literal, $name:literal, $n:literal, $flops:literal,
     $zero:expr, $a:expr, $b:expr, |$sum:ident, $x:ident, $y:ident| $step:expr) => {
        pub const $limit: FlopLimit =
            FlopLimit { name: $name, flops: ($n * $flops * ROUNDS) as f64, run: $run };

        fn $run() {
            // SAFETY: the caller chose this limit for an instruction set that the processor has.
            unsafe { $inner() }
        }

        #[target_feature(enable = $feature)]
        fn $inner() {
            let ($x, $y) = (black_box($a), black_box($b));
            let mut sums = [$zero; $n];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    let $sum = *sum;
                    *sum = $step;
                }
            }
            black_box(sums);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    register_loop!(
        AVX512,
        avx512,
        avx512_inner,
        "avx512f",
        "f32 multiply-add, AVX-512",
        24,
        32,
        _mm512_setzero_ps(),
        _mm512_set1_ps(0.5),
        _mm512_set1_ps(0.25),
        |sum, x, y| _mm512_fmadd_ps(x, y, sum)
    );
    register_loop!(
        AVX512_BF16,
        avx512_bf16,
        avx512_bf16_inner,
        "avx512f,avx512bw,avx512vl,avx512bf16",
        "bf16 dot, AVX512-BF16",
        24,
        64,
        _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.25), _mm512_set1_ps(0.25)),
        |sum, x, y| _mm512_dpbf16_ps(sum, x, y)
    );
    register_loop!(
        AVX2,
        avx2,
        avx2_inner,
        "avx2,fma",
        "f32 multiply-add, AVX2",
        12,
        16,
        _mm256_setzero_ps(),
        _mm256_set1_ps(0.5),
        _mm256_set1_ps(0.25),
        |sum, x, y| _mm256_fmadd_ps(x, y, sum)
    );
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::*;
    use std::arch::aarch64::*;

    register_loop!(
        NEON,
        neon,
        neon_inner,
        "neon",
        "f32 multiply-add, NEON",
        24,
        8,
        vdupq_n_f32(0.0),
        vdupq_n_f32(0.5),
        vdupq_n_f32(0.25),
        |sum, x, y| vfmaq_f32(sum, x, y)
    );
}
