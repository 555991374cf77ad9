//! Factors: first values, and the way into a pass.

use moe_merge_kernels::{ExpertLora, LoraPair};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{Dropout, FactorKind, FactorPair, FactorPlan, Factors, Part, TrainedFactors};

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

fn identity(size: usize) -> Vec<f32> {
    let mut rows = vec![0.0; size * size];
    rows.iter_mut().step_by(size + 1).for_each(|v| *v = 1.0);
    rows
}

/// Dropout of one projection of one layer.
fn keyed(dropout: Dropout, layer: usize, part: Part) -> Dropout {
    let mut random = ChaCha12Rng::seed_from_u64(dropout.key);
    random.set_stream((layer as u64) << 8 | part as u64);
    Dropout { key: random.next_u64(), ..dropout }
}

impl Factors {
    /// Numbers that are trained.
    pub fn parameters(&self) -> usize {
        self.pairs.values().map(FactorPair::parameters).sum()
    }

    /// Those beside the projections of `layer`, if there are any.
    pub(super) fn of(&self, layer: usize, expert: usize) -> Option<ExpertLora<'_>> {
        let pair = |part| {
            let FactorPair { rank, a, b, .. } = self.pairs.get(&(layer, part))?;
            let dropout = self.dropout.map(|d| keyed(d, layer, part));
            Some(LoraPair { a, b, rank: *rank, scale: self.scale, dropout })
        };
        let [gate, up, down] = Part::ALL.map(pair);
        let some = gate.is_some() || up.is_some() || down.is_some();
        some.then_some(ExpertLora { expert, gate, up, down })
    }
}
