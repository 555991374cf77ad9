//! Operations on slices of equal length, number by number: what merges of models are made of.
//!
//! Slices of unequal length are treated up to the shortest. There is no fused multiply-add: each result is that of the same
//! loop in plain Rust. "Rounded" is to nearest even in a dtype.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cast::Dtype;
use crate::simd::each_set;

/// Rounds to nearest even in `dtype`.
pub fn round(values: &mut [f32], dtype: Dtype) {
    match dtype {
        Dtype::F32 => {}
        Dtype::BF16 => round_bf16(values),
        Dtype::F16 => {
            let mut block = [f16::ZERO; 256];
            for values in values.chunks_mut(block.len()) {
                let block = &mut block[..values.len()];
                block.convert_from_f32_slice(values);
                block.convert_to_f32_slice(values);
            }
        }
    }
}

#[inline(always)]
fn bf16(v: f32) -> f32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // A NaN stays one.
    let bits = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { rounded };
    f32::from_bits(bits & 0xffff_0000)
}

each_set! {
    fn round_bf16(values: &mut [f32]) {
        for v in values {
            *v = bf16(*v);
        }
    }
}

/// `out = a - b`, rounded.
pub fn subtract(a: &[f32], b: &[f32], dtype: Dtype, out: &mut [f32]) {
    if dtype == Dtype::BF16 {
        return subtract_bf16(a, b, out);
    }
    subtract_f32(a, b, out);
    round(out, dtype);
}

each_set! {
    fn subtract_f32(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o = a - b;
        }
    }
}

each_set! {
    fn subtract_bf16(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o = bf16(a - b);
        }
    }
}

each_set! {
    /// `out = out + values`
    pub fn add(out: &mut [f32], values: &[f32]) {
        for (o, v) in out.iter_mut().zip(values) {
            *o += v;
        }
    }
}

each_set! {
    /// `out = out + factor values`
    pub fn add_scaled(out: &mut [f32], factor: f32, values: &[f32]) {
        for (o, v) in out.iter_mut().zip(values) {
            *o += factor * v;
        }
    }
}

each_set! {
    /// `out = out + factor (a - b)`
    pub fn add_scaled_difference(out: &mut [f32], factor: f32, a: &[f32], b: &[f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o += factor * (a - b);
        }
    }
}

each_set! {
    /// `out = out + (a - b)^2`
    pub fn add_squared_difference(out: &mut [f32], a: &[f32], b: &[f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            let difference = a - b;
            *o += difference * difference;
        }
    }
}

/// `values = factor values`, rounded.
pub fn scale(values: &mut [f32], factor: f32, dtype: Dtype) {
    if dtype == Dtype::BF16 {
        return scale_bf16(values, factor);
    }
    scale_f32(values, factor);
    round(values, dtype);
}

each_set! {
    fn scale_f32(values: &mut [f32], factor: f32) {
        for v in values {
            *v *= factor;
        }
    }
}

each_set! {
    fn scale_bf16(values: &mut [f32], factor: f32) {
        for v in values {
            *v = bf16(*v * factor);
        }
    }
}

each_set! {
    /// `values = values / divisor`
    pub fn divide(values: &mut [f32], divisor: f32) {
        for v in values {
            *v /= divisor;
        }
    }
}

each_set! {
    /// `values = values / divisors`, undivided where the divisor is zero.
    pub fn divide_each(values: &mut [f32], divisors: &[f32]) {
        for (v, d) in values.iter_mut().zip(divisors) {
            *v /= if *d == 0.0 { 1.0 } else { *d };
        }
    }
}

each_set! {
    /// Where `values` is not zero and has the sign of `all` (zero counts as positive): `sum = sum + values` and
    /// `weights = weights + weight`.
    pub fn add_agreeing(values: &[f32], weight: f32, all: &[f32], sum: &mut [f32], weights: &mut [f32]) {
        for (((v, all), sum), weights) in values.iter().zip(all).zip(sum).zip(weights) {
            let agrees = (*v != 0.0) & ((*v > 0.0) == (*all >= 0.0));
            *sum += if agrees { *v } else { 0.0 };
            *weights += if agrees { weight } else { 0.0 };
        }
    }
}

each_set! {
    /// Zeroes what is smaller in magnitude than the number with the bits `least`, or, with `keep_equal: false`, not
    /// greater.
    pub fn zero_below(values: &mut [f32], least: u32, keep_equal: bool) {
        let least = if keep_equal { least } else { least.saturating_add(1) };
        for v in values {
            let bits = v.to_bits();
            *v = f32::from_bits(if bits & 0x7fff_ffff >= least { bits } else { 0 });
        }
    }
}

each_set! {
    /// As [`zero_below`], where the number of `gauge` in the same place is smaller.
    pub fn zero_where_below(values: &mut [f32], gauge: &[f32], least: u32, keep_equal: bool) {
        let least = if keep_equal { least } else { least.saturating_add(1) };
        for (v, gauge) in values.iter_mut().zip(gauge) {
            *v = if gauge.to_bits() & 0x7fff_ffff >= least { *v } else { 0.0 };
        }
    }
}

each_set! {
    /// Zeroes what is greater in magnitude than the number with the bits `most`, or, with `keep_equal: false`, not
    /// smaller.
    pub fn zero_above(values: &mut [f32], most: u32, keep_equal: bool) {
        let limit = if keep_equal { most.saturating_add(1) } else { most };
        for v in values {
            let bits = v.to_bits();
            *v = f32::from_bits(if bits & 0x7fff_ffff < limit { bits } else { 0 });
        }
    }
}

/// Zeroes the numbers whose word is not below `threshold`, which is at most 2^32.
pub fn zero_by_chance(values: &mut [f32], words: &[u32], threshold: u64) {
    // No word is as large as 2^32.
    if let Ok(threshold) = u32::try_from(threshold) {
        zero_from(values, words, threshold);
    }
}

each_set! {
    fn zero_from(values: &mut [f32], words: &[u32], threshold: u32) {
        for (v, word) in values.iter_mut().zip(words) {
            *v = if *word < threshold { *v } else { 0.0 };
        }
    }
}

each_set! {
    /// Zeroes the numbers whose word is not below the threshold in the same place.
    pub fn zero_by_chances(values: &mut [f32], words: &[u32], thresholds: &[u32]) {
        for ((v, word), threshold) in values.iter_mut().zip(words).zip(thresholds) {
            *v = if word < threshold { *v } else { 0.0 };
        }
    }
}

each_set! {
    /// Bits of the magnitudes, which are ordered as the magnitudes are.
    pub fn magnitudes(values: &[f32], out: &mut [u32]) {
        for (o, v) in out.iter_mut().zip(values) {
            *o = v.to_bits() & 0x7fff_ffff;
        }
    }
}

/// Sums that run beside each other, so that the compiler can use vectors: the order of the sum is fixed.
const LANES: usize = 32;

each_set! {
    /// `sum a b` in f64, added to `total`.
    pub fn add_dot(a: &[f32], b: &[f32], total: &mut f64) {
        let mut lanes = [0f64; LANES];
        let (chunks_a, chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
        let mut sum = 0f64;
        for (x, y) in rest {
            sum += f64::from(*x) * f64::from(*y);
        }
        for (x, y) in chunks_a.zip(chunks_b) {
            for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
                *lane += f64::from(*x) * f64::from(*y);
            }
        }
        for lane in lanes {
            sum += lane;
        }
        *total += sum;
    }
}

each_set! {
    /// `sum a a`, `sum b b`, `sum a b` in f64, added to `totals`: each as [`add_dot`] has it.
    pub fn add_dots_of_two(a: &[f32], b: &[f32], totals: &mut [f64; 3]) {
        let mut lanes = [[0f64; LANES]; 3];
        let (chunks_a, chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest = chunks_a.remainder().iter().zip(chunks_b.remainder());
        let mut sums = [0f64; 3];
        for (x, y) in rest {
            let (x, y) = (f64::from(*x), f64::from(*y));
            sums = [sums[0] + x * x, sums[1] + y * y, sums[2] + x * y];
        }
        let [aa, bb, ab] = &mut lanes;
        for (x, y) in chunks_a.zip(chunks_b) {
            for i in 0..LANES {
                let (x, y) = (f64::from(x[i]), f64::from(y[i]));
                aa[i] += x * x;
                bb[i] += y * y;
                ab[i] += x * y;
            }
        }
        for ((total, sum), lanes) in totals.iter_mut().zip(sums).zip(lanes) {
            *total += lanes.iter().fold(sum, |sum, lane| sum + lane);
        }
    }
}

each_set! {
    /// `sum |a|` in f64, added to `total`.
    pub fn add_absolute(a: &[f32], total: &mut f64) {
        let mut lanes = [0f64; LANES];
        let chunks = a.chunks_exact(LANES);
        let mut sum = 0f64;
        for x in chunks.remainder() {
            sum += f64::from(x.abs());
        }
        for x in chunks {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += f64::from(x.abs());
            }
        }
        for lane in lanes {
            sum += lane;
        }
        *total += sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast;

    /// Numbers of all sizes and both signs, zeros among them; no multiple of any vector's length.
    fn numbers(seed: u32) -> Vec<f32> {
        (0..1003u32)
            .map(|i| {
                let word = (i + seed).wrapping_mul(2_654_435_769) >> 7;
                if word.is_multiple_of(17) {
                    0.0
                } else {
                    (word as f32 / 1e6 - 16.0).powi(3) * 1e-3
                }
            })
            .collect()
    }

    #[test]
    fn rounding_is_that_of_storing() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut values = numbers(1);
            values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0, 1e-41]);
            let mut bytes = vec![0; values.len() * dtype.size()];
            cast::narrow(&values, dtype, &mut bytes);
            let mut expected = vec![0.0; values.len()];
            cast::widen(&bytes, dtype, &mut expected);
            round(&mut values, dtype);
            for (v, e) in values.iter().zip(&expected) {
                assert_eq!(v.to_bits(), e.to_bits(), "{dtype}");
            }
            let mut nan = [f32::NAN, f32::from_bits(0x7f80_0001)];
            round(&mut nan, dtype);
            assert!(nan.iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn each_is_the_plain_loop() {
        let (a, b, c) = (numbers(1), numbers(5), numbers(9));
        let check = |found: &[f32], expected: &dyn Fn(usize) -> f32| {
            for (i, v) in found.iter().enumerate() {
                assert_eq!(v.to_bits(), expected(i).to_bits(), "{i}");
            }
        };
        let mut out = vec![0.0; a.len()];
        let rounded = |v: f32, dtype| match dtype {
            Dtype::F32 => v,
            Dtype::BF16 => half::bf16::from_f32(v).to_f32(),
            Dtype::F16 => f16::from_f32(v).to_f32(),
        };
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            subtract(&a, &b, dtype, &mut out);
            check(&out, &|i| rounded(a[i] - b[i], dtype));
            let mut scaled = c.clone();
            scale(&mut scaled, 0.3, dtype);
            check(&scaled, &|i| rounded(c[i] * 0.3, dtype));
        }
        let changed = |change: &dyn Fn(&mut [f32])| {
            let mut out = c.clone();
            change(&mut out);
            out
        };
        check(&changed(&|o| add(o, &a)), &|i| c[i] + a[i]);
        check(&changed(&|o| add_scaled(o, 0.3, &a)), &|i| c[i] + 0.3 * a[i]);
        check(&changed(&|o| add_scaled_difference(o, 0.3, &a, &b)), &|i| {
            c[i] + 0.3 * (a[i] - b[i])
        });
        check(&changed(&|o| divide(o, 0.3)), &|i| c[i] / 0.3);
        check(&changed(&|o| divide_each(o, &a)), &|i| if a[i] == 0.0 { c[i] } else { c[i] / a[i] });
        for equal in [true, false] {
            let bits = c[40].abs().to_bits();
            check(&changed(&|o| zero_below(o, bits, equal)), &|i| {
                let kept = c[i].abs() > c[40].abs() || equal && c[i].abs() == c[40].abs();
                if kept { c[i] } else { 0.0 }
            });
            check(&changed(&|o| zero_above(o, bits, equal)), &|i| {
                let kept = c[i].abs() < c[40].abs() || equal && c[i].abs() == c[40].abs();
                if kept { c[i] } else { 0.0 }
            });
        }
        let words: Vec<u32> = (0..a.len() as u32).map(|i| i.wrapping_mul(4_000_037)).collect();
        check(&changed(&|o| zero_by_chance(o, &words, 1 << 31)), &|i| {
            if words[i] < 1 << 31 { c[i] } else { 0.0 }
        });
        check(&changed(&|o| zero_by_chance(o, &words, 1 << 32)), &|i| c[i]);
    }

    #[test]
    fn what_agrees_is_added_with_its_weight() {
        let values = [1.0, -2.0, 0.0, 3.0, -4.0];
        let all = [5.0, 1.0, 0.0, 0.0, -1.0];
        let (mut sum, mut weights) = ([10.0; 5], [0.5; 5]);
        add_agreeing(&values, 2.0, &all, &mut sum, &mut weights);
        assert_eq!(sum, [11.0, 10.0, 10.0, 13.0, 6.0]);
        assert_eq!(weights, [2.5, 0.5, 0.5, 2.5, 2.5]);
    }

    #[test]
    fn sums_by_hand() {
        let a: Vec<f32> = (0..75).map(|i| i as f32 - 10.0).collect();
        let (mut dot, mut absolute) = (1.0, 1.0);
        add_dot(&a, &vec![2.0; 75], &mut dot);
        add_absolute(&a, &mut absolute);
        // The numbers from -10 to 64.
        assert_eq!((dot, absolute), (1.0 + 2.0 * (64.0 * 65.0 / 2.0 - 55.0), 1.0 + 2080.0 + 55.0));
        let (b, mut both, mut each) = (numbers(3), [1.0; 3], [1.0; 3]);
        add_dots_of_two(&a, &b[..75], &mut both);
        for (total, (x, y)) in each.iter_mut().zip([(&a[..], &a[..]), (&b, &b), (&a, &b)]) {
            add_dot(&x[..75], &y[..75], total);
        }
        assert_eq!(both, each);
        let mut keys = [0; 3];
        magnitudes(&[-1.0, 0.0, 2.0], &mut keys);
        assert_eq!(keys.map(f32::from_bits), [1.0, 0.0, 2.0]);
    }
}
