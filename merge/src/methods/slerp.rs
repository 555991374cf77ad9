//! `slerp`: along the arc between two tensors.

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::{Gram, GramMethod, Weighted};
use super::{Base, Combine, Group, Method, Scope, number};

/// `sin((1-t) a)/sin(a) v0 + sin(t a)/sin(a) v1` with the angle `a` between the whole tensors, `v0` the base; straight
/// interpolation where they are nearly (anti)parallel. In f32, rounded once.
pub(super) const METHOD: Method = Method {
    name: "slerp",
    summary: "spherical interpolation between the base and one other model",
    formula: "sin((1-t) a)/sin(a) B + sin(t a)/sin(a) W with the angle a between the whole tensors; \
              (1-t) B + t W where |cos a| > 0.9995",
    parameters: &[number("t", Scope::Global, None, "0: the base, 1: the other model")],
    base: Base::Required,
    models: (1, 1),
    whole_tensor: true,
    activations: None,
    source: "Shoemake 1985, Animating rotation with quaternion curves",
    build,
};

/// Above this cosine (of either sign) the arc is as good as straight.
const PARALLEL: f64 = 0.9995;

/// A norm up to this counts as zero: the tensor is used as it is.
const ZERO_NORM: f64 = 1e-8;

#[derive(Debug)]
struct Slerp {
    /// Where the base stands: 0 or 1.
    base: usize,
    t: f64,
    sum: Weighted,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (base, t) = (group.required_base()?, group.global[0]);
    Ok(Box::new(Slerp { base, t, sum: Weighted::new(group, None) }))
}

/// Coefficients of `v0` and `v1` for the sums `[v0 v0, v1 v1, v0 v1]`.
fn coefficients(t: f64, [aa, bb, ab]: [f64; 3]) -> [f64; 2] {
    let norm = |square: f64| if square.sqrt() > ZERO_NORM { square.sqrt() } else { 1.0 };
    let cosine = (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0);
    if cosine.abs() > PARALLEL { [1.0 - t, t] } else { arc(t, cosine) }
}

/// `sin((1-t) a)/sin(a)` and `sin(t a)/sin(a)` for the cosine of `a`.
pub(super) fn arc(t: f64, cosine: f64) -> [f64; 2] {
    let angle = cosine.acos();
    [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]
}

impl GramMethod for Slerp {
    fn sum(&self) -> &Weighted {
        &self.sum
    }

    fn find(&self, gram: &Gram, _: &[WeightRef]) -> Result<Vec<f64>, CheckpointError> {
        let (a, b) = (self.base, 1 - self.base);
        let found = coefficients(self.t, [gram.dot(a, a), gram.dot(b, b), gram.dot(a, b)]);
        Ok(vec![found[self.base], found[1 - self.base]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_angles_by_hand() {
        // Orthogonal vectors at t = 1/3: sin(60°) and sin(30°), both over sin(90°).
        let [a, b] = coefficients(1.0 / 3.0, [4.0, 9.0, 0.0]);
        assert!((a - 0.866_025_4).abs() < 1e-6 && (b - 0.5).abs() < 1e-6);
    }

    #[test]
    fn parallel_opposite_and_zero_stay_finite() {
        assert_eq!(coefficients(0.25, [1.0, 4.0, 2.0]), [0.75, 0.25]);
        assert_eq!(coefficients(0.25, [1.0, 1.0, -1.0]), [0.75, 0.25]);
        assert!(coefficients(0.5, [0.0, 1.0, 0.0]).iter().all(|c| c.is_finite()));
    }
}
