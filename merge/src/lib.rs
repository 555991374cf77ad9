//! Recipes: YAML to plan to output

#![forbid(unsafe_code)]
