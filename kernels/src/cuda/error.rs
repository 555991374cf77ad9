//! What can go wrong with a device.

use crate::error::KernelError;

/// An error about a CUDA device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The driver library is not installed.
    #[error("no CUDA driver is installed")]
    NoDriver,
    /// The driver finds no device.
    #[error("the CUDA driver finds no device: {reason}")]
    NoDevice {
        /// What the driver says.
        reason: String,
    },
    /// The device is older than the kernels.
    #[error("`{name}` has compute capability {major}.{minor}, but 8.0 is the least")]
    TooOld {
        /// Name of the device.
        name: String,
        /// Compute capability, before the point.
        major: i32,
        /// And after it.
        minor: i32,
    },
    /// The device has no room for a buffer.
    #[error("the device has no room for {bytes} bytes; {free} are free")]
    NoRoom {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free.
        free: usize,
    },
    /// A call of the driver failed.
    #[error("{what} failed on the device: {message}")]
    Driver {
        /// What was being done.
        what: &'static str,
        /// What the driver says.
        message: String,
    },
    /// More than the kernels can count.
    #[error("{what}: {count} is more than the device kernels can count ({limit})")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The most there can be.
        limit: usize,
    },
    /// Sizes or values that no path can work on.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl CudaError {
    /// A count as the kernels take it.
    pub(super) fn int(what: &'static str, count: usize) -> Result<i32, CudaError> {
        i32::try_from(count).map_err(|_| CudaError::TooMany {
            what,
            count,
            limit: i32::MAX as usize,
        })
    }
}
