//! The same products on a CUDA device that is found at run time.
//!
//! Nothing here needs CUDA to build: the driver library is opened when [`Device::open`] is called, and loads kernels that
//! were compiled to PTX beforehand (`cuda/moe.cu`, `cuda/moe.ptx`). Weights are uploaded once; activations come from and
//! return to the host. All work of a device is in one stream, so what a call enqueues follows what earlier calls did.

mod backend;
mod device;
mod driver;
#[cfg(any(test, feature = "emulator"))]
mod emulator;
mod error;
mod linear;
mod lora;
mod matrix;
mod moe;
mod moe_backward;
mod ptx;
#[cfg(test)]
mod tests;

pub use device::Device;
#[cfg(any(test, feature = "emulator"))]
pub use emulator::emulated;
pub use error::CudaError;
pub use linear::CudaLinear;
pub use lora::{LoraFactors, LoraGradients};
pub use moe::{Block, CudaMoe};
