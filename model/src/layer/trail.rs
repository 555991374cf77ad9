//! A pass of whole sequences through a layer that leaves what the way back needs.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use moe_merge_kernels::{
    Activation, ExpertLora, LoraPair, MoeBlock, MoeInner, RopeTable, Routing, lora_add,
};

use super::apart::{Apart, Own};
use super::{Fed, Feed, Gating, Layer, Moe, Passed, Past, add};
use crate::error::ModelError;
use crate::ops::{Expert, Experts, FrozenLinear, Gate, Open, Residual, numbers, to_vec};
use crate::spec::Spec;

/// How a layer in a training pass differs from the stored one.
#[derive(Clone, Copy)]
pub(crate) struct Changes<'a> {
    /// Who chooses the experts.
    pub gating: Gating<'a>,
    /// Factors beside the MLP of one expert; in a dense layer the number of their expert says nothing.
    pub lora: Option<ExpertLora<'a>>,
}

/// What a pass through a layer leaves for the way back.
pub(crate) struct Trail {
    pub(super) attended: AttendedTrail,
    pub(super) feed: FeedTrail,
    /// What the MLP gave, where a norm stands behind it.
    pub(super) fed: Option<Tensor>,
}

/// Of the first half of a layer; all `[tokens, _]`.
pub(crate) struct AttendedTrail {
    /// The stream that came in.
    pub x: Tensor,
    pub attention: AttentionTrail,
    /// What attention gave, where a norm stands behind it.
    pub attended: Option<Tensor>,
    /// The stream after attention.
    pub after: Tensor,
}

/// Of attention.
pub(crate) struct AttentionTrail {
    /// Queries, keys and values before the norms of heads and the clip, where there are some.
    pub raw: Option<[Tensor; 3]>,
    /// Latents of queries, and of keys and values, before their norms, where there are some.
    pub latents: [Option<Tensor>; 2],
    /// Queries, keys and values as they meet, and what that gives.
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub mixed: Tensor,
}

/// Of the MLP.
pub(super) enum FeedTrail {
    Dense(MlpTrail),
    Moe(Box<MoeTrail>),
}

/// Outputs of gate and up.
pub(super) struct MlpTrail {
    pub gate: Tensor,
    pub up: Tensor,
}

pub(super) struct MoeTrail {
    pub routing: Arc<Routing>,
    /// None where nobody chose.
    pub logits: Option<Tensor>,
    pub inside: Inside,
    pub shared: Option<SharedTrail>,
}

/// What lies inside the routed experts.
pub(super) enum Inside {
    Kept(MoeInner),
    /// The experts are on a device, which computes them again; but for the one that has factors.
    OnDevice(Option<Own>),
}

pub(super) struct SharedTrail {
    pub mlp: MlpTrail,
    /// Its output and the logit of its gate, if it has one.
    pub gated: Option<[Tensor; 2]>,
}

impl Trail {
    /// The logits that experts were chosen by, and the choice.
    pub fn choice(&self) -> Option<(&Tensor, &Routing)> {
        match &self.feed {
            FeedTrail::Moe(moe) => Some((moe.logits.as_ref()?, &moe.routing)),
            FeedTrail::Dense(_) => None,
        }
    }

    /// Memory that it takes, in bytes.
    fn bytes(&self) -> usize {
        let AttendedTrail { x, attention, attended, after } = &self.attended;
        let AttentionTrail { raw, latents, q, k, v, mixed } = attention;
        let tensors = [x, after, q, k, v, mixed].into_iter();
        let tensors = tensors.chain(attended).chain(&self.fed).chain(raw.iter().flatten());
        let mut tensors: Vec<&Tensor> = tensors.chain(latents.iter().flatten()).collect();
        let mut inner = 0;
        match &self.feed {
            FeedTrail::Dense(mlp) => tensors.extend([&mlp.gate, &mlp.up]),
            FeedTrail::Moe(moe) => {
                inner = match &moe.inside {
                    Inside::Kept(inner) | Inside::OnDevice(Some(Own { inner, .. })) => {
                        inner.bytes()
                    }
                    Inside::OnDevice(None) => 0,
                };
                if let Some(shared) = &moe.shared {
                    tensors.extend([&shared.mlp.gate, &shared.mlp.up]);
                    tensors.extend(shared.gated.iter().flatten());
                }
            }
        }
        inner + tensors.iter().map(|t| t.elem_count() * size_of::<f32>()).sum::<usize>()
    }
}

/// Decides which layers are kept whole for the way back, and which are computed again (gradient checkpointing).
///
/// # Source
/// Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keeper {
    /// Bytes that may still be kept.
    left: usize,
}

impl Default for Keeper {
    /// All of 30 layers of a mixture of small models for 512 tokens; a layer of a large one.
    fn default() -> Self {
        Self::of(576 << 20)
    }
}

/// What is kept of a layer.
pub(crate) enum Kept {
    /// All.
    Trail(Box<Trail>),
    /// The stream that came in, and what its routed experts gave: the dearest thing to compute again.
    Input(Tensor, Option<Tensor>),
}

impl Keeper {
    /// Keeps at most `left` bytes beside the inputs.
    pub fn of(left: usize) -> Self {
        Self { left }
    }

    pub fn keep(&mut self, trail: Trail, routed: &Option<Tensor>) -> Kept {
        let bytes = trail.bytes();
        if bytes > self.left {
            return Kept::Input(trail.attended.x, routed.clone());
        }
        self.left -= bytes;
        Kept::Trail(Box::new(trail))
    }
}

impl Layer {
    /// As [`Layer::forward_gated`] over whole sequences.
    ///
    /// * `known`: what the routed experts give, where an earlier pass has computed it
    pub fn forward_trail(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        sequences: &[Range<usize>],
        changes: &Changes<'_>,
        known: Option<&Tensor>,
    ) -> Result<(Passed, Trail), ModelError> {
        let (attended, mlp_input) = self.attended_trail(spec, x, table, Past::None(sequences))?;
        let (fed, feed) = self.feed_trail(spec.activation, &mlp_input, changes, known)?;
        let Fed { out, routing, logits, routed } = fed;
        let norm = self.after.as_ref().map(|a| &a[1]);
        let stream = add(spec, &attended.after, &out, norm)?;
        let fed = norm.is_some().then_some(out);
        Ok((Passed { stream, mlp_input, routing, logits, routed }, Trail { attended, feed, fed }))
    }

    /// The first half, and the MLP's input.
    pub fn attended_trail(
        &self,
        spec: &Spec,
        x: &Tensor,
        table: &RopeTable,
        past: Past<'_>,
    ) -> Result<(AttendedTrail, Tensor), ModelError> {
        let (attended, attention) = self.attend(spec, &self.input_norm.forward(x)?, table, past)?;
        let norm = self.after.as_ref().map(|a| &a[0]);
        let after = add(spec, x, &attended, norm)?;
        let mlp_input = self.mlp_norm.forward(&after)?;
        let attended = norm.is_some().then_some(attended);
        Ok((AttendedTrail { x: x.clone(), attention, attended, after }, mlp_input))
    }

    fn feed_trail(
        &self,
        activation: Activation,
        x: &Tensor,
        changes: &Changes<'_>,
        known: Option<&Tensor>,
    ) -> Result<(Fed, FeedTrail), ModelError> {
        let moe = match &self.mlp {
            Feed::Dense(mlp) => {
                let (out, trail) = mlp_trail(mlp, activation, x, changes.lora.as_ref())?;
                let fed = Fed { out, routing: None, logits: None, routed: None };
                return Ok((fed, FeedTrail::Dense(trail)));
            }
            Feed::Moe(moe) => moe,
        };
        let (routing, logits) = self.choice(moe, x, changes.gating)?;
        let (inside, routed) = moe.routed(activation, x, &routing, changes, known)?;
        let (out, shared) = match moe.shared_trail(activation, x)? {
            Some((y, shared)) => {
                (routed.apply_op2_no_bwd(&y, &Residual { scale: 1.0 })?, Some(shared))
            }
            None => (routed.clone(), None),
        };
        let trail = MoeTrail { routing: routing.clone(), logits: logits.clone(), inside, shared };
        let routing = Some(Routing::clone(&routing));
        Ok((Fed { out, routing, logits, routed: Some(routed) }, FeedTrail::Moe(Box::new(trail))))
    }

    /// What the shared expert, if there is one, leaves for the way back.
    pub(super) fn shared_trail(
        &self,
        activation: Activation,
        x: &Tensor,
    ) -> Result<Option<SharedTrail>, ModelError> {
        match &self.mlp {
            Feed::Dense(_) => Ok(None),
            Feed::Moe(moe) => Ok(moe.shared_trail(activation, x)?.map(|(_, trail)| trail)),
        }
    }
}

impl Moe {
    /// Output of the routed experts `[tokens, hidden]`, and what lies inside them.
    fn routed(
        &self,
        activation: Activation,
        x: &Tensor,
        routing: &Arc<Routing>,
        changes: &Changes<'_>,
        known: Option<&Tensor>,
    ) -> Result<(Inside, Tensor), ModelError> {
        if let (Some(placed), Some(lora)) = (&self.placed, changes.lora) {
            let (values, apart) =
                (numbers(x)?, Apart { moe: self, placed, routing, activation, lora });
            let mut out = known.is_none().then(|| vec![0.0; values.len()]);
            let own = apart.forward(&values, out.as_deref_mut())?;
            let routed = match (known, out) {
                (Some(known), _) => known.clone(),
                (None, out) => Tensor::from_vec(out.unwrap_or_default(), x.shape(), &Device::Cpu)?,
            };
            return Ok((Inside::OnDevice(Some(own)), routed));
        }
        if self.placed.is_some() {
            if let Some(known) = known {
                return Ok((Inside::OnDevice(None), known.clone()));
            }
            let (experts, placed) = (self.experts.clone(), self.placed.clone());
            let op = Experts { routing: routing.clone(), experts, activation, placed };
            return Ok((Inside::OnDevice(None), x.apply_op1_no_bwd(&op)?));
        }
        let (values, experts) = (numbers(x)?, self.views()?);
        let (exec, lora) = (self.exec(), changes.lora);
        let block =
            MoeBlock { x: &values, routing, experts: &experts, activation, lora, exec: &exec };
        let inner = block.inner()?;
        let routed = match known {
            Some(known) => known.clone(),
            None => {
                let mut out = vec![0.0; values.len()];
                block.forward(&inner, &mut out)?;
                Tensor::from_vec(out, x.shape(), &Device::Cpu)?
            }
        };
        Ok((Inside::Kept(inner), routed))
    }

    fn shared_trail(
        &self,
        activation: Activation,
        x: &Tensor,
    ) -> Result<Option<(Tensor, SharedTrail)>, ModelError> {
        let Some((mlp, gate)) = &self.shared else { return Ok(None) };
        let (y, mlp) = mlp_trail(mlp, activation, x, None)?;
        let Some(gate) = gate else {
            return Ok(Some((y, SharedTrail { mlp, gated: None })));
        };
        let logit = gate.forward(x)?;
        let open = y.apply_op2_no_bwd(&logit, &Open)?;
        Ok(Some((open, SharedTrail { mlp, gated: Some([y, logit]) })))
    }
}

impl Layer {
    /// `f(gate x) up x` of an expert, or of the MLP where there are none: `[rows, inter]` of `x [rows, hidden]`.
    pub fn inside(
        &self,
        expert: usize,
        activation: Activation,
        x: &Tensor,
    ) -> Result<Tensor, ModelError> {
        let mlp = match &self.mlp {
            Feed::Dense(mlp) => mlp,
            Feed::Moe(moe) => &moe.experts[expert],
        };
        let (gate, up) = (linear(&mlp.gate, x, None)?, linear(&mlp.up, x, None)?);
        Ok(gate.apply_op2_no_bwd(&up, &Gate(activation))?)
    }
}

fn mlp_trail(
    mlp: &Expert,
    activation: Activation,
    x: &Tensor,
    lora: Option<&ExpertLora<'_>>,
) -> Result<(Tensor, MlpTrail), ModelError> {
    let gate = linear(&mlp.gate, x, lora.and_then(|l| l.gate))?;
    let up = linear(&mlp.up, x, lora.and_then(|l| l.up))?;
    let h = gate.apply_op2_no_bwd(&up, &Gate(activation))?;
    let out = linear(&mlp.down, &h, lora.and_then(|l| l.down))?;
    Ok((out, MlpTrail { gate, up }))
}

fn linear(
    layer: &FrozenLinear,
    x: &Tensor,
    pair: Option<LoraPair<'_>>,
) -> Result<Tensor, ModelError> {
    let Some(pair) = pair else { return Ok(layer.forward(x)?) };
    let w = layer.view()?;
    let mut out = to_vec(&layer.forward(x)?)?;
    lora_add(&numbers(x)?, [w.rows(), w.cols()], &pair, &mut out, &layer.exec)?;
    Ok(Tensor::from_vec(out, (x.dim(0)?, w.rows()), &Device::Cpu)?)
}
