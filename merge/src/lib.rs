//! Recipes: YAML to plan to output.
//!
//! [`recipe::parse`] reads a recipe and reports every mistake with its line; [`open`] opens what it names, nested
//! recipes included; [`dense`] makes the result of a dense merge, whose weights are computed when they are read.
//!
//! ```no_run
//! use moe_merge_merge::{dense, recipe};
//! # fn main() -> Result<(), moe_merge_merge::MergeError> {
//! let text = std::fs::read_to_string("recipes/soup.yaml").unwrap_or_default();
//! if let recipe::Recipe::Dense(soup) = recipe::parse(&text, "recipes/soup.yaml".as_ref())? {
//!     let merged = dense(&soup, "recipes".as_ref())?;
//!     println!("{} tensors", merged.tensors.len());
//! }
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod align;
pub mod build;
pub mod calibrate;
pub mod card;
mod compose;
pub mod config_out;
mod dense;
pub mod documents;
mod error;
pub mod evaluate;
mod experts;
pub mod extract;
pub mod families;
pub mod gates;
pub mod layershuffle;
mod lessons;
pub mod methods;
mod origins;
pub mod plan;
mod prompts;
pub mod quality;
pub mod recipe;
mod self_text;
mod sequential;
pub mod shrink;
mod sources;
pub mod surgery;
pub mod training;
pub mod upcycle;
mod vocabulary;
pub mod write;

pub use dense::{Missing, TextReport, dense, raw, write_tensors};
pub use error::MergeError;
pub use experts::{ExpertMatch, LayerMatch};
pub use plan::{Assembly, ExpertInput, Gates, Plan};
pub use self_text::expert_texts;
pub use sources::open;
pub use write::{Provenance, Written, remarks, write, write_dense};
