//! An expert back as a dense model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::weight::PermutedRows;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Interrupt, Replace, Source, Staging};
use moe_merge_kernels::RopePairing;
use moe_merge_merge::{Provenance, write_dense};
use moe_merge_model::spec::{Attention, AttentionKind, Mlp};
use moe_merge_model::{FAMILIES, Spec};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::AdaptError;
use crate::mlp;
use crate::moe::Moe;

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct ExtractRequest {
    /// The model's folder.
    pub folder: String,
    /// The expert: a name or a number.
    pub expert: String,
    /// The folder to write.
    pub out: PathBuf,
    /// What to do if it is there.
    pub replace: Replace,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractReport {
    /// The new folder.
    pub output: PathBuf,
    /// `model_type` of the dense model.
    pub family: String,
    /// Number of the expert.
    pub expert: usize,
    /// Its name.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Which dense family has the layers of a MoE family but for its MLPs. DeepSeek 2 and OLMoE have none among the families
/// that run here.
const DENSE: &[(&str, &str)] = &[
    ("ernie4_5_moe", "llama"),
    ("mixtral", "llama"),
    ("qwen2_moe", "qwen2"),
    ("qwen3_moe", "qwen3"),
    ("deepseek", "llama"),
    ("granitemoeshared", "llama"),
];

/// Keys of MoE configurations that mean nothing in a dense one.
const DROPPED: &[&str] = &[
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "decoder_sparse_step",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "first_k_dense_replace",
    "mlp_only_layers",
    "moe_intermediate_size",
    "moe_k",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_layer_start_index",
    "moe_norm_min",
    "moe_num_experts",
    "moe_num_shared_experts",
    "moe_use_aux_free",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "routed_scaling_factor",
    "scoring_func",
    "seq_aux",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "topk_group",
    "topk_method",
    "use_bias",
];

/// Writes the model with one expert's MLPs in all layers, as a dense checkpoint. Shared experts are left out, and told.
///
/// # Errors
/// [`AdaptError::NoDense`] for a family without a dense one, or layers of other widths; no such expert; what opening and
/// writing meet.
pub fn extract(
    request: &ExtractRequest,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ExtractReport, AdaptError> {
    let moe = Moe::open(&request.folder)?;
    let expert = moe.expert(&request.expert)?;
    let (family, dense, mut warnings) = dense(&moe, expert)?;
    let name = moe.names[expert].clone();
    let staging = Staging::new(&request.out, request.replace)?;
    let title = request.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let provenance = Provenance {
        name: title,
        report: vec![format!("Expert {expert} (`{name}`) of a mixture of experts.")],
        ..Provenance::default()
    };
    let watch = Watch { interrupt: &request.interrupt, progress };
    let role = format!("expert {expert} of the model");
    let written = write_dense(&dense, &[(role, &moe.source)], None, &provenance, &staging, watch)?;
    let output = staging.publish()?;
    warnings.extend(moe.source.notes.iter().cloned());
    Ok(ExtractReport {
        output,
        family: family.to_owned(),
        expert,
        name,
        tensors: dense.tensors.len(),
        bytes: written.bytes,
        warnings,
    })
}

/// The dense model of an expert, no weight copied; its family, and what was left out.
pub(crate) fn dense(
    moe: &Moe,
    expert: usize,
) -> Result<(&'static str, Source, Vec<String>), AdaptError> {
    let refuse = |what: &str, found: String| AdaptError::NoDense {
        path: moe.source.path.clone(),
        what: what.to_owned(),
        found,
    };
    let family = DENSE.iter().find(|(ours, _)| *ours == moe.spec.family).map(|(_, dense)| *dense);
    let family = family
        .ok_or_else(|| refuse("no dense family has its layers", moe.spec.family.to_owned()))?;
    // A llama attends to everything.
    let windowed = moe.spec.layers.iter().any(|l| l.window.is_some());
    let family = if family == "llama" && windowed { "mistral" } else { family };
    let plain = moe.spec.residual_scale == 1.0
        && moe.spec.logits_divisor == 1.0
        && moe.spec.embedding_scale == 1.0
        && has_usual_scale(&moe.spec.attention);
    if !plain {
        return Err(refuse("no dense family has its multipliers", moe.spec.family.to_owned()));
    }
    let mut source = moe.source.clone();
    let (mut width, mut shared) = (None, 0);
    for (layer, spec) in moe.spec.layers.iter().enumerate() {
        let (inter, has_shared) = match &spec.mlp {
            Mlp::Moe(moe) => (moe.inter, moe.shared.is_some()),
            Mlp::Dense(dense) => (dense.inter, false),
        };
        if *width.get_or_insert(inter) != inter {
            return Err(refuse(
                "its MLPs have several widths",
                format!("{inter} in layer {layer}"),
            ));
        }
        shared += usize::from(has_shared);
        let matrices = mlp::matrices(&moe.source, moe.spec.hidden, layer, &spec.mlp, expert)?;
        let below = format!("model.layers.{layer}.");
        let routed = [
            format!("{below}mlp."),
            format!("{below}block_sparse_moe."),
            format!("{below}shared_mlp."),
        ];
        source.tensors.retain(|name, _| !routed.iter().any(|r| name.starts_with(r)));
        let names = ["gate_proj", "up_proj", "down_proj"];
        let names = names.map(|n| format!("{below}mlp.{n}.weight"));
        source.tensors.extend(names.into_iter().zip(matrices));
    }
    halves(&moe.spec, &mut source);
    source.config.0 = config(moe, family, width.unwrap_or_default());
    let spec = Spec::of(&source)?;
    for (name, shape) in spec.expected_tensors() {
        source.weight(&name)?.expect_shape(&shape, "as the dense model needs it")?;
    }
    let mut notes = Vec::new();
    if shared > 0 {
        notes.push(format!(
            "the shared experts of {shared} layers are left out: the dense model has the routed expert alone"
        ));
    }
    Ok((family, source, notes))
}

/// Puts rows of queries and keys whose rotary pairs are neighbours, `(2i, 2i + 1)`, into the order of the dense families,
/// `(i, i + head_dim / 2)`.
fn halves(spec: &Spec, source: &mut Source) {
    let AttentionKind::Projected { head_dim, .. } = spec.attention.kind else { return };
    for (layer, of) in spec.layers.iter().enumerate() {
        if of.rope.pairing != RopePairing::Interleaved {
            continue;
        }
        let heads = [("q_proj", spec.attention.heads), ("k_proj", spec.attention.kv_heads)];
        for (name, heads) in heads {
            for kind in ["weight", "bias"] {
                let name = format!("model.layers.{layer}.self_attn.{name}.{kind}");
                if let Some(weight) = source.tensors.get_mut(&name) {
                    let order = Arc::new(order_of_halves(heads, head_dim));
                    *weight = Arc::new(PermutedRows::new(weight.clone(), order));
                }
            }
        }
    }
}

/// `order[i]` is the row of the neighbours' order that becomes row `i` of the halves' order.
fn order_of_halves(heads: usize, head_dim: usize) -> Vec<u32> {
    let half = head_dim / 2;
    (0..heads * head_dim)
        .map(|row| {
            let (head, i) = (row / head_dim, row % head_dim);
            (head * head_dim + 2 * (i % half) + i / half) as u32
        })
        .collect()
}

/// Whether scores are divided by the root of the width of a head, as all dense families do.
fn has_usual_scale(attention: &Attention) -> bool {
    match attention.kind {
        AttentionKind::Projected { head_dim, .. } => {
            (attention.scale * (head_dim as f32).sqrt() - 1.0).abs() < 1e-6
        }
        AttentionKind::Latent { .. } => false,
    }
}

fn config(moe: &Moe, family: &str, width: usize) -> Map<String, Value> {
    let mut config = moe.source.config.0.clone();
    for key in DROPPED {
        config.remove(*key);
    }
    let class = FAMILIES.iter().find(|f| f.model_types.contains(&family)).map(|f| f.architecture);
    config.insert("model_type".into(), json!(family));
    config.insert("architectures".into(), json!([class]));
    config.insert("intermediate_size".into(), json!(width));
    // What families assume where nothing is said differs.
    config.insert("tie_word_embeddings".into(), json!(moe.spec.tied));
    let rope = moe.spec.layers.first().map(|l| l.rope.theta);
    let told = ["rope_parameters", "rope_theta"].iter().any(|key| config.contains_key(*key));
    if let Some(theta) = rope.filter(|_| !told) {
        config.insert("rope_theta".into(), json!(theta));
    }
    if let AttentionKind::Projected { qkv_bias: true, .. } = moe.spec.attention.kind
        && family == "llama"
    {
        config.insert("attention_bias".into(), json!(true));
    }
    config
}

/// Where an extracted expert is written if nothing is said: beside the model, with the expert's name behind it.
pub fn default_output(folder: &Path, name: &str) -> PathBuf {
    let stem = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!("{stem}-{name}"))
}

#[cfg(test)]
mod tests {
    use super::order_of_halves;

    #[test]
    fn neighbours_become_halves() {
        assert_eq!(order_of_halves(2, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order_of_halves(1, 6), [0, 2, 4, 1, 3, 5]);
    }
}
