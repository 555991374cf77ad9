//! Linear layers with frozen weights on a device.

use crate::cuda::backend::{Arg, THREADS, Use};
use crate::cuda::device::{Buffer, Device, Rows};
use crate::cuda::error::CudaError;
use crate::cuda::matrix::Stack;
use crate::error::KernelError;
use crate::exec::Batching;
use crate::view::MatView;

/// Rows and columns of an output tile, and tokens that a row-by-row product takes: constants of `moe.cu`.
pub(super) const TILE: usize = 64;
const MOST_TOKENS: usize = 8;

/// Weight rows that a block of the row-by-row kernels reads, one for each warp.
pub(super) const ROWS_OF_BLOCK: usize = THREADS as usize / 32;

/// `y = x W^T + b` with `W` on the device.
#[derive(Debug)]
pub struct CudaLinear {
    device: Device,
    weight: Stack,
    bias: Option<Buffer>,
}

impl CudaLinear {
    /// Uploads a weight `[out, in]` and a bias `[out]`.
    ///
    /// # Errors
    /// [`CudaError::NoRoom`], a bias of the wrong length, or what the driver says.
    pub fn upload(
        device: &Device,
        weight: MatView<'_>,
        bias: Option<&[f32]>,
    ) -> Result<Self, CudaError> {
        if let Some(bias) = bias {
            KernelError::check("linear bias", weight.rows(), bias.len())?;
        }
        let bias = bias.map(|b| device.put(b, Use::Weights)).transpose()?;
        let weight = Stack::upload(device, &[weight], weight.dtype())?;
        Ok(Self { device: device.clone(), weight, bias })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.weight.buffer.bytes() + self.bias.as_ref().map_or(0, Buffer::bytes)
    }

    /// Features that go out and in.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.weight.rows, self.weight.cols)
    }

    /// `x [tokens, in]` to `out [tokens, out]`, as [`crate::linear()`].
    ///
    /// # Errors
    /// [`KernelError::Length`] if the slices do not fit the weight; [`CudaError::NoRoom`], or what the driver says.
    pub fn forward(&self, x: &[f32], out: &mut [f32]) -> Result<(), CudaError> {
        self.forward_as(x, out, Batching::Fastest)
    }

    /// As [`CudaLinear::forward`], in the kernels that `batching` says.
    ///
    /// # Errors
    /// As [`CudaLinear::forward`].
    pub fn forward_as(
        &self,
        x: &[f32],
        out: &mut [f32],
        batching: Batching,
    ) -> Result<(), CudaError> {
        let (rows, cols) = self.shape();
        let tokens = x.len().checked_div(cols).unwrap_or(out.len() / rows.max(1));
        KernelError::check("linear input", tokens * cols, x.len())?;
        KernelError::check("linear output", tokens * rows, out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        if batching == Batching::Alone && tokens > MOST_TOKENS {
            let parts = x.chunks(MOST_TOKENS * cols.max(1)).zip(out.chunks_mut(MOST_TOKENS * rows));
            return parts.into_iter().try_for_each(|(x, out)| self.forward_as(x, out, batching));
        }
        let x = self.device.put_rows(x, tokens, cols)?;
        let y = self.device.scratch(out.len())?;
        self.enqueue(&x, tokens, &y, rows, batching)?;
        self.device.get(&y, out)
    }

    /// Enqueues `out [tokens, stride] = x W^T + b`; columns from the features out to `stride` become 0 where the tokens are
    /// more than eight, or go [`Batching::Together`], and are left alone else.
    pub(super) fn enqueue(
        &self,
        x: &Rows,
        tokens: usize,
        out: &Buffer,
        stride: usize,
        batching: Batching,
    ) -> Result<(), CudaError> {
        let w = &self.weight;
        let bias = self.bias.as_ref().map_or(Arg::Pointer(0), Buffer::arg);
        let (count, stride) =
            (CudaError::int("tokens", tokens)?, CudaError::int("numbers of a row", stride)?);
        let mut args = vec![x.arg(), x.stride()?, w.arg(), w.stride(), bias, Arg::Int(count)];
        args.extend([w.rows(), w.cols(), out.arg(), Arg::Int(stride)]);
        // SAFETY (both): the arguments are those of `linear_*` (and of `gemv_*`, without the last); `x` has `tokens` padded
        // rows of `w.cols`, `out` as many rows of `stride` numbers, which are at least `w.rows`.
        if tokens <= MOST_TOKENS && batching != Batching::Together {
            let grid = (w.rows.div_ceil(ROWS_OF_BLOCK), 1);
            unsafe { self.device.launch_for("gemv", w.dtype, grid, &args) }
        } else {
            args.push(self.device.exact());
            let grid = (tokens.div_ceil(TILE), w.rows.div_ceil(TILE));
            unsafe { self.device.launch_for("linear", w.dtype, grid, &args) }
        }
    }

    /// Gradient with respect to the input, as [`crate::linear_backward()`]: `dy [tokens, out]` to `dx [tokens, in]`,
    /// overwritten.
    ///
    /// # Errors
    /// As [`CudaLinear::forward`].
    pub fn backward(&self, dy: &[f32], dx: &mut [f32]) -> Result<(), CudaError> {
        let (rows, cols) = self.shape();
        let tokens = dy.len().checked_div(rows).unwrap_or(dx.len() / cols.max(1));
        KernelError::check("gradient of a linear output", tokens * rows, dy.len())?;
        KernelError::check("gradient of a linear input", tokens * cols, dx.len())?;
        if dx.is_empty() {
            return Ok(());
        }
        let dy = self.device.put_rows(dy, tokens, rows)?;
        let out = self.device.scratch(dx.len())?;
        linear_backward(&self.device, &dy, tokens, &self.weight, &out, cols)?;
        self.device.get(&out, dx)
    }
}

/// Enqueues `dx [tokens, stride] = dy w`; columns beyond those of `w` become 0.
pub(super) fn linear_backward(
    device: &Device,
    dy: &Rows,
    tokens: usize,
    w: &Stack,
    dx: &Buffer,
    stride: usize,
) -> Result<(), CudaError> {
    let count = Arg::Int(CudaError::int("tokens", tokens)?);
    let mut args = vec![dy.arg(), dy.stride()?, w.arg(), w.stride(), count, w.cols(), w.rows()];
    args.extend([dx.arg(), Arg::Int(CudaError::int("numbers of a row", stride)?), device.exact()]);
    let grid = (tokens.div_ceil(TILE), w.cols.div_ceil(TILE));
    // SAFETY: the arguments are those of `linear_backward_*`; `dy` has `tokens` padded rows of `w.rows` numbers, `dx` as
    // many rows of `stride` numbers, which are at least `w.cols`.
    unsafe { device.launch_for("linear_backward", w.dtype, grid, &args) }
}
