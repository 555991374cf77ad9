//! Expert parameters packed into one tensor (`target_parameters`): one pair of factors for all experts.
//!
//! `A` `[r·E, in]` has the rows of expert `e` together (row `e·r + j`), `B` `[out, r·E]` the columns of rank `j`
//! together (column `j·E + e`). PEFT from 0.20 takes `in` and `out` as the layer uses them, before that as the
//! parameter is stored, so that the product is the transpose; the shapes tell which.

use std::sync::Arc;

use crate::error::CheckpointError;
use crate::weight::{Update, Updated, Weight, WeightRef};

use super::file::{Parts, Stored};
use super::targets::Applied;
use super::weight::{Factor, LowRank};

/// A packed parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parameter {
    /// `gate_up_proj`: `[E, 2·inner, hidden]`, the gate above the up projection.
    GateUp,
    /// `down_proj`: `[E, hidden, inner]`.
    Down,
}

/// Whether the product of the factors is the update or its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// `ΔW[e] = s·B_e·A_e`, PEFT from 0.20.
    New,
    /// `ΔW[e] = s·(B_e·A_e)ᵀ`, PEFT before.
    Old,
}

/// Names of one expert's weights in the base.
#[derive(Debug)]
struct Expert {
    gate: String,
    up: String,
    down: String,
}

/// A pair of packed factors with the experts that it is for.
#[derive(Debug)]
pub(super) struct Packed<'a> {
    /// The experts' module, by its name in the adapter.
    module: String,
    parameter: Parameter,
    /// The packings that its shapes allow.
    packings: Vec<Packing>,
    a: &'a Stored,
    b: &'a Stored,
    experts: Vec<Expert>,
    inner: usize,
    hidden: usize,
}

impl<'a> Packed<'a> {
    /// Reads the factors at `module`, the inner (`nested`) or outer of two; `None` if no experts are there.
    pub fn new(
        applied: &Applied<'a>,
        module: &str,
        nested: bool,
        parts: &'a Parts,
    ) -> Result<Option<Self>, CheckpointError> {
        let experts = experts_at(applied, module);
        let (Some(first), Some(a), Some(b)) = (experts.first(), &parts.a, &parts.b) else {
            return Ok(None);
        };
        // Bias, magnitude and the rest do not exist for packed parameters.
        if parts.keys().count() != 2 {
            return Ok(None);
        }
        let shape = applied.source.tensors[&first.gate].shape();
        let (Some(&inner), Some(&hidden)) = (shape.first(), shape.get(1)) else { return Ok(None) };
        let (a_shape, b_shape) = (a.1.shape(), b.1.shape());
        let (Some(&width), Some(&height)) = (a_shape.get(1), b_shape.first()) else {
            return Err(applied.misfit(&a.0, a_shape, &[experts.len(), hidden], &first.gate));
        };
        let options: Vec<(Parameter, Packing)> = [
            (Parameter::GateUp, Packing::New, hidden, 2 * inner),
            (Parameter::GateUp, Packing::Old, 2 * inner, hidden),
            (Parameter::Down, Packing::New, inner, hidden),
            (Parameter::Down, Packing::Old, hidden, inner),
        ]
        .into_iter()
        .filter(|&(_, _, inputs, outputs)| (inputs, outputs) == (width, height))
        .map(|(parameter, packing, ..)| (parameter, packing))
        .collect();
        let Some(&(parameter, _)) = options.first() else {
            return Err(CheckpointError::Malformed {
                what: "packed experts of the adapter do not fit the base".into(),
                file: applied.file.path.clone(),
                tensor: Some(a.0.clone()),
                expected: format!(
                    "factors of gate_up_proj [{}, {hidden}] or down_proj [{hidden}, {inner}] for {} experts",
                    2 * inner,
                    experts.len()
                ),
                found: format!(
                    "A {a_shape:?}, B {b_shape:?}{}",
                    if nested { " (inner)" } else { "" }
                ),
                hint: applied.base_hint(),
            });
        };
        let packings = options.into_iter().map(|(_, packing)| packing).collect();
        let module = module.to_owned();
        Ok(Some(Self { module, parameter, packings, a, b, experts, inner, hidden }))
    }

    fn parameter_name(&self) -> String {
        let name = match self.parameter {
            Parameter::GateUp => "gate_up_proj",
            Parameter::Down => "down_proj",
        };
        format!("{}.{name}", self.module)
    }

    /// The update of expert `e`, rows `from..from + count` of the stored parameter.
    fn delta(
        &self,
        packing: Packing,
        e: usize,
        rank: usize,
        scale: f32,
        rows: (usize, usize),
    ) -> LowRank {
        let a = Factor::new(&self.a.1).rows_from(e * rank, rank);
        let b = Factor::new(&self.b.1).cols_by(e, self.experts.len(), rank);
        let (left, right) = match packing {
            Packing::New => (b, a),
            Packing::Old => (a.transposed(), b.transposed()),
        };
        LowRank::new(left.rows_from(rows.0, rows.1), right, scale)
    }
}

fn experts_at(applied: &Applied, module: &str) -> Vec<Expert> {
    let find = |e: usize| {
        let name = |part: &str| applied.resolve(&format!("{module}.{e}.{part}.weight"));
        Some(Expert { gate: name("gate_proj")?, up: name("up_proj")?, down: name("down_proj")? })
    };
    (0..).map_while(find).collect()
}

impl<'a> Applied<'a> {
    /// Puts packed experts on the experts of the base, one by one.
    pub fn packed(&mut self, all: Vec<Packed<'a>>) -> Result<(), CheckpointError> {
        for (i, one) in all.iter().enumerate() {
            let twin = all[..i].iter().find(|o| o.parameter_name() == one.parameter_name());
            if let Some(twin) = twin {
                return Err(CheckpointError::Malformed {
                    what: "adapter has two pairs of factors for the same expert parameter".into(),
                    file: self.file.path.clone(),
                    tensor: Some(one.a.0.clone()),
                    expected: "one pair for gate_up_proj and one for down_proj".into(),
                    found: format!(
                        "`{}` has the shape of `{}` too",
                        twin.a.0,
                        one.parameter_name()
                    ),
                    hint: self.base_hint(),
                });
            }
        }
        // One version of PEFT wrote the whole file, so an unambiguous pair speaks for the others.
        let known = all.iter().find(|p| p.packings.len() == 1).map(|p| p.packings[0]);
        for packed in &all {
            let packing = match packed.packings[..] {
                [only] => only,
                _ => known.unwrap_or_else(|| self.packing_by_version()),
            };
            self.expert_parameter(packed, packing)?;
        }
        Ok(())
    }

    fn packing_by_version(&mut self) -> Packing {
        match self.config.old_packing() {
            Some(true) => Packing::Old,
            Some(false) => Packing::New,
            None => {
                self.note(
                    "the shapes of the packed experts fit both layouts of PEFT and the adapter names no \
                     version: taken as written by PEFT 0.20 or later"
                        .into(),
                );
                Packing::New
            }
        }
    }

    fn expert_parameter(
        &mut self,
        packed: &Packed,
        packing: Packing,
    ) -> Result<(), CheckpointError> {
        let name = packed.parameter_name();
        let (rank, scale) = self.rank_and_scale(&name, packed.a, packed.b, packed.experts.len())?;
        if scale == 0.0 {
            return Ok(());
        }
        for (e, expert) in packed.experts.iter().enumerate() {
            let parts = match packed.parameter {
                Parameter::GateUp => {
                    vec![(&expert.gate, 0, packed.inner), (&expert.up, packed.inner, packed.inner)]
                }
                Parameter::Down => vec![(&expert.down, 0, packed.hidden)],
            };
            for (target, from, rows) in parts {
                let delta = packed.delta(packing, e, rank, scale, (from, rows));
                let base = self.source.tensors[target].clone();
                if base.shape() != delta.shape() {
                    return Err(self.misfit(&packed.a.0, &delta.shape(), base.shape(), target));
                }
                let weight: WeightRef = Arc::new(Updated::new(base, 0, delta));
                self.source.tensors.insert(target.clone(), weight);
            }
        }
        Ok(())
    }
}
