//! The frozen model as training sees it: forward with given gates, back to their gradients.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::Score;

use super::Gates;
use super::head::Head;
use super::penalty::penalty;
use super::windows::Piece;
use crate::error::ModelError;
use crate::layer::{Changes, Gating, Kept, Layer, OtherRouter, Passed, Trail, Wanted};
use crate::model::{Model, Tables, check_length, embed};
use crate::ops::{FrozenLinear, RmsNorm, to_vec};
use crate::probe::Batch;
use crate::spec::{MoeMlp, Spec};

/// Why a pass did not come to its end.
pub(super) enum Halt {
    /// Somebody asked for it.
    Interrupted,
    /// Something that has to be finite is not.
    NotFinite(String),
    /// It failed.
    Failed(ModelError),
}

impl From<ModelError> for Halt {
    fn from(error: ModelError) -> Self {
        Self::Failed(error)
    }
}

impl From<candle_core::Error> for Halt {
    fn from(error: candle_core::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Asked between layers whether to give up.
pub(super) type Interrupted<'a> = dyn FnMut() -> bool + 'a;

/// Who routes in a pass.
pub(super) enum Routers {
    /// Gates `[experts, hidden]` of each MoE layer, and experts per token where it is not the model's own number.
    Gates(BTreeMap<usize, Tensor>, Option<usize>),
    /// The expert of every token.
    Forced(Vec<u32>),
}

/// A model whose weights are views, all frozen.
pub(super) struct Network {
    pub spec: Spec,
    embedding: WeightRef,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: FrozenLinear,
}

/// What a walk back needs beside what the layers left.
pub(super) struct Back<'a> {
    pub batch: &'a Batch,
    /// Gates, as in the walk forward.
    pub routers: &'a Routers,
    /// Tokens that the penalties look at.
    pub counted: &'a [bool],
    /// Weights of load balance and z-loss.
    pub penalties: (f64, f64),
}

/// What comes back from a walk through the layers.
pub(super) struct Gradients {
    /// By layer, `[experts, hidden]`.
    pub gates: Gates,
    /// Mean over MoE layers, without its weight.
    pub load_balance: f64,
    /// Likewise.
    pub z: f64,
}

impl Network {
    pub fn open(source: &Source) -> Result<Self, ModelError> {
        let Model { spec, embedding, layers, norm, head } = Model::open(source)?;
        Ok(Self { spec, embedding, layers, norm, head })
    }

    /// Number and rule of each MoE layer.
    pub fn routers(&self) -> impl Iterator<Item = (usize, &MoeMlp)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| Some((l, layer.router()?.0)))
    }

    /// The gates that the model came with.
    pub fn stored_gates(&self) -> Result<Gates, ModelError> {
        let mut gates = Gates::new();
        for (l, layer) in self.layers.iter().enumerate() {
            if let Some((_, router)) = layer.router() {
                let view = router.view()?;
                let mut values = vec![0.0; view.rows() * view.cols()];
                for (row, out) in values.chunks_exact_mut(view.cols().max(1)).enumerate() {
                    view.widen_row(row, out);
                }
                gates.insert(l, values);
            }
        }
        Ok(gates)
    }

    /// Gates as tensors `[experts, hidden]`.
    pub fn tensors(&self, gates: &Gates) -> Result<BTreeMap<usize, Tensor>, ModelError> {
        let hidden = self.spec.hidden;
        gates
            .iter()
            .map(|(l, w)| {
                Ok((*l, Tensor::from_slice(w, (w.len() / hidden, hidden), &Device::Cpu)?))
            })
            .collect()
    }

    pub fn head(&self) -> Result<Head<'_>, ModelError> {
        let (spec, norm, exec) = (&self.spec, &self.norm, self.head.exec);
        Ok(Head { spec, norm, weight: self.head.view()?, exec })
    }

    /// Windows one after the other in one matrix.
    pub fn batch(&self, pieces: &[&Piece]) -> Result<Batch, ModelError> {
        pieces.iter().try_for_each(|piece| check_length(&self.spec, piece.tokens.len()))?;
        let texts = pieces.iter().map(|piece| &piece.tokens[..]);
        Batch::of(texts, |tokens| embed(&self.spec, &self.embedding, tokens))
    }

    /// The stream after the last layer; `see` gets number and result of each layer, and what it leaves for the way back.
    pub fn forward(
        &self,
        batch: &Batch,
        routers: &Routers,
        interrupted: &mut Interrupted<'_>,
        mut see: impl FnMut(usize, &Passed, Trail) -> Result<(), ModelError>,
    ) -> Result<Tensor, Halt> {
        let mut tables = Tables::new(&batch.positions);
        let mut x = batch.stream.clone();
        for l in 0..self.layers.len() {
            if interrupted() {
                return Err(Halt::Interrupted);
            }
            let changes = self.changes(l, routers)?;
            let (passed, trail) = self.layer(l, &x, &mut tables, batch, &changes, None)?;
            see(l, &passed, trail)?;
            x = passed.stream;
        }
        Ok(x)
    }

    /// Who chooses the experts in a layer.
    fn changes<'a>(&self, l: usize, routers: &'a Routers) -> Result<Changes<'a>, ModelError> {
        let gating = match (routers, self.layers[l].router()) {
            (Routers::Gates(gates, top_k), Some((moe, _))) => {
                let missing = || candle_core::Error::msg(format!("no gates for layer {l}"));
                let weights = gates.get(&l).ok_or_else(missing)?;
                let top_k = top_k.unwrap_or(moe.router.top_k);
                Gating::Weights(OtherRouter { weights, top_k })
            }
            (Routers::Forced(ids), Some(_)) => Gating::Forced(ids),
            (_, None) => Gating::Stored,
        };
        Ok(Changes { gating, lora: None })
    }

    fn layer(
        &self,
        l: usize,
        x: &Tensor,
        tables: &mut Tables<'_>,
        batch: &Batch,
        changes: &Changes<'_>,
        known: Option<&Tensor>,
    ) -> Result<(Passed, Trail), ModelError> {
        let layer = &self.layers[l];
        let table = tables.of(layer.rope());
        layer.forward_trail(&self.spec, x, table, &batch.rows, changes, known)
    }

    /// Back through the layers to the gates; below the first MoE layer nothing is wanted. Layers that were not kept whole are
    /// computed again.
    ///
    /// * `kept`: of each layer, from the first MoE layer on
    /// * `d`: gradient of the stream after the last layer
    pub fn backward(
        &self,
        back: &Back<'_>,
        mut kept: Vec<Kept>,
        mut d: Vec<f32>,
        interrupted: &mut Interrupted<'_>,
    ) -> Result<Gradients, Halt> {
        let Back { batch, routers, counted, penalties } = *back;
        let mut found = Gradients { gates: Gates::new(), load_balance: 0.0, z: 0.0 };
        let Routers::Gates(gates, _) = routers else { return Ok(found) };
        let mut tables = Tables::new(&batch.positions);
        let layers = gates.len() as f64;
        let first = self.layers.len() - kept.len();
        for l in (first..self.layers.len()).rev() {
            if interrupted() {
                return Err(Halt::Interrupted);
            }
            let Some(kept) = kept.pop() else { break };
            let changes = self.changes(l, routers)?;
            let trail = match kept {
                Kept::Trail(trail) => *trail,
                Kept::Input(x, known) => {
                    self.layer(l, &x, &mut tables, batch, &changes, known.as_ref())?.1
                }
            };
            let layer = &self.layers[l];
            let mut d_logits = None;
            if let Some((logits, routing)) = trail.choice() {
                let score = layer.router().map_or(Score::Softmax, |r| r.0.router.score);
                let weights = (penalties.0 / layers, penalties.1 / layers);
                let p = penalty(&to_vec(logits)?, routing, counted, score, weights);
                found.load_balance += p.load_balance / layers;
                found.z += p.z / layers;
                d_logits = (weights != (0.0, 0.0)).then_some(p.gradient);
            }
            let along = (tables.of(layer.rope()), &batch.rows[..]);
            let router = gates.contains_key(&l);
            let wanted = Wanted { input: l > first, router, d_logits: d_logits.as_deref() };
            let gradients = layer.backward(&self.spec, trail, along, &changes, wanted, d)?;
            if let Some(gate) = gradients.router {
                found.gates.insert(l, gate);
            }
            match gradients.input {
                Some(next) => d = next,
                None => break,
            }
        }
        Ok(found)
    }
}
