//! What a model is made of, without its family: sizes, norms, attention and MLP of each layer, names of tensors.

use moe_merge_kernels::{Activation, Precision, RopeSpec, RouterSpec};

/// A model, as its family reads it from a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// Added to the mean square in every norm but the latent ones.
    pub eps: f32,
    /// Added to the weights of norms: 1 for Gemma, 0 elsewhere.
    pub norm_offset: f32,
    /// Norms after attention and MLP too (Gemma 2 and 3).
    pub sandwich: bool,
    /// Factor on the embeddings.
    pub embedding_scale: f32,
    /// Factor on what attention and MLP add to the stream (Granite); 1 elsewhere.
    pub residual_scale: f32,
    /// Divisor of the logits (Granite); 1 elsewhere.
    pub logits_divisor: f32,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// `logit = cap * tanh(logit / cap)`.
    pub final_softcap: Option<f32>,
    /// Function of all gated MLPs.
    pub activation: Activation,
    /// What attention layers have in common.
    pub attention: Attention,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// Attention, the same in every layer but for window and rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Softcap of the scores.
    pub softcap: Option<f32>,
    /// How queries, keys and values are made.
    pub kind: AttentionKind,
}

/// How queries, keys and values are made from the stream.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionKind {
    /// One projection each.
    Projected {
        /// Dimensions of a head.
        head_dim: usize,
        /// Norm of queries and keys before rotation.
        qk_norm: QkNorm,
        /// Biases on q, k and v.
        qkv_bias: bool,
        /// Bias on o.
        o_bias: bool,
        /// q, k and v stored as one tensor `qkv_proj` (Phi 3).
        fused: bool,
        /// q, k and v clamped to `-clip..=clip` (OLMoE).
        clip: Option<f32>,
    },
    /// Through low-rank latents (DeepSeek 2).
    Latent {
        /// Rank of the query latent; none if queries have one projection.
        q_rank: Option<usize>,
        /// Rank of the key-value latent.
        kv_rank: usize,
        /// Dimensions of a key head without rotation.
        nope_dim: usize,
        /// Dimensions with rotation; shared by all heads on the key side.
        rope_dim: usize,
        /// Dimensions of a value head.
        v_dim: usize,
        /// Biases on the projections into latents and on o.
        bias: bool,
    },
}

/// Norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Absent,
    /// Each head on its own, weights `[head_dim]`.
    PerHead,
    /// All heads together, weights `[heads * head_dim]`.
    Full,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Sliding window, if attention has one here.
    pub window: Option<usize>,
    /// Rotary frequencies.
    pub rope: RopeSpec,
    /// The MLP.
    pub mlp: Mlp,
}

/// The MLP of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Mlp {
    /// One gated MLP for all tokens.
    Dense(DenseMlp),
    /// Routed experts.
    Moe(MoeMlp),
}

/// One gated MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseMlp {
    /// Its width.
    pub inter: usize,
    /// Biases on all three projections.
    pub bias: bool,
    /// Gate and up stored as one tensor.
    pub fused: bool,
}

/// Routed experts, and shared ones where there are.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeMlp {
    /// Experts there are.
    pub experts: usize,
    /// Width of an expert.
    pub inter: usize,
    /// Who chooses, and how.
    pub router: RouterSpec,
    /// What transformers 5 rounds in routing when it runs the family in bf16.
    pub reference_precision: Precision,
    /// Name of a tensor `[1, experts]` that is added to scores for the choice only.
    pub selection_bias: Option<&'static str>,
    /// How tensors are named.
    pub names: ExpertNames,
    /// Experts that every token visits.
    pub shared: Option<SharedExpert>,
}

/// An MLP that every token visits beside its routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExpert {
    /// Name of its module, below the layer: `mlp.shared_expert`.
    pub module: &'static str,
    /// Its width.
    pub inter: usize,
    /// Name of the gate `[1, hidden]` whose logistic function scales its output.
    pub gate: Option<&'static str>,
    /// Biases on all three projections.
    pub bias: bool,
    /// Stored as `input_linear` (gate above up) and `output_linear` (Granite).
    pub fused: bool,
}

/// How routed experts are named on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertNames {
    /// `block_sparse_moe.gate`, `block_sparse_moe.experts.E.{w1,w3,w2}`.
    Mixtral,
    /// `mlp.gate`, `mlp.experts.E.{gate,up,down}_proj`.
    Qwen,
    /// `block_sparse_moe.router.layer`, `block_sparse_moe.{input,output}_linear` with all experts in one tensor.
    Granite,
}

impl ExpertNames {
    /// Name of the router's weight, below the layer.
    pub fn router(self) -> &'static str {
        match self {
            Self::Mixtral => "block_sparse_moe.gate.weight",
            Self::Qwen => "mlp.gate.weight",
            Self::Granite => "block_sparse_moe.router.layer.weight",
        }
    }

    /// Names of gate, up and down of `expert`, below the layer; none where all experts are one tensor.
    pub fn expert(self, expert: usize) -> Option<[String; 3]> {
        match self {
            Self::Mixtral => Some(
                ["w1", "w3", "w2"].map(|w| format!("block_sparse_moe.experts.{expert}.{w}.weight")),
            ),
            Self::Qwen => Some(
                ["gate_proj", "up_proj", "down_proj"]
                    .map(|w| format!("mlp.experts.{expert}.{w}.weight")),
            ),
            Self::Granite => None,
        }
    }
}

impl Attention {
    /// Dimensions of a query or key head.
    pub fn qk_dim(&self) -> usize {
        match self.kind {
            AttentionKind::Projected { head_dim, .. } => head_dim,
            AttentionKind::Latent { nope_dim, rope_dim, .. } => nope_dim + rope_dim,
        }
    }

    /// Dimensions of a value head.
    pub fn v_dim(&self) -> usize {
        match self.kind {
            AttentionKind::Projected { head_dim, .. } => head_dim,
            AttentionKind::Latent { v_dim, .. } => v_dim,
        }
    }
}

/// A tensor name with its shape.
pub type NamedShape = (String, Vec<usize>);

impl Spec {
    /// Layers with routed experts, by number.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeMlp)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| match &layer.mlp {
            Mlp::Moe(moe) => Some((l, moe)),
            Mlp::Dense(_) => None,
        })
    }

    /// What comes after the head's product: division and soft cap, where the family has them.
    pub(crate) fn finish_logits(&self, logits: &mut [f32]) {
        if self.logits_divisor != 1.0 {
            logits.iter_mut().for_each(|l| *l /= self.logits_divisor);
        }
        if let Some(cap) = self.final_softcap {
            logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
        }
    }

    /// Every tensor that must be there, in the order of the model, under its name on the Hub.
    ///
    /// The head of a tied model is not among them: see [`Spec::optional_tensors`].
    pub fn expected_tensors(&self) -> Vec<NamedShape> {
        let mut list =
            vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers.len() {
            list.extend(self.layer_tensors(layer));
        }
        list.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            list.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        list
    }

    /// Tensors that may be there without being used: the head of a tied model.
    pub fn optional_tensors(&self) -> Vec<NamedShape> {
        if !self.tied {
            return Vec::new();
        }
        vec![("lm_head.weight".to_owned(), vec![self.vocab, self.hidden])]
    }

    /// The tensors of one layer.
    pub fn layer_tensors(&self, layer: usize) -> Vec<NamedShape> {
        let mut list: Vec<(String, Vec<usize>)> = Vec::new();
        let mut add = |name: &str, shape: &[usize]| {
            list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        let h = self.hidden;
        add("input_layernorm.weight", &[h]);
        self.attention_tensors(&mut add);
        add("post_attention_layernorm.weight", &[h]);
        if self.sandwich {
            add("pre_feedforward_layernorm.weight", &[h]);
            add("post_feedforward_layernorm.weight", &[h]);
        }
        match &self.layers[layer].mlp {
            Mlp::Dense(mlp) => dense_tensors("mlp", mlp, h, &mut add),
            Mlp::Moe(moe) => moe_tensors(moe, h, &mut add),
        }
        list
    }

    fn attention_tensors(&self, add: &mut impl FnMut(&str, &[usize])) {
        let (h, a) = (self.hidden, &self.attention);
        let (q, kv) = (a.heads * a.qk_dim(), a.kv_heads * a.qk_dim());
        let mut linear = |name: &str, rows: usize, cols: usize, bias: bool| {
            add(&format!("self_attn.{name}.weight"), &[rows, cols]);
            if bias {
                add(&format!("self_attn.{name}.bias"), &[rows]);
            }
        };
        match a.kind {
            AttentionKind::Projected { head_dim, qk_norm, qkv_bias, o_bias, fused, .. } => {
                if fused {
                    linear("qkv_proj", q + 2 * kv, h, qkv_bias);
                } else {
                    linear("q_proj", q, h, qkv_bias);
                    linear("k_proj", kv, h, qkv_bias);
                    linear("v_proj", kv, h, qkv_bias);
                }
                linear("o_proj", h, q, o_bias);
                let widths = match qk_norm {
                    QkNorm::Absent => return,
                    QkNorm::PerHead => [head_dim; 2],
                    QkNorm::Full => [q, kv],
                };
                add("self_attn.q_norm.weight", &widths[..1]);
                add("self_attn.k_norm.weight", &widths[1..]);
            }
            AttentionKind::Latent { q_rank, kv_rank, nope_dim, rope_dim, v_dim, bias } => {
                match q_rank {
                    None => linear("q_proj", q, h, false),
                    Some(rank) => {
                        linear("q_a_proj", rank, h, bias);
                        linear("q_b_proj", q, rank, false);
                    }
                }
                linear("kv_a_proj_with_mqa", kv_rank + rope_dim, h, bias);
                linear("kv_b_proj", a.heads * (nope_dim + v_dim), kv_rank, false);
                linear("o_proj", h, a.heads * v_dim, bias);
                if let Some(rank) = q_rank {
                    add("self_attn.q_a_layernorm.weight", &[rank]);
                }
                add("self_attn.kv_a_layernorm.weight", &[kv_rank]);
            }
        }
    }
}

fn dense_tensors(module: &str, mlp: &DenseMlp, h: usize, add: &mut impl FnMut(&str, &[usize])) {
    let mut linear = |name: &str, rows: usize, cols: usize| {
        add(&format!("{module}.{name}.weight"), &[rows, cols]);
        if mlp.bias {
            add(&format!("{module}.{name}.bias"), &[rows]);
        }
    };
    if mlp.fused {
        linear("gate_up_proj", 2 * mlp.inter, h);
    } else {
        linear("gate_proj", mlp.inter, h);
        linear("up_proj", mlp.inter, h);
    }
    linear("down_proj", h, mlp.inter);
}

fn moe_tensors(moe: &MoeMlp, h: usize, add: &mut impl FnMut(&str, &[usize])) {
    add(moe.names.router(), &[moe.experts, h]);
    if let Some(bias) = moe.selection_bias {
        add(bias, &[1, moe.experts]);
    }
    for expert in 0..moe.experts {
        if let Some([gate, up, down]) = moe.names.expert(expert) {
            add(&gate, &[moe.inter, h]);
            add(&up, &[moe.inter, h]);
            add(&down, &[h, moe.inter]);
        }
    }
    if moe.names == ExpertNames::Granite {
        add("block_sparse_moe.input_linear.weight", &[moe.experts, 2 * moe.inter, h]);
        add("block_sparse_moe.output_linear.weight", &[moe.experts, h, moe.inter]);
    }
    if let Some(shared) = &moe.shared {
        if shared.fused {
            add(&format!("{}.input_linear.weight", shared.module), &[2 * shared.inter, h]);
            add(&format!("{}.output_linear.weight", shared.module), &[h, shared.inter]);
        } else {
            let mlp = DenseMlp { inter: shared.inter, bias: shared.bias, fused: false };
            dense_tensors(shared.module, &mlp, h, add);
        }
        if let Some(gate) = shared.gate {
            add(&format!("{gate}.weight"), &[1, h]);
        }
    }
}
