//! `slerp`: along the arc between two tensors.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef};

use super::{Base, Combine, Group, Method, Once, Scope, number, read, round, scan};

/// `sin((1-t) a)/sin(a) v0 + sin(t a)/sin(a) v1` with the angle `a` between the whole tensors, `v0` the base; straight
/// interpolation where they are nearly (anti)parallel. In f32, rounded once.
pub(super) const METHOD: Method = Method {
    name: "slerp",
    summary: "spherical interpolation between the base and one other model",
    parameters: &[number("t", Scope::Global, None, "0: the base, 1: the other model")],
    base: Base::Required,
    models: (2, 2),
    whole_tensor: true,
    source: "Shoemake 1985, Animating rotation with quaternion curves",
    build,
};

/// Above this cosine (of either sign) the arc is as good as straight.
const PARALLEL: f64 = 0.9995;

/// A norm up to this counts as zero: the tensor is used as it is.
const ZERO_NORM: f64 = 1e-8;

#[derive(Debug)]
struct Slerp {
    base: usize,
    t: f64,
    dtype: Dtype,
    coefficients: Once<[f32; 2]>,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let base = group.base.ok_or("the base is not among the models")?;
    let (t, dtype) = (group.global[0], group.dtype);
    Ok(Box::new(Slerp { base, t, dtype, coefficients: Once::default() }))
}

/// Coefficients of `v0` and `v1` for the sums `[v0 v0, v1 v1, v0 v1]`.
fn coefficients(t: f64, [aa, bb, ab]: [f64; 3]) -> [f32; 2] {
    let norm = |square: f64| if square.sqrt() > ZERO_NORM { square.sqrt() } else { 1.0 };
    let cosine = (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0);
    if cosine.abs() > PARALLEL {
        return [(1.0 - t) as f32, t as f32];
    }
    let angle = cosine.acos();
    [(((1.0 - t) * angle).sin() / angle.sin()) as f32, ((t * angle).sin() / angle.sin()) as f32]
}

impl Combine for Slerp {
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let (v0, v1) = (&inputs[self.base], &inputs[1 - self.base]);
        let &[c0, c1] = self.coefficients.get(|| {
            let mut sums = [0f64; 3];
            scan(&[v0, v1], |_, blocks| {
                for (&a, &b) in blocks[0].iter().zip(&blocks[1]) {
                    let (a, b) = (a as f64, b as f64);
                    sums = [sums[0] + a * a, sums[1] + b * b, sums[2] + a * b];
                }
            })?;
            Ok(coefficients(self.t, sums))
        })?;
        v0.read_rows(rows.clone(), out)?;
        for (o, b) in out.iter_mut().zip(read(v1, rows)?) {
            *o = round(c0 * *o + c1 * b, self.dtype);
        }
        Ok(())
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
