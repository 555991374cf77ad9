//! Reading configurations: what families have in common.

use std::path::PathBuf;

use moe_merge_checkpoint::ConfigJson;
use moe_merge_kernels::{
    Activation, Precision, RopePairing, RopeScaling, RopeSpec, RouterSpec, rope::yarn_mscale,
};
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::spec::{
    Attention, AttentionKind, DenseMlp, ExpertNames, LayerSpec, Mlp, MoeMlp, QkNorm, Spec,
};

/// A configuration that is being read.
pub(super) struct Keys<'a> {
    config: &'a ConfigJson,
}

impl<'a> Keys<'a> {
    pub fn new(config: &'a ConfigJson) -> Self {
        Self { config }
    }

    /// The error for `key`, whose dots lead into objects.
    pub fn refuse(&self, key: &str, expected: &str) -> ModelError {
        let mut parts = key.split('.');
        let mut value = parts.next().and_then(|k| self.config.get(k));
        for part in parts {
            value = value.and_then(|v| v.get(part));
        }
        let found = value.map_or_else(|| "absent".to_owned(), |v| v.to_string());
        self.refuse_value(key, &found, expected)
    }

    /// The error for a value inside `key`.
    pub fn refuse_value(&self, key: &str, found: &str, expected: &str) -> ModelError {
        ModelError::Config {
            file: PathBuf::from("config.json"),
            key: key.to_owned(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.config.get(key).is_some()
    }

    /// A text, if it is there and is one.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.config.str(key)
    }

    /// A positive integer that must be there.
    pub fn size(&self, key: &str) -> Result<usize, ModelError> {
        match self.config.usize(key) {
            Some(n) if n > 0 => Ok(n),
            _ => Err(self.refuse(key, "a positive integer")),
        }
    }

    /// A whole number, `default` where absent.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        if !self.has(key) {
            return Ok(default);
        }
        self.config.usize(key).ok_or_else(|| self.refuse(key, "a whole number"))
    }

    /// A whole number under the first of `keys` that is there.
    pub fn size_under(&self, keys: &[&str]) -> Result<usize, ModelError> {
        self.size(keys.iter().find(|k| self.has(k)).unwrap_or(&keys[0]))
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        if !self.has(key) {
            return Ok(default);
        }
        self.config.f64(key).ok_or_else(|| self.refuse(key, "a number"))
    }

    /// A number, if it is there.
    pub fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        if !self.has(key) {
            return Ok(None);
        }
        Ok(Some(self.number_or(key, 0.0)? as f32))
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        if !self.has(key) {
            return Ok(default);
        }
        self.config.bool(key).ok_or_else(|| self.refuse(key, "true or false"))
    }

    pub fn activation(&self, key: &str) -> Result<Activation, ModelError> {
        let name = self.config.str(key).unwrap_or(if self.has(key) { "" } else { "silu" });
        Activation::from_config_name(name)
            .ok_or_else(|| self.refuse(key, "silu, gelu_pytorch_tanh or gelu"))
    }

    /// `head_dim`, or hidden size over heads.
    pub fn head_dim(&self) -> Result<usize, ModelError> {
        if self.has("head_dim") {
            return self.size("head_dim");
        }
        let (hidden, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        if !hidden.is_multiple_of(heads) {
            return Err(self.refuse("num_attention_heads", "a divisor of hidden_size"));
        }
        Ok(hidden / heads)
    }

    /// The window under `sliding_window`; zero and null are none.
    pub fn window(&self) -> Result<Option<usize>, ModelError> {
        Ok(Some(self.size_or("sliding_window", 0)?).filter(|w| *w > 0))
    }

    /// The window of each layer: as `layer_types` says, else where `sliding(layer)` holds.
    pub fn windows(
        &self,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let layers = self.size("num_hidden_layers")?;
        let Some(types) = self.config.get("layer_types") else {
            return Ok((0..layers).map(|l| window.filter(|_| sliding(l))).collect());
        };
        let types = types
            .as_array()
            .filter(|t| t.len() == layers)
            .ok_or_else(|| self.refuse("layer_types", "a list with one entry for each layer"))?;
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") if window.is_some() => Ok(window),
                Some("sliding_attention") => {
                    Err(self.refuse("sliding_window", "a window, as layer_types asks for one"))
                }
                _ => Err(self.refuse_value(
                    "layer_types",
                    &kind.to_string(),
                    "full_attention or sliding_attention",
                )),
            })
            .collect()
    }

    /// A list of layer numbers.
    pub fn layer_list(&self, key: &str) -> Result<Vec<usize>, ModelError> {
        let Some(value) = self.config.get(key) else { return Ok(Vec::new()) };
        let list = value.as_array().and_then(|list| {
            list.iter().map(|v| v.as_u64().map(|v| v as usize)).collect::<Option<Vec<_>>>()
        });
        list.ok_or_else(|| self.refuse(key, "a list of layer numbers"))
    }

    /// Rotary frequencies of the whole model, in either spelling.
    pub fn rope(&self, theta: f64, dim: usize) -> Result<RopeSpec, ModelError> {
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(value) = self.config.get(key) {
                let map = value.as_object().ok_or_else(|| self.refuse(key, "an object"))?;
                return self.rope_from(key, map, theta, dim);
            }
        }
        self.rope_from("rope_scaling", &Map::new(), theta, dim)
    }

    /// Rotary frequencies under `rope_parameters.KIND`, where layers differ; none if that is not how it is written.
    pub fn rope_for(
        &self,
        kind: &str,
        theta: f64,
        dim: usize,
    ) -> Result<Option<RopeSpec>, ModelError> {
        let map = self.config.get("rope_parameters").and_then(|p| p.get(kind));
        let Some(map) = map.and_then(Value::as_object) else { return Ok(None) };
        self.rope_from(&format!("rope_parameters.{kind}"), map, theta, dim).map(Some)
    }

    fn rope_from(
        &self,
        at: &str,
        map: &Map<String, Value>,
        theta: f64,
        dim: usize,
    ) -> Result<RopeSpec, ModelError> {
        let number = |key: &str| map.get(key).and_then(Value::as_f64);
        let needed = |key: &str| {
            number(key)
                .filter(|v| *v > 0.0)
                .ok_or_else(|| self.refuse(&format!("{at}.{key}"), "a positive number"))
        };
        let theta = match number("rope_theta") {
            Some(theta) => theta,
            None => self.number_or("rope_theta", theta)?,
        };
        let partial = match number("partial_rotary_factor") {
            Some(partial) => partial,
            None => self.number_or("partial_rotary_factor", 1.0)?,
        };
        let dim = (dim as f64 * partial) as usize;
        if !dim.is_multiple_of(2) || theta.is_nan() || theta <= 0.0 {
            return Err(self.refuse(at, "a positive rope_theta and an even number of dimensions"));
        }
        let original = || match number("original_max_position_embeddings") {
            Some(original) => Ok(original),
            None => self.size("max_position_embeddings").map(|n| n as f64),
        };
        let type_key = if map.contains_key("rope_type") { "rope_type" } else { "type" };
        let kind = map.get(type_key).map_or(Some("default"), Value::as_str);
        let scaling = match kind {
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: needed("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low: needed("low_freq_factor")?,
                high: needed("high_freq_factor")?,
                original: original()?,
            },
            Some("yarn") => {
                let factor = needed("factor")?;
                let both = number("mscale")
                    .filter(|m| *m != 0.0)
                    .zip(number("mscale_all_dim").filter(|m| *m != 0.0));
                let attention_factor = number("attention_factor").unwrap_or_else(|| match both {
                    Some((some, all)) => yarn_mscale(factor, some) / yarn_mscale(factor, all),
                    None => yarn_mscale(factor, 1.0),
                });
                RopeScaling::Yarn {
                    factor,
                    beta_fast: number("beta_fast").unwrap_or(32.0),
                    beta_slow: number("beta_slow").unwrap_or(1.0),
                    original: original()?,
                    truncate: map.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                    attention_factor,
                }
            }
            _ => {
                return Err(self.refuse(
                    &format!("{at}.{type_key}"),
                    "default, linear, llama3 or yarn (dynamic and longrope are not done)",
                ));
            }
        };
        Ok(RopeSpec { theta, dim, scaling, pairing: RopePairing::Halves })
    }

    /// What DeepSeek multiplies the attention scale with under YaRN.
    pub fn yarn_score_scale(&self) -> f64 {
        let map = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| self.config.get(key).and_then(Value::as_object));
        let number = |key: &str| map.and_then(|m| m.get(key)).and_then(Value::as_f64);
        match (number("mscale_all_dim"), number("factor")) {
            (Some(mscale), Some(factor)) if mscale != 0.0 => yarn_mscale(factor, mscale).powi(2),
            _ => 1.0,
        }
    }

    /// A llama: what the other families start from.
    ///
    /// * `family`: its name; `theta`: base of rotary frequencies where the configuration has none
    pub fn llama(&self, family: &'static str, theta: f64) -> Result<Spec, ModelError> {
        let heads = self.size("num_attention_heads")?;
        let kv_heads =
            if self.has("num_key_value_heads") { self.size("num_key_value_heads")? } else { heads };
        let head_dim = self.head_dim()?;
        let rope = self.rope(theta, head_dim)?;
        let dense = DenseMlp { inter: self.size("intermediate_size")?, bias: false, fused: false };
        let layers = self
            .windows(None, |_| false)?
            .into_iter()
            .map(|window| LayerSpec { window, rope, mlp: Mlp::Dense(dense.clone()) })
            .collect();
        Ok(Spec {
            family,
            vocab: self.size("vocab_size")?,
            hidden: self.size("hidden_size")?,
            max_positions: self.size("max_position_embeddings")?,
            eps: self.number_or("rms_norm_eps", 1e-6)? as f32,
            norm_offset: 0.0,
            sandwich: false,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits_divisor: 1.0,
            tied: self.bool_or("tie_word_embeddings", false)?,
            final_softcap: None,
            activation: self.activation("hidden_act")?,
            attention: Attention {
                heads,
                kv_heads,
                scale: 1.0 / (head_dim as f32).sqrt(),
                softcap: None,
                kind: AttentionKind::Projected {
                    head_dim,
                    qk_norm: QkNorm::Absent,
                    qkv_bias: false,
                    o_bias: false,
                    fused: false,
                    clip: None,
                },
            },
            layers,
        })
    }

    /// A llama whose layers have the windows that `sliding` says.
    pub fn llama_with_windows(
        &self,
        family: &'static str,
        theta: f64,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Spec, ModelError> {
        let windows = self.windows(window, sliding)?;
        // `layer_types` is read here, so the plain llama must not stumble over its windows.
        let mut bare = self.config.clone();
        bare.0.remove("layer_types");
        let mut spec = Keys::new(&bare).llama(family, theta)?;
        for (layer, window) in spec.layers.iter_mut().zip(windows) {
            layer.window = window;
        }
        Ok(spec)
    }

    /// Routed experts with softmax scores; counts under the keys that Mixtral and Qwen use.
    pub fn experts(
        &self,
        names: ExpertNames,
        inter: usize,
        renormalise: bool,
    ) -> Result<MoeMlp, ModelError> {
        Ok(MoeMlp {
            experts: self.size_under(&["num_experts", "num_local_experts"])?,
            inter,
            router: RouterSpec {
                renormalise,
                ..RouterSpec::softmax(self.size("num_experts_per_tok")?)
            },
            reference_precision: Precision::RoundLikeHf { logits: true, weights: true },
            selection_bias: None,
            names,
            shared: None,
        })
    }
}

/// Gives every projection of a spec's attention the biases asked for.
pub(super) fn set_biases(spec: &mut Spec, qkv: bool, o: bool) {
    if let AttentionKind::Projected { qkv_bias, o_bias, .. } = &mut spec.attention.kind {
        (*qkv_bias, *o_bias) = (qkv, o);
    }
}

/// Sets the norm of queries and keys.
pub(super) fn set_qk_norm(spec: &mut Spec, norm: QkNorm) {
    if let AttentionKind::Projected { qk_norm, .. } = &mut spec.attention.kind {
        *qk_norm = norm;
    }
}

/// What must hold in every family.
pub(super) fn check(spec: &Spec, keys: &Keys<'_>) -> Result<(), ModelError> {
    let a = &spec.attention;
    if !a.heads.is_multiple_of(a.kv_heads) {
        return Err(keys.refuse("num_key_value_heads", "a divisor of num_attention_heads"));
    }
    for layer in &spec.layers {
        if let Mlp::Moe(moe) = &layer.mlp {
            let (k, experts) = (moe.router.top_k, moe.experts);
            if k > experts {
                let key = if keys.has("moe_k") { "moe_k" } else { "num_experts_per_tok" };
                return Err(keys.refuse(key, &format!("at most the {experts} experts there are")));
            }
            if let Some((groups, kept)) = moe.router.groups
                && (groups == 0
                    || !experts.is_multiple_of(groups)
                    || kept > groups
                    || kept * (experts / groups) < k)
            {
                return Err(keys.refuse(
                    "topk_group",
                    "equal groups that hold num_experts_per_tok experts together",
                ));
            }
        }
    }
    Ok(())
}
