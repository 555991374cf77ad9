//! Recipes: YAML to plan to output

#![forbid(unsafe_code)]

mod error;
pub mod methods;
pub mod recipe;

pub use error::MergeError;
