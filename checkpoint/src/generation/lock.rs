//! One writer at a time.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::CheckpointError;
use crate::manifest::MANIFEST_NAME;

/// The right to change a model folder; given back when dropped, and by the system when the process ends.
#[derive(Debug)]
pub(super) struct Lock {
    folder: PathBuf,
    _file: File,
}

/// How often a lock that somebody holds is tried again.
const EVERY: Duration = Duration::from_millis(10);

impl Lock {
    /// Takes the lock of `folder`, which may have been held for `patience` at most.
    ///
    /// # Errors
    /// [`CheckpointError::Busy`], [`CheckpointError::Io`].
    pub fn take(folder: &Path, patience: Duration) -> Result<Self, CheckpointError> {
        let own = folder.join(".moe-merge");
        let path = own.join("lock");
        let clock = Instant::now();
        loop {
            let failed = |e| CheckpointError::io("locking the model", &path, e);
            match fs::create_dir(&own) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed(e)),
                _ => {}
            }
            let opened = File::options().create(true).append(true).open(&path);
            let file = match opened {
                // The holder before took the folder away between the two steps.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => {
                    return Ok(Self { folder: folder.to_owned(), _file: file });
                }
                // It was removed before it was locked.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if clock.elapsed() < patience => {
                    std::thread::sleep(EVERY);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(CheckpointError::Busy { path: folder.to_owned() });
                }
                Err(TryLockError::Error(e)) => return Err(failed(e)),
            }
        }
    }
}

/// Whether `path` is still the file that was opened.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

impl Drop for Lock {
    /// A folder that was not changed after all keeps nothing of ours.
    fn drop(&mut self) {
        if self.folder.join(MANIFEST_NAME).exists() {
            return;
        }
        let own = self.folder.join(".moe-merge");
        let others = fs::read_dir(&own).into_iter().flatten().flatten();
        if others.map(|e| e.file_name()).all(|name| name == "lock") {
            let _ = fs::remove_file(own.join("lock"));
            let _ = fs::remove_dir(&own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path(), Duration::ZERO).unwrap();
        let refused = Lock::take(dir.path(), Duration::from_millis(30));
        assert!(matches!(refused, Err(CheckpointError::Busy { .. })), "{refused:?}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Lock::take(dir.path(), Duration::from_secs(60)).is_ok());
            std::thread::sleep(Duration::from_millis(30));
            drop(first);
            assert!(waiting.join().unwrap());
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
