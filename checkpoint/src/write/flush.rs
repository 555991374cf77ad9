//! Bytes on their way to the disk while more of them are being made.

use std::fs::File;
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};

use crate::resume::{Log, Point};

/// Bytes written between two requests: the disk stays busy.
const STEP: u64 = if cfg!(test) { 1 << 10 } else { 16 << 20 };

/// Has the system begin to store what a file holds so far, without a wait, so that little is left to wait for at the end;
/// and notes which whole tensors were handed to it.
pub(super) struct Flusher<'a> {
    /// What is before this is on its way.
    from: u64,
    whole: Option<Point>,
    log: Option<&'a Log>,
}

impl<'a> Flusher<'a> {
    /// Notes in `log`.
    pub fn new(log: Option<&'a Log>) -> Self {
        Self { from: 0, whole: None, log }
    }

    /// Takes note that the file holds whole tensors up to here.
    pub fn whole(&mut self, point: Point) {
        self.whole = Some(point);
    }

    /// Takes note that the file has `size` bytes now.
    pub fn wrote(&mut self, file: &File, size: u64) {
        let count = size - self.from;
        if count < STEP {
            return;
        }
        // Linux begins to write the pages out that are said to be of no further use, and keeps them until that is done. Where
        // it does not, they are written at the end.
        let _ = fadvise(file, self.from, NonZeroU64::new(count), Advice::DontNeed);
        self.from = size;
        if let (Some(log), Some(point)) = (self.log, self.whole.take()) {
            log.note(&point);
        }
    }
}
