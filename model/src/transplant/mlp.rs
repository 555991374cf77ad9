//! A gated MLP whose numbers change: forward, and gradients with respect to its input and its matrices.

use std::ops::Range;

use moe_merge_kernels::dense::Into;
use moe_merge_kernels::{
    Activation, Dtype, Exec, KernelError, MatView, linear, linear_backward, linear_weight_backward,
};

use crate::error::ModelError;
use crate::ops::Expert;

/// `down(f(gate x) * up x)` in f32: gate and up `[inter, hidden]`, down `[hidden, inter]`, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub flat: Vec<f32>,
    pub hidden: usize,
    pub inter: usize,
    pub activation: Activation,
}

impl Mlp {
    /// Widened from the weights of `expert`.
    pub fn of(expert: &Expert, activation: Activation) -> Result<Self, ModelError> {
        let view = expert.view()?;
        let (inter, hidden) = (view.gate.rows(), view.gate.cols());
        let flat = vec![0.0; 3 * inter * hidden];
        let mut mlp = Self { flat, hidden, inter, activation };
        mlp.read(expert)?;
        Ok(mlp)
    }

    /// Takes the numbers of `expert`, which has the same sizes.
    pub fn read(&mut self, expert: &Expert) -> Result<(), ModelError> {
        let view = expert.view()?;
        let parts = self.flat.chunks_exact_mut((self.inter * self.hidden).max(1));
        for (part, matrix) in parts.zip([view.gate, view.up, view.down]) {
            for (row, out) in part.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                matrix.widen_row(row, out);
            }
        }
        Ok(())
    }

    /// Where one of the three matrices lies.
    pub fn range(&self, matrix: usize) -> Range<usize> {
        let size = self.hidden * self.inter;
        matrix * size..(matrix + 1) * size
    }

    /// Rows and columns of one of them.
    pub fn shape(&self, matrix: usize) -> [usize; 2] {
        if matrix == 2 { [self.hidden, self.inter] } else { [self.inter, self.hidden] }
    }

    fn view(&self, matrix: usize) -> Result<MatView<'_>, KernelError> {
        let [rows, cols] = self.shape(matrix);
        MatView::new(bytemuck::cast_slice(&self.flat[self.range(matrix)]), Dtype::F32, rows, cols)
    }

    /// Products with one matrix, `[tokens, rows]`.
    fn product(&self, matrix: usize, x: &[f32]) -> Result<Vec<f32>, KernelError> {
        let [rows, cols] = self.shape(matrix);
        let mut out = vec![0.0; x.len() / cols.max(1) * rows];
        linear(x, self.view(matrix)?, None, &mut out, &Exec::default())?;
        Ok(out)
    }

    /// What goes into the down projection, `[tokens, inter]`.
    pub fn activations(&self, x: &[f32]) -> Result<Vec<f32>, ModelError> {
        let mut a = self.product(0, x)?;
        self.activation.gate(&mut a, &self.product(1, x)?);
        Ok(a)
    }

    /// What comes out of it, `[tokens, hidden]`.
    pub fn down(&self, activations: &[f32]) -> Result<Vec<f32>, ModelError> {
        Ok(self.product(2, activations)?)
    }

    /// The MLP of `x [tokens, hidden]`.
    pub fn forward(&self, x: &[f32]) -> Result<Vec<f32>, ModelError> {
        self.down(&self.activations(x)?)
    }

    /// Gradients of `sum(d_out * forward(x))`: added to `weights` (laid out as `flat`, or empty where they are of no use);
    /// returned with respect to `x` where `wanted`.
    pub fn backward(
        &self,
        x: &[f32],
        d_out: &[f32],
        weights: &mut [f32],
        wanted: Input,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let (mut gate, mut up) = (self.product(0, x)?, self.product(1, x)?);
        let mut a = gate.clone();
        if !weights.is_empty() {
            self.activation.gate(&mut a, &up);
            let down = self.range(2);
            linear_weight_backward(&a, d_out, &mut weights[down], self.shape(2), Into::Add)?;
        }
        // The gradient of the activations takes their place.
        let exec = Exec::default();
        linear_backward(d_out, self.view(2)?, &mut a, Into::Overwrite, &exec)?;
        self.activation.gate_backward(&mut gate, &mut up, &a);
        let learns = !weights.is_empty();
        for (matrix, d) in [(0, &gate), (1, &up)].into_iter().filter(|_| learns) {
            let into = &mut weights[self.range(matrix)];
            linear_weight_backward(x, d, into, self.shape(matrix), Into::Add)?;
        }
        if wanted == Input::Frozen {
            return Ok(None);
        }
        let mut d_x = vec![0.0; x.len()];
        linear_backward(&gate, self.view(0)?, &mut d_x, Into::Overwrite, &exec)?;
        linear_backward(&up, self.view(1)?, &mut d_x, Into::Add, &exec)?;
        Ok(Some(d_x))
    }
}

/// Whether a gradient with respect to the input is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// It is.
    Followed,
    /// It is not.
    Frozen,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 127) as f32 / 64.0 - 1.0).collect()
    }

    #[test]
    fn gradients_are_slopes() {
        let (hidden, inter, tokens) = (5, 7, 3);
        let flat = numbers(3 * hidden * inter, 1);
        let mlp = Mlp { flat, hidden, inter, activation: Activation::Silu };
        let (x, d) = (numbers(tokens * hidden, 2), numbers(tokens * hidden, 3));
        let value = |mlp: &Mlp, x: &[f32]| -> f64 {
            let out = mlp.forward(x).unwrap();
            out.iter().zip(&d).map(|(o, d)| f64::from(*o) * f64::from(*d)).sum()
        };
        let mut weights = vec![0.0; mlp.flat.len()];
        let d_x = mlp.backward(&x, &d, &mut weights, Input::Followed).unwrap().unwrap();
        let near = |slope: f64, found: f32| {
            assert!(
                (slope - f64::from(found)).abs() < 5e-3 * slope.abs().max(1.0),
                "{slope} {found}"
            );
        };
        for (i, found) in weights.iter().enumerate() {
            let moved = |by: f32| {
                let mut other = mlp.clone();
                other.flat[i] += by;
                value(&other, &x)
            };
            near((moved(1e-2) - moved(-1e-2)) / 2e-2, *found);
        }
        for (i, found) in d_x.iter().enumerate() {
            let moved = |by: f32| {
                let mut other = x.clone();
                other[i] += by;
                value(&mlp, &other)
            };
            near((moved(1e-2) - moved(-1e-2)) / 2e-2, *found);
        }
    }
}
