//! A running model: families, forward pass, probing, perplexity, generation.
//!
//! A family turns `config.json` into a [`Spec`]; everything after that knows no family. Weights stay where they are.
//!
//! ```no_run
//! use moe_merge_checkpoint::{Source, SourceRef};
//! use moe_merge_model::{Cache, LogitRows, Model};
//! let source = Source::open(&"models/base".parse::<SourceRef>()?, ".".as_ref())?;
//! let model = Model::open(&source)?;
//! let mut cache = Cache::new(&model, 128);
//! let logits = model.forward(&[1, 5, 7], &mut cache, LogitRows::Last)?;
//! assert_eq!(logits.len(), model.spec().vocab);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod cache;
pub mod chat;
mod error;
pub mod expert_training;
pub mod families;
mod first_token;
pub mod generate;
pub mod gguf;
mod lanes;
mod layer;
#[cfg(test)]
mod layer_gradients;
mod model;
mod ops;
pub mod perplexity;
mod placement;
mod probe;
pub mod router_training;
mod running;
pub mod sample;
pub mod sampler;
pub mod side_by_side;
pub mod spec;
mod steady;
pub mod streamed;
mod text_error;
pub mod tokenizer;
pub mod trace;
pub mod transplant;
pub mod verify;
mod walk;
mod weights;

pub use cache::Cache;
pub use chat::ChatTemplate;
pub use error::ModelError;
pub use families::{FAMILIES, Family, family_of};
pub use first_token::{FirstToken, first_token};
pub use model::{LogitRows, Model, Visited, Watch};
pub use placement::{DeviceChoice, Placement};
pub use probe::{LayerProbe, probe};
pub use sample::{sample_texts, self_text_starts};
pub use sampler::{Sampler, Sampling};
pub use spec::Spec;
pub use steady::Steady;
pub use text_error::TextError;
pub use tokenizer::{Spans, Tokenizer};
pub use walk::{Decide, Outputs, RouterView, walk};
