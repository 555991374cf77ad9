//! Output families: what each can hold, how it names its tensors, what its `config.json` says.

use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{CheckpointError, ConfigJson, Dtype, Source, WeightRef};
use serde_json::{Map, Value};

use crate::error::MergeError;

mod check;
mod deepseek;
mod ernie4_5_moe;
mod granitemoeshared;
mod mixtral;
mod qwen2_moe;
mod qwen3_moe;

pub use check::{check_sources, dense_name, warn_about_sources};
pub(crate) use check::{is_derived, mlp_weight, unused_tensors};

/// Every output family, in the order in which `architecture: auto` tries them.
pub static OUTPUTS: &[&dyn OutputFamily] = &[
    &mixtral::Mixtral,
    &qwen3_moe::Qwen3Moe,
    &qwen2_moe::Qwen2Moe,
    &ernie4_5_moe::Ernie,
    &granitemoeshared::Granite,
    &deepseek::Deepseek,
];

/// One of the three matrices of a gated MLP: `down(act(gate x) * up x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Matrix {
    /// `[intermediate, hidden]`, under the activation.
    Gate,
    /// `[intermediate, hidden]`, the factor beside it.
    Up,
    /// `[hidden, intermediate]`.
    Down,
}

impl Matrix {
    /// All three.
    pub const ALL: [Matrix; 3] = [Matrix::Gate, Matrix::Up, Matrix::Down];

    /// Its name in dense models and in most MoE families.
    pub const fn name(self) -> &'static str {
        match self {
            Matrix::Gate => "gate_proj",
            Matrix::Up => "up_proj",
            Matrix::Down => "down_proj",
        }
    }
}

/// How experts lie on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// One tensor per expert and matrix: what every loader reads.
    #[default]
    Hub,
    /// All experts of a layer in one tensor, gate above up: transformers 5's own, unreadable for 4.x.
    Fused,
}

/// Sizes of a dense model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
}

impl Dims {
    /// Reads them from the configuration of `source`.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] naming the key that is missing.
    pub fn of(source: &Source) -> Result<Self, MergeError> {
        let need = |key: &str| {
            source.config.usize(key).filter(|&n| n > 0).ok_or_else(|| CheckpointError::Malformed {
                what: format!("`{key}` is missing or no positive number"),
                file: source.path.join("config.json"),
                tensor: None,
                expected: "a positive number".into(),
                found: source.config.0.get(key).map_or("nothing".into(), Value::to_string),
                hint: None,
            })
        };
        let (hidden, heads) = (need("hidden_size")?, need("num_attention_heads")?);
        Ok(Self {
            layers: need("num_hidden_layers")?,
            hidden,
            intermediate: need("intermediate_size")?,
            heads,
            kv_heads: source.config.usize("num_key_value_heads").unwrap_or(heads),
            head_dim: source.config.usize("head_dim").unwrap_or(hidden / heads),
            vocab: need("vocab_size")?,
        })
    }
}

/// What is to become one MoE.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Donor of everything but the MLPs.
    pub base: &'a Source,
    /// Routed experts, in order.
    pub experts: Vec<&'a Source>,
    /// Shared experts, in order.
    pub shared: Vec<&'a Source>,
    /// Whether a gate for the shared expert will be computed (from prompts, or drawn at random).
    pub shared_gate: SharedGate,
}

/// Whether there is a gate in front of the shared expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedGate {
    /// `sigmoid(gate x)` scales its output.
    Computed,
    /// Its output is added as it is.
    Absent,
}

/// Facts of the output that its configuration repeats.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Sizes of the base.
    pub dims: Dims,
    /// Routed experts.
    pub experts: usize,
    /// Shared experts.
    pub shared: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// One kind of MoE checkpoint.
pub trait OutputFamily: Sync + std::fmt::Debug {
    /// `model_type` in `config.json`, and the word for `architecture:`.
    fn name(&self) -> &'static str;

    /// The class in `architectures`.
    fn class(&self) -> &'static str;

    /// What it is, in one line.
    fn summary(&self) -> &'static str;

    /// Whether it can hold `request`.
    ///
    /// # Errors
    /// [`MergeError::Incompatible`] with the reason.
    fn accepts(&self, request: &Request<'_>) -> Result<(), MergeError>;

    /// Whether there is a fused layout that a loader reads.
    fn has_fused(&self) -> bool {
        true
    }

    /// Name of the router of a layer, `[experts, hidden]`.
    fn router(&self, layer: usize, _layout: Layout) -> String {
        format!("model.layers.{layer}.mlp.gate.weight")
    }

    /// How the router is stored; `None`: as everything else.
    fn router_dtype(&self) -> Option<Dtype> {
        None
    }

    /// Name of one matrix of one expert, hub layout.
    fn expert(&self, layer: usize, expert: usize, matrix: Matrix) -> String {
        format!("model.layers.{layer}.mlp.experts.{expert}.{}.weight", matrix.name())
    }

    /// Names of the tensors that hold all experts of a layer, where `layout` has such: `[experts, 2 * intermediate, hidden]`
    /// with the gate above the up projection, and `[experts, hidden, intermediate]`.
    fn stacked(&self, layer: usize, layout: Layout) -> Option<[String; 2]> {
        let name = |name| format!("model.layers.{layer}.mlp.experts.{name}");
        (layout == Layout::Fused).then(|| ["gate_up_proj", "down_proj"].map(name))
    }

    /// The same for what all tokens pass through: `[2 * shared * intermediate, hidden]`, all gates above all up projections,
    /// and `[hidden, shared * intermediate]`. `None`: one tensor per matrix, as [`OutputFamily::shared`] says.
    fn stacked_shared(&self, _layer: usize) -> Option<[String; 2]> {
        None
    }

    /// Name of one matrix of what all tokens pass through, several shared experts side by side in one.
    fn shared(&self, layer: usize, matrix: Matrix) -> Option<String>;

    /// Name of the gate of the shared expert, `[1, hidden]`.
    fn shared_gate(&self, _layer: usize) -> Option<String> {
        None
    }

    /// A tensor of the base outside the MLPs, as it has to be here.
    fn attention(&self, _name: &str, weight: WeightRef, _dims: &Dims) -> WeightRef {
        weight
    }

    /// Small tensors that the base does not have, with their dtype.
    fn additions(
        &self,
        _layer: usize,
        _shape: &Shape,
        _base: &Source,
        _dtype: Dtype,
    ) -> Vec<Addition> {
        Vec::new()
    }

    /// Writes the family's own keys over what is left of the base's.
    fn configure(&self, config: &mut Map<String, Value>, shape: &Shape);
}

/// A small tensor that is made, not copied.
#[derive(Debug, Clone)]
pub struct Addition {
    /// Its name.
    pub name: String,
    /// Its numbers.
    pub weight: WeightRef,
    /// How it is stored.
    pub dtype: Dtype,
}

impl Addition {
    /// Zeros of `shape`.
    pub fn zeros(name: String, shape: &[usize], dtype: Dtype) -> Self {
        Self { weight: Arc::new(OwnedWeight::zeros(&name, shape, dtype)), name, dtype }
    }
}

/// The first of the `wanted` families that accepts; with none wanted, the first of all.
///
/// # Errors
/// [`MergeError::Incompatible`]: the reason why the wanted family (or the likeliest one) cannot hold the request.
pub fn select(
    wanted: &[&str],
    request: &Request<'_>,
) -> Result<&'static dyn OutputFamily, MergeError> {
    let named: Vec<&'static dyn OutputFamily> = match wanted {
        [] => OUTPUTS.to_vec(),
        wanted => OUTPUTS.iter().copied().filter(|f| wanted.contains(&f.name())).collect(),
    };
    let mut reasons = Vec::new();
    for family in named {
        match family.accepts(request) {
            Ok(()) => return Ok(family),
            Err(reason) => reasons.push((family.name(), reason)),
        }
    }
    let likeliest = likeliest(request);
    if let Some(at) = reasons.iter().position(|(name, _)| *name == likeliest) {
        return Err(reasons.swap_remove(at).1);
    }
    match reasons.into_iter().next() {
        Some((_, reason)) => Err(reason),
        None => Err(MergeError::Incompatible {
            what: "unknown output family".into(),
            first: request.base.label.clone(),
            second: wanted.join(", "),
            expected: OUTPUTS.iter().map(|f| f.name()).collect::<Vec<_>>().join(", "),
            found: wanted.join(", "),
            hint: "leave `architecture` out to let the base decide".into(),
            recipe: None,
        }),
    }
}

/// The family whose refusal says most.
fn likeliest(request: &Request<'_>) -> &'static str {
    match (request.base.config.model_type(), request.shared.len(), request.shared_gate) {
        ("qwen3", ..) => "qwen3_moe",
        ("qwen2", ..) | (_, 1.., SharedGate::Computed) => "qwen2_moe",
        (_, 0, _) => "mixtral",
        _ => "ernie4_5_moe",
    }
}

/// What the families with llama attention and ungated shared experts have in common: no biases, no gate.
fn expect_llama_ungated(
    family: &dyn OutputFamily,
    request: &Request<'_>,
) -> Result<(), MergeError> {
    expect_type(family, request, &["llama", "mistral"])?;
    expect_ungated(family, request)?;
    expect_no_bias(
        family,
        request,
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
        "write `architecture: qwen2_moe`, which keeps biases on q, k and v",
    )
}

/// A refusal of `family` because of the base.
fn refuse(
    family: &dyn OutputFamily,
    base: &Source,
    what: String,
    expected: &str,
    found: String,
    hint: &str,
) -> MergeError {
    MergeError::Incompatible {
        what,
        first: base.label.clone(),
        second: format!("output family `{}`", family.name()),
        expected: expected.into(),
        found,
        hint: hint.into(),
        recipe: None,
    }
}

/// Whether the first layer of a model has a bias beside `projection`.
fn has_bias(source: &Source, projection: &str) -> bool {
    source.tensors.contains_key(&format!("model.layers.0.{projection}.bias"))
}

/// Refuses bases of other types than `types`, with the reason where one is known.
fn expect_type(
    family: &dyn OutputFamily,
    request: &Request<'_>,
    types: &[&str],
) -> Result<(), MergeError> {
    let found = request.base.config.model_type();
    if types.contains(&found) {
        return Ok(());
    }
    let why = match found {
        t if t.starts_with("gemma") => {
            "its norms multiply by 1 + weight, its embeddings are scaled, and it has norms that no MoE family has"
        }
        "phi3" => {
            "its rotary embedding may be partial or long-rope, which the MoE families do not have"
        }
        "qwen3" => "it normalises queries and keys per head; only `qwen3_moe` does that too",
        "qwen2" => "it has biases on queries, keys and values; `qwen2_moe` has them too",
        t if t.contains("moe") || t == "mixtral" || t.starts_with("deepseek") => {
            "it is a MoE already; experts are taken from dense models"
        }
        _ => "its structure is not that of the output family",
    };
    Err(refuse(
        family,
        request.base,
        format!("`{found}` cannot become `{}`: {why}", family.name()),
        &types.join(" or "),
        found.to_owned(),
        match found {
            "qwen3" => "write `architecture: qwen3_moe`",
            "qwen2" => "write `architecture: qwen2_moe` and give one shared expert",
            _ => "use a base of one of the expected types",
        },
    ))
}

/// Refuses a base with biases on `projections`.
fn expect_no_bias(
    family: &dyn OutputFamily,
    request: &Request<'_>,
    projections: &[&str],
    hint: &str,
) -> Result<(), MergeError> {
    match projections.iter().find(|p| has_bias(request.base, p)) {
        None => Ok(()),
        Some(projection) => Err(refuse(
            family,
            request.base,
            format!(
                "`{}` has no bias on `{projection}`, and dropping it would change the model",
                family.name()
            ),
            "no such bias",
            format!("`model.layers.0.{projection}.bias`"),
            hint,
        )),
    }
}

/// Refuses shared experts, or another number of them.
fn expect_shared(
    family: &dyn OutputFamily,
    request: &Request<'_>,
    allowed: std::ops::RangeInclusive<usize>,
    hint: &str,
) -> Result<(), MergeError> {
    let found = request.shared.len();
    if allowed.contains(&found) {
        return Ok(());
    }
    let expected = match (*allowed.start(), *allowed.end()) {
        (0, 0) => "no shared expert".to_owned(),
        (1, 1) => "exactly one shared expert".to_owned(),
        (from, _) => format!("at least {from} shared experts"),
    };
    Err(refuse(
        family,
        request.base,
        format!("`{}` cannot hold {found} shared experts", family.name()),
        &expected,
        format!("{found} shared experts"),
        hint,
    ))
}

/// Refuses gates in front of shared experts where the family adds their output as it is.
fn expect_ungated(family: &dyn OutputFamily, request: &Request<'_>) -> Result<(), MergeError> {
    if request.shared.is_empty() || request.shared_gate == SharedGate::Absent {
        return Ok(());
    }
    Err(refuse(
        family,
        request.base,
        format!("`{}` has no gate for shared experts", family.name()),
        "shared experts without prompts",
        "a shared expert with prompts".into(),
        "remove its prompts, or write `architecture: qwen2_moe` (one shared expert)",
    ))
}

/// Refuses a head width that loaders of the family do not read from the configuration.
fn expect_plain_heads(family: &dyn OutputFamily, request: &Request<'_>) -> Result<(), MergeError> {
    let dims = Dims::of(request.base)?;
    if dims.head_dim * dims.heads == dims.hidden {
        return Ok(());
    }
    Err(refuse(
        family,
        request.base,
        format!(
            "`{}` takes the width of a head from hidden_size / num_attention_heads",
            family.name()
        ),
        &format!("head_dim {}", dims.hidden / dims.heads),
        format!("head_dim {}", dims.head_dim),
        "write `architecture: mixtral`, which reads `head_dim`",
    ))
}

/// Sets keys.
fn set<const N: usize>(config: &mut Map<String, Value>, keys: [(&str, Value); N]) {
    for (key, value) in keys {
        config.insert(key.into(), value);
    }
}

/// The activation of a model; `silu` where the configuration is silent.
fn activation(config: &ConfigJson) -> &str {
    config.str("hidden_act").or_else(|| config.str("hidden_activation")).unwrap_or("silu")
}

#[cfg(test)]
mod tests;
