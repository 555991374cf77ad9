//! One layer: weights and the way through it.

mod apart;
mod back;
mod load;
mod sites;
mod surgery;
mod trail;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
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
    RouterLogits, SelfAttention, to_vec,
};
use crate::placement::Placement;
use crate::spec::{AttentionKind, LayerSpec, Mlp, MoeMlp, Spec};
use crate::weights::Weights;

use load::{gated, load_attention, load_moe};

pub(crate) use back::Wanted;
pub(crate) use load::norm;
pub(crate) use sites::names as site_names;
pub(crate) use surgery::Choice;
use trail::AttentionTrail;
pub(crate) use trail::{Changes, Keeper, Kept, Trail};

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

    /// The projection back to the stream.
    fn output(&self) -> &FrozenLinear {
        match self {
            Projections::Plain { o, .. } | Projections::Latent { o, .. } => o,
        }
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

impl Moe {
    /// The rule by which experts are chosen.
    fn rule(&self, gating: Gating<'_>) -> RouterSpec {
        match gating {
            Gating::Weights(other) => RouterSpec { top_k: other.top_k, ..self.spec.router },
            _ => self.spec.router,
        }
    }
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
    /// `[experts, hidden]`.
    pub weights: &'a Tensor,
    /// Experts per token.
    pub top_k: usize,
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

    /// As [`Layer::forward`], with a say in who chooses the experts.
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
        let (trail, mlp_input) = self.attended_trail(spec, x, table, past)?;
        Ok((trail.after, mlp_input))
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
        let stream = add(spec, x, &out, self.after.as_ref().map(|a| &a[1]))?;
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
    ) -> Result<(Tensor, AttentionTrail), ModelError> {
        let trail = self.mixed(spec, x, table, past)?;
        Ok((self.attention.output().forward(&trail.mixed)?, trail))
    }

    /// Attention up to its output projection.
    fn mixed(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<AttentionTrail, ModelError> {
        let a = &spec.attention;
        let (mut raw, mut latents) = (None, [None, None]);
        let (q, k, v) = match &self.attention {
            Projections::Plain { q, k, v, norms, .. } => {
                let (mut q, mut k, mut v) = (q.forward(x)?, k.forward(x)?, v.forward(x)?);
                let clip = self.clip(spec);
                raw =
                    (norms.is_some() || clip.is_some()).then(|| [q.clone(), k.clone(), v.clone()]);
                if let Some([q_norm, k_norm]) = norms {
                    (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                }
                if let Some(clip) = clip {
                    let clipped = |x: &Tensor| x.apply_op1_no_bwd(&clip);
                    (q, k, v) = (clipped(&q)?, clipped(&k)?, clipped(&v)?);
                }
                let rope =
                    |heads| Rope { table: table.clone(), heads, head_dim: a.qk_dim(), from: 0 };
                let q = q.apply_op1_no_bwd(&rope(a.heads))?;
                (q, k.apply_op1_no_bwd(&rope(a.kv_heads))?, v)
            }
            Projections::Latent { .. } => {
                let ([q, k, v], found) = self.latent(spec, x, table)?;
                latents = found;
                (q, k, v)
            }
        };
        let mixed = match past {
            Past::None(sequences) => self.self_attention(spec, sequences).forward(&q, &k, &v)?,
            Past::Lanes(mut caches, lens) => {
                let kernel = self.attention_spec(spec);
                lanes::attend(&mut caches, lens, [&q, &k, &v], &kernel, &self.exec)?
            }
            Past::Cache(cache, len) => {
                cache.put(len, &to_vec(&k)?, &to_vec(&v)?);
                let count = len + q.dim(0)?;
                let (spec, exec) = (self.attention_spec(spec), self.exec);
                q.apply_op1_no_bwd(&CachedAttention { spec, exec, cache: &*cache, count })?
            }
        };
        Ok(AttentionTrail { raw, latents, q, k, v, mixed })
    }

    /// What queries, keys and values are limited to.
    fn clip(&self, spec: &Spec) -> Option<Clamp> {
        match spec.attention.kind {
            AttentionKind::Projected { clip, .. } => clip.map(Clamp),
            AttentionKind::Latent { .. } => None,
        }
    }

    fn attention_spec(&self, spec: &Spec) -> AttentionSpec {
        let a = &spec.attention;
        AttentionSpec {
            heads: a.heads,
            kv_heads: a.kv_heads,
            qk_dim: a.qk_dim(),
            v_dim: a.v_dim(),
            scale: a.scale,
            softcap: a.softcap,
            window: self.spec.window,
        }
    }

    fn self_attention(&self, spec: &Spec, sequences: &[Range<usize>]) -> SelfAttention {
        let spec = self.attention_spec(spec);
        SelfAttention { spec, exec: self.exec, sequences: sequences.into() }
    }

    /// Queries, keys and values through latents, expanded for every head; and the latents before their norms.
    fn latent(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
    ) -> Result<([Tensor; 3], [Option<Tensor>; 2]), ModelError> {
        let (
            Projections::Latent { q, kv_a, kv_norm, kv_b, .. },
            &AttentionKind::Latent { kv_rank, nope_dim, rope_dim, v_dim, .. },
        ) = (&self.attention, &spec.attention.kind)
        else {
            return Err(candle_core::Error::msg("attention has no latents").into());
        };
        let (tokens, heads) = (x.dim(0)?, spec.attention.heads);
        let (q, q_latent) = match q {
            Queries::Whole(q) => (q.forward(x)?, None),
            Queries::Latent { a, norm, b } => {
                let latent = a.forward(x)?;
                (b.forward(&norm.forward(&latent)?)?, Some(latent))
            }
        };
        let head_dim = nope_dim + rope_dim;
        let rope = Rope { table: table.clone(), heads, head_dim, from: nope_dim };
        let q = q.apply_op1_no_bwd(&rope)?;
        let both = kv_a.forward(x)?;
        let rope = Rope { table: table.clone(), heads: 1, head_dim: rope_dim, from: 0 };
        let turned = both.narrow(1, kv_rank, rope_dim)?.contiguous()?.apply_op1_no_bwd(&rope)?;
        let latent = both.narrow(1, 0, kv_rank)?.contiguous()?;
        let kv = kv_b.forward(&kv_norm.forward(&latent)?)?;
        let kv = kv.reshape((tokens, heads, nope_dim + v_dim))?;
        let turned =
            turned.reshape((tokens, 1, rope_dim))?.broadcast_as((tokens, heads, rope_dim))?;
        let k = Tensor::cat(&[&kv.narrow(2, 0, nope_dim)?, &turned], 2)?;
        let v = kv.narrow(2, nope_dim, v_dim)?.contiguous()?;
        let (k, v) = (k.reshape((tokens, heads * head_dim))?, v.reshape((tokens, heads * v_dim))?);
        Ok(([q, k, v], [q_latent, Some(latent)]))
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
        if let Gating::Stored = gating
            && let Some((routing, logits, routed)) = self.block(moe, activation, x)?
        {
            let out = add_shared(routed.clone(), moe, activation, x)?;
            let logits = Some(logits);
            return Ok(Fed { out, routing: Some(routing), logits, routed: Some(routed) });
        }
        let (routing, logits) = self.choice(moe, x, gating)?;
        let (experts, placed) = (moe.experts.clone(), moe.placed.clone());
        let op = Experts { routing: routing.clone(), experts, activation, placed };
        let routed = x.apply_op1_no_bwd(&op)?;
        let out = add_shared(routed.clone(), moe, activation, x)?;
        let routing = Some(Arc::unwrap_or_clone(routing));
        Ok(Fed { out, routing, logits, routed: Some(routed) })
    }

    /// The experts of every token, and the logits they were chosen by.
    fn choice(
        &self,
        moe: &Moe,
        x: &Tensor,
        gating: Gating<'_>,
    ) -> Result<(Arc<Routing>, Option<Tensor>), ModelError> {
        let logits = match gating {
            Gating::Stored | Gating::Always(_) => moe.router.forward(x)?,
            Gating::Weights(other) => x.apply_op2_no_bwd(other.weights, &RouterLogits)?,
            Gating::Forced(ids) => {
                let weights = vec![moe.spec.router.scale; ids.len()];
                let routing = Routing { tokens: ids.len(), top_k: 1, ids: ids.to_vec(), weights };
                return Ok((Arc::new(routing), None));
            }
            Gating::Given(routing) => return Ok((Arc::new(routing.clone()), None)),
        };
        let (tokens, experts) = logits.dims2()?;
        let (values, bias) = (to_vec(&logits)?, moe.bias.as_deref());
        let rule = moe.rule(gating);
        let routing = match gating {
            Gating::Always(expert) => route_always(&values, tokens, experts, bias, &rule, expert),
            _ => route(&values, tokens, experts, bias, &rule),
        };
        let routing = routing.map_err(|source| ModelError::Router { layer: self.index, source })?;
        Ok((Arc::new(routing), Some(logits)))
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
}

/// What the MLP of a layer gives.
struct Fed {
    out: Tensor,
    routing: Option<Routing>,
    logits: Option<Tensor>,
    routed: Option<Tensor>,
}

fn add(spec: &Spec, x: &Tensor, y: &Tensor, norm: Option<&RmsNorm>) -> Result<Tensor, ModelError> {
    let scale = Residual { scale: spec.residual_scale };
    Ok(match norm {
        Some(norm) => x.apply_op2_no_bwd(&norm.forward(y)?, &scale)?,
        None => x.apply_op2_no_bwd(y, &scale)?,
    })
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
        y = y.apply_op2_no_bwd(&gate.forward(x)?, &Open)?;
    }
    Ok(out.apply_op2_no_bwd(&y, &Residual { scale: 1.0 })?)
}

fn mlp_forward(mlp: &Expert, activation: Activation, x: &Tensor) -> Result<Tensor, ModelError> {
    let (gate, up) = (mlp.gate.forward(x)?, mlp.up.forward(x)?);
    Ok(mlp.down.forward(&gate.apply_op2_no_bwd(&up, &Gate(activation))?)?)
}
