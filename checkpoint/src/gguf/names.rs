//! Tensor names and row order: from llama.cpp's to Hugging Face's.
//!
//! # Source
//! llama.cpp `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`; transformers
//! `modeling_gguf_pytorch_utils.py`. Differs from the latter: experts stay one by one, attention biases of llama models are
//! put back in order as well, and nothing is dropped unsaid.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::CheckpointError;
use crate::gguf::config::Meta;
use crate::gguf::dequant::Shifted;
use crate::gguf::header::{Header, TensorInfo};
use crate::map::MappedFile;
use crate::shard::OtherTensor;
use crate::weight::{PermutedRows, RowSlice, WeightRef};

/// `general.architecture`, as far as this program knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama, Mistral, and Mixtral when there are experts.
    Llama,
    Qwen2,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
    Phi3,
    Gemma2,
    Gemma3,
    Olmoe,
    Deepseek2,
}

/// Every architecture with its name in GGUF files.
const ARCHITECTURES: &[(&str, Architecture)] = &[
    ("llama", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen2moe", Architecture::Qwen2Moe),
    ("qwen3", Architecture::Qwen3),
    ("qwen3moe", Architecture::Qwen3Moe),
    ("phi3", Architecture::Phi3),
    ("gemma2", Architecture::Gemma2),
    ("gemma3", Architecture::Gemma3),
    ("olmoe", Architecture::Olmoe),
    ("deepseek2", Architecture::Deepseek2),
];

impl Architecture {
    /// The architecture with this name.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        ARCHITECTURES.iter().find(|(known, _)| *known == name).map(|(_, a)| *a)
    }

    /// All known names, for messages.
    pub(super) fn known() -> String {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// The weights of a file under Hugging Face names.
pub(super) struct Named {
    pub tensors: BTreeMap<String, WeightRef>,
    /// Tensors that became no weight, under their GGUF names.
    pub other: Vec<OtherTensor>,
    pub notes: Vec<String>,
}

/// What becomes of one tensor of the file.
#[derive(Debug, PartialEq)]
enum Place {
    /// It is the weight of this name.
    As(String),
    /// The same, with its rows in the order of rotary pairs, for this many heads.
    Rotary(String, usize),
    /// The same, with 1 added by the converter.
    PlusOne(String),
    /// The same, as one row of a matrix.
    Row(String),
    /// One matrix for each expert; the name of expert `e` is prefix + e + suffix.
    Experts(String, String),
    /// The configuration has it.
    Config,
    /// Nobody knows it.
    Unknown,
}

/// Renames the tensors of a file and undoes what its converter did to them.
pub(super) fn map(header: &Header, file: &MappedFile) -> Result<Named, CheckpointError> {
    let meta = Meta::new(header, file)?;
    let namer = Namer {
        architecture: meta.architecture,
        layers: meta.required("block_count")?,
        heads: meta.heads()?,
        kv_heads: meta.kv_heads()?,
        experts: meta.optional("expert_count").unwrap_or(0),
    };
    let mut named = Named { tensors: BTreeMap::new(), other: Vec::new(), notes: Vec::new() };
    let mut unknown = Vec::new();
    for tensor in &header.tensors {
        let place =
            if tensor.kind.is_no_weight() { Place::Config } else { namer.place(tensor.name) };
        match place {
            Place::Config => named.other.push(other(tensor, file)),
            Place::Unknown => {
                unknown.push(tensor.name);
                named.other.push(other(tensor, file));
            }
            place => put(&namer, place, tensor, file, &mut named.tensors)?,
        }
    }
    if !unknown.is_empty() {
        named
            .notes
            .push(format!("tensors that are not understood are left out: {}", unknown.join(", ")));
    }
    Ok(named)
}

fn other(tensor: &TensorInfo, file: &MappedFile) -> OtherTensor {
    OtherTensor {
        name: tensor.name.to_owned(),
        dtype: format!("{:?}", tensor.kind),
        shape: tensor.shape.clone(),
        file: file.path().to_owned(),
    }
}

fn put(
    namer: &Namer,
    place: Place,
    tensor: &TensorInfo,
    file: &MappedFile,
    tensors: &mut BTreeMap<String, WeightRef>,
) -> Result<(), CheckpointError> {
    let weight = super::weight(file, tensor)?;
    let mut insert = |name: String, weight: WeightRef| match tensors.insert(name, weight) {
        None => Ok(()),
        Some(first) => Err(CheckpointError::Malformed {
            what: "two tensors stand for the same weight".into(),
            file: file.path().to_owned(),
            tensor: Some(tensor.name.to_owned()),
            expected: "one tensor for each weight".into(),
            found: format!("`{}` as well", first.origin().1),
            hint: None,
        }),
    };
    let shape_error = |expected: String| CheckpointError::Shape {
        file: file.path().to_owned(),
        tensor: tensor.name.to_owned(),
        expected,
        found: tensor.shape.clone(),
    };
    match place {
        Place::As(name) => insert(name, weight),
        Place::PlusOne(name) => insert(name, Arc::new(Shifted::new(weight, -1.0))),
        Place::Row(name) => match tensor.shape.len() {
            1 => insert(name, Arc::new(RowSlice::new(weight, 0..1))),
            _ => insert(name, weight),
        },
        Place::Rotary(name, heads) => {
            let rows = tensor.shape[0];
            match rotary_order(rows, heads) {
                Some(order) => insert(name, Arc::new(PermutedRows::new(weight, Arc::new(order)))),
                None => Err(shape_error(format!("rows for {heads} heads of even size"))),
            }
        }
        Place::Experts(prefix, suffix) => {
            let &[experts, rows, _] = tensor.shape.as_slice() else {
                return Err(shape_error("[experts, rows, columns]".into()));
            };
            if experts != namer.experts {
                let why = "expert_count of the metadata";
                return Err(shape_error(format!("[{}, rows, columns] ({why})", namer.experts)));
            }
            for e in 0..experts {
                let slice = RowSlice::new(weight.clone(), e * rows..(e + 1) * rows);
                insert(format!("{prefix}{e}{suffix}"), Arc::new(slice))?;
            }
            Ok(())
        }
        Place::Config | Place::Unknown => Ok(()),
    }
}

/// For each row in Hugging Face's order its row in the file; `None` if `rows` are no `heads` heads of even size.
///
/// llama.cpp rotates neighbouring dimensions `(2i, 2i + 1)` of a head, Hugging Face dimensions `(i, i + size / 2)`.
fn rotary_order(rows: usize, heads: usize) -> Option<Vec<u32>> {
    let halves = heads > 0 && rows.is_multiple_of(heads) && (rows / heads).is_multiple_of(2);
    if !halves || u32::try_from(rows).is_err() {
        return None;
    }
    let size = rows / heads;
    let order = (0..rows).map(|row| {
        let (head, within) = (row / size, row % size);
        let (second, pair) = (within / (size / 2), within % (size / 2));
        (head * size + 2 * pair + second) as u32
    });
    Some(order.collect())
}

/// Knows the names of one architecture.
struct Namer {
    architecture: Architecture,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    experts: usize,
}

impl Namer {
    fn place(&self, name: &str) -> Place {
        match name {
            "token_embd.weight" => return Place::As("model.embed_tokens.weight".into()),
            "output.weight" => return Place::As("lm_head.weight".into()),
            "output.bias" => return Place::As("lm_head.bias".into()),
            "output_norm.weight" => return self.norm("model.norm.weight".into()),
            "rope_freqs.weight" | "rope_factors_long.weight" | "rope_factors_short.weight" => {
                return Place::Config;
            }
            _ => {}
        }
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((layer, (module, parameter))) =
            layer.and_then(|(n, rest)| Some((n.parse::<usize>().ok()?, rest.rsplit_once('.')?)))
        else {
            return Place::Unknown;
        };
        if layer >= self.layers || !matches!(parameter, "weight" | "bias") {
            return Place::Unknown;
        }
        let prefix = format!("model.layers.{layer}.");
        self.attention(module, &prefix, parameter)
            .or_else(|| self.norms(module, &prefix, parameter))
            .or_else(|| self.experts(module, &prefix, parameter))
            .or_else(|| self.mlp(module, &prefix, parameter))
            .unwrap_or(Place::Unknown)
    }

    fn norm(&self, name: String) -> Place {
        if self.architecture.is_gemma() { Place::PlusOne(name) } else { Place::As(name) }
    }

    fn attention(&self, module: &str, prefix: &str, parameter: &str) -> Option<Place> {
        use Architecture::*;
        let name = |module: &str| format!("{prefix}self_attn.{module}.{parameter}");
        let rotary = |module: &str, heads: usize| match self.architecture {
            Llama => Place::Rotary(name(module), heads),
            _ => Place::As(name(module)),
        };
        let latent = self.architecture == Deepseek2;
        Some(match module {
            "attn_q" => rotary("q_proj", self.heads),
            "attn_k" => rotary("k_proj", self.kv_heads),
            "attn_v" => Place::As(name("v_proj")),
            "attn_output" => Place::As(name("o_proj")),
            "attn_qkv" if self.architecture == Phi3 => Place::As(name("qkv_proj")),
            "attn_q_norm" => self.norm(name("q_norm")),
            "attn_k_norm" => self.norm(name("k_norm")),
            "attn_q_a" if latent => Place::As(name("q_a_proj")),
            "attn_q_a_norm" if latent => Place::As(name("q_a_layernorm")),
            "attn_q_b" if latent => Place::As(name("q_b_proj")),
            "attn_kv_a_mqa" if latent => Place::As(name("kv_a_proj_with_mqa")),
            "attn_kv_a_norm" if latent => Place::As(name("kv_a_layernorm")),
            "attn_kv_b" if latent => Place::As(name("kv_b_proj")),
            _ => return None,
        })
    }

    fn norms(&self, module: &str, prefix: &str, parameter: &str) -> Option<Place> {
        let gemma = self.architecture.is_gemma();
        let module = match module {
            "attn_norm" => "input_layernorm",
            "ffn_norm" if gemma => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "post_attention_norm" if gemma => "post_attention_layernorm",
            "post_ffw_norm" if gemma => "post_feedforward_layernorm",
            _ => return None,
        };
        Some(self.norm(format!("{prefix}{module}.{parameter}")))
    }

    fn experts(&self, module: &str, prefix: &str, parameter: &str) -> Option<Place> {
        use Architecture::*;
        if self.experts == 0 {
            return None;
        }
        let mixtral = self.architecture == Llama;
        let block = if mixtral { "block_sparse_moe" } else { "mlp" };
        let shared = match self.architecture {
            Deepseek2 => "shared_experts",
            _ => "shared_expert",
        };
        let matrix = |kind: &str| match (kind, mixtral) {
            ("gate", true) => Some("w1"),
            ("down", true) => Some("w2"),
            ("up", true) => Some("w3"),
            ("gate", false) => Some("gate_proj"),
            ("down", false) => Some("down_proj"),
            ("up", false) => Some("up_proj"),
            _ => None,
        };
        match module {
            "ffn_gate_inp" => return Some(Place::As(format!("{prefix}{block}.gate.{parameter}"))),
            "ffn_gate_inp_shexp" if self.architecture == Qwen2Moe => {
                return Some(Place::Row(format!("{prefix}mlp.shared_expert_gate.{parameter}")));
            }
            "exp_probs_b" if self.architecture == Deepseek2 => {
                return Some(Place::As(format!("{prefix}mlp.gate.e_score_correction_bias")));
            }
            _ => {}
        }
        let rest = module.strip_prefix("ffn_")?;
        if let Some(kind) = rest.strip_suffix("_exps") {
            let suffix = format!(".{}.{parameter}", matrix(kind)?);
            return Some(Place::Experts(format!("{prefix}{block}.experts."), suffix));
        }
        if let Some(kind) = rest.strip_suffix("_shexp").filter(|_| !mixtral) {
            return Some(Place::As(format!("{prefix}mlp.{shared}.{}.{parameter}", matrix(kind)?)));
        }
        // Files from before the experts were stacked have one tensor for each: `ffn_up.3`.
        let (kind, expert) = rest.split_once('.')?;
        let expert = expert.parse::<usize>().ok().filter(|e| *e < self.experts)?;
        let matrix = matrix(kind)?;
        Some(Place::As(format!("{prefix}{block}.experts.{expert}.{matrix}.{parameter}")))
    }

    fn mlp(&self, module: &str, prefix: &str, parameter: &str) -> Option<Place> {
        let module = match module {
            "ffn_up" if self.architecture == Architecture::Phi3 => "gate_up_proj",
            "ffn_gate" => "gate_proj",
            "ffn_up" => "up_proj",
            "ffn_down" => "down_proj",
            _ => return None,
        };
        Some(Place::As(format!("{prefix}mlp.{module}.{parameter}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namer(architecture: Architecture, experts: usize) -> Namer {
        Namer { architecture, layers: 2, heads: 4, kv_heads: 2, experts }
    }

    #[test]
    fn rotary_pairs_become_halves() {
        // Two heads of four rows: pairs (0, 1), (2, 3) become first halves 0, 2 and second halves 1, 3.
        assert_eq!(rotary_order(8, 2), Some(vec![0, 2, 1, 3, 4, 6, 5, 7]));
        assert_eq!(rotary_order(6, 2), None);
        assert_eq!(rotary_order(8, 0), None);
        assert_eq!(rotary_order(7, 2), None);
    }

    #[test]
    fn names_by_architecture() {
        use Architecture::*;
        let place = |architecture, experts, name: &str| namer(architecture, experts).place(name);
        let named = |name: &str| Place::As(name.into());
        assert_eq!(
            place(Llama, 0, "blk.1.attn_k.bias"),
            Place::Rotary("model.layers.1.self_attn.k_proj.bias".into(), 2)
        );
        assert_eq!(
            place(Qwen2, 0, "blk.1.attn_k.bias"),
            named("model.layers.1.self_attn.k_proj.bias")
        );
        assert_eq!(
            place(Phi3, 0, "blk.0.ffn_up.weight"),
            named("model.layers.0.mlp.gate_up_proj.weight")
        );
        assert_eq!(
            place(Gemma2, 0, "blk.0.ffn_norm.weight"),
            Place::PlusOne("model.layers.0.pre_feedforward_layernorm.weight".into())
        );
        assert_eq!(
            place(Llama, 8, "blk.0.ffn_down_exps.weight"),
            Place::Experts("model.layers.0.block_sparse_moe.experts.".into(), ".w2.weight".into())
        );
        assert_eq!(
            place(Llama, 8, "blk.0.ffn_up.7.weight"),
            named("model.layers.0.block_sparse_moe.experts.7.w3.weight")
        );
        assert_eq!(
            place(Qwen2Moe, 8, "blk.0.ffn_gate_inp_shexp.weight"),
            Place::Row("model.layers.0.mlp.shared_expert_gate.weight".into())
        );
        assert_eq!(
            place(Deepseek2, 8, "blk.1.ffn_gate_shexp.weight"),
            named("model.layers.1.mlp.shared_experts.gate_proj.weight")
        );
    }

    #[test]
    fn what_is_not_known_is_not_named() {
        use Architecture::*;
        for name in ["blk.2.attn_q.weight", "blk.0.attn_q.scale", "blk.x.attn_q.weight", "rope"] {
            assert_eq!(namer(Llama, 0).place(name), Place::Unknown, "{name}");
        }
        assert_eq!(namer(Llama, 8).place("blk.0.ffn_up.8.weight"), Place::Unknown);
        assert_eq!(namer(Llama, 0).place("blk.0.attn_kv_b.weight"), Place::Unknown);
    }
}
