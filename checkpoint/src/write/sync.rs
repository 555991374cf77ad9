//! Bytes on their way to the disk while more are computed: the wait at the end is short, and what is safe is noted.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::Receiver;

use super::lock;
use crate::error::CheckpointError;
use crate::resume::{Log, Point};

/// Bytes of a shard after which they are sent to the disk.
pub(super) const STEP: u64 = if cfg!(test) { 1 << 10 } else { 64 << 20 };

/// The beginning of a shard that is to reach the disk.
pub(super) struct Part {
    /// A handle to its file.
    pub file: File,
    /// Where it lies, for messages.
    pub path: PathBuf,
    /// What will be safe then.
    pub point: Point,
}

/// Sends parts of shards to the disk, one after the other.
pub(super) struct Syncer<'a> {
    /// Shards for which the system refused.
    failed: Mutex<BTreeMap<usize, CheckpointError>>,
    log: Option<&'a Log>,
}

impl<'a> Syncer<'a> {
    /// Notes in `log` what has become safe.
    pub fn new(log: Option<&'a Log>) -> Self {
        Self { failed: Mutex::default(), log }
    }

    /// Works until nobody sends any more. A later part of a shard stands for an earlier one.
    pub fn run(&self, parts: Receiver<Part>) {
        while let Ok(part) = parts.recv() {
            let waiting: BTreeMap<usize, Part> =
                std::iter::once(part).chain(parts.try_iter()).map(|p| (p.point.shard, p)).collect();
            for (shard, part) in waiting {
                match part.file.sync_data() {
                    Ok(()) => self.note(&part.point),
                    Err(e) => {
                        let error = CheckpointError::io("writing", &part.path, e);
                        lock(&self.failed).insert(shard, error);
                    }
                }
            }
        }
    }

    /// Notes what is safe. A note that cannot be made is no reason to stop: only a later run could have used it.
    pub fn note(&self, point: &Point) {
        if let Some(log) = self.log {
            let _ = log.note(point);
        }
    }

    /// What the system said about a part of shard `number`: it says so only once.
    pub fn check(&self, number: usize) -> Result<(), CheckpointError> {
        lock(&self.failed).remove(&number).map_or(Ok(()), Err)
    }

    /// What an earlier run had of shard `number`.
    pub fn earlier(&self, number: usize) -> Option<&Point> {
        self.log?.point(number)
    }
}
