//! Conversions between `f32` and weights as stored. Rounding is to nearest, ties to even.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// How the numbers of a weight are stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// 32-bit IEEE.
    F32,
    /// 16-bit brain float.
    BF16,
    /// 16-bit IEEE.
    F16,
}

impl Dtype {
    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
        }
    }

    /// The name that `config.json` uses: `float32`, `bfloat16`, `float16`.
    pub const fn config_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            Dtype::F16 => "float16",
        }
    }

    /// Reads a name as recipes and `config.json` spell it (`bfloat16`, `torch.bfloat16`, `bf16`, …).
    pub fn from_config_name(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "f32" | "fp32" | "float" => Some(Dtype::F32),
            "bfloat16" | "bf16" => Some(Dtype::BF16),
            "float16" | "f16" | "fp16" | "half" => Some(Dtype::F16),
            _ => None,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::BF16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

/// Numbers converted at a time where the bytes may be unaligned.
const BLOCK: usize = 256;

/// Widens stored numbers to `f32`: `out[i] = bytes[i]`, exactly.
///
/// * `bytes`: `out.len() * dtype.size()` bytes at any alignment; what is longer is ignored
pub fn widen(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::BF16 => {
            widen_bf16(bytes, out);
        }
        Dtype::F16 => {
            let mut block = [f16::ZERO; BLOCK];
            for (o, b) in out.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK * 2)) {
                let block = &mut block[..o.len()];
                for (h, c) in block.iter_mut().zip(b.chunks_exact(2)) {
                    *h = f16::from_bits(u16::from_le_bytes([c[0], c[1]]));
                }
                block.convert_to_f32_slice(o);
            }
        }
    }
}

crate::simd::each_set! {
    fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *o = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
        }
    }
}

crate::simd::each_set! {
    fn narrow_bf16(values: &[f32], out: &mut [u8]) {
        for (v, o) in values.iter().zip(out.chunks_exact_mut(2)) {
            let bits = v.to_bits();
            let even = (bits >> 16) & 1;
            let rounded = bits.wrapping_add(0x7fff + even) >> 16;
            // A NaN keeps its upper bits, and one that says that it is quiet.
            let quiet = (bits >> 16) | 0x40;
            let half = if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded } as u16;
            o.copy_from_slice(&half.to_le_bytes());
        }
    }
}

/// Rounds `f32` numbers to `dtype` and stores them; `out` has `values.len() * dtype.size()` bytes.
pub fn narrow(values: &[f32], dtype: Dtype, out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (v, o) in values.iter().zip(out.chunks_exact_mut(4)) {
                o.copy_from_slice(&v.to_le_bytes());
            }
        }
        Dtype::BF16 => {
            narrow_bf16(values, out);
        }
        Dtype::F16 => {
            let mut block = [f16::ZERO; BLOCK];
            for (v, o) in values.chunks(BLOCK).zip(out.chunks_mut(BLOCK * 2)) {
                let block = &mut block[..v.len()];
                block.convert_from_f32_slice(v);
                for (h, c) in block.iter().zip(o.chunks_exact_mut(2)) {
                    c.copy_from_slice(&h.to_bits().to_le_bytes());
                }
            }
        }
    }
}

/// Index of the first number that is NaN or infinite.
pub fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    /// Numbers looked at before asking whether one of them was bad: keeps the inner loop free of branches.
    const STRIDE: usize = 4096;
    let size = dtype.size();
    let bad = |chunk: &[u8]| match dtype {
        Dtype::F32 => chunk.chunks_exact(4).fold(false, |bad, c| {
            bad | (u32::from_le_bytes([c[0], c[1], c[2], c[3]]) & 0x7f80_0000 == 0x7f80_0000)
        }),
        Dtype::BF16 => chunk
            .chunks_exact(2)
            .fold(false, |bad, c| bad | (u16::from_le_bytes([c[0], c[1]]) & 0x7f80 == 0x7f80)),
        Dtype::F16 => chunk
            .chunks_exact(2)
            .fold(false, |bad, c| bad | (u16::from_le_bytes([c[0], c[1]]) & 0x7c00 == 0x7c00)),
    };
    let (block, chunk) = bytes.chunks(STRIDE * size).enumerate().find(|(_, chunk)| bad(chunk))?;
    let inside = chunk.chunks_exact(size).position(bad)?;
    Some(block * STRIDE + inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bit_patterns() {
        let mut out = [0.0; 2];
        widen(&[0x80, 0x3f, 0x00, 0xc0], Dtype::BF16, &mut out);
        assert_eq!(out, [1.0, -2.0]);
        widen(&[0x00, 0x3c, 0x00, 0xc0], Dtype::F16, &mut out);
        assert_eq!(out, [1.0, -2.0]);
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let mut out = [0u8; 2];
        // 1 + 2^-8 lies half way between 1 and 1 + 2^-7: even is 1.
        narrow(&[1.0 + 2f32.powi(-8)], Dtype::BF16, &mut out);
        assert_eq!(out, [0x80, 0x3f]);
        narrow(&[1.0 + 3.0 * 2f32.powi(-8)], Dtype::BF16, &mut out);
        assert_eq!(out, [0x82, 0x3f]);
    }

    #[test]
    fn rounding_is_that_of_half() {
        let values: Vec<f32> = (0..1u32 << 20)
            .map(|i| f32::from_bits(i.wrapping_mul(4093).wrapping_add(i << 20)))
            .collect();
        let mut out = vec![0; values.len() * 2];
        narrow(&values, Dtype::BF16, &mut out);
        for (v, o) in values.iter().zip(out.chunks_exact(2)) {
            assert_eq!(half::bf16::from_f32(*v).to_bits().to_le_bytes(), o, "{v}");
        }
    }

    #[test]
    fn round_trip_keeps_16_bit_values() {
        for dtype in [Dtype::BF16, Dtype::F16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(|b| b.to_le_bytes()).collect();
            let mut wide = vec![0.0; 1 << 16];
            widen(&bytes, dtype, &mut wide);
            let mut back = vec![0u8; 1 << 17];
            narrow(&wide, dtype, &mut back);
            for i in (0..1 << 16).filter(|&i| !wide[i].is_nan()) {
                assert_eq!(bytes[2 * i..2 * i + 2], back[2 * i..2 * i + 2], "{dtype} {i:#x}");
            }
        }
    }

    #[test]
    fn finds_the_first_bad_number() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut values = vec![1.0f32; 10_000];
            let mut bytes = vec![0; values.len() * dtype.size()];
            narrow(&values, dtype, &mut bytes);
            assert_eq!(first_non_finite(&bytes, dtype), None);
            values[7001] = f32::NAN;
            values[7002] = f32::INFINITY;
            narrow(&values, dtype, &mut bytes);
            assert_eq!(first_non_finite(&bytes, dtype), Some(7001));
        }
    }
}
