//! What llama.cpp's architectures compute, and whether that is what a model asks for.

use moe_merge_checkpoint::gguf::Architecture;
use moe_merge_kernels::{Activation, Score};

use super::GgufError;
use crate::spec::{AttentionKind, Mlp, MoeMlp, QkNorm, Spec};

use Architecture::*;

/// Which layers have experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layers {
    /// None of them.
    Dense,
    /// All of them, or none.
    Either,
    /// All of them.
    Sparse,
    /// All from one layer on.
    FromOneOn,
}

/// The experts that every token visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shared {
    Never,
    Optional,
    Always,
    /// With a gate on what they give.
    AlwaysGated,
}

/// What the code of an architecture does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ability {
    layers: Layers,
    shared: Shared,
    /// Whether the weights of the chosen experts are divided by their sum; none if the file decides.
    renormalises: Option<bool>,
    /// Whether heads may be of another size than `hidden / heads`.
    any_head_size: bool,
    qk_norm: QkNorm,
    /// Whether the output projection of attention may have a bias.
    output_bias: bool,
    /// Whether dense MLPs may have biases.
    mlp_bias: bool,
    /// Whether `rope_freqs.weight` is read.
    pub(super) rope_factors: bool,
    /// Whether the head has to be a tensor of its own.
    pub(super) needs_head: bool,
}

/// What llama.cpp does for an architecture.
///
/// # Source
/// llama.cpp of October 2026, `src/models/ARCHITECTURE.cpp`: `load_arch_tensors` and `graph`.
pub(super) fn ability(architecture: Architecture) -> Ability {
    let dense = Ability {
        layers: Layers::Dense,
        shared: Shared::Never,
        renormalises: None,
        any_head_size: false,
        qk_norm: QkNorm::Absent,
        output_bias: false,
        mlp_bias: false,
        rope_factors: false,
        needs_head: false,
    };
    let sparse = Ability { layers: Layers::Sparse, ..dense };
    match architecture {
        Llama => Ability {
            layers: Layers::Either,
            renormalises: Some(true),
            any_head_size: true,
            output_bias: true,
            mlp_bias: true,
            rope_factors: true,
            ..dense
        },
        Qwen2 | Phi3 => dense,
        Qwen3 => Ability { any_head_size: true, qk_norm: QkNorm::PerHead, ..dense },
        Gemma2 => Ability { any_head_size: true, ..dense },
        Gemma3 => Ability { any_head_size: true, qk_norm: QkNorm::PerHead, ..dense },
        Qwen2Moe => Ability {
            shared: Shared::AlwaysGated,
            renormalises: Some(false),
            needs_head: true,
            ..sparse
        },
        Qwen3Moe => Ability {
            renormalises: Some(true),
            any_head_size: true,
            qk_norm: QkNorm::PerHead,
            ..sparse
        },
        Olmoe => {
            Ability { renormalises: Some(false), qk_norm: QkNorm::Full, needs_head: true, ..sparse }
        }
        Deepseek => Ability {
            layers: Layers::FromOneOn,
            shared: Shared::Always,
            renormalises: Some(false),
            rope_factors: true,
            ..sparse
        },
        Deepseek2 => Ability {
            layers: Layers::FromOneOn,
            shared: Shared::Always,
            any_head_size: true,
            ..sparse
        },
        Ernie4_5Moe => Ability {
            layers: Layers::FromOneOn,
            shared: Shared::Optional,
            renormalises: Some(true),
            any_head_size: true,
            ..sparse
        },
        GraniteMoe => Ability {
            shared: Shared::Optional,
            renormalises: Some(true),
            any_head_size: true,
            output_bias: true,
            rope_factors: true,
            ..sparse
        },
    }
}

/// The architecture with the name of the model's family.
pub(super) fn by_name(spec: &Spec) -> Architecture {
    match spec.family {
        "qwen2" => Qwen2,
        "qwen2_moe" => Qwen2Moe,
        "qwen3" => Qwen3,
        "qwen3_moe" => Qwen3Moe,
        "phi3" => Phi3,
        "gemma2" => Gemma2,
        "gemma3_text" => Gemma3,
        "olmoe" => Olmoe,
        "deepseek" => Deepseek,
        "deepseek_v2" => Deepseek2,
        "ernie4_5_moe" => Ernie4_5Moe,
        "granitemoeshared" => GraniteMoe,
        _ => Llama,
    }
}

/// The architecture that computes what `spec` says.
///
/// # Errors
/// [`GgufError::Lacking`] with the first thing that the nearest one does not do.
pub(super) fn architecture(spec: &Spec) -> Result<Architecture, GgufError> {
    let named = by_name(spec);
    let error = match fits(spec, named) {
        Ok(()) => return Ok(named),
        Err(error) => error,
    };
    // DeepSeek's first MoE is the llama of others with experts; what it is called is all that differs.
    let others: &[Architecture] = match named {
        Deepseek => &[Llama, GraniteMoe, Ernie4_5Moe],
        _ => &[],
    };
    others.iter().copied().find(|other| fits(spec, *other).is_ok()).ok_or(error)
}

/// The error for something that `architecture` does not do.
pub(super) fn lacking(
    spec: &Spec,
    architecture: Architecture,
    what: &str,
    expected: &str,
    found: &str,
) -> GgufError {
    GgufError::Lacking {
        family: spec.family,
        architecture: architecture.name(),
        what: what.into(),
        expected: expected.into(),
        found: found.into(),
        hint: None,
    }
}

fn fits(spec: &Spec, architecture: Architecture) -> Result<(), GgufError> {
    let can = ability(architecture);
    let lacks = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    let activation = if architecture.is_gemma() { Activation::GeluTanh } else { Activation::Silu };
    if spec.activation != activation {
        let name = |a: Activation| format!("{a:?}");
        return lacks("its MLPs have another activation", &name(activation), name(spec.activation));
    }
    let granite = architecture == GraniteMoe;
    let scales = [spec.residual_scale, spec.logits_divisor];
    if !granite && scales != [1.0, 1.0] {
        return lacks(
            "it does not scale what layers add, or logits",
            "1 and 1",
            format!("{scales:?}"),
        );
    }
    if granite && [spec.attention.scale, spec.embedding_scale, scales[0]].contains(&0.0) {
        return lacks("it takes a multiplier of 0 for 1", "other numbers", "0".into());
    }
    if architecture.is_gemma() {
        gemma(spec, architecture)?;
    } else if spec.final_softcap.is_some() {
        return lacks("it does not cap logits", "no cap", format!("{:?}", spec.final_softcap));
    }
    attention(spec, architecture, can)?;
    mlps(spec, architecture, can)
}

fn gemma(spec: &Spec, architecture: Architecture) -> Result<(), GgufError> {
    let lacks = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    let caps = (spec.attention.softcap, spec.final_softcap);
    match (architecture, caps) {
        (Gemma2, (Some(_), Some(_))) | (Gemma3, (None, _)) => {}
        (Gemma2, _) => {
            return lacks("it always caps scores and logits", "two caps", format!("{caps:?}"));
        }
        _ => return lacks("it does not cap scores", "no cap", format!("{caps:?}")),
    }
    if architecture == Gemma2 && !spec.tied {
        return lacks("it has no head of its own", "`tie_word_embeddings` true", "false".into());
    }
    let mut windows: Vec<usize> = spec.layers.iter().filter_map(|l| l.window).collect();
    windows.dedup();
    if windows.len() > 1 {
        return lacks(
            "it has one sliding window",
            "the same in all layers",
            format!("{windows:?}"),
        );
    }
    Ok(())
}

/// Layers by which llama.cpp tells the models that scale attention by `hidden / heads`.
const LARGE_GEMMAS: [(Architecture, usize); 2] = [(Gemma2, 46), (Gemma3, 62)];

fn attention(spec: &Spec, architecture: Architecture, can: Ability) -> Result<(), GgufError> {
    let lacks = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    let attention = &spec.attention;
    let dim = attention.qk_dim();
    if !can.any_head_size && dim * attention.heads != spec.hidden {
        return lacks(
            "its heads are `hidden_size / num_attention_heads` wide",
            &format!("head_dim {}", spec.hidden / attention.heads),
            dim.to_string(),
        );
    }
    if attention.softcap.is_some() && architecture != Gemma2 {
        return lacks("it does not cap scores", "no cap", format!("{:?}", attention.softcap));
    }
    let usual = match LARGE_GEMMAS.contains(&(architecture, spec.layers.len())) {
        true => spec.hidden / attention.heads,
        false => dim,
    };
    let usual = 1.0 / (usual as f32).sqrt();
    // With YaRN, DeepSeek 2 has its own; the keys for it are checked where they are made.
    let free = matches!(architecture, GraniteMoe | Deepseek2);
    if !free && (attention.scale / usual - 1.0).abs() > 1e-5 {
        return lacks(
            "it scales scores by the size of heads",
            &format!("{usual}"),
            attention.scale.to_string(),
        );
    }
    match attention.kind {
        AttentionKind::Projected { qk_norm, o_bias, clip, .. } => {
            if qk_norm != can.qk_norm {
                let name = |norm: QkNorm| format!("{norm:?}");
                return lacks(
                    "its queries and keys have another norm",
                    &name(can.qk_norm),
                    name(qk_norm),
                );
            }
            if o_bias && !can.output_bias {
                return lacks(
                    "its attention has no bias on the output",
                    "no bias",
                    "a bias".into(),
                );
            }
            if architecture == Olmoe && attention.kv_heads != attention.heads {
                let expected = format!("{} key-value heads", attention.heads);
                return lacks(
                    "it has as many key-value heads as heads",
                    &expected,
                    attention.kv_heads.to_string(),
                );
            }
            match clip {
                Some(clip) => lacks(
                    "it does not clamp queries, keys and values",
                    "no `clip_qkv`",
                    clip.to_string(),
                ),
                None => Ok(()),
            }
        }
        AttentionKind::Latent { bias: true, .. } => {
            lacks("its latent attention has no biases", "no bias", "biases".into())
        }
        AttentionKind::Latent { .. } => Ok(()),
    }
}

fn mlps(spec: &Spec, architecture: Architecture, can: Ability) -> Result<(), GgufError> {
    let lacks = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    let sparse: Vec<usize> = spec.moe_layers().map(|(layer, _)| layer).collect();
    let all = spec.layers.len();
    let as_it_has = match can.layers {
        Layers::Dense => sparse.is_empty(),
        Layers::Either => sparse.is_empty() || sparse.len() == all,
        Layers::Sparse => sparse.len() == all,
        Layers::FromOneOn => sparse.first().is_some_and(|first| first + sparse.len() == all),
    };
    if !as_it_has {
        let expected = match can.layers {
            Layers::Dense => "no experts",
            Layers::Either => "experts in all layers, or in none",
            Layers::Sparse => "experts in all layers",
            Layers::FromOneOn => "experts in all layers from one on",
        };
        return lacks(
            "it has experts in other layers",
            expected,
            format!("experts in layers {sparse:?} of {all}"),
        );
    }
    for layer in &spec.layers {
        match &layer.mlp {
            Mlp::Dense(mlp) if mlp.bias && !can.mlp_bias => {
                return lacks("its MLPs have no biases", "no bias", "biases".into());
            }
            Mlp::Dense(_) => {}
            Mlp::Moe(moe) => experts(spec, moe, architecture, can)?,
        }
    }
    Ok(())
}

/// Most experts that llama.cpp takes (`LLAMA_MAX_EXPERTS`).
const MOST_EXPERTS: usize = 512;

fn experts(
    spec: &Spec,
    moe: &MoeMlp,
    architecture: Architecture,
    can: Ability,
) -> Result<(), GgufError> {
    let lacks = |what: &str, expected: &str, found: String| {
        Err(lacking(spec, architecture, what, expected, &found))
    };
    if moe.experts > MOST_EXPERTS {
        return lacks(
            "it has fewer experts",
            &format!("at most {MOST_EXPERTS}"),
            moe.experts.to_string(),
        );
    }
    let router = &moe.router;
    // Where every token visits all experts, their scores sum to one by themselves.
    let is_same = router.top_k == moe.experts;
    if let Some(renormalises) = can.renormalises
        && renormalises != router.renormalise
        && !is_same
    {
        return Err(renormalisation(spec, architecture, renormalises));
    }
    if router.score != Score::Softmax || router.groups.is_some() {
        return lacks(
            "it chooses experts in another way",
            "softmax over all experts",
            format!("{router:?}"),
        );
    }
    if router.scale != 1.0 && architecture != Deepseek2 {
        return lacks("it does not scale the weights of experts", "1", router.scale.to_string());
    }
    if moe.selection_bias.is_some() && architecture != Ernie4_5Moe {
        return lacks("its choice of experts has no bias", "no bias", "a bias".into());
    }
    let has = match &moe.shared {
        None => matches!(can.shared, Shared::Never | Shared::Optional),
        Some(shared) if shared.bias => false,
        Some(shared) if shared.gate.is_some() => can.shared == Shared::AlwaysGated,
        Some(_) => matches!(can.shared, Shared::Optional | Shared::Always),
    };
    if has {
        return Ok(());
    }
    let expected = match can.shared {
        Shared::Never => "none",
        Shared::Optional => "with or without, no gate, no bias",
        Shared::Always => "shared experts without gate or bias",
        Shared::AlwaysGated => "a shared expert with a gate, no bias",
    };
    lacks("it has other shared experts", expected, format!("{:?}", moe.shared))
}

fn renormalisation(spec: &Spec, architecture: Architecture, renormalises: bool) -> GgufError {
    let word = |divided: bool| match divided {
        true => "divided by their sum (`norm_topk_prob` true)",
        false => "taken as they are (`norm_topk_prob` false)",
    };
    let hint = match architecture {
        Qwen2Moe => {
            "give each token all experts (`experts_per_token`), or build the same experts with `architecture: \
             granitemoeshared` or `ernie4_5_moe`, whose shared experts have no gate, or `mixtral`"
        }
        _ => "run it with transformers or vLLM, which do as `config.json` says",
    };
    GgufError::Lacking {
        family: spec.family,
        architecture: architecture.name(),
        what: "it weights the experts of a token otherwise".into(),
        expected: format!("weights {}", word(renormalises)),
        found: format!("weights {}", word(!renormalises)),
        hint: Some(hint.into()),
    }
}
