//! A frozen model with factors: forward, loss, back.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::{Exec, KernelError, LoraGradients};

use super::{
    BatchGradient, BatchLoss, FactorGradients, FactorPair, FactorPlan, Factors, GradientError,
    Lesson, Part, Route,
};
use crate::error::ModelError;
use crate::layer::{Changes, Gating, Keeper, Kept, Layer, OtherRouter, Passed, Trail, Wanted};
use crate::model::{Model, Tables, check_length, embed, in_pool};
use crate::ops::{FrozenLinear, RmsNorm, to_vec};
use crate::placement::Placement;
use crate::probe::Batch;
use crate::router_training::head::{Head, Losses, Target};
use crate::spec::{Mlp, Spec};

/// What the loss is.
#[derive(Debug, Clone, Copy)]
pub enum Goal<'a> {
    /// Cross entropy of the next token.
    NextToken,
    /// `KL(teacher, model)` of the next token's distribution. The teacher has the same vocabulary.
    Teacher(&'a Trainee),
    /// The same, where [`Trainee::said`] has told already what the teacher makes of the lessons.
    Said(&'a Trainee, &'a [f32]),
}

/// A frozen model, one of whose experts (or whose MLPs, if it is dense) is to get factors. Its weights are views.
#[derive(Debug)]
pub struct Trainee {
    spec: Spec,
    embedding: WeightRef,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: FrozenLinear,
    expert: Option<usize>,
    route: Route,
    /// What of a batch may be kept for the way back.
    pub(super) keeper: Keeper,
}

/// Asked between layers whether to give up.
type Interrupted<'a> = dyn FnMut() -> bool + Send + 'a;

/// Is shown what the projections of a layer read.
type SeeInputs<'a> = dyn FnMut(usize, usize, [&[f32]; 2]) -> Result<(), GradientError> + Send + 'a;

/// The rows of a batch whose prediction counts.
struct Places {
    rows: Vec<usize>,
    next: Vec<u32>,
}

impl Trainee {
    /// Opens the model.
    ///
    /// * `expert`: for a MoE, the one that gets factors; none for a dense model
    ///
    /// # Errors
    /// As [`crate::Model::open`]; [`ModelError::Expert`] if there is no such expert in a MoE layer.
    pub fn open(source: &Source, expert: Option<usize>, route: Route) -> Result<Self, ModelError> {
        Self::open_with(source, expert, route, Exec::default())
    }

    /// As [`Trainee::open`], with products computed as `exec` says, on the way back too; routers choose by exact ones.
    ///
    /// # Errors
    /// As [`Trainee::open`].
    pub fn open_with(
        source: &Source,
        expert: Option<usize>,
        route: Route,
        exec: Exec,
    ) -> Result<Self, ModelError> {
        Self::open_on(source, expert, route, exec, &Placement::cpu())
    }

    /// As [`Trainee::open_with`], with the products of frozen weights where `placement` says; the expert that gets factors stays on
    /// the processor.
    ///
    /// # Errors
    /// As [`Trainee::open`]; [`ModelError::Device`] if the device has no room, or fails.
    pub fn open_on(
        source: &Source,
        expert: Option<usize>,
        route: Route,
        exec: Exec,
        placement: &Placement,
    ) -> Result<Self, ModelError> {
        let spec = Spec::of(source)?;
        let fewest = spec.moe_layers().map(|(_, moe)| moe.experts).min();
        if expert.map_or(fewest.is_some(), |e| e >= fewest.unwrap_or(0)) {
            return Err(ModelError::Expert { expert, experts: fewest.unwrap_or(0) });
        }
        let Model { spec, embedding, layers, norm, head } =
            Model::open_on(source, exec, placement)?;
        Ok(Self { spec, embedding, layers, norm, head, expert, route, keeper: Keeper::default() })
    }

    /// What the model is made of.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Rows and columns of a projection of `layer`; none where there is nothing to train: a dense layer of a MoE.
    pub fn size(&self, layer: usize, part: Part) -> Option<(usize, usize)> {
        if part == Part::Router {
            let routed = self.expert.is_some() && self.route == Route::Natural;
            let moe = matches!(self.spec.layers.get(layer)?.mlp, Mlp::Moe(_));
            return (routed && moe).then_some((1, self.spec.hidden));
        }
        let inter = match (&self.spec.layers.get(layer)?.mlp, self.expert) {
            (Mlp::Dense(mlp), None) => mlp.inter,
            (Mlp::Moe(moe), Some(_)) => moe.inter,
            _ => return None,
        };
        let hidden = self.spec.hidden;
        Some(if part == Part::Down { (hidden, inter) } else { (inter, hidden) })
    }

    /// Factors before the first step: the model computes what it computed without them.
    pub fn factors(&self, plan: &FactorPlan) -> Factors {
        let mut pairs = BTreeMap::new();
        for layer in plan.layers.clone() {
            for part in &plan.parts {
                if let Some(size) = self.size(layer, *part) {
                    let at = (layer, *part);
                    pairs.insert(at, FactorPair::new(plan, at, size));
                }
            }
        }
        Factors { scale: plan.scale, pairs, dropout: None }
    }

    /// Losses of the tokens that count.
    ///
    /// # Errors
    /// [`GradientError`].
    pub fn losses(
        &self,
        factors: Option<&Factors>,
        lessons: &[&Lesson],
        goal: &Goal<'_>,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<BatchLoss, GradientError> {
        in_pool(|| self.losses_of(factors, lessons, goal, interrupted))
    }

    fn losses_of(
        &self,
        factors: Option<&Factors>,
        lessons: &[&Lesson],
        goal: &Goal<'_>,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<BatchLoss, GradientError> {
        let batch = self.batch(lessons)?;
        let places = Places::of(lessons);
        let mut visits = BTreeMap::new();
        let stream = self.forward(&batch, factors, interrupted, |l, passed, _| {
            visits.extend(self.visits(passed).map(|v| (l, v)));
        })?;
        let nats = self.loss(&stream, &places, lessons, goal, None, interrupted)?.nats;
        Ok(BatchLoss { nats, visits, tokens: batch.positions.len() })
    }

    /// Tokens that visited the expert, in a MoE layer.
    fn visits(&self, passed: &Passed) -> Option<usize> {
        let (routing, expert) = (passed.routing.as_ref()?, self.expert? as u32);
        Some(routing.ids.iter().filter(|id| **id == expert).count())
    }

    /// Shows of each MoE layer without factors: its number, what its router read `[tokens, hidden]`, its logits
    /// `[tokens, experts]`, the expert.
    pub(super) fn see_routers(
        &self,
        lessons: &[&Lesson],
        interrupted: &mut Interrupted<'_>,
        see: &mut (dyn FnMut(usize, &Tensor, &Tensor, usize) -> candle_core::Result<()> + Send),
    ) -> Result<(), GradientError> {
        in_pool(|| {
            let batch = self.batch(lessons)?;
            let mut seen = Ok(());
            self.forward(&batch, None, interrupted, |l, passed, _| {
                if let (Some(logits), Some(expert), Ok(())) = (&passed.logits, self.expert, &seen) {
                    seen = see(l, &passed.mlp_input, logits, expert);
                }
            })?;
            Ok(seen?)
        })
    }

    /// Shows of each layer in `layers`, without factors, what the expert's projections read: its number, how many rows, and
    /// `[rows, hidden]` and `[rows, inter]`, each row times the weight of its visit.
    pub(super) fn see_inputs(
        &self,
        lessons: &[&Lesson],
        layers: Range<usize>,
        interrupted: &mut Interrupted<'_>,
        see: &mut SeeInputs<'_>,
    ) -> Result<(), GradientError> {
        in_pool(|| {
            let batch = self.batch(lessons)?;
            let mut seen = Ok(());
            self.forward(&batch, None, interrupted, |l, passed, _| {
                if layers.contains(&l) && seen.is_ok() {
                    seen = self
                        .inputs(l, passed)
                        .and_then(|[z, h]| see(l, z.len() / self.spec.hidden, [&z, &h]));
                }
            })?;
            seen
        })
    }

    /// What the projections read of the tokens that visit, times the weights of the visits.
    fn inputs(&self, layer: usize, passed: &Passed) -> Result<[Vec<f32>; 2], GradientError> {
        let hidden = self.spec.hidden;
        let all = to_vec(&passed.mlp_input)?;
        let visits: Vec<(usize, f32)> = match (&passed.routing, self.expert) {
            (Some(routing), Some(expert)) => {
                let slots = routing.ids.iter().zip(&routing.weights).enumerate();
                let own = slots.filter(|(_, (id, _))| **id as usize == expert);
                own.map(|(slot, (_, weight))| (slot / routing.top_k, *weight)).collect()
            }
            (None, Some(_)) => Vec::new(), // a dense layer of a MoE
            (_, None) => (0..all.len() / hidden).map(|row| (row, 1.0)).collect(),
        };
        let rows = visits.iter().flat_map(|(row, _)| &all[row * hidden..(row + 1) * hidden]);
        let mut z: Vec<f32> = rows.copied().collect();
        if visits.is_empty() {
            return Ok([Vec::new(), Vec::new()]);
        }
        let read = Tensor::from_slice(&z, (visits.len(), hidden), &Device::Cpu)?;
        let expert = self.expert.unwrap_or(0);
        let mut h = to_vec(&self.layers[layer].inside(expert, self.spec.activation, &read)?)?;
        for values in [&mut z, &mut h] {
            let width = values.len() / visits.len();
            for (row, (_, weight)) in values.chunks_exact_mut(width).zip(&visits) {
                row.iter_mut().for_each(|v| *v *= weight);
            }
        }
        Ok([z, h])
    }

    /// Sum of the losses of the tokens that count, each times `weight`, and its gradient with respect to the factors.
    ///
    /// # Errors
    /// [`GradientError`].
    pub fn gradient(
        &self,
        factors: &Factors,
        lessons: &[&Lesson],
        goal: &Goal<'_>,
        weight: f32,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<BatchGradient, GradientError> {
        in_pool(|| self.gradient_of(factors, lessons, goal, weight, interrupted))
    }

    fn gradient_of(
        &self,
        factors: &Factors,
        lessons: &[&Lesson],
        goal: &Goal<'_>,
        weight: f32,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<BatchGradient, GradientError> {
        let batch = self.batch(lessons)?;
        let places = Places::of(lessons);
        let first = factors.pairs.keys().next().map_or(self.layers.len(), |(l, _)| *l);
        let (mut kept, mut visits, mut keeper) = (Vec::new(), BTreeMap::new(), self.keeper);
        let stream = self.forward(&batch, Some(factors), interrupted, |l, passed, trail| {
            if l >= first {
                kept.push(keeper.keep(trail, &passed.routed));
            }
            visits.extend(self.visits(passed).map(|v| (l, v)));
        })?;
        let weights = vec![weight; places.rows.len()];
        let losses = self.loss(&stream, &places, lessons, goal, Some(&weights), interrupted)?;
        let nats: f64 = losses.nats.iter().sum();
        if !nats.is_finite() {
            return Err(GradientError::NotFinite { what: "the training loss".into() });
        }
        let hidden = self.spec.hidden;
        let mut d_stream = vec![0.0; stream.elem_count()];
        let d_rows = losses.gradient.unwrap_or_default();
        for (row, d) in places.rows.iter().zip(d_rows.chunks_exact(hidden)) {
            d_stream[row * hidden..(row + 1) * hidden].copy_from_slice(d);
        }
        let found = self.backward(&batch, factors, kept, d_stream, interrupted)?;
        let tokens = batch.positions.len();
        Ok(BatchGradient { nats, scored: places.rows.len(), factors: found, visits, tokens })
    }

    /// Sequences one after the other in one matrix.
    fn batch(&self, lessons: &[&Lesson]) -> Result<Batch, ModelError> {
        lessons.iter().try_for_each(|lesson| check_length(&self.spec, lesson.tokens.len()))?;
        let texts = lessons.iter().map(|lesson| &lesson.tokens[..]);
        Batch::of(texts, |tokens| embed(&self.spec, &self.embedding, tokens))
    }

    fn head(&self) -> Result<Head<'_>, ModelError> {
        let (spec, norm, exec) = (&self.spec, &self.norm, self.head.exec);
        Ok(Head { spec, norm, weight: self.head.view()?, exec })
    }

    /// The stream after the last layer; `see` gets number and result of each layer, and what it leaves for the way back.
    fn forward(
        &self,
        batch: &Batch,
        factors: Option<&Factors>,
        interrupted: &mut Interrupted<'_>,
        mut see: impl FnMut(usize, &Passed, Trail),
    ) -> Result<Tensor, GradientError> {
        let mut tables = Tables::new(&batch.positions);
        let mut x = batch.stream.clone();
        let forced = self.forced(batch);
        for l in 0..self.layers.len() {
            if interrupted() {
                return Err(GradientError::Interrupted);
            }
            let router = factors.map(|f| self.router(l, f)).transpose()?.flatten();
            let changes = self.changes(l, factors, forced.as_deref(), router.as_ref());
            let (passed, trail) = self.layer(l, &x, &mut tables, batch, &changes, None)?;
            see(l, &passed, trail);
            x = passed.stream;
        }
        Ok(x)
    }

    /// The router of a layer with the trained row of the expert; none where it is not trained.
    fn router(&self, layer: usize, factors: &Factors) -> Result<Option<Tensor>, GradientError> {
        let Some(pair) = factors.pairs.get(&(layer, Part::Router)) else { return Ok(None) };
        let (Some((_, router)), Some(expert)) = (self.layers[layer].router(), self.expert) else {
            return Ok(None);
        };
        let view = router.view()?;
        let (experts, hidden) = (view.rows(), view.cols());
        let mut values = vec![0.0; experts * hidden];
        for (row, out) in values.chunks_exact_mut(hidden.max(1)).enumerate() {
            view.widen_row(row, out);
        }
        let rate = factors.scale * pair.b[0];
        let own = &mut values[expert * hidden..(expert + 1) * hidden];
        own.iter_mut().zip(&pair.a).for_each(|(w, a)| *w += rate * a);
        Ok(Some(Tensor::from_vec(values, (experts, hidden), &Device::Cpu)?))
    }

    /// How a layer differs from the stored one: who chooses the experts (another router, nobody, or its own one), and the
    /// factors in it.
    fn changes<'a>(
        &self,
        layer: usize,
        factors: Option<&'a Factors>,
        forced: Option<&'a [u32]>,
        router: Option<&'a Tensor>,
    ) -> Changes<'a> {
        let gating = match (forced, router, self.layers[layer].router()) {
            (Some(ids), ..) => Gating::Forced(ids),
            (None, Some(weights), Some((moe, _))) => {
                Gating::Weights(OtherRouter { weights, top_k: moe.router.top_k })
            }
            _ => match self.expert.filter(|_| self.route == Route::Always) {
                Some(expert) => Gating::Always(expert),
                None => Gating::Stored,
            },
        };
        let lora = factors.and_then(|f| f.of(layer, self.expert.unwrap_or(0)));
        Changes { gating, lora }
    }

    /// The gradient of a router's row `a`, from that of the whole router.
    fn router_gradient(
        &self,
        layer: usize,
        factors: &Factors,
        all: &[f32],
    ) -> Result<Vec<f32>, GradientError> {
        let pair = &factors.pairs[&(layer, Part::Router)];
        let (rate, from) = (factors.scale * pair.b[0], self.expert.unwrap_or(0) * pair.input);
        let row = all[from..from + pair.input].iter().map(|g| rate * g).collect::<Vec<f32>>();
        if row.iter().any(|g| !g.is_finite()) {
            let what = format!("the gradient of the router of layer {layer}");
            return Err(GradientError::NotFinite { what });
        }
        Ok(row)
    }

    /// The expert of every token, where all visit one.
    fn forced(&self, batch: &Batch) -> Option<Vec<u32>> {
        let expert = self.expert.filter(|_| self.route == Route::Forced)?;
        Some(vec![expert as u32; batch.positions.len()])
    }

    fn layer(
        &self,
        l: usize,
        x: &Tensor,
        tables: &mut Tables<'_>,
        batch: &Batch,
        changes: &Changes<'_>,
        known: Option<&Tensor>,
    ) -> Result<(Passed, Trail), GradientError> {
        let (layer, spec) = (&self.layers[l], &self.spec);
        let table = tables.of(layer.rope());
        let passed = layer.forward_trail(spec, x, table, &batch.rows, changes, known);
        passed.map_err(|e| match e {
            ModelError::Router { layer, source: KernelError::NotFinite { .. } } => {
                GradientError::NotFinite { what: format!("a router logit of layer {layer}") }
            }
            other => other.into(),
        })
    }

    /// Losses of the rows that count and, with weights, the gradient of their weighted sum.
    fn loss(
        &self,
        stream: &Tensor,
        places: &Places,
        lessons: &[&Lesson],
        goal: &Goal<'_>,
        weights: Option<&[f32]>,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Losses, GradientError> {
        let rows = places.gather(stream, self.spec.hidden)?;
        match goal {
            Goal::NextToken => {
                Ok(self.head()?.losses(&rows, &Target::Next(&places.next), weights)?)
            }
            Goal::Teacher(teacher) => {
                let states = teacher.said_of(lessons, places, interrupted)?;
                let goal = Goal::Said(teacher, &states);
                self.loss(stream, places, lessons, &goal, weights, interrupted)
            }
            Goal::Said(teacher, states) => {
                Ok(self.head()?.losses(&rows, &Target::Other(states, &teacher.head()?), weights)?)
            }
        }
    }

    /// What the model as it is makes of the places that count, `[places, hidden]`: for [`Goal::Said`].
    ///
    /// # Errors
    /// [`GradientError`].
    pub fn said(
        &self,
        lessons: &[&Lesson],
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Vec<f32>, GradientError> {
        in_pool(|| self.said_of(lessons, &Places::of(lessons), interrupted))
    }

    fn said_of(
        &self,
        lessons: &[&Lesson],
        places: &Places,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Vec<f32>, GradientError> {
        let batch = self.batch(lessons)?;
        let stream = self.forward(&batch, None, interrupted, |_, _, _| ())?;
        Ok(self.head()?.states(&places.gather(&stream, self.spec.hidden)?)?)
    }

    /// Back through the layers down to the first one with factors; those that were not kept whole are computed again.
    ///
    /// * `d`: gradient of the last stream, `[tokens, hidden]`
    fn backward(
        &self,
        batch: &Batch,
        factors: &Factors,
        mut kept: Vec<Kept>,
        mut d: Vec<f32>,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<FactorGradients, GradientError> {
        let mut found = FactorGradients::new();
        let mut tables = Tables::new(&batch.positions);
        let forced = self.forced(batch);
        let first = self.layers.len() - kept.len();
        for l in (first..self.layers.len()).rev() {
            if interrupted() {
                return Err(GradientError::Interrupted);
            }
            let Some(kept) = kept.pop() else { break };
            let router = self.router(l, factors)?;
            let changes = self.changes(l, Some(factors), forced.as_deref(), router.as_ref());
            let trail = match kept {
                Kept::Trail(trail) => *trail,
                Kept::Input(x, known) => {
                    self.layer(l, &x, &mut tables, batch, &changes, known.as_ref())?.1
                }
            };
            let layer = &self.layers[l];
            let along = (tables.of(layer.rope()), &batch.rows[..]);
            let wanted = Wanted { input: l > first, router: router.is_some(), d_logits: None };
            let gradients = layer.backward(&self.spec, trail, along, &changes, wanted, d)?;
            for (part, gradient) in Part::ALL.into_iter().zip(gradients.factors) {
                if let Some(gradient) = gradient {
                    let pair = &factors.pairs[&(l, part)];
                    found.insert((l, part), trained(pair, gradient, (l, part))?);
                }
            }
            if let Some(gradient) = gradients.router {
                let row = self.router_gradient(l, factors, &gradient)?;
                found.insert((l, Part::Router), [row, Vec::new()]);
            }
            match gradients.input {
                Some(next) => d = next,
                None => break,
            }
        }
        Ok(found)
    }
}

/// The gradients of the factors that are trained; the others are empty.
fn trained(
    pair: &FactorPair,
    LoraGradients { a, b }: LoraGradients,
    (layer, part): (usize, Part),
) -> Result<[Vec<f32>; 2], GradientError> {
    let mut both = [a, b];
    for (gradient, trained) in both.iter_mut().zip(pair.trains()) {
        if !trained {
            gradient.clear();
        }
        if gradient.iter().any(|g| !g.is_finite()) {
            let what = format!("the gradient of `{}` of layer {layer}", part.name());
            return Err(GradientError::NotFinite { what });
        }
    }
    Ok(both)
}

impl Places {
    fn of(lessons: &[&Lesson]) -> Self {
        let mut places = Self { rows: Vec::new(), next: Vec::new() };
        let mut from = 0;
        for lesson in lessons {
            for at in lesson.places() {
                places.rows.push(from + at - 1);
                places.next.push(lesson.tokens[at]);
            }
            from += lesson.tokens.len();
        }
        places
    }

    /// Those rows of `x [tokens, hidden]`.
    fn gather(&self, x: &Tensor, hidden: usize) -> Result<Vec<f32>, ModelError> {
        let all = to_vec(x)?;
        let mut rows = Vec::with_capacity(self.rows.len() * hidden);
        for row in &self.rows {
            rows.extend_from_slice(&all[row * hidden..(row + 1) * hidden]);
        }
        Ok(rows)
    }
}
