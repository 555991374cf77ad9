//! Bytes on disk: open, name, write and publish checkpoints.
//!
//! A [`Source`] is anything that holds weights (a folder of safetensors shards, a GGUF file, a model of the local
//! Hub cache, any of them with a LoRA adapter on top), seen through Hugging Face tensor names. Its weights are
//! [`Weight`]s: views of the file where the bytes can be used as stored, and row-by-row readers where they
//! must be computed (dequantised, LoRA applied, rows put in another order). Nothing is read at open.
//!
//! ```no_run
//! use moe_merge_checkpoint::{Source, SourceRef};
//! let source = Source::open(&"models/base+adapters/rust".parse::<SourceRef>()?, ".".as_ref())?;
//! for (name, weight) in &source.tensors {
//!     println!("{name} {:?} {}", weight.shape(), weight.dtype());
//! }
//! # Ok::<(), moe_merge_checkpoint::CheckpointError>(())
//! ```

#![deny(unsafe_code)]

pub mod adapter;
pub mod config_json;
mod error;
mod explain;
mod file;
mod folder;
pub mod generation;
pub mod gguf;
pub mod header;
pub mod hub;
pub mod index;
pub mod layout;
pub mod manifest;
mod map;
pub mod publish;
pub mod resume;
mod shard;
mod source;
mod source_ref;
pub mod summary;
pub mod weight;
pub mod write;

pub use config_json::ConfigJson;
pub use error::CheckpointError;
pub use explain::{Explain, Kind};
pub use folder::weights_in;
pub use generation::{Change, Generation, JournalLine, NewTensors};
pub use moe_merge_kernels::Dtype;
pub use publish::{Interrupt, Replace, Staging};
pub use resume::Identity;
pub use shard::{OtherTensor, weights};
pub use source::{SideContent, SideFile, Source};
pub use source_ref::{SourceRef, located};
pub use summary::Summary;
pub use weight::{Weight, WeightRef};
