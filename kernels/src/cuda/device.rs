//! A device, and buffers on it.

use std::sync::Arc;

use crate::cast::Dtype;
use crate::cuda::backend::{Arg, Backend, Fill, Use};
use crate::cuda::driver::Driver;
use crate::cuda::error::CudaError;
use crate::exec::Accuracy;

/// A CUDA device with the kernels loaded. Clones share it.
#[derive(Debug, Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
    accuracy: Accuracy,
}

impl Device {
    /// Opens the first device.
    ///
    /// `MOE_MERGE_NVRTC=1` compiles the kernels for exactly this device, if the compiler library is installed.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::TooOld`], or what the driver says.
    pub fn open() -> Result<Self, CudaError> {
        Ok(Self::on(Arc::new(Driver::open()?)))
    }

    pub(super) fn on(backend: Arc<dyn Backend>) -> Self {
        Self { backend, accuracy: Accuracy::default() }
    }

    /// The same device with another accuracy of products with bf16 weights, where more than eight tokens are multiplied at
    /// once: exact ones take activations as the sum of two bf16 numbers, which leaves an error of 2^-17, fast ones as one.
    pub fn with_accuracy(self, accuracy: Accuracy) -> Self {
        Self { accuracy, ..self }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        self.backend.name()
    }

    /// Bytes that can be allocated, about.
    ///
    /// # Errors
    /// What the driver says.
    pub fn free_memory(&self) -> Result<usize, CudaError> {
        self.backend.free_memory()
    }

    /// 1 for exact products, as the kernels take it.
    pub(super) fn exact(&self) -> Arg {
        Arg::Int(i32::from(self.accuracy == Accuracy::Exact))
    }

    /// Room for `count` numbers of 4 bytes.
    pub(super) fn scratch(&self, count: usize) -> Result<Buffer, CudaError> {
        self.buffer(bytes_of(count, 4)?, Use::Scratch)
    }

    fn buffer(&self, bytes: usize, purpose: Use) -> Result<Buffer, CudaError> {
        let bytes = bytes.max(1).next_multiple_of(16);
        let at = self.backend.alloc(bytes, purpose)?;
        Ok(Buffer { backend: self.backend.clone(), at, bytes, purpose })
    }

    /// Numbers of 4 bytes, on the device until the buffer is dropped.
    pub(super) fn put<T: bytemuck::NoUninit>(
        &self,
        values: &[T],
        purpose: Use,
    ) -> Result<Buffer, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.buffer(bytes.len(), purpose)?;
        // SAFETY: the buffer has room for these bytes.
        unsafe { self.backend.upload(bytes, buffer.at)? };
        Ok(buffer)
    }

    /// Numbers of 4 bytes into a buffer, from its number `at` on.
    pub(super) fn put_into(&self, values: &[u32], to: &Buffer, at: usize) -> Result<(), CudaError> {
        assert!((at + values.len()) * 4 <= to.bytes, "more is written than the buffer holds");
        // SAFETY: the buffer has room for these bytes.
        unsafe { self.backend.upload(bytemuck::cast_slice(values), to.at + at as u64 * 4) }
    }

    /// `bytes` that `fill` makes, on the device for as long as the buffer lives.
    pub(super) fn put_weights(
        &self,
        bytes: usize,
        fill: &mut Fill<'_>,
    ) -> Result<Buffer, CudaError> {
        let buffer = self.buffer(bytes, Use::Weights)?;
        // SAFETY: the buffer has room for `bytes`.
        unsafe { self.backend.stage(bytes, buffer.at, fill)? };
        Ok(buffer)
    }

    /// Activations `[rows, cols]` in rows padded with zeros.
    pub(super) fn put_rows(&self, x: &[f32], rows: usize, cols: usize) -> Result<Rows, CudaError> {
        let stride = padded(cols);
        let buffer = if stride == cols {
            self.put(x, Use::Scratch)?
        } else {
            let mut wide = vec![0.0; rows * stride];
            for (to, from) in wide.chunks_exact_mut(stride).zip(x.chunks_exact(cols.max(1))) {
                to[..cols].copy_from_slice(from);
            }
            self.put(&wide, Use::Scratch)?
        };
        Ok(Rows { buffer, stride })
    }

    /// Room for `[rows, cols]` in padded rows, to be filled with zeros beyond `cols` by what writes it.
    pub(super) fn rows(&self, rows: usize, cols: usize) -> Result<Rows, CudaError> {
        let stride = padded(cols);
        Ok(Rows { buffer: self.scratch(bytes_of(rows, stride)?)?, stride })
    }

    /// Waits for the work enqueued and reads numbers of 4 bytes from the beginning of a buffer.
    pub(super) fn get<T: bytemuck::Pod>(
        &self,
        from: &Buffer,
        to: &mut [T],
    ) -> Result<(), CudaError> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        assert!(to.len() <= from.bytes, "more is read than the buffer holds");
        // SAFETY: the buffer has as many bytes.
        unsafe { self.backend.download(from.at, to) }
    }

    /// Enqueues `kernel`, or nothing for an empty grid.
    ///
    /// # Safety
    /// As [`Backend::launch`].
    pub(super) unsafe fn launch(
        &self,
        kernel: &str,
        grid: (usize, usize),
        args: &[Arg],
    ) -> Result<(), CudaError> {
        const DOWN: usize = 65_535;
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let across = CudaError::int("blocks", grid.0)? as u32;
        if grid.1 > DOWN {
            return Err(CudaError::TooMany {
                what: "columns of blocks",
                count: grid.1,
                limit: DOWN,
            });
        }
        // SAFETY: the caller's promise.
        unsafe { self.backend.launch(kernel, (across, grid.1 as u32), args) }
    }

    /// As [`Device::launch`], for the variant of a kernel that reads weights of `dtype`.
    ///
    /// # Safety
    /// As [`Backend::launch`].
    pub(super) unsafe fn launch_for(
        &self,
        kernel: &str,
        dtype: Dtype,
        grid: (usize, usize),
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let suffix = match dtype {
            Dtype::BF16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        };
        // SAFETY: the caller's promise.
        unsafe { self.launch(&format!("{kernel}_{suffix}"), grid, args) }
    }
}

/// Row length of activations that are multiplied: the kernels load 8 numbers at a time.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

/// `count * size`, or why it cannot be.
pub(super) fn bytes_of(count: usize, size: usize) -> Result<usize, CudaError> {
    count.checked_mul(size).filter(|n| *n <= isize::MAX as usize).ok_or(CudaError::TooMany {
        what: "bytes of a buffer",
        count: usize::MAX,
        limit: isize::MAX as usize,
    })
}

/// Memory of a device, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    backend: Arc<dyn Backend>,
    at: u64,
    bytes: usize,
    purpose: Use,
}

impl Buffer {
    pub fn arg(&self) -> Arg {
        Arg::Pointer(self.at)
    }

    /// The address of its number `at`, of 4 bytes.
    pub fn arg_from(&self, at: usize) -> Arg {
        assert!(at * 4 <= self.bytes, "an address beyond the buffer");
        Arg::Pointer(self.at + at as u64 * 4)
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and nobody can name it any more.
        unsafe { self.backend.free(self.at, self.bytes, self.purpose) };
    }
}

/// Activations in padded rows.
#[derive(Debug)]
pub(super) struct Rows {
    pub buffer: Buffer,
    /// Numbers from row to row.
    pub stride: usize,
}

impl Rows {
    pub fn arg(&self) -> Arg {
        self.buffer.arg()
    }

    pub fn stride(&self) -> Result<Arg, CudaError> {
        Ok(Arg::Int(CudaError::int("numbers of a row", self.stride)?))
    }
}
