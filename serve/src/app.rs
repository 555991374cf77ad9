//! What all routes share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::Engine;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::options::Options;

/// A server as its routes see it.
pub struct App {
    pub live: std::sync::Arc<Live>,
    pub engine: Engine,
    pub metrics: std::sync::Arc<Metrics>,
    pub options: Options,
    /// What clients call the model.
    pub name: String,
    /// Whether it takes no more requests.
    pub stopping: AtomicBool,
    /// Requests so far.
    pub count: AtomicU64,
}

impl App {
    /// An id that no other request of this server has: `chatcmpl-…`, `cmpl-…`, `req-…`.
    pub fn id(&self, prefix: &str) -> String {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros());
        format!("{prefix}-{started:x}{number:04x}")
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
