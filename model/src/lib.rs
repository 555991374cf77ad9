//! A running model: families, forward pass, probing, perplexity, generation

#![forbid(unsafe_code)]

pub mod chat;
pub mod sampler;
mod text_error;
pub mod tokenizer;
pub mod verify;


pub use chat::ChatTemplate;
pub use sampler::{Sampler, Sampling};
pub use text_error::TextError;
pub use tokenizer::Tokenizer;
