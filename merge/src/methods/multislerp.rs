//! `multislerp`: the mean direction of several tensors, with their mean length.

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::{Gram, GramMethod, Weighted};
use super::{Base, Combine, Group, Method, Scope, flag, number};

/// `unit(sum_m w_m x_m / |x_m|) * sum_m w_m |x_m|`, with `x = W`, or `x = W - B` and then `+ B`. In f32, rounded once.
pub(super) const METHOD: Method = Method {
    name: "multislerp",
    summary: "weighted mean of directions, times the weighted mean of lengths",
    formula: "unit(sum w x/|x|) * sum w |x| with x = W or W - B, then + B",
    parameters: &[
        number("weight", Scope::Model, None, "weight of this model"),
        flag("normalize_weights", true, "divide the weights by their sum"),
        number(
            "eps",
            Scope::Global,
            Some(1e-8),
            "directions that cancel to less than this have no mean",
        )
        .within(0.0, 1.0),
    ],
    base: Base::Optional,
    models: (1, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "mergekit `merge_methods/multislerp.py`; its step in the tangent space cancels, what remains is this",
    build,
};

#[derive(Debug)]
struct MultiSlerp {
    /// Weight of each point.
    weights: Vec<f64>,
    eps: f64,
    sum: Weighted,
    name: String,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let own = group.own(0);
    let points = group.others();
    let mut weights: Vec<f64> = points.iter().map(|&m| own[m]).collect();
    if group.global[0] != 0.0 && weights.len() > 1 {
        let total: f64 = weights.iter().sum();
        if total == 0.0 {
            return Err(
                "the weights add up to zero, and `normalize_weights` divides by their sum".into()
            );
        }
        weights.iter_mut().for_each(|w| *w /= total);
    }
    // One model alone is the result as it is, base or not.
    let base = group.base.filter(|_| weights.len() > 1);
    let mut sum = Weighted::new(group, base);
    sum.points = points;
    Ok(Box::new(MultiSlerp { weights, eps: group.global[1], sum, name: group.name.clone() }))
}

/// Coefficients of the points; `None` if their directions cancel.
fn coefficients(weights: &[f64], eps: f64, gram: &Gram) -> Option<Vec<f64>> {
    let n = gram.size();
    if n == 1 {
        return Some(vec![1.0]);
    }
    let direction: Vec<f64> = (0..n).map(|m| weights[m] / (gram.norm(m) + eps)).collect();
    let length = gram.form(&direction, &direction).max(0.0).sqrt();
    if length < eps {
        return (n == 2).then(|| weights.to_vec());
    }
    let mean: f64 = (0..n).map(|m| weights[m] * gram.norm(m)).sum();
    Some(direction.iter().map(|d| d / length * mean).collect())
}

impl GramMethod for MultiSlerp {
    fn sum(&self) -> &Weighted {
        &self.sum
    }

    fn find(&self, gram: &Gram, inputs: &[WeightRef]) -> Result<Vec<f64>, CheckpointError> {
        coefficients(&self.weights, self.eps, gram).ok_or_else(|| CheckpointError::Malformed {
            what: "`multislerp` cannot be computed: the directions of the models cancel out".into(),
            file: inputs[0].origin().0,
            tensor: Some(self.name.clone()),
            expected: format!("a weighted mean direction longer than {:e}", self.eps),
            found: "a mean of length zero".into(),
            hint: Some("change the weights, or use `linear`".into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonal_vectors_by_hand() {
        // (3, 0) and (0, 4), equal weights: direction (1, 1)/sqrt 2, length 3.5.
        let gram = Gram::known(2, &[9.0, 0.0, 0.0, 16.0]);
        let found = coefficients(&[0.5, 0.5], 1e-12, &gram).unwrap();
        let expected = 3.5 / 2f64.sqrt();
        assert!(
            (found[0] * 3.0 - expected).abs() < 1e-9 && (found[1] * 4.0 - expected).abs() < 1e-9
        );
    }

    #[test]
    fn opposite_directions() {
        let two = Gram::known(2, &[1.0, -1.0, -1.0, 1.0]);
        assert_eq!(coefficients(&[0.5, 0.5], 1e-8, &two), Some(vec![0.5, 0.5]));
        // Three vectors at 120 degrees cancel, and have no mean direction.
        let c = -0.5;
        let three = Gram::known(3, &[1.0, c, c, c, 1.0, c, c, c, 1.0]);
        assert_eq!(coefficients(&[1.0 / 3.0; 3], 1e-8, &three), None);
    }
}
