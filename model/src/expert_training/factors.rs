//! Factors: first values, and the way into a pass.

use candle_core::{Device, Tensor, Var};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{Dropout, FactorKind, FactorPair, FactorPlan, Factors, Part, TrainedFactors};
use crate::lora::{ExpertFactors, LoraFactors};

/// A step of a router moves a logit by at most about so many times the learning rate, whatever the width.
const ROUTER_RATE: f32 = 64.0;

impl FactorPair {
    /// Before the first step: the update is 0.
    ///
    /// Low rank: `a` uniform in `±1/√input`, `b` 0, as PEFT begins (Kaiming with `a = √5`). The numbers depend on seed,
    /// layer and projection alone.
    pub(super) fn new(
        plan: &FactorPlan,
        at: (usize, Part),
        (output, input): (usize, usize),
    ) -> Self {
        if at.1 == Part::Router {
            let (a, b) = (vec![0.0; input], vec![ROUTER_RATE / (input as f32 * plan.scale)]);
            return Self { rank: 1, input, output, a, b, trained: TrainedFactors::A };
        }
        match plan.kind {
            FactorKind::LowRank(rank) => {
                let (layer, part) = at;
                let mut random = ChaCha12Rng::seed_from_u64(plan.seed);
                random.set_stream((layer as u64) << 8 | part as u64);
                let bound = 1.0 / (input as f32).sqrt();
                let mut number = || {
                    let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
                    (2.0 * unit - 1.0) * bound
                };
                let a = (0..rank * input).map(|_| number()).collect();
                let b = vec![0.0; output * rank];
                Self { rank, input, output, a, b, trained: TrainedFactors::Both }
            }
            FactorKind::Full if input <= output => {
                let (a, b) = (identity(input), vec![0.0; output * input]);
                Self { rank: input, input, output, a, b, trained: TrainedFactors::B }
            }
            FactorKind::Full => {
                let (a, b) = (vec![0.0; output * input], identity(output));
                Self { rank: output, input, output, a, b, trained: TrainedFactors::A }
            }
        }
    }

    /// Whether `a` and `b` are trained.
    pub fn trains(&self) -> [bool; 2] {
        [self.trained != TrainedFactors::B, self.trained != TrainedFactors::A]
    }

    /// Numbers that are trained.
    pub fn parameters(&self) -> usize {
        let [a, b] = self.trains();
        usize::from(a) * self.a.len() + usize::from(b) * self.b.len()
    }
}

/// Dropout of one projection of one layer.
fn keyed(dropout: Dropout, layer: usize, part: Part) -> Dropout {
    let mut random = ChaCha12Rng::seed_from_u64(dropout.key);
    random.set_stream((layer as u64) << 8 | part as u64);
    Dropout { key: random.next_u64(), ..dropout }
}

fn identity(size: usize) -> Vec<f32> {
    let mut rows = vec![0.0; size * size];
    rows.iter_mut().step_by(size + 1).for_each(|v| *v = 1.0);
    rows
}

/// The factors of one layer as tensors.
pub(super) struct LayerFactors {
    pub factors: ExpertFactors,
    /// Tensors `a` and `b` of each pair, in the order of [`Part`].
    pub tensors: Vec<(Part, [Tensor; 2])>,
}

impl Factors {
    /// Numbers that are trained.
    pub fn parameters(&self) -> usize {
        self.pairs.values().map(FactorPair::parameters).sum()
    }

    /// Those of `layer`, if there are any; as variables where a gradient is wanted.
    pub(super) fn of(
        &self,
        layer: usize,
        expert: usize,
        variables: bool,
    ) -> candle_core::Result<Option<LayerFactors>> {
        let mut found = ExpertFactors { expert, gate: None, up: None, down: None };
        let mut tensors = Vec::new();
        for ((_, part), pair) in self.pairs.range((layer, Part::Gate)..=(layer, Part::Down)) {
            let tensor = |values: &[f32], shape: (usize, usize), trained: bool| {
                let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
                match variables && trained {
                    true => Ok(Var::from_tensor(&tensor)?.into_inner()),
                    false => candle_core::Result::Ok(tensor),
                }
            };
            let trains = pair.trains();
            let a = tensor(&pair.a, (pair.rank, pair.input), trains[0])?;
            let b = tensor(&pair.b, (pair.output, pair.rank), trains[1])?;
            let (scale, dropout) = (self.scale, self.dropout.map(|d| keyed(d, layer, *part)));
            let lora = LoraFactors { a: a.clone(), b: b.clone(), scale, dropout };
            match part {
                Part::Gate => found.gate = Some(lora),
                Part::Up => found.up = Some(lora),
                Part::Down => found.down = Some(lora),
                Part::Router => continue,
            }
            tensors.push((*part, [a, b]));
        }
        Ok((!tensors.is_empty()).then_some(LayerFactors { factors: found, tensors }))
    }
}
