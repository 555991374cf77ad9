//! What a device must be able to do: the driver does it, and the emulator of the tests.

use crate::cuda::error::CudaError;

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// It stays.
    Weights,
    /// It is given back after a call and wanted again by the next.
    Scratch,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    /// Address on the device; 0 is null.
    Pointer(u64),
    Int(i32),
    Float(f32),
}

/// Threads of every block.
pub(super) const THREADS: u32 = 128;

/// Fills the part of an upload that begins at a byte offset; it must write all of it, front to back, and read nothing.
pub(super) type Fill<'a> = dyn FnMut(usize, &mut [u8]) + 'a;

/// A device with one queue of work.
pub(super) trait Backend: std::fmt::Debug + Send + Sync {
    fn name(&self) -> &str;

    /// Bytes that can be allocated, about.
    fn free_memory(&self) -> Result<usize, CudaError>;

    /// At least `bytes` (a multiple of 16, not 0) at a multiple of 16.
    fn alloc(&self, bytes: usize, purpose: Use) -> Result<u64, CudaError>;

    /// # Safety
    /// The buffer came from `alloc` with the same arguments, and nothing that is enqueued later uses it.
    unsafe fn free(&self, at: u64, bytes: usize, purpose: Use);

    /// Copies to the device, after what is enqueued. `from` can change as soon as this returns.
    ///
    /// # Safety
    /// A buffer at `to` has room.
    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), CudaError>;

    /// As `upload`, for `bytes` that `fill` makes, piece by piece.
    ///
    /// # Safety
    /// A buffer at `to` has room.
    unsafe fn stage(&self, bytes: usize, to: u64, fill: &mut Fill<'_>) -> Result<(), CudaError>;

    /// Waits for what is enqueued and copies from the device.
    ///
    /// # Safety
    /// A buffer at `from` has as many bytes.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError>;

    /// Enqueues a kernel of blocks of [`THREADS`].
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what it reads and writes lies in buffers that live until it has run.
    unsafe fn launch(&self, kernel: &str, grid: (u32, u32), args: &[Arg]) -> Result<(), CudaError>;
}
