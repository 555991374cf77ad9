//! `ramplus_tl`: as `ram`, with changes of one model alone made up for what is shared.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::subtract;
use super::ram::{Active, EPSILON};
use super::{Base, Combine, Group, Method, Once, Scope, number, scan};

/// As `ram`, but what model `m` changed alone is multiplied by `1 + r clamp(shared/alone, 0, alpha)`, with the numbers of
/// its changes in this tensor that others share and that they do not.
pub(super) const METHOD: Method = Method {
    name: "ramplus_tl",
    summary: "as `ram`, with lone changes enlarged the more of a model's changes are shared",
    formula: "as `ram`, lone d times 1 + r clamp(shared/alone, 0, alpha), counted in each tensor",
    parameters: &[
        EPSILON,
        number("r", Scope::Global, Some(0.1), "strength of the enlargement"),
        number("alpha", Scope::Global, Some(0.2), "bound on shared/alone")
            .within(0.0, f64::INFINITY),
    ],
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Reinforced Agent Merging 2026, arXiv:2601.13572",
    build,
};

#[derive(Debug)]
struct RamPlus {
    active: Active,
    r: f64,
    alpha: f64,
    factors: Once<Vec<f32>>,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (r, alpha) = (group.global[1], group.global[2]);
    Ok(Box::new(RamPlus { active: Active::new(group)?, r, alpha, factors: Once::default() }))
}

impl RamPlus {
    /// One factor for each model that is not the base.
    fn factors(&self, inputs: &[WeightRef]) -> Result<&[f32], CheckpointError> {
        let active = &self.active;
        let found = self.factors.get(|| {
            let tensors = active.others.iter().chain([&active.base]).map(|&m| &inputs[m]);
            let n = active.others.len();
            let parts = scan(
                &tensors.collect::<Vec<_>>(),
                |_| vec![[0u64; 2]; n],
                |counts, _, blocks| {
                    let mut differences = vec![Vec::new(); n];
                    for (d, w) in differences.iter_mut().zip(blocks) {
                        subtract(w, &blocks[n], active.dtype, d);
                    }
                    for i in 0..blocks[n].len() {
                        let alone = usize::from(active.count(&differences, i) == 1);
                        for (count, d) in counts.iter_mut().zip(&differences) {
                            count[alone] += u64::from(d[i].abs() > active.epsilon);
                        }
                    }
                },
            )?;
            let factor = |m: usize| {
                let sum = |kind: usize| parts.iter().map(|p| p[m][kind]).sum::<u64>() as f64;
                let ratio = sum(0) / sum(1).max(f64::from(active.epsilon));
                (1.0 + self.r * ratio.clamp(0.0, self.alpha)) as f32
            };
            Ok((0..n).map(factor).collect())
        })?;
        Ok(found)
    }
}

impl Combine for RamPlus {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        self.factors(inputs).map(|_| ())
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        self.active.rows(self.factors(inputs)?, inputs, rows, out)
    }
}
