//! One layer: weights and the way through it.

mod adapted;
mod sites;
mod surgery;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::weight::RowSlice;
use moe_merge_kernels::cuda::{Block, CudaError, CudaMoe};
use moe_merge_kernels::{
    Accuracy, Activation, AttentionSpec, Batching, Exec, KernelError, RopeSpec, RopeTable,
    RouterSpec, Routing, route, route_always,
};

use crate::cache::LayerCache;
use crate::error::ModelError;
use crate::lanes;
use crate::ops::{
    CachedAttention, Clamp, Expert, Experts, FrozenLinear, Gate, Open, Residual, RmsNorm, Rope,
    RouterLogits, SelfAttention, SlotWeights, apply1, apply2, to_vec,
};
use crate::placement::Placement;
use crate::spec::{AttentionKind, ExpertNames, LayerSpec, Mlp, MoeMlp, QkNorm, SharedExpert, Spec};
use crate::weights::Weights;

pub(crate) use adapted::Adapted;
pub(crate) use sites::names as site_names;

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
    exec: Exec,
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

impl Projections {
    fn linears(&mut self) -> impl Iterator<Item = &mut FrozenLinear> {
        let layers = match self {
            Projections::Plain { q, k, v, o, .. } => vec![q, k, v, o],
            Projections::Latent { q, kv_a, kv_b, o, .. } => {
                let mut layers = vec![kv_a, kv_b, o];
                match q {
                    Queries::Whole(q) => layers.push(q),
                    Queries::Latent { a, b, .. } => layers.extend([a, b]),
                }
                layers
            }
        };
        layers.into_iter()
    }

    fn place(&mut self, placement: &Placement) -> Result<(), ModelError> {
        self.linears().try_for_each(|l| l.place(placement))
    }
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
    experts: Arc<[Expert]>,
    /// Shared expert and its gate.
    shared: Option<(Expert, Option<FrozenLinear>)>,
    /// The routed experts on a device, if they are placed there.
    placed: Option<Arc<CudaMoe>>,
}

/// Where the keys and values of a pass are.
pub(crate) enum Past<'a> {
    /// In a cache that holds so many tokens already.
    Cache(&'a mut LayerCache, usize),
    /// In a cache for each row: every row is the next token of a sequence of its own.
    Lanes(Vec<&'a mut LayerCache>, &'a [usize]),
    /// Nowhere: the pass holds whole sequences, in these rows.
    None(&'a [Range<usize>]),
}

/// Who chooses the experts in a MoE layer.
#[derive(Clone, Copy)]
pub(crate) enum Gating<'a> {
    /// The layer's own router.
    Stored,
    /// The layer's own router, which chooses this expert for every token.
    Always(usize),
    /// Another router.
    Weights(OtherRouter<'a>),
    /// Nobody: every token has its expert, with the weight that a router gives to an expert it is certain of.
    Forced(&'a [u32]),
    /// Nobody: every token has its experts and their weights.
    Given(&'a Routing),
}

/// A router in the place of a layer's own.
#[derive(Clone, Copy)]
pub(crate) struct OtherRouter<'a> {
    /// `[experts, hidden]`; gradients flow to it if it is a variable.
    pub weights: &'a Tensor,
    /// Experts per token.
    pub top_k: usize,
    /// Output of the routed experts for the same input and weights, where an earlier pass has computed it.
    pub known: Option<&'a Tensor>,
}

/// What a pass through one layer leaves behind.
pub(crate) struct Passed {
    /// The stream after the layer, `[tokens, hidden]`.
    pub stream: Tensor,
    /// Output of the norm before the MLP.
    pub mlp_input: Tensor,
    /// Experts chosen, in a MoE layer.
    pub routing: Option<Routing>,
    /// Logits they were chosen by, `[tokens, experts]`; none where nobody chose.
    pub logits: Option<Tensor>,
    /// Output of the routed experts, `[tokens, hidden]`, before shared ones are added.
    pub routed: Option<Tensor>,
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
            exec: weights.exec,
        })
    }

    /// As [`Layer::load`], with its products where `placement` says.
    pub fn load_on(
        weights: &Weights,
        spec: &Spec,
        index: usize,
        placement: &Placement,
    ) -> Result<Self, ModelError> {
        let mut layer = Self::load(weights, spec, index)?;
        layer.place(placement)?;
        Ok(layer)
    }

    /// Puts its products where `placement` says. A router stays with its experts.
    pub fn place(&mut self, placement: &Placement) -> Result<(), ModelError> {
        if placement.device_name().is_none() {
            return Ok(());
        }
        self.attention.place(placement)?;
        match &mut self.mlp {
            Feed::Dense(mlp) => mlp.place(placement),
            Feed::Moe(moe) => {
                if let Some((mlp, gate)) = &mut moe.shared {
                    mlp.place(placement)?;
                    gate.iter_mut().try_for_each(|g| g.place(placement))?;
                }
                if placement.experts_on_cpu(self.index) {
                    return Ok(());
                }
                moe.router.place(placement)?;
                let views: Vec<_> =
                    moe.experts.iter().map(Expert::view).collect::<candle_core::Result<_>>()?;
                let accuracy =
                    moe.experts.first().map_or_else(Accuracy::default, |e| e.gate.accuracy());
                moe.placed = placement.experts(self.index, &views, accuracy)?;
                Ok(())
            }
        }
    }

    /// Its number.
    pub fn index(&self) -> usize {
        self.index
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

    /// Which kernels the tokens of a pass go through from now on.
    pub fn set_batching(&mut self, batching: Batching) {
        self.exec.batching = batching;
        self.attention.linears().for_each(|l| l.exec.batching = batching);
        match &mut self.mlp {
            Feed::Dense(mlp) => mlp.set_batching(batching),
            Feed::Moe(moe) => {
                moe.router.exec.batching = batching;
                let mut experts = moe.experts.to_vec();
                experts.iter_mut().for_each(|e| e.set_batching(batching));
                moe.experts = experts.into();
                if let Some((mlp, gate)) = &mut moe.shared {
                    mlp.set_batching(batching);
                    gate.iter_mut().for_each(|g| g.exec.batching = batching);
                }
            }
        }
    }

    /// Lets every token visit `top_k` experts, in a MoE layer.
    pub fn set_top_k(&mut self, top_k: usize) {
        if let Feed::Moe(moe) = &mut self.mlp {
            moe.spec.router.top_k = top_k;
        }
    }

    /// Rounds in routing as transformers does when it runs the family in bf16, in a MoE layer.
    pub fn round_router_like_hf(&mut self) {
        if let Feed::Moe(moe) = &mut self.mlp {
            moe.spec.router.precision = moe.spec.reference_precision;
        }
    }

    /// Rule and weights `[experts, hidden]` of its router, in a MoE layer.
    pub fn router(&self) -> Option<(&MoeMlp, &FrozenLinear)> {
        match &self.mlp {
            Feed::Dense(_) => None,
            Feed::Moe(moe) => Some((&moe.spec, &moe.router)),
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
        self.forward_gated(spec, x, table, past, Gating::Stored)
    }

    /// As [`Layer::forward`], with a say in who chooses the experts. If `x` or the gates are variables, gradients flow to
    /// them.
    pub fn forward_gated(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
        gating: Gating<'_>,
    ) -> Result<Passed, ModelError> {
        let (x, mlp_input) = self.attended(spec, x, table, past)?;
        self.fed(spec, &x, mlp_input, gating)
    }

    /// The first half of the way: the stream after attention, and the MLP's input.
    pub fn attended(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<(Tensor, Tensor), ModelError> {
        let attended = self.attend(spec, &self.input_norm.forward(x)?, table, past)?;
        let x = add(spec, x, attended, self.after.as_ref().map(|a| &a[0]))?;
        let mlp_input = self.mlp_norm.forward(&x)?;
        Ok((x, mlp_input))
    }

    /// The second half, from what [`Layer::attended`] gave.
    pub fn fed(
        &self,
        spec: &Spec,
        x: &Tensor,
        mlp_input: Tensor,
        gating: Gating<'_>,
    ) -> Result<Passed, ModelError> {
        let Fed { out, routing, logits, routed } =
            self.feed(spec.activation, &mlp_input, gating)?;
        let stream = add(spec, x, out, self.after.as_ref().map(|a| &a[1]))?;
        Ok(Passed { stream, mlp_input, routing, logits, routed })
    }

    /// What every routed expert makes of `mlp_input`: one `[tokens, hidden]` each, none in a dense layer.
    pub fn expert_outputs(
        &self,
        activation: Activation,
        mlp_input: &Tensor,
    ) -> Result<Vec<Tensor>, ModelError> {
        match &self.mlp {
            Feed::Dense(_) => Ok(Vec::new()),
            Feed::Moe(moe) => {
                moe.experts.iter().map(|e| mlp_forward(e, activation, mlp_input)).collect()
            }
        }
    }

    fn attend(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<Tensor, ModelError> {
        let (Projections::Plain { o, .. } | Projections::Latent { o, .. }) = &self.attention;
        Ok(o.forward(&self.mixed(spec, x, table, past)?)?)
    }

    /// The values of all heads, mixed by attention: the input of the output projection.
    fn mixed(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<Tensor, ModelError> {
        let a = &spec.attention;
        let (q, k, v) = match &self.attention {
            Projections::Plain { q, k, v, norms, .. } => {
                let (mut q, mut k, mut v) = (q.forward(x)?, k.forward(x)?, v.forward(x)?);
                if let Some([q_norm, k_norm]) = norms {
                    (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                }
                if let AttentionKind::Projected { clip: Some(c), .. } = a.kind {
                    (q, k, v) =
                        (apply1(&q, Clamp(c))?, apply1(&k, Clamp(c))?, apply1(&v, Clamp(c))?);
                }
                let rope =
                    |heads| Rope { table: table.clone(), heads, head_dim: a.qk_dim(), from: 0 };
                (apply1(&q, rope(a.heads))?, apply1(&k, rope(a.kv_heads))?, v)
            }
            Projections::Latent { .. } => self.latent(spec, x, table)?,
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
        Ok(match past {
            Past::None(sequences) => {
                SelfAttention { spec: kernel, exec: self.exec, sequences: sequences.into() }
                    .forward(&q, &k, &v)?
            }
            Past::Cache(..) if q.track_op() => {
                return Err(candle_core::Error::msg("attention to a cache has no gradient").into());
            }
            Past::Lanes(mut caches, lens) => {
                lanes::attend(&mut caches, lens, [&q, &k, &v], &kernel, &self.exec)?
            }
            Past::Cache(cache, len) => {
                cache.put(len, &to_vec(&k)?, &to_vec(&v)?);
                let count = len + q.dim(0)?;
                let (spec, exec) = (kernel, self.exec);
                q.apply_op1_no_bwd(&CachedAttention { spec, exec, cache: &*cache, count })?
            }
        })
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
        let q = apply1(&q, Rope { table: table.clone(), heads, head_dim, from: nope_dim })?;
        let latent = kv_a.forward(x)?;
        let turned = apply1(
            &latent.narrow(1, kv_rank, rope_dim)?.contiguous()?,
            Rope { table: table.clone(), heads: 1, head_dim: rope_dim, from: 0 },
        )?;
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
        gating: Gating<'_>,
    ) -> Result<Fed, ModelError> {
        let moe = match &self.mlp {
            Feed::Dense(mlp) => {
                let out = mlp_forward(mlp, activation, x)?;
                return Ok(Fed { out, routing: None, logits: None, routed: None });
            }
            Feed::Moe(moe) => moe,
        };
        let Moe { spec, router, .. } = &**moe;
        if let (Gating::Stored, false) = (gating, x.track_op())
            && let Some((routing, logits, routed)) = self.block(moe, activation, x)?
        {
            let out = add_shared(routed.clone(), moe, activation, x)?;
            let logits = Some(logits);
            return Ok(Fed { out, routing: Some(routing), logits, routed: Some(routed) });
        }
        let (routing, weights, logits) = match gating {
            Gating::Stored => self.routed(moe, router.forward(x)?, spec.router, None)?,
            Gating::Always(e) => self.routed(moe, router.forward(x)?, spec.router, Some(e))?,
            Gating::Weights(OtherRouter { weights, top_k, .. }) => {
                let rule = RouterSpec { top_k, ..spec.router };
                self.routed(moe, apply2(x, weights, RouterLogits)?, rule, None)?
            }
            Gating::Forced(ids) => forced(ids, spec.router.scale)?,
            Gating::Given(routing) => given(routing.clone())?,
        };
        let known = match gating {
            Gating::Weights(other) => other.known.cloned(),
            _ => None,
        };
        let (experts, placed) = (moe.experts.clone(), moe.placed.clone());
        let op = Experts { routing: routing.clone(), experts, activation, known, placed };
        let routed = apply2(x, &weights, op)?;
        let out = add_shared(routed.clone(), moe, activation, x)?;
        let routing = Some(Arc::unwrap_or_clone(routing));
        Ok(Fed { out, routing, logits, routed: Some(routed) })
    }

    /// Router, choice and experts on the device that holds them, if one does: routing, logits, output.
    fn block(
        &self,
        moe: &Moe,
        activation: Activation,
        x: &Tensor,
    ) -> Result<Option<(Routing, Tensor, Tensor)>, ModelError> {
        let (Some(placed), Some(router)) = (&moe.placed, moe.router.placed()) else {
            return Ok(None);
        };
        let rule = &moe.spec.router;
        if !placed.can_route(rule) || moe.router.exec.batching != Batching::Fastest {
            return Ok(None);
        }
        let values = to_vec(x)?;
        let mut out = vec![0.0; values.len()];
        let bias = moe.bias.as_deref();
        let found = placed.block(&values, router, bias, rule, activation, &mut out);
        let Block { routing, logits } = found.map_err(|e| match e {
            CudaError::Kernel(source @ KernelError::NotFinite { .. }) => {
                ModelError::Router { layer: self.index, source }
            }
            e => e.into(),
        })?;
        let shape = (routing.tokens, moe.experts.len());
        let logits = Tensor::from_vec(logits, shape, &Device::Cpu)?;
        let out = Tensor::from_vec(out, x.shape(), &Device::Cpu)?;
        Ok(Some((routing, logits, out)))
    }

    /// The experts that `logits` choose, one of them `always`, and the weights through which gradients reach the logits.
    fn routed(
        &self,
        moe: &Moe,
        logits: Tensor,
        rule: RouterSpec,
        always: Option<usize>,
    ) -> Result<Choice, ModelError> {
        let (tokens, experts) = logits.dims2()?;
        let (values, bias) = (to_vec(&logits)?, moe.bias.as_deref());
        let routing = match always {
            None => route(&values, tokens, experts, bias, &rule),
            Some(expert) => route_always(&values, tokens, experts, bias, &rule, expert),
        };
        let routing = routing.map_err(|source| ModelError::Router { layer: self.index, source })?;
        let routing = Arc::new(routing);
        let weights = apply1(&logits, SlotWeights { routing: routing.clone(), spec: rule })?;
        Ok((routing, weights, Some(logits)))
    }
}

/// Routing, its weights `[tokens, top_k]`, the logits it was chosen by.
type Choice = (Arc<Routing>, Tensor, Option<Tensor>);

/// What the MLP of a layer gives.
struct Fed {
    out: Tensor,
    routing: Option<Routing>,
    logits: Option<Tensor>,
    routed: Option<Tensor>,
}

/// One expert per token, given from outside.
fn forced(ids: &[u32], weight: f32) -> Result<Choice, ModelError> {
    let weights = vec![weight; ids.len()];
    given(Routing { tokens: ids.len(), top_k: 1, ids: ids.to_vec(), weights })
}

fn given(routing: Routing) -> Result<Choice, ModelError> {
    let slots = (routing.tokens, routing.top_k);
    let weights = Tensor::from_slice(&routing.weights, slots, &Device::Cpu)?;
    Ok((Arc::new(routing), weights, None))
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
    Ok(apply2(x, &y, Residual { scale: spec.residual_scale })?)
}

/// Adds what the shared expert, if there is one, makes of `x`.
fn add_shared(
    out: Tensor,
    moe: &Moe,
    activation: Activation,
    x: &Tensor,
) -> Result<Tensor, ModelError> {
    let Some((mlp, gate)) = &moe.shared else { return Ok(out) };
    let mut y = mlp_forward(mlp, activation, x)?;
    if let Some(gate) = gate {
        y = apply2(&y, &gate.forward(x)?, Open)?;
    }
    Ok(apply2(&out, &y, Residual { scale: 1.0 })?)
}

fn mlp_forward(mlp: &Expert, activation: Activation, x: &Tensor) -> Result<Tensor, ModelError> {
    let (gate, up) = (mlp.gate.forward(x)?, mlp.up.forward(x)?);
    Ok(mlp.down.forward(&apply2(&gate, &up, Gate(activation))?)?)
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
        Ok(weights.frozen(weights.get(&format!("{at}{name}"))?, None))
    };
    let experts: Vec<Expert> = if moe.names == ExpertNames::Granite {
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
    // Which experts a token visits must not hang on how its activations are rounded.
    let router = plain(moe.names.router())?.exact();
    let experts = experts.into();
    let (spec, placed) = (moe.clone(), None);
    Ok(Feed::Moe(Box::new(Moe { spec, router, bias, experts, shared, placed })))
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
        weights.frozen(Arc::new(RowSlice::new(from.clone(), rows)), None)
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
