//! `model_stock`: between the base and the mean, as far as the models agree.

use std::ops::Range;

use moe_merge_checkpoint::{CheckpointError, WeightRef};

use super::gram::{Gram, Weighted, subtract};
use super::{Base, Combine, Group, Method, flag, read, round};

/// `t mean(W) + (1-t) B`, `t = N c / (1 + (N-1) c)` with the mean cosine `c` between the differences to the base. In f32,
/// rounded once.
pub(super) const METHOD: Method = Method {
    name: "model_stock",
    summary: "between the base and the mean of the models, as far as their task vectors agree",
    formula: "t mean(W) + (1-t) B with t = N c/(1 + (N-1) c), c = mean cosine of the W - B",
    parameters: &[flag("filter_wise", false, "one t for each row instead of each tensor")],
    base: Base::Required,
    models: (2, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Jang et al. 2024, Model Stock, arXiv:2403.19522",
    build,
};

/// A product of norms below this counts as this: small differences stay nearer to the base.
const LEAST_PRODUCT: f64 = 1e-6;

#[derive(Debug)]
struct ModelStock {
    filter_wise: bool,
    sum: Weighted,
}

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    let filter_wise = group.global[0] != 0.0 && group.inputs[0].shape().len() > 1;
    let sum = Weighted::new(group, Some(group.required_base()?));
    Ok(Box::new(ModelStock { filter_wise, sum }))
}

/// The share of the mean, for the Gram matrix of the differences.
fn share(gram: &Gram) -> f64 {
    let n = gram.size();
    let (mut sum, mut pairs) = (0.0, 0);
    for i in 0..n {
        for j in i + 1..n {
            let product = (gram.norm(i) * gram.norm(j)).max(LEAST_PRODUCT);
            sum += (gram.dot(i, j) / product).clamp(-1.0, 1.0);
            pairs += 1;
        }
    }
    let cosine = sum / f64::from(pairs.max(1));
    let denominator = 1.0 + (n as f64 - 1.0) * cosine;
    if denominator.abs() < 1e-6 { 0.0 } else { n as f64 * cosine / denominator }
}

impl ModelStock {
    fn whole(&self, inputs: &[WeightRef]) -> Result<&[f32], CheckpointError> {
        self.sum
            .coefficients(inputs, |gram| Ok(vec![share(gram) / gram.size() as f64; gram.size()]))
    }

    fn each_row(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let Some(base) = self.sum.base else { return Ok(()) };
        let n = self.sum.points.len();
        let mut differences = vec![Vec::new(); n];
        for (row, out) in rows.zip(out.chunks_exact_mut(inputs[0].cols().max(1))) {
            inputs[base].read_rows(row..row + 1, out)?;
            for (d, &m) in differences.iter_mut().zip(&self.sum.points) {
                subtract(&read(&inputs[m], row..row + 1)?, out, self.sum.dtype, d);
            }
            let c = (share(&Gram::of_vectors(&differences)) / n as f64) as f32;
            for (i, o) in out.iter_mut().enumerate() {
                let sum: f32 = differences.iter().map(|d| c * d[i]).sum();
                *o = round(*o + sum, self.sum.dtype);
            }
        }
        Ok(())
    }
}

impl Combine for ModelStock {
    fn prepare(&self, inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        if self.filter_wise { Ok(()) } else { self.whole(inputs).map(|_| ()) }
    }

    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        match self.filter_wise {
            true => self.each_row(inputs, rows, out),
            false => self.sum.rows(self.whole(inputs)?, inputs, rows, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_by_hand() {
        assert!((share(&Gram::known(2, &[4.0, 4.0, 4.0, 4.0])) - 1.0).abs() < 1e-12);
        assert_eq!(share(&Gram::known(2, &[4.0, 0.0, 0.0, 4.0])), 0.0);
        assert_eq!(share(&Gram::known(2, &[4.0, -4.0, -4.0, 4.0])), 0.0);
        // N = 3, c = 0.5: 1.5 / 2.
        let sums = [1.0, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0];
        assert!((share(&Gram::known(3, &sums)) - 0.75).abs() < 1e-12);
        // Norms of 1e-4: the product is raised from 1e-8 to 1e-6.
        let small = Gram::known(2, &[1e-8, 1e-8, 1e-8, 1e-8]);
        assert!((share(&small) - 0.02 / 1.01).abs() < 1e-12);
    }
}
