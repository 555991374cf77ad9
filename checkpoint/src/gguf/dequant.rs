//! Weights stored in blocks of a few bits a value, computed when their rows are read.
//!
//! Each function below turns one block into its values with the formula in its doc comment, in f32, product first and
//! sum after, so that the numbers equal gguf-py's to the last bit. A K-quant block holds 256 values in sub-blocks.
//!
//! # Source
//! ggml `ggml-common.h` (layouts) and `ggml-quants.c` (formulas).

use std::ops::Range;
use std::path::PathBuf;
use std::slice;

use half::f16;
use moe_merge_kernels::Dtype;

use crate::error::CheckpointError;
use crate::gguf::kinds::TensorKind;
use crate::map::MappedFile;
use crate::weight::{Weight, WeightRef};

/// Turns one block into its values.
type BlockReader = fn(&[u8], &mut [f32]);

/// The reader for blocks of `kind`; `None` if this program has none.
fn block_reader(kind: TensorKind) -> Option<BlockReader> {
    Some(match kind {
        TensorKind::Q4_0 => q4_0,
        TensorKind::Q4_1 => q4_1,
        TensorKind::Q5_0 => q5_0,
        TensorKind::Q5_1 => q5_1,
        TensorKind::Q8_0 => q8_0,
        TensorKind::Q2_K => q2_k,
        TensorKind::Q3_K => q3_k,
        TensorKind::Q4_K => q4_k,
        TensorKind::Q5_K => q5_k,
        TensorKind::Q6_K => q6_k,
        TensorKind::IQ4_NL => iq4_nl,
        TensorKind::IQ4_XS => iq4_xs,
        _ => return None,
    })
}

/// A tensor of quantised blocks in a mapped file; its rows are dequantised when they are read.
#[derive(Debug, Clone)]
pub struct BlockWeight {
    file: MappedFile,
    range: Range<usize>,
    name: String,
    kind: TensorKind,
    read: BlockReader,
    shape: Vec<usize>,
}

impl BlockWeight {
    /// The blocks `range` of `file` as `shape`, whose rows are whole blocks; `None` if `kind` cannot be dequantised.
    ///
    /// The caller has checked that `range` is what `shape` takes in `kind`.
    pub(crate) fn new(
        file: MappedFile,
        range: Range<usize>,
        name: String,
        kind: TensorKind,
        shape: Vec<usize>,
    ) -> Option<Self> {
        let read = block_reader(kind)?;
        Some(Self { file, range, name, kind, read, shape })
    }
}

impl Weight for BlockWeight {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let (block, size) = self.kind.block();
        let width = (self as &dyn Weight).cols() / block * size;
        let (from, to) =
            (self.range.start + rows.start * width, self.range.start + rows.end * width);
        let blocks = self.file.bytes()[from..to].chunks_exact(size);
        for (block, values) in blocks.zip(out.chunks_exact_mut(block)) {
            (self.read)(block, values);
        }
        Ok(())
    }

    fn origin(&self) -> (PathBuf, String) {
        (self.file.path().to_owned(), self.name.clone())
    }

    fn release(&self) {
        self.file.release(self.range.clone());
    }
}

/// A weight with a number added to each of its values: Gemma's norms, which GGUF stores as `1 + weight`.
#[derive(Debug, Clone)]
pub struct Shifted {
    inner: WeightRef,
    by: f32,
}

impl Shifted {
    /// `inner + by`, element by element.
    pub fn new(inner: WeightRef, by: f32) -> Self {
        Self { inner, by }
    }
}

impl Weight for Shifted {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.inner.read_rows(rows, out)?;
        out.iter_mut().for_each(|v| *v += self.by);
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        slice::from_ref(&self.inner)
    }
}

/// The 16-bit float at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 values: `d * (q - 8)`. `d` f16, then 16 bytes: low halves are values 0 to 15, high halves 16 to 31.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((l, h), q) in low.iter_mut().zip(high).zip(&block[2..18]) {
        *l = d * f32::from((q & 15) as i8 - 8);
        *h = d * f32::from((q >> 4) as i8 - 8);
    }
}

/// 32 values: `d * q + m`. `d`, `m` f16, then as Q4_0.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((l, h), q) in low.iter_mut().zip(high).zip(&block[4..20]) {
        *l = d * f32::from(q & 15) + m;
        *h = d * f32::from(q >> 4) + m;
    }
}

/// 32 values: `d * (q - 16)`. `d` f16, 4 bytes with bit 4 of each value, then as Q4_0.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let bits = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let (low, high) = out.split_at_mut(16);
    for (i, ((l, h), q)) in low.iter_mut().zip(high).zip(&block[6..22]).enumerate() {
        let bit = |at: usize| ((bits >> at) & 1) as u8 * 16;
        *l = d * f32::from((q & 15 | bit(i)) as i8 - 16);
        *h = d * f32::from((q >> 4 | bit(i + 16)) as i8 - 16);
    }
}

/// 32 values: `d * q + m`. `d`, `m` f16, then as Q5_0.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    let (low, high) = out.split_at_mut(16);
    for (i, ((l, h), q)) in low.iter_mut().zip(high).zip(&block[8..24]).enumerate() {
        let bit = |at: usize| ((bits >> at) & 1) as u8 * 16;
        *l = d * f32::from(q & 15 | bit(i)) + m;
        *h = d * f32::from(q >> 4 | bit(i + 16)) + m;
    }
}

/// 32 values: `d * q`. `d` f16, then 32 signed bytes.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (o, q) in out.iter_mut().zip(&block[2..34]) {
        *o = d * f32::from(*q as i8);
    }
}

/// 16 sub-blocks of 16 values: `d * scale * q - dmin * min`.
///
/// 16 bytes (scale in the low half, min in the high one), 64 bytes of 2-bit values, `d`, `dmin` f16. Of 128 values, 32
/// bytes hold the first 32 in their lowest bits, the next 32 in the bits above, and so on.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (sub, values) in out.chunks_exact_mut(16).enumerate() {
        let (scale, min) = (d * f32::from(block[sub] & 15), dmin * f32::from(block[sub] >> 4));
        let (from, shift) = two_bit_place(sub);
        for (o, q) in values.iter_mut().zip(&block[16 + from..16 + from + 16]) {
            *o = scale * f32::from((q >> shift) & 3) - min;
        }
    }
}

/// Where the 2-bit values of 16-value sub-block `sub` lie: first byte, and shift within the bytes.
fn two_bit_place(sub: usize) -> (usize, usize) {
    (sub / 8 * 32 + sub % 2 * 16, sub / 2 % 4 * 2)
}

/// 16 sub-blocks of 16 values: `d * (scale - 32) * (q - 4 if its high bit is clear)`.
///
/// 32 bytes of high bits (bit `i / 32` of byte `i % 32` belongs to value `i`), 64 bytes of 2-bit values as Q2_K, 12 bytes
/// of 6-bit scales, `d` f16.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 108);
    let packed = &block[96..108];
    for (sub, values) in out.chunks_exact_mut(16).enumerate() {
        let low = (packed[sub % 8] >> (sub / 8 * 4)) & 15;
        let high = (packed[8 + sub % 4] >> (sub / 4 * 2)) & 3;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        let (from, shift) = two_bit_place(sub);
        let masks = &block[sub % 2 * 16..sub % 2 * 16 + 16];
        let bytes = &block[32 + from..32 + from + 16];
        for ((o, q), mask) in values.iter_mut().zip(bytes).zip(masks) {
            let missing = (!(mask >> (sub / 2)) & 1) << 2;
            *o = scale * f32::from(((q >> shift) & 3) as i8 - missing as i8);
        }
    }
}

/// The 6-bit scale and min of 32-value sub-block `sub`, from the 12 bytes that Q4_K and Q5_K share.
fn six_bit_pair(packed: &[u8], sub: usize) -> (f32, f32) {
    let (scale, min) = if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let both = packed[sub + 4];
        (both & 15 | (packed[sub - 4] >> 6) << 4, both >> 4 | (packed[sub] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// 8 sub-blocks of 32 values: `d * scale * q - dmin * min`.
///
/// `d`, `dmin` f16, 12 bytes of 6-bit pairs, 128 bytes: of 64 values, 32 bytes hold the first 32 in their low halves.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (sub, values) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = six_bit_pair(&block[4..16], sub);
        let (scale, min) = (d * scale, dmin * min);
        let (from, shift) = (16 + sub / 2 * 32, sub % 2 * 4);
        for (o, q) in values.iter_mut().zip(&block[from..from + 32]) {
            *o = scale * f32::from((q >> shift) & 15) - min;
        }
    }
}

/// As Q4_K, with 32 bytes of high bits (bit `sub` of byte `i` belongs to value `i` of sub-block `sub`) before the values.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let bits = &block[16..48];
    for (sub, values) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = six_bit_pair(&block[4..16], sub);
        let (scale, min) = (d * scale, dmin * min);
        let (from, shift) = (48 + sub / 2 * 32, sub % 2 * 4);
        for ((o, q), bit) in values.iter_mut().zip(&block[from..from + 32]).zip(bits) {
            *o = scale * f32::from((q >> shift) & 15 | ((bit >> sub) & 1) << 4) - min;
        }
    }
}

/// 16 sub-blocks of 16 values: `d * scale * (q - 32)`.
///
/// 128 bytes of low halves, 64 bytes of 2-bit high parts, 16 signed scales, `d` f16. Of 128 values, 64 bytes hold the
/// first 64 in their low halves, and 32 bytes hold the high parts of the first 32 in their lowest bits, and so on.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (sub, values) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(block[192 + sub] as i8);
        let (half, quarter, odd) = (sub / 8, sub / 2 % 4, sub % 2 * 16);
        let from = half * 64 + quarter % 2 * 32 + odd;
        let (shift, high_shift) = (quarter / 2 * 4, quarter * 2);
        let high = &block[128 + half * 32 + odd..128 + half * 32 + odd + 16];
        for ((o, q), h) in values.iter_mut().zip(&block[from..from + 16]).zip(high) {
            let q = (q >> shift) & 15 | ((h >> high_shift) & 3) << 4;
            *o = scale * f32::from(q as i8 - 32);
        }
    }
}

/// The 16 values that IQ4_NL and IQ4_XS choose from.
const IQ4_VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// 32 values: `d * table[q]`. Layout of Q4_0.
fn iq4_nl(block: &[u8], out: &mut [f32]) {
    iq4(half_at(block, 0), &block[2..18], out);
}

fn iq4(scale: f32, bytes: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for ((l, h), q) in low.iter_mut().zip(high).zip(bytes) {
        *l = scale * IQ4_VALUES[usize::from(q & 15)];
        *h = scale * IQ4_VALUES[usize::from(q >> 4)];
    }
}

/// 8 sub-blocks of 32 values: `d * (scale - 32) * table[q]`.
///
/// `d` f16, 16 bits with the 2 high bits of each scale, 4 bytes with the low halves, 128 bytes as 8 times IQ4_NL.
fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (sub, values) in out.chunks_exact_mut(32).enumerate() {
        let low = (block[4 + sub / 2] >> (sub % 2 * 4)) & 15;
        let scale = (low | (((high >> (2 * sub)) & 3) as u8 * 16)) as i8 - 32;
        iq4(d * f32::from(scale), &block[8 + sub * 16..8 + sub * 16 + 16], values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_by_hand() {
        // d = 0.5; bytes 0x90: low half 0, high half 9.
        let mut block = vec![0x00, 0x38];
        block.extend([0x90; 16]);
        let mut out = [0.0; 32];
        q4_0(&block, &mut out);
        assert_eq!(out[..16], [-4.0; 16]);
        assert_eq!(out[16..], [0.5; 16]);

        // d = 0.5, m = 1.0.
        let mut block = vec![0x00, 0x38, 0x00, 0x3c];
        block.extend([0x90; 16]);
        q4_1(&block, &mut out);
        assert_eq!(out[..16], [1.0; 16]);
        assert_eq!(out[16..], [5.5; 16]);

        // Sub-block 0 of Q6_K: scale 2, values 33 - 32 = 1; the rest has scale 0.
        let mut block = vec![0u8; 210];
        block[..16].fill(1);
        block[128..144].fill(2);
        block[192] = 2;
        block[208..].copy_from_slice(&[0x00, 0x38]);
        let mut out = [9.0; 256];
        q6_k(&block, &mut out);
        assert_eq!(out[..16], [1.0; 16]);
        assert_eq!(out[16..], [0.0; 240]);
    }

    #[test]
    fn every_reader_fills_its_block() {
        use TensorKind::*;
        for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS] {
            let (count, size) = kind.block();
            for byte in [0x00, 0x55, 0xff] {
                let mut out = vec![1234.5; count];
                block_reader(kind).unwrap()(&vec![byte; size], &mut out);
                assert!(out.iter().all(|v| *v != 1234.5), "{kind}");
            }
        }
    }
}
