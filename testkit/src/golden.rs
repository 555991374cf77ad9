//! Reference tensors and how far a result may be from them.

use std::collections::BTreeMap;
use std::path::Path;

/// A reference tensor, widened to `f64` (integers included).
#[derive(Debug, Clone)]
pub struct Golden {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f64>,
}

impl Golden {
    /// The values as token ids.
    pub fn ids(&self) -> Vec<u32> {
        self.values.iter().map(|&v| v as u32).collect()
    }

    /// Row `i` of the first axis.
    pub fn row(&self, i: usize) -> &[f64] {
        let width: usize = self.shape[1..].iter().product();
        &self.values[i * width..(i + 1) * width]
    }
}

/// All tensors of a safetensors file.
pub fn load(path: &Path) -> BTreeMap<String, Golden> {
    let bytes = fs_err::read(path).expect("reference file");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("reference file");
    file.tensors()
        .into_iter()
        .map(|(name, t)| {
            use safetensors::Dtype as D;
            let values: Vec<f64> = match t.dtype() {
                D::F32 => le(t.data(), |b: [u8; 4]| f32::from_le_bytes(b) as f64),
                D::F64 => le(t.data(), f64::from_le_bytes),
                D::I64 => le(t.data(), |b: [u8; 8]| i64::from_le_bytes(b) as f64),
                D::BF16 => le(t.data(), |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f64()),
                D::F16 => le(t.data(), |b: [u8; 2]| half::f16::from_le_bytes(b).to_f64()),
                other => panic!("reference tensor `{name}` is {other:?}"),
            };
            (name, Golden { shape: t.shape().to_vec(), values })
        })
        .collect()
}

fn le<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    bytes.chunks_exact(N).map(|c| value(c.try_into().expect("chunk"))).collect()
}

/// Largest absolute difference over the largest absolute reference value.
pub fn relative_difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths differ");
    let scale = expected.iter().fold(0f64, |m, v| m.max(v.abs())).max(f64::MIN_POSITIVE);
    let diff = found.iter().zip(expected).fold(0f64, |m, (f, e)| {
        if f.is_finite() { m.max((*f as f64 - e).abs()) } else { f64::INFINITY }
    });
    diff / scale
}

/// Cosine of the angle between two vectors.
pub fn cosine(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths differ");
    let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (f, e) in found.iter().zip(expected) {
        let f = *f as f64;
        ab += f * e;
        aa += f * f;
        bb += e * e;
    }
    ab / (aa.sqrt() * bb.sqrt())
}

/// Logits and hidden states against transformers, f32 weights: share of the largest absolute value.
/// f32 sums in another order differ by a few units in the last place per layer.
pub const LOGITS_F32: f64 = 2e-4;

/// The same with bf16 weights and f32 arithmetic on our side.
pub const LOGITS_BF16: f64 = 2e-3;

/// Gates against mergekit in the same mode with prompts of equal length: cosine per row.
pub const GATE_COSINE: f64 = 0.9999;

/// Dense merges in f32 against mergekit: share of the largest absolute value.
pub const MERGE_F32: f64 = 1e-6;
