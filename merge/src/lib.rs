//! Recipes: YAML to plan to output

#![forbid(unsafe_code)]

pub mod card;
mod compose;
pub mod config_out;
mod error;
pub mod families;
pub mod plan;
pub mod recipe;
pub mod write;

pub use error::MergeError;
pub use plan::{Assembly, ExpertInput, Gates, Plan};
pub use write::{Provenance, Written, write, write_dense};
