//! Arithmetic on slices: casts, sparse dispatch, products with weights as stored, norms, attention.
//!
//! Nothing here knows files, tensor libraries or model families. A weight is a [`MatView`] over bytes
//! (usually of a memory map) in the dtype it is stored in; activations are `f32` slices.
//!
//! ```
//! use moe_merge_kernels::{Dtype, MatView};
//! let bytes = [0u8, 0, 128, 63, 0, 0, 0, 64]; // 1.0 and 2.0
//! let w = MatView::new(&bytes, Dtype::F32, 1, 2).unwrap();
//! let mut row = [0.0; 2];
//! w.widen_row(0, &mut row);
//! assert_eq!(row, [1.0, 2.0]);
//! ```

#[cfg(target_endian = "big")]
compile_error!("weights are stored little-endian; big-endian targets are not supported");

pub mod activation;
#[cfg(test)]
mod allocations;
pub mod attention;
mod attention_backward;
pub mod cast;
pub mod cuda;
pub mod dense;
pub mod dispatch;
mod eigen;
pub mod elementwise;
mod env;
mod error;
mod exec;
mod linear;
mod linear_backward;
mod lora;
mod lora_backward;
mod moe_block;
mod norm;
mod panel;
mod product;
pub mod random;
pub mod rope;
pub mod routing;
mod routing_backward;
mod rows;
mod scratch;
mod simd;
pub mod svd;
mod tasks;
mod transpose;
mod turned;
mod vector;
mod view;
mod widen;

pub use activation::Activation;
pub use attention::{AttentionSpec, KeptNumber, KeyValues, attention, attention_lanes};
pub use attention_backward::{AttentionGradients, attention_backward};
pub use cast::Dtype;
pub use dispatch::{ExpertView, Groups, group, moe_forward};
pub use eigen::{Eigen, symmetric_eigen};
pub use env::calm_candle;
pub use error::KernelError;
pub use exec::{Accuracy, Batching, Exec, ISA_VARIABLE, Isa};
pub use linear::linear;
pub use linear_backward::{linear_backward, linear_weight_backward};
pub use lora::{Dropout, ExpertLora, LoraPair, lora_add};
pub use lora_backward::{LoraGradients, lora_backward};
pub use moe_block::{MoeBlock, MoeGradients, MoeInner};
pub use norm::{LogSumExp, rms_norm, rms_norm_backward, softmax};
pub use rope::{RopePairing, RopeScaling, RopeSpec, RopeTable};
pub use routing::{Precision, RouterSpec, Routing, Score, route, route_always};
pub use routing_backward::route_backward;
pub use view::MatView;
