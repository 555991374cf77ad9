//! Notices new generations on disk.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moe_merge_checkpoint::Explain;

use crate::live::Live;
use crate::metrics::Metrics;

/// A thread that looks at the folder every so often. It ends when this is dropped.
pub struct Watcher {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says if it gives no thread.
    pub fn start(live: Arc<Live>, metrics: Arc<Metrics>, every: Duration) -> std::io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let seen = stop.clone();
        let thread = std::thread::Builder::new().name("watcher".into()).spawn(move || {
            let mut told = None;
            while !waited(&seen, every) {
                if let Err(error) = refresh(&live, &metrics) {
                    // A folder that stays broken is told about once.
                    if told.as_ref() != Some(&error) {
                        tracing::error!(
                            "the model on disk cannot be opened, the old one stays: {error}"
                        );
                    }
                    told = Some(error);
                } else {
                    told = None;
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for `time`; true if the thread is to stop.
fn waited((stop, changed): &(Mutex<bool>, Condvar), time: Duration) -> bool {
    let stopped = stop.lock().unwrap_or_else(PoisonError::into_inner);
    let wait = changed.wait_timeout_while(stopped, time, |stop| !*stop);
    *wait.unwrap_or_else(PoisonError::into_inner).0
}

/// Makes the generation on disk the live one, and counts it. The error says what a person needs.
pub fn refresh(live: &Live, metrics: &Metrics) -> Result<(), String> {
    let clock = Instant::now();
    match live.refresh() {
        Ok(None) => Ok(()),
        Ok(Some(generation)) => {
            metrics.switches.fetch_add(1, Relaxed);
            metrics.switch.add(clock.elapsed());
            tracing::info!("generation {} is live", generation.number);
            Ok(())
        }
        Err(error) => {
            metrics.refused.fetch_add(1, Relaxed);
            let fields = error.fields().into_iter().map(|(l, v)| format!("; {l}: {v}"));
            Err(format!("{error}{}", fields.collect::<String>()))
        }
    }
}
