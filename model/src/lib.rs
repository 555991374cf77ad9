//! A running model: families, forward pass, probing, perplexity, generation

#![forbid(unsafe_code)]
