//! A server from its start to its end.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use moe_merge_checkpoint::{Interrupt, SourceRef};
use tokio::runtime::Runtime;

use crate::app::App;
use crate::engine::Engine;
use crate::error::ServeError;
use crate::listen;
use crate::live::{Live, Opener};
use crate::metrics::Metrics;
use crate::options::{Options, Watch};
use crate::routes;
use crate::watcher::Watcher;

/// How often the interrupt is looked at.
const EVERY: Duration = Duration::from_millis(50);

/// Threads that read and write connections. Models run on others.
const THREADS: usize = 2;

/// A server that listens.
pub struct Server {
    app: Arc<App>,
    runtime: Runtime,
    listener: tokio::net::TcpListener,
    address: SocketAddr,
    watcher: Option<Watcher>,
}

impl Server {
    /// Opens the model and listens; connections wait until [`Server::run`].
    ///
    /// # Errors
    /// [`ServeError`] if the model cannot be opened or the address not be listened on.
    pub fn open(
        reference: &SourceRef,
        base_dir: &Path,
        opener: Opener,
        options: Options,
    ) -> Result<Self, ServeError> {
        let live = Arc::new(Live::open(reference, base_dir, opener)?);
        let metrics = Arc::new(Metrics::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .enable_all()
            .thread_name("http")
            .build()
            .map_err(ServeError::Threads)?;
        let address = options.address;
        let refused = |source| ServeError::Listen { address, source };
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let engine =
            Engine::start(&options.limits, metrics.clone()).map_err(ServeError::Threads)?;
        let watcher = match options.watch {
            Watch::Every(time) if live.path.is_dir() => Some(
                Watcher::start(live.clone(), metrics.clone(), time).map_err(ServeError::Threads)?,
            ),
            _ => None,
        };
        let name = options.name.clone().unwrap_or_else(|| name_of(reference));
        let (stopping, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let app = Arc::new(App { live, engine, metrics, options, name, stopping, count });
        Ok(Self { app, runtime, listener, address, watcher })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What clients call the model.
    pub fn name(&self) -> &str {
        &self.app.name
    }

    /// The number of the live generation.
    pub fn generation(&self) -> u32 {
        self.app.live.now().number
    }

    /// Serves until `interrupt` is triggered; then takes no more requests, and ends when those under way have their answers
    /// or their time is over.
    pub fn run(self, interrupt: &Interrupt) {
        let Self { app, runtime, listener, watcher, .. } = self;
        let router = routes::all(app.clone());
        let stop = async {
            while interrupt.check().is_ok() {
                tokio::time::sleep(EVERY).await;
            }
            app.stopping.store(true, Ordering::Relaxed);
        };
        runtime.block_on(listen::serve(listener, router, &app.options.limits, stop));
        drop(watcher);
        // Requests whose time is over go now, and with them what the engine still does for them.
        runtime.shutdown_timeout(EVERY);
        app.engine.close();
    }
}

/// The last part of the path, or of the Hub name.
fn name_of(reference: &SourceRef) -> String {
    let path = Path::new(&reference.model);
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    absolute.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
