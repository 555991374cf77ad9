//! Model families: one file each, one line each in [`FAMILIES`].

mod deepseek;
mod deepseek_v2;
mod ernie4_5_moe;
mod gemma2;
mod gemma3;
mod granitemoeshared;
mod keys;
mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use moe_merge_checkpoint::{ConfigJson, Source};

use crate::error::ModelError;
use crate::spec::Spec;
use keys::Keys;

/// One family.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Values of `model_type` that mean this family, its own first.
    pub model_types: &'static [&'static str],
    /// What `architectures` holds.
    pub architecture: &'static str,
    spec: fn(&Keys<'_>) -> Result<Spec, ModelError>,
}

const fn family(
    model_types: &'static [&'static str],
    architecture: &'static str,
    spec: fn(&Keys<'_>) -> Result<Spec, ModelError>,
) -> Family {
    Family { model_types, architecture, spec }
}

/// Every family that runs.
pub const FAMILIES: &[Family] = &[
    family(&["llama"], "LlamaForCausalLM", llama::spec),
    family(&["mistral"], "MistralForCausalLM", mistral::spec),
    family(&["qwen2"], "Qwen2ForCausalLM", qwen2::spec),
    family(&["qwen3"], "Qwen3ForCausalLM", qwen3::spec),
    family(&["phi3"], "Phi3ForCausalLM", phi3::spec),
    family(&["gemma2"], "Gemma2ForCausalLM", gemma2::spec),
    family(&["gemma3_text"], "Gemma3ForCausalLM", gemma3::spec),
    family(&["mixtral"], "MixtralForCausalLM", mixtral::spec),
    family(&["qwen2_moe"], "Qwen2MoeForCausalLM", qwen2_moe::spec),
    family(&["qwen3_moe"], "Qwen3MoeForCausalLM", qwen3_moe::spec),
    family(&["olmoe"], "OlmoeForCausalLM", olmoe::spec),
    family(&["deepseek_v2"], "DeepseekV2ForCausalLM", deepseek_v2::spec),
    family(&["deepseek"], "DeepseekForCausalLM", deepseek::spec),
    family(&["ernie4_5_moe"], "Ernie4_5_MoeForCausalLM", ernie4_5_moe::spec),
    family(&["granitemoeshared"], "GraniteMoeSharedForCausalLM", granitemoeshared::spec),
];

/// The family of a configuration.
///
/// # Errors
/// [`ModelError::Config`] if `model_type` names none of [`FAMILIES`].
pub fn family_of(config: &ConfigJson) -> Result<&'static Family, ModelError> {
    let keys = Keys::new(config);
    let name = config.model_type();
    FAMILIES.iter().find(|f| f.model_types.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().map(|f| f.model_types[0]).collect();
        keys.refuse("model_type", &format!("one of {}", known.join(", ")))
    })
}

impl Spec {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ModelError::Config`] if it asks for something that is not done.
    pub fn from_config(config: &ConfigJson) -> Result<Spec, ModelError> {
        let family = family_of(config)?;
        let spec = (family.spec)(&Keys::new(config))?;
        keys::check(&spec, &Keys::new(config))?;
        Ok(spec)
    }

    /// Reads the configuration of a source; errors name its file.
    ///
    /// # Errors
    /// As [`Spec::from_config`].
    pub fn of(source: &Source) -> Result<Spec, ModelError> {
        Spec::from_config(&source.config).map_err(|error| match error {
            ModelError::Config { key, found, expected, .. } => {
                let folder = source.path.is_dir();
                let file =
                    if folder { source.path.join("config.json") } else { source.path.clone() };
                ModelError::Config { file, key, found, expected }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Mlp;
    use moe_merge_kernels::RopeScaling;
    use serde_json::{Value, json};

    fn config(extra: Value) -> ConfigJson {
        let mut base = json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-6, "hidden_act": "silu",
        });
        for (key, value) in extra.as_object().unwrap() {
            base[key] = value.clone();
        }
        ConfigJson(base.as_object().unwrap().clone())
    }

    fn refused(extra: Value) -> (String, String) {
        match Spec::from_config(&config(extra)) {
            Err(ModelError::Config { key, found, .. }) => (key, found),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_done_is_named() {
        let named = |extra, key: &str, found: &str| {
            assert_eq!(refused(extra), (key.to_owned(), found.to_owned()));
        };
        named(json!({"model_type": "bloom"}), "model_type", "\"bloom\"");
        named(json!({"hidden_act": "relu"}), "hidden_act", "\"relu\"");
        named(json!({"hidden_size": null}), "hidden_size", "absent");
        named(json!({"num_key_value_heads": 3}), "num_key_value_heads", "3");
        named(
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            "rope_scaling.rope_type",
            "\"dynamic\"",
        );
        named(
            json!({"layer_types": ["full_attention", "chunked_attention"]}),
            "layer_types",
            "\"chunked_attention\"",
        );
        named(
            json!({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}),
            "num_experts_per_tok",
            "3",
        );
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let new =
            json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}});
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}});
        let (new, old) = (config(new), config(old));
        let (new, old) = (Spec::from_config(&new).unwrap(), Spec::from_config(&old).unwrap());
        assert_eq!(new, old);
        assert_eq!(new.layers[0].rope.theta, 5e5);
        assert_eq!(new.layers[0].rope.scaling, RopeScaling::Linear { factor: 4.0 });
    }

    #[test]
    fn a_window_of_zero_is_none() {
        let window = |extra| Spec::from_config(&config(extra)).unwrap().layers[1].window;
        let mistral = |w: Value| json!({"model_type": "mistral", "sliding_window": w, "num_key_value_heads": 1});
        assert_eq!(window(mistral(json!(0))), None);
        assert_eq!(window(mistral(json!(null))), None);
        assert_eq!(window(mistral(json!(7))), Some(7));
        let qwen = |on: bool| json!({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": on, "max_window_layers": 1});
        assert_eq!(window(qwen(false)), None);
        assert_eq!(window(qwen(true)), Some(7));
    }

    #[test]
    fn expert_counts_have_two_names() {
        for key in ["num_experts", "num_local_experts"] {
            let spec = Spec::from_config(&config(json!({
                "model_type": "qwen3_moe", key: 3, "num_experts_per_tok": 2,
                "moe_intermediate_size": 4, "mlp_only_layers": [0],
            })))
            .unwrap();
            assert!(matches!(spec.layers[0].mlp, Mlp::Dense(_)));
            let Mlp::Moe(moe) = &spec.layers[1].mlp else { panic!() };
            assert_eq!((moe.experts, moe.inter), (3, 4));
        }
    }

    #[test]
    fn families_have_distinct_names() {
        let mut names: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), FAMILIES.iter().map(|f| f.model_types.len()).sum::<usize>());
    }
}
