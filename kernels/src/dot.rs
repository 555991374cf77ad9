//! Dot products of stored rows with `f32` vectors, one function for each instruction set.
//!
//! A row is read once, front to back, at any byte alignment. Which set is used is found once at run time; sums of one
//! set are the same in every call, sums of two sets differ in their last bits.

use std::sync::OnceLock;

use crate::cast::{self, Dtype};

/// `sum_i row[i] * x[i]`; `row` holds `x.len()` numbers as stored.
pub(crate) type Dot = fn(row: &[u8], x: &[f32]) -> f32;

/// The function for `dtype` on this machine.
pub(crate) fn dot_for(dtype: Dtype) -> Dot {
    static SET: OnceLock<[Dot; 3]> = OnceLock::new();
    let set = SET.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                return [x86::avx512_f32, x86::avx512_bf16, x86::avx512_f16];
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c")
            {
                return [x86::avx2_f32, x86::avx2_bf16, x86::avx2_f16];
            }
        }
        [portable::<F32>, portable::<BF16>, portable::<F16>]
    });
    match dtype {
        Dtype::F32 => set[0],
        Dtype::BF16 => set[1],
        Dtype::F16 => set[2],
    }
}

/// A dtype as a type, so that the portable loop is compiled once for each.
trait Stored {
    const DTYPE: Dtype;
}
struct F32;
struct BF16;
struct F16;
impl Stored for F32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Stored for BF16 {
    const DTYPE: Dtype = Dtype::BF16;
}
impl Stored for F16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// Plain Rust: sixteen sums side by side, which compilers turn into vector code of any width.
fn portable<S: Stored>(row: &[u8], x: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let mut wide = [0f32; LANES];
    for (w, x) in row.chunks(LANES * S::DTYPE.size()).zip(x.chunks(LANES)) {
        cast::widen(w, S::DTYPE, &mut wide[..x.len()]);
        for i in 0..x.len() {
            sums[i] += wide[i] * x[i];
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// Writes one dot product: the loop over whole vectors with four sums, and a plain tail.
    macro_rules! dot {
        ($public:ident, $name:ident, $features:literal, $lanes:literal, $size:literal, $stored:ty,
         $zero:ident, $fma:ident, $loadx:ident, $add:ident, $reduce:expr, |$p:ident| $load:expr) => {
            pub(super) fn $public(row: &[u8], x: &[f32]) -> f32 {
                assert!(row.len() >= x.len() * $size);
                // SAFETY: `dot_for` hands this function out only where the features were detected; the length is
                // checked above.
                unsafe { $name(row, x) }
            }

            #[target_feature(enable = $features)]
            unsafe fn $name(row: &[u8], x: &[f32]) -> f32 {
                let n = x.len();
                let mut sums = [$zero(); 4];
                let mut i = 0;
                // SAFETY (both loops): `i + lanes <= n` numbers are readable in `x` and, by the caller's check, in
                // `row`; all loads are unaligned ones.
                while i + 4 * $lanes <= n {
                    for (s, sum) in sums.iter_mut().enumerate() {
                        let at = i + s * $lanes;
                        let $p = unsafe { row.as_ptr().add(at * $size) };
                        let w = unsafe { $load };
                        *sum = $fma(w, unsafe { $loadx(x.as_ptr().add(at)) }, *sum);
                    }
                    i += 4 * $lanes;
                }
                while i + $lanes <= n {
                    let $p = unsafe { row.as_ptr().add(i * $size) };
                    let w = unsafe { $load };
                    sums[0] = $fma(w, unsafe { $loadx(x.as_ptr().add(i)) }, sums[0]);
                    i += $lanes;
                }
                let sum = $add($add(sums[0], sums[1]), $add(sums[2], sums[3]));
                let reduce: unsafe fn(_) -> f32 = $reduce;
                // SAFETY: same features as this function.
                unsafe { reduce(sum) + portable::<$stored>(&row[i * $size..], &x[i..]) }
            }
        };
    }

    #[target_feature(enable = "avx512f")]
    fn sum_512(v: __m512) -> f32 {
        _mm512_reduce_add_ps(v)
    }

    #[target_feature(enable = "avx")]
    fn sum_256(v: __m256) -> f32 {
        let mut lanes = [0f32; 8];
        // SAFETY: eight floats fit.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), v) };
        lanes.iter().sum()
    }

    dot!(
        avx512_f32,
        avx512_f32_inner,
        "avx512f",
        16,
        4,
        F32,
        _mm512_setzero_ps,
        _mm512_fmadd_ps,
        _mm512_loadu_ps,
        _mm512_add_ps,
        sum_512,
        |p| _mm512_loadu_ps(p.cast())
    );
    dot!(
        avx512_bf16,
        avx512_bf16_inner,
        "avx512f",
        16,
        2,
        BF16,
        _mm512_setzero_ps,
        _mm512_fmadd_ps,
        _mm512_loadu_ps,
        _mm512_add_ps,
        sum_512,
        |p| _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())),
            16
        ))
    );
    dot!(
        avx512_f16,
        avx512_f16_inner,
        "avx512f",
        16,
        2,
        F16,
        _mm512_setzero_ps,
        _mm512_fmadd_ps,
        _mm512_loadu_ps,
        _mm512_add_ps,
        sum_512,
        |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    );
    dot!(
        avx2_f32,
        avx2_f32_inner,
        "avx2,fma,f16c",
        8,
        4,
        F32,
        _mm256_setzero_ps,
        _mm256_fmadd_ps,
        _mm256_loadu_ps,
        _mm256_add_ps,
        sum_256,
        |p| _mm256_loadu_ps(p.cast())
    );
    dot!(
        avx2_bf16,
        avx2_bf16_inner,
        "avx2,fma,f16c",
        8,
        2,
        BF16,
        _mm256_setzero_ps,
        _mm256_fmadd_ps,
        _mm256_loadu_ps,
        _mm256_add_ps,
        sum_256,
        |p| _mm256_castsi256_ps(_mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())),
            16
        ))
    );
    dot!(
        avx2_f16,
        avx2_f16_inner,
        "avx2,fma,f16c",
        8,
        2,
        F16,
        _mm256_setzero_ps,
        _mm256_fmadd_ps,
        _mm256_loadu_ps,
        _mm256_add_ps,
        sum_256,
        |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    );

    #[cfg(test)]
    pub(super) const AVX512: [(Dtype, Dot); 3] =
        [(Dtype::F32, avx512_f32), (Dtype::BF16, avx512_bf16), (Dtype::F16, avx512_f16)];
    #[cfg(test)]
    pub(super) const AVX2: [(Dtype, Dot); 3] =
        [(Dtype::F32, avx2_f32), (Dtype::BF16, avx2_bf16), (Dtype::F16, avx2_f16)];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every length around the vector widths, at an odd byte offset, against f64.
    fn check(dtype: Dtype, dot: Dot) {
        for n in [0, 1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 37 % 64) as f32 - 31.0) / 32.0).collect();
            let x: Vec<f32> = (0..n).map(|i| ((i * 53 % 128) as f32 - 60.0) / 64.0).collect();
            let mut bytes = vec![0; n * dtype.size() + 1];
            cast::narrow(&row, dtype, &mut bytes[1..]);
            let expected: f64 = row.iter().zip(&x).map(|(a, b)| *a as f64 * *b as f64).sum();
            // The values are exact in every dtype, so only the order of the sum can show.
            assert!((dot(&bytes[1..], &x) as f64 - expected).abs() < 1e-4, "{dtype} {n}");
        }
    }

    #[test]
    fn every_instruction_set_sums_the_same_products() {
        check(Dtype::F32, portable::<F32>);
        check(Dtype::BF16, portable::<BF16>);
        check(Dtype::F16, portable::<F16>);
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                x86::AVX512.iter().for_each(|(dtype, dot)| check(*dtype, *dot));
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c")
            {
                x86::AVX2.iter().for_each(|(dtype, dot)| check(*dtype, *dot));
            }
        }
    }
}
