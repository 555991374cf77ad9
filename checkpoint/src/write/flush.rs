//! Bytes on their way to the disk while more of them are being made.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Bytes written between two requests: the disk stays busy, and few of the file system's commits are asked for.
const STEP: usize = 32 << 20;

/// Asks the system to store what a file holds so far, on a thread of its own, so that little is left to wait for at the
/// end. A shorter file than [`STEP`] gets no thread.
#[derive(Default)]
pub(super) struct Flusher {
    waiting: usize,
    thread: Option<(SyncSender<()>, JoinHandle<io::Result<()>>)>,
}

impl Flusher {
    /// Notes that `count` bytes were handed to the system.
    pub fn wrote(&mut self, file: &File, count: usize) -> io::Result<()> {
        self.waiting += count;
        if self.waiting < STEP {
            return Ok(());
        }
        self.waiting = 0;
        let (signal, _) = match &mut self.thread {
            Some(thread) => thread,
            None => self.thread.insert(start(file.try_clone()?)),
        };
        // A full channel: the request that waits will cover these bytes, too. A closed one: `finish` tells why.
        let _ = signal.try_send(());
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

fn start(file: File) -> (SyncSender<()>, JoinHandle<io::Result<()>>) {
    let (signal, requests) = sync_channel(1);
    let work = move || requests.iter().try_for_each(|()| file.sync_data());
    (signal, std::thread::spawn(work))
}
