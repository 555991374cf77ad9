//! Rotary scaling from GGUF metadata and its tables of factors.

use std::f64::consts::PI;

use serde_json::{Value as Json, json};

use crate::error::CheckpointError;
use crate::gguf::config::Meta;
use crate::gguf::key;
use crate::gguf::table::{ROPE_FREQS, ROPE_LONG, ROPE_SHORT};

/// `rope_scaling` of `config.json`; `None` if positions are not scaled.
///
/// # Errors
/// [`CheckpointError::Unsupported`] for a kind of scaling that is not known, or factors that none of the known kinds
/// gives: leaving them out would change every logit.
pub(super) fn scaling(
    meta: &Meta,
    notes: &mut Vec<String>,
) -> Result<Option<Json>, CheckpointError> {
    if let Some(factors) = meta.table(ROPE_FREQS) {
        return from_factors(meta, &factors, notes);
    }
    let long = meta.table(ROPE_LONG);
    if let (Some(long), Some(short)) = (long, meta.table(ROPE_SHORT)) {
        notes.push("`rope_factors_long` and `rope_factors_short` became `rope_scaling`".into());
        return Ok(Some(json!({ "type": "longrope", "long_factor": long, "short_factor": short })));
    }
    let factor = meta.number(key::ROPE_SCALING_FACTOR).or_else(|| meta.number("rope.scale_linear"));
    let kind = meta.text(key::ROPE_SCALING_TYPE).unwrap_or(match factor {
        Some(factor) if factor != 1.0 => "linear",
        _ => "none",
    });
    match (kind, factor) {
        ("none" | "default", _) | ("linear", None) => Ok(None),
        ("linear", Some(factor)) => {
            Ok(Some(json!({ "type": "linear", "rope_type": "linear", "factor": factor })))
        }
        ("yarn", Some(factor)) => Ok(Some(yarn(meta, factor))),
        _ => Err(CheckpointError::Unsupported {
            what: format!("rope scaling `{kind}` of the GGUF file is not understood"),
            file: meta.file.path().to_owned(),
            hint: "use the safetensors files of this model".into(),
        }),
    }
}

fn yarn(meta: &Meta, factor: f64) -> Json {
    let mut scaling = json!({ "type": "yarn", "rope_type": "yarn", "factor": factor });
    let mut set = |key: &str, value: Option<f64>| {
        if let Some(value) = value {
            scaling[key] = json!(value);
        }
    };
    set("beta_fast", meta.number(key::ROPE_YARN_BETA_FAST));
    set("beta_slow", meta.number(key::ROPE_YARN_BETA_SLOW));
    // The converter stores 0.1 * mscale_all_dim; published DeepSeek models have both scales equal.
    let scale = meta.number(key::ROPE_YARN_LOG).map(|m| (m * 1e4).round() / 1e3);
    set("mscale", scale);
    set("mscale_all_dim", scale);
    if let Some(by) = meta.number(key::ROPE_SCALING_ATTENTION).filter(|by| *by != 1.0) {
        // On top of what YaRN asks for by itself.
        scaling["attention_factor"] = json!(by * (0.1 * factor.max(1.0).ln() + 1.0));
    }
    if let Some(length) = meta.optional(key::ROPE_SCALING_ORIGINAL) {
        scaling["original_max_position_embeddings"] = json!(length);
    }
    scaling
}

/// Llama 3's parameters, of which the file keeps only the factors they give.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Llama3 {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    original: f64,
}

impl Llama3 {
    /// What the frequency with this wavelength is divided by.
    fn divisor(&self, wavelength: f64) -> f64 {
        let turns = self.original / wavelength;
        if turns > self.high_freq_factor {
            1.0
        } else if turns < self.low_freq_factor {
            self.factor
        } else {
            let smooth =
                (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            1.0 / ((1.0 - smooth) / self.factor + smooth)
        }
    }
}

/// What Llama 3's scaling divides the frequency of each of `pairs` pairs of dimensions by: `rope_freqs.weight`.
pub fn llama3_factors(
    theta: f64,
    pairs: usize,
    [factor, low, high, original]: [f64; 4],
) -> Vec<f32> {
    let scaling = Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original };
    wavelengths(theta, pairs).map(|w| scaling.divisor(w) as f32).collect()
}

/// Positions in which each of `pairs` pairs of dimensions turns once.
fn wavelengths(base: f64, pairs: usize) -> impl Iterator<Item = f64> {
    (0..pairs).map(move |i| 2.0 * PI * base.powf(i as f64 / pairs as f64))
}

/// How far a stored factor may be from the computed one: it went through f32 powers.
const FACTOR_TOLERANCE: f64 = 1e-3;

/// The parameters that give `factors` for rotary `base`, if there are any.
///
/// Only `original / low` and `original / high` can be seen, so `low_freq_factor` 1 and `high_freq_factor` 4, as all
/// published models have them, are taken as given and the original context is searched.
fn llama3_parameters(factors: &[f32], base: f64) -> Option<Llama3> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let wavelengths: Vec<f64> = wavelengths(base, factors.len()).collect();
    let fits = |p: &Llama3| {
        factors.iter().zip(&wavelengths).all(|(found, wavelength)| {
            let expected = p.divisor(*wavelength);
            (f64::from(*found) - expected).abs() <= FACTOR_TOLERANCE * expected
        })
    };
    let originals = [8192u32, 4096, 2048, 16384, 32768, 65536, 131_072, 1024, 512, 256, 128, 64];
    originals
        .iter()
        .map(|&original| Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: f64::from(original),
        })
        .find(fits)
}

fn from_factors(
    meta: &Meta,
    factors: &[f32],
    notes: &mut Vec<String>,
) -> Result<Option<Json>, CheckpointError> {
    if factors.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    let base = meta.number(key::ROPE_BASE).unwrap_or(10000.0);
    let Some(found) = llama3_parameters(factors, base) else {
        return Err(CheckpointError::Malformed {
            what: "rope factors are not those of Llama 3".into(),
            file: meta.file.path().to_owned(),
            tensor: Some(ROPE_FREQS.into()),
            expected:
                "factors of a Llama 3 scaling with `low_freq_factor` 1 and `high_freq_factor` 4"
                    .into(),
            found: format!(
                "{} factors up to {}",
                factors.len(),
                factors.iter().fold(0f32, |m, f| m.max(*f))
            ),
            hint: Some("use the safetensors files of this model".into()),
        });
    };
    notes.push("`rope_freqs.weight` became `rope_scaling` of type `llama3`".into());
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": found.factor,
        "low_freq_factor": found.low_freq_factor,
        "high_freq_factor": found.high_freq_factor,
        "original_max_position_embeddings": found.original as u64,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_parameters_come_back() {
        for (factor, original, base, pairs) in [
            (32.0, 8192.0, 500_000.0, 32),
            (8.0, 8192.0, 500_000.0, 64),
            (8.0, 2048.0, 10_000.0, 16),
        ] {
            let given = Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original };
            let factors = llama3_factors(base, pairs, [factor, 1.0, 4.0, original]);
            assert_eq!(llama3_parameters(&factors, base), Some(given));
        }
    }

    #[test]
    fn other_factors_are_not_taken_for_llama3() {
        assert_eq!(llama3_parameters(&[1.0, 3.0, 2.0, 8.0], 10_000.0), None);
    }

    #[test]
    fn divisor_by_hand() {
        let p =
            Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 100.0 };
        assert_eq!(p.divisor(10.0), 1.0);
        assert_eq!(p.divisor(200.0), 8.0);
        // 2.5 turns: half way, 1 / (0.5 / 8 + 0.5).
        assert!((p.divisor(40.0) - 1.0 / 0.5625).abs() < 1e-12);
    }
}
