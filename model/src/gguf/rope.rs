//! Rotary frequencies as metadata.

use moe_merge_checkpoint::gguf::{Architecture, MetaValue, key, llama3_factors};
use moe_merge_kernels::{RopeScaling, RopeSpec};

use super::check::{ability, lacking};
use super::{GgufError, Keys};
use crate::spec::Spec;

/// What each frequency is divided by, where a formula decides it that llama.cpp does not have.
pub(super) fn factors(rope: &RopeSpec) -> Option<Vec<f32>> {
    match rope.scaling {
        RopeScaling::Llama3 { factor, low, high, original } => {
            Some(llama3_factors(rope.theta, rope.dim / 2, [factor, low, high, original]))
        }
        _ => None,
    }
}

/// Base, dimensions and scaling.
pub(super) fn keys(
    spec: &Spec,
    architecture: Architecture,
    keys: &mut Keys,
) -> Result<(), GgufError> {
    let of = |window: bool| spec.layers.iter().find(|l| l.window.is_some() == window);
    let Some(first) = spec.layers.first() else { return Ok(()) };
    // Gemma 3 has frequencies of its own in layers with a window; elsewhere all layers agree.
    let global = of(false).unwrap_or(first).rope;
    let local = of(true).unwrap_or(first).rope;
    keys.count(key::ROPE_DIM, global.dim);
    keys.number(key::ROPE_BASE, global.theta as f32);
    if architecture == Architecture::Gemma3 {
        keys.number(key::ROPE_BASE_LOCAL, local.theta as f32);
    }
    let refuse = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    if local != global
        && (architecture != Architecture::Gemma3 || local.scaling != RopeScaling::None)
    {
        return refuse(
            "rotary frequencies differ from layer to layer",
            "the same in all layers",
            format!("{local:?} and {global:?}"),
        );
    }
    let partial = matches!(architecture, Architecture::Phi3 | Architecture::Deepseek2);
    if !partial && global.dim != spec.attention.qk_dim() {
        let size = format!("{} dimensions", spec.attention.qk_dim());
        return refuse("it rotates whole heads", &size, global.dim.to_string());
    }
    match global.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            keys.put(key::ROPE_SCALING_TYPE, MetaValue::Text("linear".into()));
            keys.number(key::ROPE_SCALING_FACTOR, factor as f32);
        }
        RopeScaling::Llama3 { .. } if ability(architecture).rope_factors => {}
        RopeScaling::Llama3 { .. } => {
            return refuse(
                "it does not scale rotary frequencies as Llama 3 does",
                "no scaling, `linear` or `yarn`",
                "`llama3`".into(),
            );
        }
        RopeScaling::Yarn { .. } if architecture.is_gemma() => {
            return refuse("it does not do YaRN", "no scaling, or `linear`", "`yarn`".into());
        }
        RopeScaling::Yarn { .. } => yarn(spec, architecture, &global, keys)?,
    }
    Ok(())
}

/// What YaRN multiplies cosine and sine with by itself.
fn usual(factor: f64, times: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * times * factor.ln() + 1.0 }
}

fn yarn(
    spec: &Spec,
    architecture: Architecture,
    rope: &RopeSpec,
    keys: &mut Keys,
) -> Result<(), GgufError> {
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, attention_factor } =
        rope.scaling
    else {
        return Ok(());
    };
    if !truncate || beta_fast != 32.0 || beta_slow != 1.0 {
        return Err(lacking(
            spec,
            architecture,
            "it does YaRN with the usual numbers only",
            "`beta_fast` 32, `beta_slow` 1, `truncate` true",
            &format!("{beta_fast}, {beta_slow}, {truncate}"),
        ));
    }
    keys.put(key::ROPE_SCALING_TYPE, MetaValue::Text("yarn".into()));
    keys.number(key::ROPE_SCALING_FACTOR, factor as f32);
    keys.count(key::ROPE_SCALING_ORIGINAL, original as usize);
    if architecture == Architecture::Deepseek2 {
        // The scores are multiplied by the square of what `mscale_all_dim` asks for.
        let scale = f64::from(spec.attention.scale) * (spec.attention.qk_dim() as f64).sqrt();
        let mscale = (scale.sqrt() - 1.0) / (0.1 * factor.ln()).max(f64::MIN_POSITIVE);
        let mscale = (mscale * 1e4).round() / 1e4;
        if mscale == 0.0 || (attention_factor - 1.0).abs() > 1e-6 {
            return Err(lacking(
                spec,
                architecture,
                "it does YaRN with `mscale` equal to `mscale_all_dim` only",
                "both the same, and not 0",
                &format!(
                    "a factor of {attention_factor} on the frequencies, {scale} on the scores"
                ),
            ));
        }
        keys.number(key::ROPE_YARN_LOG, (0.1 * mscale) as f32);
        return Ok(());
    }
    let more = attention_factor / usual(factor, 1.0);
    if (more - 1.0).abs() > 1e-6 {
        keys.number(key::ROPE_SCALING_ATTENTION, more as f32);
    }
    Ok(())
}
