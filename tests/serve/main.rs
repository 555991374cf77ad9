//! The server over real sockets.

mod client;
mod clients;
#[path = "../common/mod.rs"]
mod common;
mod host;
mod hostile;
mod live;
mod load;
mod openai;
mod program;
