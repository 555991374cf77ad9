//! Bytes on their way to the disk while more of them are being made.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use crate::resume::{Log, Point};

/// Bytes written between two requests: the disk stays busy, and few of the file system's commits are asked for.
const STEP: usize = if cfg!(test) { 1 << 10 } else { 32 << 20 };

type Thread<'a> = (SyncSender<Option<Point>>, ScopedJoinHandle<'a, io::Result<()>>);

/// Asks the system to store what a file holds so far, on a thread of its own, so that little is left to wait for at the
/// end, and notes what has become safe. A shorter file than [`STEP`] gets no thread.
pub(super) struct Flusher<'a> {
    waiting: usize,
    whole: Option<Point>,
    thread: Option<Thread<'a>>,
    log: Option<&'a Log>,
}

impl<'a> Flusher<'a> {
    /// Notes in `log` what is safe.
    pub fn new(log: Option<&'a Log>) -> Self {
        Self { waiting: 0, whole: None, thread: None, log }
    }

    /// Takes note that the file holds whole tensors up to here.
    pub fn whole(&mut self, point: Point) {
        self.whole = Some(point);
    }

    /// Takes note that `count` bytes were handed to the system.
    pub fn wrote(&mut self, file: &File, count: usize, scope: &'a Scope<'a, '_>) -> io::Result<()> {
        self.waiting += count;
        if self.waiting < STEP {
            return Ok(());
        }
        self.waiting = 0;
        let (signal, _) = match &mut self.thread {
            Some(thread) => thread,
            None => self.thread.insert(start(file.try_clone()?, self.log, scope)),
        };
        // A full channel: the request that waits will cover these bytes, too. A closed one: `finish` tells why.
        if let Err(TrySendError::Full(point)) = signal.try_send(self.whole.take()) {
            self.whole = point;
        }
        Ok(())
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// The first one of any request: the system reports a failed write once only.
    pub fn finish(self, file: &File) -> io::Result<()> {
        if let Some((signal, thread)) = self.thread {
            drop(signal);
            thread
                .join()
                .map_err(|_| io::Error::other("the thread that stores a file panicked"))??;
        }
        file.sync_data()
    }
}

fn start<'a>(file: File, log: Option<&'a Log>, scope: &'a Scope<'a, '_>) -> Thread<'a> {
    let (signal, requests) = sync_channel::<Option<Point>>(1);
    let work = move || {
        requests.iter().try_for_each(|point| {
            file.sync_data()?;
            if let (Some(log), Some(point)) = (log, point) {
                log.note(&point);
            }
            Ok(())
        })
    };
    (signal, scope.spawn(work))
}
