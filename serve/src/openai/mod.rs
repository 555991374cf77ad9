//! What OpenAI's clients say and expect.

pub mod body;
pub mod error;
pub mod fields;
pub mod request;
pub mod response;
pub mod sse;
