//! Gradients of LoRA factors, on a device.

use crate::cast::Dtype;
use crate::cuda::backend::Arg;
use crate::cuda::backend::THREADS;
use crate::cuda::device::{Buffer, Device, Rows};
use crate::cuda::error::CudaError;
use crate::cuda::linear::{CudaLinear, linear_backward};
use crate::cuda::matrix::Stack;
use crate::error::KernelError;
use crate::exec::Batching;
use crate::view::MatView;

/// The factors of `y += scale B (A x)`.
#[derive(Debug, Clone, Copy)]
pub struct LoraFactors<'a> {
    /// `[rank, in]`.
    pub a: &'a [f32],
    /// `[out, rank]`.
    pub b: &'a [f32],
    /// `alpha / rank`.
    pub scale: f32,
    /// Rows of `a` and columns of `b`.
    pub rank: usize,
}

/// Gradients of a pair of LoRA factors, and through them.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraGradients {
    /// `scale B^T dY^T X`, `[rank, in]`.
    pub a: Vec<f32>,
    /// `scale dY^T (X A^T)`, `[out, rank]`.
    pub b: Vec<f32>,
    /// `scale dY B A`, `[rows, in]`: what the factors add to the gradient of the input.
    pub x: Vec<f32>,
}

impl Device {
    /// Gradients of LoRA factors from the rows that went through them: for a factor pair of one expert, the rows of the
    /// pairs routed to it.
    ///
    /// * `x`: `[rows, in]`; `dy`: `[rows, out]`, the gradient of what the layer puts out
    /// * f32, summed over the rows from the first to the last
    ///
    /// # Errors
    /// [`KernelError::Length`] if factors and rows do not fit each other; [`CudaError::NoRoom`], or what the driver says.
    pub fn lora_gradients(
        &self,
        x: &[f32],
        dy: &[f32],
        rows: usize,
        factors: LoraFactors<'_>,
    ) -> Result<LoraGradients, CudaError> {
        let LoraFactors { a, b, scale, rank } = factors;
        let input = a.len().checked_div(rank).unwrap_or(0);
        let output = b.len().checked_div(rank).unwrap_or(0);
        KernelError::check("LoRA factor A", rank * input, a.len())?;
        KernelError::check("LoRA factor B", rank * output, b.len())?;
        KernelError::check("LoRA input", rows * input, x.len())?;
        KernelError::check("gradient of a LoRA output", rows * output, dy.len())?;
        let mut found =
            LoraGradients { a: vec![0.0; a.len()], b: vec![0.0; b.len()], x: vec![0.0; x.len()] };
        if rows == 0 || rank == 0 {
            return Ok(found);
        }
        let view =
            |values, rows, cols| MatView::new(bytemuck::cast_slice(values), Dtype::F32, rows, cols);
        let down = CudaLinear::upload(self, view(a, rank, input)?, None)?;
        let [a, b] = [(a, rank, input), (b, output, rank)]
            .map(|(v, rows, cols)| Stack::upload(self, &[view(v, rows, cols)?], Dtype::F32));
        let (a, b) = (a?, b?);
        let (x, dy) = (self.put_rows(x, rows, input)?, self.put_rows(dy, rows, output)?);
        let (low, d_low) = (self.rows(rows, rank)?, self.rows(rows, rank)?); // X A^T and dY B
        down.enqueue(&x, rows, &low.buffer, low.stride, Batching::Fastest)?;
        linear_backward(self, &dy, rows, &b, &d_low.buffer, d_low.stride)?;
        let (d_a, d_b) = (self.scratch(rank * input)?, self.scratch(output * rank)?);
        self.outer(&d_low, &x, rows, (rank, input), scale, &d_a, (input, 1))?;
        self.outer(&low, &dy, rows, (rank, output), scale, &d_b, (1, rank))?;
        let d_x = self.scratch(found.x.len())?;
        linear_backward(self, &d_low, rows, &a, &d_x, input)?;
        self.get(&d_a, &mut found.a)?;
        self.get(&d_b, &mut found.b)?;
        self.get(&d_x, &mut found.x)?;
        found.x.iter_mut().for_each(|v| *v *= scale);
        Ok(found)
    }

    /// Enqueues `out[i steps.0 + j steps.1] = scale sum_n a[n, i] b[n, j]` for `i`, `j` below `sizes`.
    #[allow(clippy::too_many_arguments)] // of the kernel behind it
    fn outer(
        &self,
        a: &Rows,
        b: &Rows,
        rows: usize,
        sizes: (usize, usize),
        scale: f32,
        out: &Buffer,
        steps: (usize, usize),
    ) -> Result<(), CudaError> {
        let int = |count| CudaError::int("numbers of a row", count).map(Arg::Int);
        let mut args = vec![a.arg(), a.stride()?, b.arg(), b.stride()?, int(rows)?, int(sizes.1)?];
        args.extend([Arg::Float(scale), out.arg(), int(steps.0)?, int(steps.1)?]);
        let grid = (sizes.1.div_ceil(THREADS as usize), sizes.0);
        // SAFETY: the arguments are those of `outer`: `a` and `b` have `rows` rows of at least `sizes` numbers, and the
        // steps reach every place of `out`, which has `sizes.0 * sizes.1`, once.
        unsafe { self.launch("outer", grid, &args) }
    }
}
