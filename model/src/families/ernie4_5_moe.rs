//! Ernie 4.5 MoE: llama attention with interleaved rotary pairs; a bias on the scores for the choice of experts only.

use moe_merge_kernels::{Precision, RopePairing, RouterSpec};

use super::keys::{Keys, set_biases};
use crate::error::ModelError;
use crate::spec::{ExpertNames, Mlp, MoeMlp, SharedExpert, Spec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<Spec, ModelError> {
    let mut spec = keys.llama("ernie4_5_moe", 500_000.0)?;
    spec.tied = keys.bool_or("tie_word_embeddings", true)?;
    let bias = keys.bool_or("use_bias", false)?;
    set_biases(&mut spec, bias, bias);
    let inter = keys.size("moe_intermediate_size")?;
    let shared = keys.size_or("moe_num_shared_experts", 2)?;
    let moe = MoeMlp {
        experts: keys.size_under(&["moe_num_experts", "num_experts"])?,
        inter,
        router: RouterSpec::softmax(keys.size_under(&["moe_k", "num_experts_per_tok"])?),
        reference_precision: Precision::RoundLikeHf { logits: false, weights: true },
        selection_bias: Some("mlp.moe_statics.e_score_correction_bias"),
        names: ExpertNames::Qwen,
        shared: (shared > 0).then(|| SharedExpert {
            module: "mlp.shared_experts",
            inter: inter * shared,
            gate: None,
            bias,
            fused: false,
        }),
    };
    let start = keys.size_or("moe_layer_start_index", 1)?;
    let end = match keys.number_or("moe_layer_end_index", -1.0)? {
        end if end < 0.0 => spec.layers.len() - 1,
        end => end as usize,
    };
    let step = keys.size_or("moe_layer_interval", 1)?.max(1);
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        layer.rope.pairing = RopePairing::Interleaved;
        if (l + 1).is_multiple_of(step) && (start..=end).contains(&l) {
            layer.mlp = Mlp::Moe(moe.clone());
        } else if let Mlp::Dense(mlp) = &mut layer.mlp {
            mlp.bias = bias;
        }
    }
    Ok(spec)
}
