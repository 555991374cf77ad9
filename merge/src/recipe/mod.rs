//! Recipes: YAML text to typed values, every mistake with its place.

mod error;

pub use error::{Location, RecipeError, RecipeErrors};
