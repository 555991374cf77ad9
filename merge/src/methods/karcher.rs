//! `karcher`: the point of the sphere nearest to all models.

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::{Gram, GramMethod, Weighted};
use super::{Base, Combine, Group, Method, Scope, number};

/// The Riemannian mean of the directions of the models, times the mean of their lengths. All models count alike. In f32,
/// rounded once.
pub(super) const METHOD: Method = Method {
    name: "karcher",
    summary: "mean of the models' directions on the sphere, times their mean length",
    formula: "u: repeat u <- exp_u(mean of log_u(W/|W|)); result u * mean |W|",
    parameters: &[
        number("max_iter", Scope::Global, Some(10.0), "steps, at most").within(0.0, 1e6),
        number("tol", Scope::Global, Some(1e-5), "angle that counts as none").within(0.0, 1.0),
    ],
    base: Base::Ordinary,
    models: (1, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Karcher 1977, Riemannian center of mass and mollifier smoothing; mergekit `merge_methods/karcher.py`",
    build,
};

#[derive(Debug)]
struct Karcher {
    max_iter: u64,
    tol: f64,
    sum: Weighted,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let (max_iter, tol) = (group.global[0] as u64, group.global[1]);
    Ok(Box::new(Karcher { max_iter, tol, sum: Weighted::new(group, None) }))
}

/// Coefficients of the models: every point met on the way is a combination of their directions, so that the Gram matrix
/// is all there is to know.
fn coefficients(gram: &Gram, max_iter: u64, tol: f64) -> Vec<f64> {
    let n = gram.size();
    if n == 1 {
        return vec![1.0];
    }
    let active: Vec<bool> = (0..n).map(|m| gram.norm(m) > tol).collect();
    let count = active.iter().filter(|a| **a).count();
    if count == 0 {
        return vec![0.0; n];
    }
    let alpha = 1.0 / count as f64;
    // Coefficients on W; those on the directions are `unit` times these.
    let unit = |m: usize| if active[m] { 1.0 / gram.norm(m) } else { 0.0 };
    let length = |a: &[f64]| gram.form(a, a).max(0.0).sqrt();
    let mut u: Vec<f64> = (0..n).map(|m| alpha * unit(m)).collect();
    let norm = length(&u);
    if norm < tol {
        let first = active.iter().position(|a| *a).unwrap_or(0);
        u.fill(0.0);
        u[first] = unit(first);
    } else {
        u.iter_mut().for_each(|a| *a /= norm);
    }
    for _ in 0..max_iter {
        let mut tangent = vec![0.0; n];
        for m in (0..n).filter(|m| active[*m]) {
            let mut axis = vec![0.0; n];
            axis[m] = unit(m);
            let cosine = gram.form(&u, &axis).clamp(-1.0, 1.0);
            let angle = cosine.acos();
            if angle < tol {
                continue;
            }
            let scale = alpha * angle / angle.sin();
            tangent[m] += scale * unit(m);
            tangent.iter_mut().zip(&u).for_each(|(t, u)| *t -= scale * cosine * u);
        }
        let step = length(&tangent);
        if step < tol {
            break;
        }
        let (sin, cos) = step.sin_cos();
        u.iter_mut().zip(&tangent).for_each(|(u, t)| *u = cos * *u + sin / step * t);
        let norm = length(&u);
        if norm > 0.0 {
            u.iter_mut().for_each(|a| *a /= norm);
        }
    }
    let mean = (0..n).map(|m| gram.norm(m)).sum::<f64>() / n as f64;
    u.iter().map(|a| a * mean).collect()
}

impl GramMethod for Karcher {
    fn sum(&self) -> &Weighted {
        &self.sum
    }

    fn find(&self, gram: &Gram, _: &[WeightRef]) -> Result<Vec<f64>, CheckpointError> {
        Ok(coefficients(gram, self.max_iter, self.tol))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_three_directions_on_a_circle() {
        // At 0, 0.4 and 1.1 rad the Riemannian mean is at 0.5 rad; the normalised sum is not.
        let angles = [0.0f64, 0.4, 1.1];
        let sums: Vec<f64> =
            angles.iter().flat_map(|a| angles.iter().map(move |b| (a - b).cos())).collect();
        let found = coefficients(&Gram::known(3, &sums), 50, 1e-12);
        let x: f64 = found.iter().zip(angles).map(|(c, a)| c * a.cos()).sum();
        let y: f64 = found.iter().zip(angles).map(|(c, a)| c * a.sin()).sum();
        assert!((y.atan2(x) - 0.5).abs() < 1e-9 && (x.hypot(y) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn zero_and_opposite_tensors_stay_finite() {
        assert_eq!(coefficients(&Gram::known(2, &[0.0; 4]), 10, 1e-5), [0.0, 0.0]);
        let found = coefficients(&Gram::known(2, &[1.0, -1.0, -1.0, 1.0]), 10, 1e-5);
        assert!(found.iter().all(|c| c.is_finite()));
        let found = coefficients(&Gram::known(2, &[4.0, 0.0, 0.0, 0.0]), 10, 1e-5);
        assert!((found[0] - 0.5).abs() < 1e-9 && found[1] == 0.0);
    }
}
