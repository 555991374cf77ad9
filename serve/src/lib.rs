//! HTTP server over a live model: OpenAI's routes, admin routes, metrics, one small page.
//!
//! A request is answered by the generation that was live when it came, whatever happens to the model meanwhile, and gets
//! the tokens that this generation gives it alone, whoever is served beside it.
//!
//! ```no_run
//! use moe_merge_checkpoint::Interrupt;
//! use moe_merge_model::Model;
//! use moe_merge_serve::{Options, Server};
//! let opener = Box::new(|source: &_| Model::open(source));
//! let server = Server::open(&"merged/quickstart".parse()?, ".".as_ref(), opener, Options::default())?;
//! println!("http://{}", server.address());
//! server.run(&Interrupt::default());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod app;
mod engine;
mod error;
mod listen;
mod live;
mod metrics;
mod openai;
mod options;
mod routes;
mod server;
mod text;
mod watcher;

pub use error::ServeError;
pub use live::Opener;
pub use options::{Limits, Options, Watch};
pub use server::Server;
