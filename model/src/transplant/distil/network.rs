//! The student: forward, loss, and back to the experts and routers that are trained.

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::{Source, WeightRef};

use super::part::{Gate, Part, Step, Trained};
use super::taught::Taught;
use super::{Distillation, Pupil, Visits};
use crate::error::ModelError;
use crate::layer::{Choice, Layer, Past};
use crate::model::{Tables, embed};
use crate::ops::{tensor_like, to_vec};
use crate::probe::Batch;
use crate::spec::Spec;
use crate::transplant::mlp::{Input, Mlp};
use crate::transplant::{Ending, Side, missing};

/// Texts of a batch: those of each pupil, in the order of the pupils.
pub(super) type Drawn = Vec<Vec<usize>>;

pub(super) struct Network<'a> {
    pub spec: Spec,
    embedding: WeightRef,
    layers: Vec<Layer>,
    ending: Ending,
    /// By layer: the experts that tokens visit.
    pub parts: Vec<Vec<Part>>,
    /// By layer, where routers say who is visited.
    pub gates: Vec<Option<Gate>>,
    pub pupils: Vec<Taught<'a>>,
    /// Weight of what is lacking to the teachers' streams.
    stream: f32,
}

/// Who is visited in one layer.
struct Visited {
    /// Of each part: row of the stream and slot.
    rows: Vec<Vec<(usize, usize)>>,
    /// What each slot enters the stream times.
    shares: Vec<f32>,
    /// The router's rows and what it chose, where there is one.
    gate: Option<(Tensor, Choice)>,
}

impl<'a> Network<'a> {
    pub fn new(
        student: &Source,
        pupils: &[Pupil<'a>],
        visits: Visits,
        options: &Distillation,
    ) -> Result<Self, ModelError> {
        let own = Side::new(student, &[])?;
        let ending = own.ending()?;
        let stream = options.stream > 0.0;
        let pupils_taught = pupils
            .iter()
            .map(|p| Taught::new(&own, &ending, p, stream))
            .collect::<Result<_, _>>()?;
        let layers: Vec<Layer> = (0..own.model.spec.layers.len())
            .map(|l| own.model.layer(l))
            .collect::<Result<_, _>>()?;
        let (mut parts, mut gates) = (Vec::new(), Vec::new());
        for (l, layer) in layers.iter().enumerate() {
            let visited: Vec<usize> = match (visits, layer.experts()) {
                (Visits::Routed, 0) => vec![0],
                (Visits::Routed, experts) => (0..experts).collect(),
                (Visits::Forced, _) => pupils.iter().map(|p| p.expert).collect(),
            };
            let part = |expert: usize| -> Result<Part, ModelError> {
                let found = layer.mlp_of(&own.model.spec, expert).ok_or_else(|| missing(expert))?;
                let learns = |p: &Pupil<'_>| p.expert == expert && p.layers.contains(&l);
                let trained = match (own.fitted(layer) && pupils.iter().any(learns), options.rank) {
                    (false, _) => Trained::Nothing,
                    (true, None) => Trained::Everything,
                    (true, Some(rank)) => {
                        Trained::Rank(rank, options.seed ^ ((l as u64) << 32 | expert as u64))
                    }
                };
                Ok(Part::new(expert, Mlp::of(found.0, own.model.spec.activation)?, trained))
            };
            parts.push(visited.into_iter().map(part).collect::<Result<Vec<_>, _>>()?);
            let routed = layer.router().filter(|_| visits == Visits::Routed);
            let gate = routed.map(|(_, router)| -> Result<Gate, ModelError> {
                let view = router.view()?;
                let mut rows = vec![0.0; view.rows() * view.cols()];
                for (row, out) in rows.chunks_exact_mut(view.cols().max(1)).enumerate() {
                    view.widen_row(row, out);
                }
                Ok(Gate::new(rows, view.cols()))
            });
            gates.push(gate.transpose()?);
        }
        let embedding = own.model.weights.get("model.embed_tokens.weight")?;
        let (spec, stream) = (own.model.spec, options.stream);
        Ok(Self { spec, embedding, layers, ending, parts, gates, pupils: pupils_taught, stream })
    }

    /// Loss of some texts, mean over their tokens; the gradient is left in the parts and gates.
    pub fn gradient(&mut self, drawn: &Drawn) -> Result<f64, ModelError> {
        let batch = self.batch(drawn)?;
        let (last, mut streams) = self.forward(&batch)?;
        let (mut loss, mut d) = self.loss(drawn, &batch, &to_vec(&last)?)?;
        let taught = self.taught(drawn)?;
        let mut tables = Tables::new(&batch.positions);
        let first = (0..self.layers.len())
            .find(|l| self.gates[*l].is_some() || self.parts[*l].iter().any(Part::learns));
        let Some(first) = first else { return Ok(loss) };
        for l in (first..self.layers.len()).rev() {
            let Some(input) = streams.pop() else { break };
            let wanted = if l == first { Input::Frozen } else { Input::Followed };
            match self.back(l, &input, &batch, &mut tables, d, wanted)? {
                Some(next) => d = next,
                None => break,
            }
            if let Some(target) = taught.get(l - 1) {
                let share = self.stream / taught.len() as f32;
                loss += apart(&to_vec(&input)?, target, self.spec.hidden, share, &mut d);
            }
        }
        Ok(loss)
    }

    /// Mean divergence from the teacher on the held-out texts of each pupil, in nats per token; `None` without any.
    pub fn held_out(&self, tokens: usize) -> Result<Vec<Option<f64>>, ModelError> {
        let mut all = Vec::new();
        for (at, pupil) in self.pupils.iter().enumerate() {
            let (mut nats, mut count, mut from) = (0.0, 0, pupil.learnt);
            while from < pupil.texts.len() {
                let (mut to, mut filled) = (from, 0);
                while to < pupil.texts.len() && (to == from || filled < tokens) {
                    filled += pupil.texts[to].len();
                    to += 1;
                }
                let mut drawn = vec![Vec::new(); self.pupils.len()];
                drawn[at] = (from..to).collect();
                let batch = self.batch(&drawn)?;
                let (last, _) = self.forward(&batch)?;
                let (sum, seen, _) = self.nats(&drawn, &batch, &to_vec(&last)?)?;
                (nats, count, from) = (nats + sum, count + seen, to);
            }
            all.push((count > 0).then(|| nats / count as f64));
        }
        Ok(all)
    }

    /// Everything that changes from step to step, in a fixed order.
    pub fn numbers(&mut self) -> Vec<&mut Vec<f32>> {
        let parts = self.parts.iter_mut().flatten().flat_map(Part::numbers);
        parts.chain(self.gates.iter_mut().flatten().flat_map(Gate::numbers)).collect()
    }

    pub fn update(&mut self, step: Step) -> Result<(), ModelError> {
        for (layer, parts) in self.layers.iter().zip(&mut self.parts) {
            for part in parts {
                let start = layer.mlp_of(&self.spec, part.expert);
                let (start, _) = start.ok_or_else(|| missing(part.expert))?;
                part.update(start, step)?;
            }
        }
        self.gates.iter_mut().flatten().for_each(|g| g.update(step));
        Ok(())
    }

    fn batch(&self, drawn: &Drawn) -> Result<Batch, ModelError> {
        let texts = self.pupils.iter().zip(drawn);
        let texts = texts.flat_map(|(pupil, drawn)| drawn.iter().map(|t| pupil.texts[*t]));
        Batch::of(texts, |tokens| embed(&self.spec, &self.embedding, tokens))
    }

    /// The last stream, and what went into each layer.
    fn forward(&self, batch: &Batch) -> Result<(Tensor, Vec<Tensor>), ModelError> {
        let (mut x, mut inputs) = (batch.stream.clone(), Vec::new());
        let mut tables = Tables::new(&batch.positions);
        for (l, layer) in self.layers.iter().enumerate() {
            let past = Past::None(&batch.rows);
            let (after, h) = layer.attended(&self.spec, &x, tables.of(layer.rope()), past)?;
            let visited = self.visited(l, &h)?;
            let mut stream = to_vec(&layer.without_experts(&self.spec, &after, &h)?)?;
            let (h, hidden) = (to_vec(&h)?, self.spec.hidden);
            for (part, rows) in self.parts[l].iter().zip(&visited.rows) {
                let out = part.mlp.forward(&gather(&h, rows, hidden))?;
                for ((row, slot), out) in rows.iter().zip(out.chunks_exact(hidden)) {
                    let into = &mut stream[row * hidden..(row + 1) * hidden];
                    let share = visited.shares[*slot];
                    into.iter_mut().zip(out).for_each(|(x, y)| *x += share * y);
                }
            }
            let next = tensor_like(stream, &x)?;
            inputs.push(std::mem::replace(&mut x, next));
        }
        Ok((x, inputs))
    }

    /// Who is visited in layer `l`.
    fn visited(&self, l: usize, h: &Tensor) -> Result<Visited, ModelError> {
        let (layer, tokens) = (&self.layers[l], h.dim(0)?);
        let Some(own) = &self.gates[l] else {
            let expert = self.parts[l].first().map_or(0, |p| p.expert);
            let found = layer.mlp_of(&self.spec, expert);
            let (_, factor) = found.ok_or_else(|| missing(expert))?;
            let rows = vec![(0..tokens).map(|t| (t, t)).collect()];
            return Ok(Visited { rows, shares: vec![factor; tokens], gate: None });
        };
        let shape = (self.parts[l].len(), self.spec.hidden);
        let rows = Tensor::from_slice(&own.rows, shape, &Device::Cpu)?;
        let choice = layer.chosen(h, &rows)?;
        let routing = &choice.routing;
        let mut visits = vec![Vec::new(); self.parts[l].len()];
        for (slot, expert) in routing.ids.iter().enumerate() {
            visits[*expert as usize].push((slot / routing.top_k, slot));
        }
        let shares = routing.weights.iter().map(|w| w * self.spec.residual_scale).collect();
        Ok(Visited { rows: visits, shares, gate: Some((rows, choice)) })
    }

    /// Mean loss over the tokens that have a teacher's prediction, and its gradient with respect to the last stream.
    fn loss(
        &self,
        drawn: &Drawn,
        batch: &Batch,
        stream: &[f32],
    ) -> Result<(f64, Vec<f32>), ModelError> {
        let (nats, count, mut d) = self.nats(drawn, batch, stream)?;
        let share = 1.0 / count.max(1) as f32;
        d.iter_mut().for_each(|d| *d *= share);
        Ok((nats / count.max(1) as f64, d))
    }

    /// The sum of losses, their number, and the gradient of the sum.
    fn nats(
        &self,
        drawn: &Drawn,
        batch: &Batch,
        stream: &[f32],
    ) -> Result<(f64, usize, Vec<f32>), ModelError> {
        let (hidden, head) = (self.spec.hidden, self.ending.head()?);
        let (mut nats, mut count) = (0.0, 0);
        let mut d = vec![0.0; stream.len()];
        let texts = self.pupils.iter().zip(drawn).flat_map(|(p, d)| d.iter().map(move |t| (p, *t)));
        for ((pupil, text), rows) in texts.zip(&batch.rows) {
            let wide = rows.start * hidden..rows.end * hidden;
            let (sum, seen) = pupil.losses(&head, text, &stream[wide.clone()], &mut d[wide])?;
            (nats, count) = (nats + sum, count + seen);
        }
        Ok((nats, count, d))
    }

    /// The teachers' streams after each layer but the last, where they count.
    fn taught(&self, drawn: &Drawn) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut all: Vec<Vec<f32>> = Vec::new();
        if self.stream <= 0.0 {
            return Ok(all);
        }
        for (pupil, drawn) in self.pupils.iter().zip(drawn).filter(|(_, d)| !d.is_empty()) {
            let streams = pupil.streams(drawn)?;
            all.resize(streams.len(), Vec::new());
            all.iter_mut().zip(streams).for_each(|(all, own)| all.extend(own));
        }
        Ok(all)
    }

    /// Back through one layer, computed again from its input: gradients of what is trained in it added, and the one of its
    /// input returned where it is wanted.
    fn back(
        &mut self,
        l: usize,
        input: &Tensor,
        batch: &Batch,
        tables: &mut Tables<'_>,
        mut d: Vec<f32>,
        wanted: Input,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let (layer, along) = (&self.layers[l], &batch.rows[..]);
        let table = tables.of(layer.rope());
        let (trail, h) = layer.attended_trail(&self.spec, input, table, Past::None(along))?;
        let visited = self.visited(l, &h)?;
        let (flat, hidden) = (to_vec(&h)?, self.spec.hidden);
        let mut d_h = (wanted == Input::Followed).then(|| vec![0.0; flat.len()]);
        let mut d_weights = vec![0.0; visited.shares.len()];
        for (part, rows) in self.parts[l].iter_mut().zip(&visited.rows) {
            let inputs = gather(&flat, rows, hidden);
            let mut d_out = gather(&d, rows, hidden);
            if visited.gate.is_some() {
                let out = part.mlp.forward(&inputs)?;
                let pairs = out.chunks_exact(hidden).zip(d_out.chunks_exact(hidden));
                for ((_, slot), (out, d)) in rows.iter().zip(pairs) {
                    let product: f32 = out.iter().zip(d).map(|(o, d)| o * d).sum();
                    d_weights[*slot] = self.spec.residual_scale * product;
                }
            }
            for ((_, slot), d) in rows.iter().zip(d_out.chunks_exact_mut(hidden)) {
                d.iter_mut().for_each(|d| *d *= visited.shares[*slot]);
            }
            let own = part.mlp.backward(&inputs, &d_out, &mut part.gradient, wanted)?;
            if let (Some(own), Some(d_h)) = (own, &mut d_h) {
                for ((row, _), own) in rows.iter().zip(own.chunks_exact(hidden)) {
                    let into = &mut d_h[row * hidden..(row + 1) * hidden];
                    into.iter_mut().zip(own).for_each(|(d, own)| *d += own);
                }
            }
        }
        if let (Some(own), Some((rows, choice))) = (&mut self.gates[l], &visited.gate) {
            own.see(&flat);
            let found = layer.chosen_back(choice, (&flat, rows), &d_weights, d_h.as_deref_mut())?;
            own.gradient.iter_mut().zip(found).for_each(|(sum, g)| *sum += g);
        }
        let Some(mut d_h) = d_h else { return Ok(None) };
        layer.without_experts_back(&self.spec, &h, &d, &mut d_h)?;
        layer.attended_back(&self.spec, &trail, (table, along), &d_h, &mut d)?;
        Ok(Some(d))
    }
}

/// Some rows of `x [tokens, hidden]`.
fn gather(x: &[f32], rows: &[(usize, usize)], hidden: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(rows.len() * hidden);
    rows.iter().for_each(|(row, _)| all.extend_from_slice(&x[row * hidden..(row + 1) * hidden]));
    all
}

/// Mean over rows of `|x - target|² / |target|²` times `share`; its gradient is added to `d`.
fn apart(x: &[f32], target: &[f32], hidden: usize, share: f32, d: &mut [f32]) -> f64 {
    let rows = (x.len() / hidden.max(1)).max(1) as f32;
    let mut sum = 0.0;
    let each = x.chunks_exact(hidden).zip(target.chunks_exact(hidden));
    for ((x, target), d) in each.zip(d.chunks_exact_mut(hidden)) {
        let length: f32 = target.iter().map(|t| t * t).sum();
        let scale = share / (rows * length.max(f32::MIN_POSITIVE));
        for ((x, target), d) in x.iter().zip(target).zip(d) {
            let lacking = x - target;
            sum += f64::from(scale * lacking * lacking);
            *d += 2.0 * scale * lacking;
        }
    }
    sum
}
