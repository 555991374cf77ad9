//! Hidden folders that killed runs left behind: removed, put back, or taken up.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{parent_of, with_suffix};
use crate::error::CheckpointError;
use crate::resume::{Identity, Log};

/// What killed runs left behind.
pub(super) struct Stale<'a> {
    /// What is to be made.
    pub identity: Option<&'a Identity>,
    /// The first that makes the same: folder, lock file, lock, log.
    pub found: Option<(PathBuf, PathBuf, File, Log)>,
    /// Why one that had made something was of no use.
    pub left: Option<String>,
}

impl Stale<'_> {
    /// Removes hidden folders whose lock nobody holds, but for one that is taken up. An old output that a killed run had
    /// put aside goes back.
    pub fn settle(&mut self, target: &Path, prefix: &str) -> Result<(), CheckpointError> {
        let parent = parent_of(target);
        let entries = fs::read_dir(parent)
            .map_err(|e| CheckpointError::io("reading the folder", parent, e))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with(prefix) {
                continue;
            }
            let path = entry.path();
            let stem = name.trim_end_matches(".lock").trim_end_matches(".old");
            let (folder, lock_path) = (parent.join(stem), parent.join(format!("{stem}.lock")));
            let lock = match File::options().read(true).write(true).open(&lock_path) {
                Ok(file) => match file.try_lock() {
                    Ok(()) => Some(file),
                    Err(TryLockError::WouldBlock | TryLockError::Error(_)) => continue,
                },
                Err(e) if e.kind() == ErrorKind::NotFound => None,
                Err(_) => continue,
            };
            let lock = match lock {
                Some(lock) if folder.is_dir() => {
                    match self.take_up(folder.clone(), &lock_path, lock) {
                        Ok(()) => {
                            let aside = with_suffix(&folder, ".old");
                            if aside.is_dir() && !target.exists() {
                                let _ = fs::rename(&aside, target);
                            }
                            continue;
                        }
                        Err(lock) => Some(lock),
                    }
                }
                lock => lock,
            };
            // Not being allowed to clean up is no reason to stop: the new run has names of its own.
            if name.ends_with(".old") && !target.exists() {
                let _ = fs::rename(&path, target);
            } else if path != lock_path {
                let _ = fs::remove_dir_all(&path);
            }
            if !folder.exists() {
                let _ = fs::remove_file(&lock_path);
            }
            drop(lock);
        }
        Ok(())
    }

    /// Keeps what a killed run left if it made the same; else gives back its lock.
    fn take_up(&mut self, folder: PathBuf, lock_path: &Path, lock: File) -> Result<(), File> {
        let Some(identity) = self.identity.filter(|_| self.found.is_none()) else {
            return Err(lock);
        };
        let Ok(file) = lock.try_clone() else { return Err(lock) };
        match Log::take_up(file, identity) {
            Ok(log) => {
                self.found = Some((folder, lock_path.to_owned(), lock, log));
                Ok(())
            }
            Err(why) => {
                self.left = self.left.take().or(why);
                Err(lock)
            }
        }
    }
}
