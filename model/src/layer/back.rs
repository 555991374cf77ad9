//! The way back through a layer, from what a pass left.

use std::ops::Range;

use candle_core::Tensor;
use moe_merge_kernels::dense::Into;
use moe_merge_kernels::{
    Activation, Exec, ExpertLora, ExpertView, LoraGradients, LoraPair, MoeBlock, MoeGradients,
    RopeTable, lora_backward, route_backward,
};

use super::apart::Apart;
use super::trail::{
    AttendedTrail, AttentionTrail, Changes, FeedTrail, Inside, MlpTrail, MoeTrail, SharedTrail,
    Trail,
};
use super::{Feed, Gating, Layer, Moe, Projections, Queries};
use crate::error::ModelError;
use crate::ops::{Expert, FrozenLinear, Open, RmsNorm, RouterLogits, numbers, to_vec};
use crate::spec::{AttentionKind, Spec};

/// Of what, beside the factors, a gradient is wanted, and what else reaches the logits of the router.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wanted<'a> {
    /// The layer's input.
    pub input: bool,
    /// The other router.
    pub router: bool,
    /// Gradient of the logits from elsewhere, `[tokens, experts]`.
    pub d_logits: Option<&'a [f32]>,
}

/// Gradients of a layer.
#[derive(Default)]
pub(crate) struct LayerGradients {
    /// Of its input, `[tokens, hidden]`.
    pub input: Option<Vec<f32>>,
    /// Of the other router, `[experts, hidden]`.
    pub router: Option<Vec<f32>>,
    /// Of the factors beside gate, up and down.
    pub factors: [Option<LoraGradients>; 3],
}

impl Layer {
    /// Back through the layer: `d` is the gradient of the stream that [`Layer::forward_trail`] gave, `[tokens, hidden]`; all
    /// else as there.
    pub fn backward(
        &self,
        spec: &Spec,
        trail: Trail,
        (table, sequences): (&RopeTable, &[Range<usize>]),
        changes: &Changes<'_>,
        wanted: Wanted<'_>,
        mut d: Vec<f32>,
    ) -> Result<LayerGradients, ModelError> {
        let Trail { attended, feed, fed } = trail;
        let d_fed = self.before_added(spec, 1, fed.as_ref(), &d)?;
        let d_fed = d_fed.as_deref().unwrap_or(&d);
        let mlp_input = self.mlp_norm.forward(&attended.after)?;
        let mut d_input = wanted.input.then(|| vec![0.0; d.len()]);
        let activation = spec.activation;
        let mut found = LayerGradients::default();
        match (&self.mlp, feed) {
            (Feed::Dense(mlp), FeedTrail::Dense(trail)) => {
                let (d_x, lora) = (d_input.as_deref_mut(), changes.lora.as_ref());
                let x = numbers(&mlp_input)?;
                found.factors = mlp_back(mlp, activation, trail, &x, lora, d_fed, d_x)?;
            }
            (Feed::Moe(moe), FeedTrail::Moe(trail)) => {
                let d_x = d_input.as_deref_mut();
                let x = numbers(&mlp_input)?;
                found = moe.back(activation, *trail, &x, changes, wanted, d_fed, d_x)?;
            }
            _ => return Err(candle_core::Error::msg("a trail of another kind of layer").into()),
        }
        if let Some(d_input) = d_input {
            self.attended_back(spec, &attended, (table, sequences), &d_input, &mut d)?;
            found.input = Some(d);
        }
        Ok(found)
    }

    /// Back through the first half: `d_input` is the gradient of the MLP's input, `d` that of the stream after attention, and
    /// becomes that of the layer's input.
    pub fn attended_back(
        &self,
        spec: &Spec,
        trail: &AttendedTrail,
        (table, sequences): (&RopeTable, &[Range<usize>]),
        d_input: &[f32],
        d: &mut [f32],
    ) -> Result<(), ModelError> {
        self.mlp_norm.back(&trail.after, d_input, d, Into::Add)?;
        let d_attended = self.before_added(spec, 0, trail.attended.as_ref(), d)?;
        let d_attended = d_attended.as_deref().unwrap_or(d);
        let d_normed = self.attend_back(spec, &trail.attention, table, sequences, d_attended)?;
        self.input_norm.back(&trail.x, &d_normed, d, Into::Add)?;
        Ok(())
    }

    /// The gradient of what is added to the stream, from that of the stream; none where it is the same.
    fn before_added(
        &self,
        spec: &Spec,
        half: usize,
        added: Option<&Tensor>,
        d: &[f32],
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let scale = spec.residual_scale;
        let scaled = (scale != 1.0).then(|| d.iter().map(|d| d * scale).collect::<Vec<f32>>());
        let (Some(norms), Some(added)) = (&self.after, added) else { return Ok(scaled) };
        Ok(Some(norms[half].back_new(added, scaled.as_deref().unwrap_or(d))?))
    }

    /// Back through attention: the gradient of what the norm before it gave.
    fn attend_back(
        &self,
        spec: &Spec,
        trail: &AttentionTrail,
        table: &RopeTable,
        sequences: &[Range<usize>],
        d: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let a = &spec.attention;
        let AttentionTrail { raw, latents, q, k, v, mixed } = trail;
        let d_mixed = self.attention.output().back_new(d)?;
        let attention = self.self_attention(spec, sequences);
        let [mut d_q, mut d_k, mut d_v] = attention.back([q, k, v], mixed, &d_mixed)?;
        match &self.attention {
            Projections::Plain { q: wq, k: wk, v: wv, norms, .. } => {
                table.apply_backward(&mut d_q, a.heads, a.qk_dim(), 0)?;
                table.apply_backward(&mut d_k, a.kv_heads, a.qk_dim(), 0)?;
                if let Some([q, k, v]) = raw {
                    let [q_norm, k_norm] =
                        norms.as_ref().map_or([None, None], |[q, k]| [Some(q), Some(k)]);
                    if let Some(clip) = self.clip(spec) {
                        clip.back(&normed(q_norm, q)?, &mut d_q)?;
                        clip.back(&normed(k_norm, k)?, &mut d_k)?;
                        clip.back(v, &mut d_v)?;
                    }
                    if let (Some(q_norm), Some(k_norm)) = (q_norm, k_norm) {
                        (d_q, d_k) = (q_norm.back_new(q, &d_q)?, k_norm.back_new(k, &d_k)?);
                    }
                }
                let mut d_x = wq.back_new(&d_q)?;
                wk.back(&d_k, &mut d_x, Into::Add)?;
                wv.back(&d_v, &mut d_x, Into::Add)?;
                Ok(d_x)
            }
            Projections::Latent { q: wq, kv_a, kv_norm, kv_b, .. } => {
                let [q_latent, Some(latent)] = latents else {
                    return Err(candle_core::Error::msg("attention left no latents").into());
                };
                let (d_kv, mut d_turned) = split_keys(spec, &d_k, &d_v)?;
                let tokens = q.dim(0)?;
                let rope_dim = d_turned.len() / tokens.max(1);
                table.apply_backward(&mut d_q, a.heads, a.qk_dim(), a.qk_dim() - rope_dim)?;
                table.apply_backward(&mut d_turned, 1, rope_dim, 0)?;
                let d_latent = kv_norm.back_new(latent, &kv_b.back_new(&d_kv)?)?;
                let d_both = side_by_side(tokens, &d_latent, &d_turned);
                let mut d_x = match (wq, q_latent) {
                    (Queries::Latent { a, norm, b }, Some(latent)) => {
                        a.back_new(&norm.back_new(latent, &b.back_new(&d_q)?)?)?
                    }
                    (Queries::Whole(q), _) => q.back_new(&d_q)?,
                    (Queries::Latent { .. }, None) => {
                        return Err(candle_core::Error::msg("queries left no latent").into());
                    }
                };
                kv_a.back(&d_both, &mut d_x, Into::Add)?;
                Ok(d_x)
            }
        }
    }

    /// Adds to `d_x` what reaches the MLP's input `x` through the shared expert, from the gradient `d` of the stream.
    pub(super) fn shared_back(
        &self,
        spec: &Spec,
        trail: Option<SharedTrail>,
        x: &Tensor,
        d: &[f32],
        d_x: &mut [f32],
    ) -> Result<(), ModelError> {
        let (Feed::Moe(moe), Some(trail)) = (&self.mlp, trail) else { return Ok(()) };
        let d: Vec<f32> = d.iter().map(|d| d * spec.residual_scale).collect();
        moe.shared_back(spec.activation, trail, &numbers(x)?, &d, d_x)
    }
}

fn normed(norm: Option<&RmsNorm>, x: &Tensor) -> Result<Tensor, ModelError> {
    Ok(norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))?)
}

/// From the gradients of keys and values of every head to those of what was expanded, `[tokens, heads * (nope + v)]`, and of the
/// part that turns, which all heads share, `[tokens, rope]`.
fn split_keys(spec: &Spec, d_k: &[f32], d_v: &[f32]) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
    let AttentionKind::Latent { nope_dim, rope_dim, v_dim, .. } = spec.attention.kind else {
        return Err(candle_core::Error::msg("attention has no latents").into());
    };
    let heads = spec.attention.heads;
    let mut d_kv = Vec::with_capacity(d_k.len() / (nope_dim + rope_dim) * (nope_dim + v_dim));
    let mut d_turned = Vec::with_capacity(d_k.len() / (nope_dim + rope_dim) / heads * rope_dim);
    let tokens = d_k.chunks_exact(heads * (nope_dim + rope_dim));
    for (d_k, d_v) in tokens.zip(d_v.chunks_exact(heads * v_dim)) {
        let mut sum = vec![0.0; rope_dim];
        for (d_k, d_v) in d_k.chunks_exact(nope_dim + rope_dim).zip(d_v.chunks_exact(v_dim)) {
            d_kv.extend_from_slice(&d_k[..nope_dim]);
            d_kv.extend_from_slice(d_v);
            sum.iter_mut().zip(&d_k[nope_dim..]).for_each(|(sum, d)| *sum += d);
        }
        d_turned.extend(sum);
    }
    Ok((d_kv, d_turned))
}

/// Rows of `a` and `b` beside each other.
fn side_by_side(rows: usize, a: &[f32], b: &[f32]) -> Vec<f32> {
    let (a_width, b_width) = (a.len() / rows.max(1), b.len() / rows.max(1));
    let mut both = Vec::with_capacity(a.len() + b.len());
    for row in 0..rows {
        both.extend_from_slice(&a[row * a_width..(row + 1) * a_width]);
        both.extend_from_slice(&b[row * b_width..(row + 1) * b_width]);
    }
    both
}

impl Moe {
    /// Back through router, routed experts and shared one; what reaches `x` is put into `d_x`.
    #[expect(clippy::too_many_arguments, reason = "what a layer needs on the way back")]
    fn back(
        &self,
        activation: Activation,
        trail: MoeTrail,
        x: &[f32],
        changes: &Changes<'_>,
        wanted: Wanted<'_>,
        d: &[f32],
        mut d_x: Option<&mut [f32]>,
    ) -> Result<LayerGradients, ModelError> {
        let lost = || candle_core::Error::msg("experts left nothing");
        let MoeTrail { routing, logits, inside, shared } = trail;
        let (weights, factors) = match (inside, &self.placed) {
            (Inside::Kept(inner), _) => {
                let (experts, exec, lora) = (self.views()?, self.exec(), changes.lora);
                let (routing, experts, exec) = (&*routing, &experts[..], &exec);
                let block = MoeBlock { x, routing, experts, activation, lora, exec };
                let MoeGradients { weights, gate, up, down } =
                    block.backward(inner, d, d_x.as_deref_mut())?;
                (weights, [gate, up, down])
            }
            (Inside::OnDevice(Some(own)), Some(placed)) => {
                let Some(lora) = changes.lora else { return Err(lost().into()) };
                let apart = Apart { moe: self, placed, routing: &routing, activation, lora };
                let MoeGradients { weights, gate, up, down } =
                    apart.backward(own, x, d, d_x.as_deref_mut())?;
                (weights, [gate, up, down])
            }
            (Inside::OnDevice(None), Some(placed)) => {
                let weights = placed.backward(x, &routing, activation, d, d_x.as_deref_mut())?;
                (weights, [None, None, None])
            }
            (Inside::OnDevice(_), None) => return Err(lost().into()),
        };
        let mut found = LayerGradients { factors, ..LayerGradients::default() };
        if let (Some(logits), true) = (&logits, wanted.router || d_x.is_some()) {
            let mut d_logits = vec![0.0; logits.elem_count()];
            let rule = self.rule(changes.gating);
            let experts = logits.dim(1)?;
            let values = numbers(logits)?;
            route_backward(&values, experts, &routing, &weights, &rule, &mut d_logits)?;
            for (d, more) in d_logits.iter_mut().zip(wanted.d_logits.unwrap_or_default()) {
                *d += more;
            }
            match (changes.gating, &mut d_x) {
                (Gating::Weights(other), d_x) => {
                    let (w, d_x) = (other.weights, d_x.as_deref_mut());
                    found.router = RouterLogits.back(x, w, &d_logits, d_x, wanted.router)?;
                }
                (_, Some(d_x)) => self.router.back(&d_logits, d_x, Into::Add)?,
                (_, None) => {}
            }
        }
        if let (Some(shared), Some(d_x)) = (shared, d_x) {
            self.shared_back(activation, shared, x, d, d_x)?;
        }
        Ok(found)
    }

    fn shared_back(
        &self,
        activation: Activation,
        trail: SharedTrail,
        x: &[f32],
        d: &[f32],
        d_x: &mut [f32],
    ) -> Result<(), ModelError> {
        let Some((mlp, gate)) = &self.shared else { return Ok(()) };
        let mut d = d.to_vec();
        if let (Some(gate), Some([y, logit])) = (gate, &trail.gated) {
            let d_logit = Open.back(y, logit, &mut d)?;
            gate.back(&d_logit, d_x, Into::Add)?;
        }
        mlp_back(mlp, activation, trail.mlp, x, None, &d, Some(d_x))?;
        Ok(())
    }

    /// The matrices of each expert.
    pub(super) fn views(&self) -> candle_core::Result<Vec<ExpertView<'_>>> {
        self.experts.iter().map(Expert::view).collect()
    }

    /// How products with them are computed.
    pub(super) fn exec(&self) -> Exec {
        self.experts.first().map_or_else(Exec::default, |e| e.gate.exec)
    }
}

/// Back through a gated MLP: what reaches `x` is added to `d_x`, the gradients of factors are returned.
fn mlp_back(
    mlp: &Expert,
    activation: Activation,
    trail: MlpTrail,
    x: &[f32],
    lora: Option<&ExpertLora<'_>>,
    d: &[f32],
    mut d_x: Option<&mut [f32]>,
) -> Result<[Option<LoraGradients>; 3], ModelError> {
    let (mut gate, mut up) = (to_vec(&trail.gate)?, to_vec(&trail.up)?);
    let mut d_h = vec![0.0; gate.len()];
    let pair = lora.and_then(|l| l.down);
    let mut h = Vec::new();
    if pair.is_some() {
        h = gate.clone();
        activation.gate(&mut h, &up);
    }
    let down = linear_back(&mlp.down, pair, &h, d, Some((&mut d_h, Into::Overwrite)))?;
    activation.gate_backward(&mut gate, &mut up, &d_h);
    let mut back = |layer, pair, d: &[f32]| {
        linear_back(layer, pair, x, d, d_x.as_deref_mut().map(|d_x| (d_x, Into::Add)))
    };
    let gate = back(&mlp.gate, lora.and_then(|l| l.gate), &gate)?;
    let up = back(&mlp.up, lora.and_then(|l| l.up), &up)?;
    Ok([gate, up, down])
}

fn linear_back(
    layer: &FrozenLinear,
    pair: Option<LoraPair<'_>>,
    x: &[f32],
    dy: &[f32],
    mut dx: Option<(&mut [f32], Into)>,
) -> Result<Option<LoraGradients>, ModelError> {
    if let Some((dx, into)) = &mut dx {
        layer.back(dy, dx, *into)?;
    }
    let Some(pair) = pair else { return Ok(None) };
    let (w, dx) = (layer.view()?, dx.map(|(dx, _)| dx));
    Ok(Some(lora_backward(x, [w.rows(), w.cols()], &pair, dy, dx, &layer.exec)?))
}
