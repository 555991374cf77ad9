//! The names of architectures and tensors in GGUF files and on the Hub: one table, read in both directions.
//!
//! # Source
//! llama.cpp `gguf-py/gguf/constants.py`, `tensor_mapping.py` (names), `conversion/*.py` (what is done to the numbers) and
//! `src/llama-model.cpp` (which pairs of dimensions are rotated).

/// `general.architecture`, as far as this program knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Architecture {
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
    /// The first DeepSeek MoE: llama attention.
    Deepseek,
    /// DeepSeek 2: attention through latents.
    Deepseek2,
    Ernie4_5Moe,
    GraniteMoe,
}

use Architecture::*;

/// Every architecture with its name in GGUF files.
const ARCHITECTURES: &[(&str, Architecture)] = &[
    ("llama", Llama),
    ("qwen2", Qwen2),
    ("qwen2moe", Qwen2Moe),
    ("qwen3", Qwen3),
    ("qwen3moe", Qwen3Moe),
    ("phi3", Phi3),
    ("gemma2", Gemma2),
    ("gemma3", Gemma3),
    ("olmoe", Olmoe),
    ("deepseek", Deepseek),
    ("deepseek2", Deepseek2),
    ("ernie4_5-moe", Ernie4_5Moe),
    ("granitemoe", GraniteMoe),
];

impl Architecture {
    /// The architecture with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        ARCHITECTURES.iter().find(|(known, _)| *known == name).map(|(_, a)| *a)
    }

    /// Its name in GGUF files.
    pub fn name(self) -> &'static str {
        // Every variant is in the table: a test goes through them.
        ARCHITECTURES.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }

    /// All known names, for messages.
    pub(super) fn known() -> String {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        names.join(", ")
    }

    /// Whether norms are stored with 1 added.
    pub fn is_gemma(self) -> bool {
        matches!(self, Gemma2 | Gemma3)
    }

    /// Whether llama.cpp rotates neighbouring dimensions `(2i, 2i + 1)` of a head; elsewhere `(i, i + size / 2)`.
    pub fn rotates_neighbours(self) -> bool {
        matches!(self, Llama | Deepseek | Deepseek2 | Ernie4_5Moe | GraniteMoe)
    }

    /// Whether the Hugging Face model rotates halves and llama.cpp neighbours, so that rows of q and k are in another
    /// order in the file.
    pub(super) fn reorders_rows(self) -> bool {
        matches!(self, Llama | Deepseek | GraniteMoe)
    }
}

/// What is between a tensor of a GGUF file and the one of the Hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    As,
    /// Rows of queries in the order of rotary pairs, where the architecture wants it.
    Query,
    /// The same for keys.
    Key,
    /// 1 added, for Gemma.
    Norm,
    /// A vector in the file, a matrix of one row on the Hub.
    Vector,
    /// One tensor for all experts in the file, one for each (`{}`) on the Hub.
    Experts,
    /// The first half of the rows (of each expert) of the Hub's tensor.
    FirstHalf,
    /// The second half.
    SecondHalf,
}

/// One tensor of a layer under both of its names, without `blk.N.` or `model.layers.N.` and without `.weight` or `.bias`.
pub(super) struct Row {
    pub gguf: &'static str,
    pub hub: &'static str,
    pub change: Change,
    on: &'static [Architecture],
}

/// All of them.
const ALL: &[Architecture] = &[
    Llama,
    Qwen2,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
    Phi3,
    Gemma2,
    Gemma3,
    Olmoe,
    Deepseek,
    Deepseek2,
    Ernie4_5Moe,
    GraniteMoe,
];
const GEMMA: &[Architecture] = &[Gemma2, Gemma3];
const SHARED: &[Architecture] = &[Deepseek, Deepseek2, Ernie4_5Moe, GraniteMoe];

const fn row(
    gguf: &'static str,
    hub: &'static str,
    change: Change,
    on: &'static [Architecture],
) -> Row {
    Row { gguf, hub, change, on }
}

use Change::*;

/// The tensors of a layer. In each direction the first row that fits counts: rows further down are for files that stand
/// for a model of another family with the same arithmetic.
const ROWS: &[Row] = &[
    row("attn_norm", "input_layernorm", Norm, ALL),
    row("ffn_norm", "pre_feedforward_layernorm", Norm, GEMMA),
    row("post_attention_norm", "post_attention_layernorm", Norm, GEMMA),
    row("post_ffw_norm", "post_feedforward_layernorm", Norm, GEMMA),
    row("ffn_norm", "post_attention_layernorm", As, ALL),
    row("attn_q", "self_attn.q_proj", Query, ALL),
    row("attn_k", "self_attn.k_proj", Key, ALL),
    row("attn_v", "self_attn.v_proj", As, ALL),
    row("attn_output", "self_attn.o_proj", As, ALL),
    row("attn_qkv", "self_attn.qkv_proj", As, &[Phi3]),
    row("attn_q_norm", "self_attn.q_norm", Norm, ALL),
    row("attn_k_norm", "self_attn.k_norm", Norm, ALL),
    row("attn_q_a", "self_attn.q_a_proj", As, &[Deepseek2]),
    row("attn_q_a_norm", "self_attn.q_a_layernorm", As, &[Deepseek2]),
    row("attn_q_b", "self_attn.q_b_proj", As, &[Deepseek2]),
    row("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", As, &[Deepseek2]),
    row("attn_kv_a_norm", "self_attn.kv_a_layernorm", As, &[Deepseek2]),
    row("attn_kv_b", "self_attn.kv_b_proj", As, &[Deepseek2]),
    row("ffn_gate_inp", "block_sparse_moe.gate", As, &[Llama]),
    row("ffn_gate_exps", "block_sparse_moe.experts.{}.w1", Experts, &[Llama]),
    row("ffn_up_exps", "block_sparse_moe.experts.{}.w3", Experts, &[Llama]),
    row("ffn_down_exps", "block_sparse_moe.experts.{}.w2", Experts, &[Llama]),
    row("ffn_gate_inp", "block_sparse_moe.router.layer", As, &[GraniteMoe]),
    row("ffn_gate_exps", "block_sparse_moe.input_linear", FirstHalf, &[GraniteMoe]),
    row("ffn_up_exps", "block_sparse_moe.input_linear", SecondHalf, &[GraniteMoe]),
    row("ffn_down_exps", "block_sparse_moe.output_linear", As, &[GraniteMoe]),
    row("ffn_gate_shexp", "shared_mlp.input_linear", FirstHalf, &[GraniteMoe]),
    row("ffn_up_shexp", "shared_mlp.input_linear", SecondHalf, &[GraniteMoe]),
    row("ffn_down_shexp", "shared_mlp.output_linear", As, &[GraniteMoe]),
    row("ffn_gate_inp", "mlp.gate", As, ALL),
    row("exp_probs_b", "mlp.gate.e_score_correction_bias", As, &[Deepseek2]),
    row("exp_probs_b", "mlp.moe_statics.e_score_correction_bias", Vector, &[Ernie4_5Moe]),
    row("ffn_gate_exps", "mlp.experts.{}.gate_proj", Experts, ALL),
    row("ffn_up_exps", "mlp.experts.{}.up_proj", Experts, ALL),
    row("ffn_down_exps", "mlp.experts.{}.down_proj", Experts, ALL),
    row("ffn_gate_inp_shexp", "mlp.shared_expert_gate", Vector, &[Qwen2Moe]),
    row("ffn_gate_shexp", "mlp.shared_expert.gate_proj", As, &[Qwen2Moe]),
    row("ffn_up_shexp", "mlp.shared_expert.up_proj", As, &[Qwen2Moe]),
    row("ffn_down_shexp", "mlp.shared_expert.down_proj", As, &[Qwen2Moe]),
    row("ffn_gate_shexp", "mlp.shared_experts.gate_proj", As, SHARED),
    row("ffn_up_shexp", "mlp.shared_experts.up_proj", As, SHARED),
    row("ffn_down_shexp", "mlp.shared_experts.down_proj", As, SHARED),
    row("ffn_up", "mlp.gate_up_proj", As, &[Phi3]),
    row("ffn_gate", "mlp.gate_proj", As, ALL),
    row("ffn_up", "mlp.up_proj", As, ALL),
    row("ffn_down", "mlp.down_proj", As, ALL),
];

/// Tensors outside of layers: their names in the file and on the Hub, complete.
const OUTSIDE: &[(&str, &str, Change)] = &[
    ("token_embd.weight", EMBEDDING, As),
    ("output_norm.weight", "model.norm.weight", Norm),
    ("output.weight", "lm_head.weight", As),
    ("output.bias", "lm_head.bias", As),
];

/// The embedding on the Hub.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head in the file.
pub(super) const OUTPUT: &str = "output.weight";

/// Table of rotary factors, which the configuration has on the Hub.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
pub(super) const ROPE_LONG: &str = "rope_factors_long.weight";
pub(super) const ROPE_SHORT: &str = "rope_factors_short.weight";

/// The tensor outside of layers that a file calls `name`: its name on the Hub.
pub(super) fn outside_by_gguf(name: &str) -> Option<(&'static str, Change)> {
    OUTSIDE.iter().find(|(gguf, ..)| *gguf == name).map(|(_, hub, change)| (*hub, *change))
}

/// The tensor of a layer that files of `architecture` call `module`.
pub(super) fn by_gguf(architecture: Architecture, module: &str) -> Option<&'static Row> {
    ROWS.iter().find(|r| r.gguf == module && r.on.contains(&architecture))
}

/// What a tensor of the Hub becomes in files of an architecture.
pub(super) struct Written {
    /// Name in the file.
    pub name: String,
    pub change: Change,
    /// Which expert it is.
    pub expert: Option<usize>,
}

/// The tensors of a file of `architecture` that the tensor `name` of the Hub becomes, or a part of; none if there is
/// no place for it.
pub(super) fn by_hub(architecture: Architecture, name: &str) -> Vec<Written> {
    if let Some((gguf, _, change)) = OUTSIDE.iter().find(|(_, hub, _)| *hub == name) {
        return vec![Written { name: (*gguf).to_owned(), change: *change, expert: None }];
    }
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|r| r.split_once('.'))
    else {
        return Vec::new();
    };
    if layer.parse::<usize>().is_err() {
        return Vec::new();
    }
    // A correction bias has no parameter's name on the Hub; files call it one.
    let (module, parameter) = match rest.strip_suffix(".weight") {
        Some(module) => (module, "weight"),
        None => (rest.strip_suffix(".bias").unwrap_or(rest), "bias"),
    };
    let (module, expert) = without_expert(module);
    let rows = ROWS.iter().filter(|r| r.hub == module && r.on.contains(&architecture));
    // The halves of one tensor are the only case of two rows that both count.
    let is_half = |r: &Row| matches!(r.change, FirstHalf | SecondHalf);
    let mut found: Vec<&Row> = rows.collect();
    if !found.iter().all(|r| is_half(r)) {
        found.truncate(1);
    }
    let written = |r: &Row| Written {
        name: format!("blk.{layer}.{}.{parameter}", r.gguf),
        change: r.change,
        expert,
    };
    found.into_iter().map(written).collect()
}

/// `mlp.experts.7.up_proj` as `mlp.experts.{}.up_proj` and 7.
fn without_expert(module: &str) -> (String, Option<usize>) {
    let parts = module.split_once(".experts.").and_then(|(block, rest)| {
        let (number, matrix) = rest.split_once('.')?;
        Some((block, number.parse::<usize>().ok()?, matrix))
    });
    match parts {
        Some((block, number, matrix)) => (format!("{block}.experts.{{}}.{matrix}"), Some(number)),
        None => (module.to_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_has_its_name() {
        for architecture in ALL {
            assert_eq!(Architecture::from_name(architecture.name()), Some(*architecture));
        }
        assert_eq!(ALL.len(), ARCHITECTURES.len());
    }

    #[test]
    fn both_directions_agree() {
        for &architecture in ALL {
            for row in ROWS.iter().filter(|r| r.on.contains(&architecture)) {
                let Some(read) = by_gguf(architecture, row.gguf) else { panic!("{}", row.gguf) };
                let hub = format!("model.layers.3.{}.weight", read.hub.replace("{}", "5"));
                let names: Vec<String> =
                    by_hub(architecture, &hub).into_iter().map(|w| w.name).collect();
                let expected = format!("blk.3.{}.weight", row.gguf);
                assert!(names.contains(&expected), "{hub}: {names:?}, {expected}");
            }
        }
    }

    #[test]
    fn names_by_hand() {
        let names = |architecture, hub: &str| -> Vec<String> {
            by_hub(architecture, hub).into_iter().map(|w| w.name).collect()
        };
        assert_eq!(
            names(GraniteMoe, "model.layers.0.block_sparse_moe.input_linear.weight"),
            ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"]
        );
        let bias = "model.layers.2.mlp.moe_statics.e_score_correction_bias";
        assert_eq!(names(Ernie4_5Moe, bias), ["blk.2.exp_probs_b.bias"]);
        assert_eq!(names(Llama, "lm_head.weight"), ["output.weight"]);
        // A DeepSeek MoE whose arithmetic is Mixtral's.
        assert_eq!(
            names(Llama, "model.layers.1.mlp.experts.4.down_proj.weight"),
            ["blk.1.ffn_down_exps.weight"]
        );
        assert!(names(Llama, "model.layers.0.mlp.shared_experts.up_proj.weight").is_empty());
        assert!(names(Llama, "model.layers.x.mlp.up_proj.weight").is_empty());
    }
}
