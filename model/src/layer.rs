//! One layer: weights and the way through it.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::weight::RowSlice;
use moe_merge_kernels::{
    Activation, AttentionSpec, RopeSpec, RopeTable, Routing, activation, route,
};

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::lanes;
use crate::ops::{
    CachedAttention, Expert, Experts, FrozenLinear, Gate, RmsNorm, Rope, SelfAttention, to_vec,
};
use crate::spec::{AttentionKind, ExpertNames, LayerSpec, Mlp, MoeMlp, QkNorm, SharedExpert, Spec};
use crate::weights::Weights;

/// A layer whose weights are views.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    index: usize,
    spec: LayerSpec,
    input_norm: RmsNorm,
    /// Norm before the MLP.
    mlp_norm: RmsNorm,
    /// Norms of what attention and MLP add, where there are.
    after: Option<[RmsNorm; 2]>,
    attention: Projections,
    mlp: Feed,
}

#[derive(Debug, Clone)]
enum Projections {
    Plain {
        q: FrozenLinear,
        k: FrozenLinear,
        v: FrozenLinear,
        o: FrozenLinear,
        norms: Option<[RmsNorm; 2]>,
    },
    Latent {
        q: Queries,
        kv_a: FrozenLinear,
        kv_norm: RmsNorm,
        kv_b: FrozenLinear,
        o: FrozenLinear,
    },
}

#[derive(Debug, Clone)]
enum Queries {
    Whole(FrozenLinear),
    Latent { a: FrozenLinear, norm: RmsNorm, b: FrozenLinear },
}

#[derive(Debug, Clone)]
enum Feed {
    Dense(Expert),
    Moe(Box<Moe>),
}

#[derive(Debug, Clone)]
struct Moe {
    spec: MoeMlp,
    router: FrozenLinear,
    bias: Option<Arc<[f32]>>,
    experts: Vec<Expert>,
    /// Shared expert and its gate.
    shared: Option<(Expert, Option<FrozenLinear>)>,
}

/// Where the keys and values of a pass are.
pub(crate) enum Past<'a> {
    /// In a cache that holds so many tokens already.
    Cache(&'a mut LayerCache, usize),
    /// In a cache for each row: every row is the next token of a sequence of its own.
    Lanes(&'a mut [LayerCache], &'a [usize]),
    /// Nowhere: the pass holds whole sequences, in these rows.
    None(&'a [Range<usize>]),
}

/// What a pass through one layer leaves behind.
pub(crate) struct Passed {
    /// The stream after the layer, `[tokens, hidden]`.
    pub stream: Tensor,
    /// Output of the norm before the MLP.
    pub mlp_input: Tensor,
    /// Experts chosen, in a MoE layer.
    pub routing: Option<Routing>,
}

impl Layer {
    pub fn load(weights: &Weights, spec: &Spec, index: usize) -> Result<Self, ModelError> {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let norm = |name: &str| norm(weights, spec, &at(&format!("{name}.weight")));
        let (mlp_norm, after) = if spec.sandwich {
            let after = [norm("post_attention_layernorm")?, norm("post_feedforward_layernorm")?];
            (norm("pre_feedforward_layernorm")?, Some(after))
        } else {
            (norm("post_attention_layernorm")?, None)
        };
        let layer = &spec.layers[index];
        Ok(Self {
            index,
            spec: layer.clone(),
            input_norm: norm("input_layernorm")?,
            mlp_norm,
            after,
            attention: load_attention(weights, spec, &at("self_attn"))?,
            mlp: match &layer.mlp {
                Mlp::Dense(mlp) => Feed::Dense(gated(weights, &at("mlp"), mlp.fused, mlp.inter)?),
                Mlp::Moe(moe) => load_moe(weights, moe, &at(""), spec.hidden)?,
            },
        })
    }

    /// Its rotary frequencies.
    pub fn rope(&self) -> &RopeSpec {
        &self.spec.rope
    }

    /// Routed experts in it.
    pub fn experts(&self) -> usize {
        match &self.mlp {
            Feed::Dense(_) => 0,
            Feed::Moe(moe) => moe.experts.len(),
        }
    }

    /// Through the layer: attention, then the MLP, each added to the stream.
    ///
    /// * `x`: `[tokens, hidden]`; `table`: rotary table of the tokens' positions
    pub fn forward(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<Passed, ModelError> {
        let attended = self.attend(spec, &self.input_norm.forward(x)?, table, past)?;
        let x = add(spec, x, attended, self.after.as_ref().map(|a| &a[0]))?;
        let mlp_input = self.mlp_norm.forward(&x)?;
        let (fed, routing) = self.feed(spec.activation, &mlp_input)?;
        let stream = add(spec, &x, fed, self.after.as_ref().map(|a| &a[1]))?;
        Ok(Passed { stream, mlp_input, routing })
    }

    fn attend(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<Tensor, ModelError> {
        let a = &spec.attention;
        let (q, k, v, o) = match &self.attention {
            Projections::Plain { q, k, v, o, norms } => {
                let (mut q, mut k, mut v) = (q.forward(x)?, k.forward(x)?, v.forward(x)?);
                if let Some([q_norm, k_norm]) = norms {
                    (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                }
                if let AttentionKind::Projected { clip: Some(c), .. } = a.kind {
                    (q, k, v) = (q.clamp(-c, c)?, k.clamp(-c, c)?, v.clamp(-c, c)?);
                }
                let rope = |heads| Rope { table, heads, head_dim: a.qk_dim(), from: 0 };
                (q.apply_op1_no_bwd(&rope(a.heads))?, k.apply_op1_no_bwd(&rope(a.kv_heads))?, v, o)
            }
            Projections::Latent { o, .. } => {
                let (q, k, v) = self.latent(spec, x, table)?;
                (q, k, v, o)
            }
        };
        let kernel = AttentionSpec {
            heads: a.heads,
            kv_heads: a.kv_heads,
            qk_dim: a.qk_dim(),
            v_dim: a.v_dim(),
            scale: a.scale,
            softcap: a.softcap,
            window: self.spec.window,
        };
        let mixed = match past {
            Past::None(sequences) => {
                q.apply_op3_no_bwd(&k, &v, &SelfAttention { spec: kernel, sequences })?
            }
            Past::Lanes(caches, lens) => lanes::attend(caches, lens, [&q, &k, &v], &kernel)?,
            Past::Cache(cache, len) => {
                cache.put(len, &to_vec(&k)?, &to_vec(&v)?);
                let kv = cache.view(len + q.dim(0)?);
                q.apply_op1_no_bwd(&CachedAttention { spec: kernel, kv })?
            }
        };
        Ok(o.forward(&mixed)?)
    }

    /// Queries, keys and values through latents, expanded for every head.
    fn latent(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
    ) -> Result<(Tensor, Tensor, Tensor), ModelError> {
        let (
            Projections::Latent { q, kv_a, kv_norm, kv_b, .. },
            &AttentionKind::Latent { kv_rank, nope_dim, rope_dim, v_dim, .. },
        ) = (&self.attention, &spec.attention.kind)
        else {
            return Err(candle_core::Error::msg("attention has no latents").into());
        };
        let (tokens, heads) = (x.dim(0)?, spec.attention.heads);
        let q = match q {
            Queries::Whole(q) => q.forward(x)?,
            Queries::Latent { a, norm, b } => b.forward(&norm.forward(&a.forward(x)?)?)?,
        };
        let head_dim = nope_dim + rope_dim;
        let q = q.apply_op1_no_bwd(&Rope { table, heads, head_dim, from: nope_dim })?;
        let latent = kv_a.forward(x)?;
        let turned = latent
            .narrow(1, kv_rank, rope_dim)?
            .contiguous()?
            .apply_op1_no_bwd(&Rope { table, heads: 1, head_dim: rope_dim, from: 0 })?;
        let latent = kv_norm.forward(&latent.narrow(1, 0, kv_rank)?.contiguous()?)?;
        let kv = kv_b.forward(&latent)?.reshape((tokens, heads, nope_dim + v_dim))?;
        let turned =
            turned.reshape((tokens, 1, rope_dim))?.broadcast_as((tokens, heads, rope_dim))?;
        let k = Tensor::cat(&[&kv.narrow(2, 0, nope_dim)?, &turned], 2)?;
        let v = kv.narrow(2, nope_dim, v_dim)?.contiguous()?;
        Ok((q, k.reshape((tokens, heads * head_dim))?, v.reshape((tokens, heads * v_dim))?))
    }

    fn feed(
        &self,
        activation: Activation,
        x: &Tensor,
    ) -> Result<(Tensor, Option<Routing>), ModelError> {
        let moe = match &self.mlp {
            Feed::Dense(mlp) => return Ok((mlp_forward(mlp, activation, x)?, None)),
            Feed::Moe(moe) => moe,
        };
        let Moe { spec, router, bias, experts, shared } = &**moe;
        let tokens = x.dim(0)?;
        let logits = to_vec(&router.forward(x)?)?;
        let routing = route(&logits, tokens, spec.experts, bias.as_deref(), &spec.router)
            .map_err(|source| ModelError::Router { layer: self.index, source })?;
        let slots = (tokens, routing.top_k);
        let weights = Tensor::from_slice(&routing.weights, slots, &Device::Cpu)?;
        let op = Experts { ids: &routing.ids, experts, activation };
        let mut out = x.apply_op2_no_bwd(&weights, &op)?;
        if let Some((mlp, gate)) = shared {
            let mut y = mlp_forward(mlp, activation, x)?;
            if let Some(gate) = gate {
                let open: Vec<f32> =
                    to_vec(&gate.forward(x)?)?.into_iter().map(activation::sigmoid).collect();
                y = y.broadcast_mul(&Tensor::from_vec(open, (tokens, 1), &Device::Cpu)?)?;
            }
            out = (out + y)?;
        }
        Ok((out, Some(routing)))
    }
}

fn add(
    spec: &Spec,
    x: &Tensor,
    mut y: Tensor,
    norm: Option<&RmsNorm>,
) -> Result<Tensor, ModelError> {
    if let Some(norm) = norm {
        y = norm.forward(&y)?;
    }
    if spec.residual_scale != 1.0 {
        y = (y * spec.residual_scale as f64)?;
    }
    Ok((x + y)?)
}

fn mlp_forward(mlp: &Expert, activation: Activation, x: &Tensor) -> Result<Tensor, ModelError> {
    let (gate, up) = (mlp.gate.forward(x)?, mlp.up.forward(x)?);
    Ok(mlp.down.forward(&gate.apply_op2_no_bwd(&up, &Gate(activation))?)?)
}

/// The norm `name` of the spec's kind.
pub(crate) fn norm(weights: &Weights, spec: &Spec, name: &str) -> Result<RmsNorm, ModelError> {
    Ok(RmsNorm { weight: weights.vector(name)?, eps: spec.eps, offset: spec.norm_offset })
}

fn load_attention(weights: &Weights, spec: &Spec, at: &str) -> Result<Projections, ModelError> {
    let a = &spec.attention;
    let linear = |name: &str| weights.linear(&format!("{at}.{name}"));
    match a.kind {
        AttentionKind::Projected { head_dim, qk_norm, fused, .. } => {
            let (q_rows, kv_rows) = (a.heads * head_dim, a.kv_heads * head_dim);
            let [q, k, v] = if fused {
                weights.cut(&format!("{at}.qkv_proj"), [q_rows, kv_rows, kv_rows])?
            } else {
                [linear("q_proj")?, linear("k_proj")?, linear("v_proj")?]
            };
            let norms = match qk_norm {
                QkNorm::Absent => None,
                _ => Some([
                    norm(weights, spec, &format!("{at}.q_norm.weight"))?,
                    norm(weights, spec, &format!("{at}.k_norm.weight"))?,
                ]),
            };
            Ok(Projections::Plain { q, k, v, o: linear("o_proj")?, norms })
        }
        AttentionKind::Latent { q_rank, .. } => {
            // The reference gives these two norms its default, not the configuration's eps.
            let norm = |name: &str| -> Result<RmsNorm, ModelError> {
                let weight = weights.vector(&format!("{at}.{name}.weight"))?;
                Ok(RmsNorm { weight, eps: 1e-6, offset: 0.0 })
            };
            let q = match q_rank {
                None => Queries::Whole(linear("q_proj")?),
                Some(_) => Queries::Latent {
                    a: linear("q_a_proj")?,
                    norm: norm("q_a_layernorm")?,
                    b: linear("q_b_proj")?,
                },
            };
            Ok(Projections::Latent {
                q,
                kv_a: linear("kv_a_proj_with_mqa")?,
                kv_norm: norm("kv_a_layernorm")?,
                kv_b: linear("kv_b_proj")?,
                o: linear("o_proj")?,
            })
        }
    }
}

fn gated(weights: &Weights, at: &str, fused: bool, inter: usize) -> Result<Expert, ModelError> {
    let linear = |name: &str| weights.linear(&format!("{at}.{name}"));
    let [gate, up] = if fused {
        weights.cut(&format!("{at}.gate_up_proj"), [inter, inter])?
    } else {
        [linear("gate_proj")?, linear("up_proj")?]
    };
    Ok(Expert { gate, up, down: linear("down_proj")? })
}

/// `at` is the layer's prefix, dot included.
fn load_moe(weights: &Weights, moe: &MoeMlp, at: &str, hidden: usize) -> Result<Feed, ModelError> {
    let plain = |name: &str| -> Result<FrozenLinear, ModelError> {
        Ok(FrozenLinear::new(weights.get(&format!("{at}{name}"))?, None))
    };
    let experts = if moe.names == ExpertNames::Granite {
        stacked_experts(weights, moe, at, hidden)?
    } else {
        (0..moe.experts)
            .filter_map(|e| moe.names.expert(e))
            .map(|[gate, up, down]| {
                Ok(Expert { gate: plain(&gate)?, up: plain(&up)?, down: plain(&down)? })
            })
            .collect::<Result<_, ModelError>>()?
    };
    let bias = moe.selection_bias.map(|name| weights.vector(&format!("{at}{name}"))).transpose()?;
    let shared = moe.shared.as_ref().map(|s| load_shared(weights, s, at)).transpose()?;
    let router = plain(moe.names.router())?;
    Ok(Feed::Moe(Box::new(Moe { spec: moe.clone(), router, bias, experts, shared })))
}

/// Experts that are slices of two stacked tensors.
fn stacked_experts(
    weights: &Weights,
    moe: &MoeMlp,
    at: &str,
    hidden: usize,
) -> Result<Vec<Expert>, ModelError> {
    let input = weights.get(&format!("{at}block_sparse_moe.input_linear.weight"))?;
    let output = weights.get(&format!("{at}block_sparse_moe.output_linear.weight"))?;
    let slice = |from: &moe_merge_checkpoint::WeightRef, part: usize, rows: usize| {
        let rows = part * rows..(part + 1) * rows;
        FrozenLinear::new(Arc::new(RowSlice::new(from.clone(), rows)), None)
    };
    Ok((0..moe.experts)
        .map(|e| Expert {
            gate: slice(&input, 2 * e, moe.inter),
            up: slice(&input, 2 * e + 1, moe.inter),
            down: slice(&output, e, hidden),
        })
        .collect())
}

fn load_shared(
    weights: &Weights,
    shared: &SharedExpert,
    at: &str,
) -> Result<(Expert, Option<FrozenLinear>), ModelError> {
    let module = format!("{at}{}", shared.module);
    let mlp = if shared.fused {
        let [gate, up] =
            weights.cut(&format!("{module}.input_linear"), [shared.inter, shared.inter])?;
        Expert { gate, up, down: weights.linear(&format!("{module}.output_linear"))? }
    } else {
        gated(weights, &module, false, shared.inter)?
    };
    let gate = shared.gate.map(|g| weights.linear(&format!("{at}{g}"))).transpose()?;
    Ok((mlp, gate))
}
