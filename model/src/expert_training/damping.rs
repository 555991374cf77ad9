//! Small steps along what other text sends through an expert.

use std::collections::BTreeMap;
use std::ops::Range;

use moe_merge_kernels::svd::truncated_svd;

use super::{Factors, GradientError, Lesson, Part, TrainedFactors, Trainee};
use crate::error::ModelError;

/// Directions of which each projection remembers the use.
const DIRECTIONS: usize = 32;

/// A direction used this many times the mean is damped by `1/√2`.
const KNEE: f64 = 0.1;

/// What text that an expert is not trained on sends through its projections: where that lies, steps are made small, so that
/// learning something new moves what is known as little as it can.
///
/// With `C` the second moments of what a projection reads, factors are trained as if they read `P z` in the place of `z`,
/// `P = (1 + C / (0.1 mean)) ^ -1/2` with `mean` the mean eigenvalue, scaled so that `P` is 1 where `C` is smallest. Of `C`
/// the 32 largest eigenvalues are kept, and the mean of the others.
///
/// # Source
/// Saha and Roy, Continual Learning with Scaled Gradient Projection (arXiv:2302.01386), with the factors of LoRA in the place
/// of weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Damping {
    /// By layer, of what gate and up read, and of what down reads.
    layers: BTreeMap<usize, [Used; 2]>,
}

/// The directions that a projection reads most.
#[derive(Debug, Clone, PartialEq, Default)]
struct Used {
    /// Orthonormal, `[count, input]`.
    directions: Vec<f32>,
    /// What is taken off along each.
    off: Vec<f32>,
}

impl Damping {
    /// Runs the model as it is over `lessons`, and looks at what the expert's projections in `layers` read there.
    ///
    /// # Errors
    /// [`GradientError`].
    pub fn new(
        trainee: &Trainee,
        layers: Range<usize>,
        lessons: &[&Lesson],
        interrupted: &mut (dyn FnMut() -> bool + Send),
    ) -> Result<Self, GradientError> {
        let mut damping = Self::default();
        trainee.see_inputs(lessons, layers, interrupted, &mut |layer, rows, inputs| {
            let [z, h] = inputs.map(|z| Used::by(z, rows));
            damping.layers.insert(layer, [z?, h?]);
            Ok(())
        })?;
        Ok(damping)
    }

    /// The first values of low-rank factors, damped.
    pub fn begin(&self, factors: &mut Factors) {
        for (at, pair) in &mut factors.pairs {
            if let (TrainedFactors::Both, Some(used)) = (pair.trained, self.used(*at)) {
                used.damp(&mut pair.a, pair.input);
            }
        }
    }

    /// `x P`, `x [rows, input]` beside a projection.
    pub(super) fn damp(&self, at: (usize, Part), x: &mut [f32], input: usize) {
        if let Some(used) = self.used(at) {
            used.damp(x, input);
        }
    }

    fn used(&self, (layer, part): (usize, Part)) -> Option<&Used> {
        let [z, h] = self.layers.get(&layer)?;
        match part {
            Part::Gate | Part::Up => Some(z),
            Part::Down => Some(h),
            Part::Router => None,
        }
    }
}

impl Used {
    /// Of the rows of `z [rows, input]`.
    fn by(z: &[f32], rows: usize) -> Result<Self, GradientError> {
        let input = z.len() / rows.max(1);
        let found = truncated_svd(z, rows, input, DIRECTIONS).map_err(ModelError::from)?;
        let squares: Vec<f64> = found.values.iter().map(|v| v * v).collect();
        let mean = found.energy / input.max(1) as f64;
        if mean <= 0.0 {
            return Ok(Self::default());
        }
        let rest = (found.energy - squares.iter().sum::<f64>()).max(0.0);
        let rest = rest / (input - squares.len()).max(1) as f64;
        let factor = |square: f64| (1.0 + square / (KNEE * mean)).sqrt().recip();
        let off = squares.iter().map(|s| (1.0 - factor(*s) / factor(rest)) as f32).collect();
        Ok(Self { directions: found.right, off })
    }

    fn damp(&self, x: &mut [f32], input: usize) {
        for row in x.chunks_exact_mut(input.max(1)) {
            for (direction, off) in self.directions.chunks_exact(input.max(1)).zip(&self.off) {
                let along: f32 = row.iter().zip(direction).map(|(x, d)| x * d).sum();
                row.iter_mut().zip(direction).for_each(|(x, d)| *x -= off * along * d);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert_training::optimise::{self, Optimiser};
    use crate::expert_training::{FactorGradients, FactorPair};

    #[test]
    fn what_is_used_is_damped_and_the_rest_is_not() {
        // Two directions of eight are read, one nine times as strongly as the other.
        let mut z = vec![0.0; 16];
        (z[1], z[8 + 4]) = (3.0, 1.0);
        let used = Used::by(&z, 2).unwrap();
        let mut x = vec![1.0; 8];
        used.damp(&mut x, 8);
        let mean = 10.0 / 8.0;
        let factor = |square: f64| (1.0 + square / (KNEE * mean)).sqrt().recip() as f32;
        for (i, x) in x.iter().enumerate() {
            let expected = match i {
                1 => factor(9.0),
                4 => factor(1.0),
                _ => 1.0,
            };
            assert!((x - expected).abs() < 1e-6, "{i}: {x}, {expected}");
        }
    }

    #[test]
    fn a_damped_step_is_a_step_of_factors_that_read_damped_inputs() {
        let at = (0, Part::Gate);
        let used = Used::by(&[2.0, 1.0, 0.5, 0.0, 1.0, 0.0], 2).unwrap();
        let damping = Damping { layers: [(0, [used, Used::default()])].into() };
        let factors = |a: Vec<f32>| {
            let trained = TrainedFactors::Both;
            let pair = FactorPair { rank: 1, input: 3, output: 1, a, b: vec![1.0], trained };
            Factors { scale: 1.0, pairs: [(at, pair)].into(), dropout: None }
        };
        let (mut damped, mut inner) = (factors(vec![0.3, -0.2, 0.1]), factors(vec![0.0; 3]));
        let mut moments = [&damped; 4].map(optimise::zeros);
        let [m, v, inner_m, inner_v] = &mut moments;
        let adam = Optimiser::AdamW { weight_decay: 0.0 };
        for (number, g) in [(1, [1.0, -2.0, 0.5]), (2, [0.2, 0.4, -3.0])] {
            let step = optimise::Step { number, rate: 0.1, scale: 1.0 };
            let mut gradients = FactorGradients::from([(at, [g.to_vec(), vec![0.1]])]);
            optimise::step(adam, step, Some(&damping), &mut damped, &gradients, m, v);
            damping.damp(at, &mut gradients.get_mut(&at).unwrap()[0], 3);
            optimise::step(adam, step, None, &mut inner, &gradients, inner_m, inner_v);
        }
        let (damped, mut inner) = (&damped.pairs[&at], inner.pairs[&at].clone());
        assert!((inner.a[0] - damped.a[0] + 0.3).abs() > 1e-3, "the damping is felt");
        damping.damp(at, &mut inner.a, 3);
        for ((found, inner), first) in damped.a.iter().zip(&inner.a).zip([0.3, -0.2, 0.1]) {
            assert!((found - first - inner).abs() < 1e-6, "{damped:?} {inner:?}");
        }
        assert_eq!(damped.b, inner.b);
    }

    #[test]
    fn an_expert_that_nobody_visits_is_not_damped() {
        let used = Used::by(&[], 0).unwrap();
        let mut x = vec![1.0, 2.0];
        used.damp(&mut x, 2);
        assert_eq!(x, [1.0, 2.0]);
        assert_eq!(Used::by(&[0.0; 4], 2).unwrap(), Used::default());
    }
}
