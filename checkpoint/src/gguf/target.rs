//! A file that appears at its place complete or not at all.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::error::CheckpointError;
use crate::publish::{Replace, free_bytes, sync_folder};

/// A hidden file beside the target in which an output grows; dropping it removes it.
///
/// It is locked as long as it is in use: what a killed run left behind is told by the missing lock, and removed by the next
/// run with the same target.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    replace: Replace,
    file: NamedTempFile,
}

impl Target {
    /// Prepares to write `path`.
    ///
    /// # Errors
    /// * [`CheckpointError::OutputExists`] if it is there and `replace` is [`Replace::Never`]
    /// * [`CheckpointError::NotAModel`] if [`Replace::Force`] would delete something that is no GGUF file
    /// * [`CheckpointError::Io`] if nothing can be written there
    pub(super) fn new(path: &Path, replace: Replace) -> Result<Self, CheckpointError> {
        let path = std::path::absolute(path)
            .map_err(|e| CheckpointError::io("resolving the output path", path, e))?;
        // A link keeps pointing at the new file.
        let path = path.canonicalize().unwrap_or(path);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(CheckpointError::OutputExists { path });
        };
        check(&path, replace)?;
        fs::create_dir_all(folder)
            .map_err(|e| CheckpointError::io("creating the parent folder", folder, e))?;
        let prefix = format!(".{}.moe-merge-", name.to_string_lossy());
        remove_stale(folder, &prefix);
        let file = new_file(folder, &prefix)?;
        Ok(Self { path, replace, file })
    }

    /// Checks that `bytes` fit on the file system of the target.
    ///
    /// # Errors
    /// [`CheckpointError::NoRoom`] with both numbers.
    pub(super) fn need(&self, bytes: u64) -> Result<(), CheckpointError> {
        let free = free_bytes(self.file.path())?;
        if bytes > free {
            return Err(CheckpointError::NoRoom { path: self.path.clone(), needed: bytes, free });
        }
        Ok(())
    }

    /// Refuses to replace one of `files`.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] naming the file.
    pub(super) fn protect(&self, files: &[PathBuf]) -> Result<(), CheckpointError> {
        match files.iter().find(|f| f.canonicalize().is_ok_and(|f| f == self.path)) {
            Some(file) => Err(CheckpointError::Unsupported {
                what: "the output would replace one of its own sources".into(),
                file: file.clone(),
                hint: "choose another file".into(),
            }),
            None => Ok(()),
        }
    }

    /// The file to write into.
    pub(super) fn file(&self) -> &File {
        self.file.as_file()
    }

    /// Where it will be.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the contents to the disk, then moves the file to its place in one step.
    ///
    /// # Errors
    /// As [`Target::new`] if the target has appeared since, [`CheckpointError::Io`] if the system refuses. The hidden file
    /// is gone in either case.
    pub(super) fn publish(self) -> Result<PathBuf, CheckpointError> {
        let Self { path, replace, file } = self;
        file.as_file().sync_all().map_err(|e| CheckpointError::io("writing to disk", &path, e))?;
        check(&path, replace)?;
        let moved = match replace {
            Replace::Never => file.persist_noclobber(&path),
            Replace::Force => file.persist(&path),
        };
        moved.map_err(|e| match e.error.kind() {
            ErrorKind::AlreadyExists => CheckpointError::OutputExists { path: path.clone() },
            _ => CheckpointError::io("moving the output into place", &path, e.error),
        })?;
        if let Some(folder) = path.parent() {
            sync_folder(folder)?;
        }
        Ok(path)
    }
}

fn check(path: &Path, replace: Replace) -> Result<(), CheckpointError> {
    let meta = match path.symlink_metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            return Err(CheckpointError::OutputExists { path: path.to_owned() });
        }
        Err(e) => return Err(CheckpointError::io("looking at the output", path, e)),
    };
    match replace {
        Replace::Never => Err(CheckpointError::OutputExists { path: path.to_owned() }),
        Replace::Force if meta.is_file() && is_replaceable(path) => Ok(()),
        Replace::Force => Err(CheckpointError::NotAGguf { path: path.to_owned() }),
    }
}

/// Whether a file is empty or begins as GGUF files do.
fn is_replaceable(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|f| f.take(4).read_to_end(&mut start));
    read.is_ok() && (start.is_empty() || start == b"GGUF")
}

/// Tries to create and lock a file before giving up; only runs that clean up at that very moment take one away.
const ATTEMPTS: u32 = 8;

fn new_file(folder: &Path, prefix: &str) -> Result<NamedTempFile, CheckpointError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |e| CheckpointError::io("writing to the folder of the output", folder, e);
    for _ in 0..ATTEMPTS {
        // As an ordinary new file: the user's mask decides who may read it.
        let permissions = fs::Permissions::from_mode(0o666);
        let file = Builder::new()
            .prefix(prefix)
            .suffix(".part")
            .permissions(permissions)
            .tempfile_in(folder)
            .map_err(|e| failed(without_path(e)))?;
        // File systems without locks are written to all the same.
        let is_locked = !matches!(file.as_file().try_lock(), Err(fs::TryLockError::WouldBlock));
        if is_locked && file.path().exists() {
            return Ok(file);
        }
    }
    Err(failed(std::io::Error::other("the hidden file was taken away again and again")))
}

/// The system's own error: the temporary name, which comes and goes, is no help.
fn without_path(error: std::io::Error) -> std::io::Error {
    match error.raw_os_error() {
        Some(code) => std::io::Error::from_raw_os_error(code),
        None => std::io::Error::from(error.kind()),
    }
}

/// Removes hidden files whose lock nobody holds. Not being allowed to is no reason to stop.
fn remove_stale(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !(name.starts_with(prefix) && name.ends_with(".part")) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::options().write(true).open(&path)
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/m.gguf");
        drop(Target::new(&path, Replace::Never).unwrap());
        assert!(names(path.parent().unwrap()).is_empty());
        let target = Target::new(&path, Replace::Never).unwrap();
        target.file().write_all(b"GGUF new").unwrap();
        assert!(!path.exists());
        target.publish().unwrap();
        assert_eq!(names(path.parent().unwrap()), ["m.gguf"]);
        let again = Target::new(&path, Replace::Never).unwrap_err();
        assert!(matches!(again, CheckpointError::OutputExists { .. }), "{again:?}");
        Target::new(&path, Replace::Force).unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn only_gguf_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "mine").unwrap();
        for path in [&path, dir.path()] {
            let error = Target::new(path, Replace::Force).unwrap_err();
            assert!(matches!(error, CheckpointError::NotAGguf { .. }), "{error:?}");
        }
        let below = Target::new(&path.join("m.gguf"), Replace::Never).unwrap_err();
        assert!(matches!(below, CheckpointError::OutputExists { .. }), "{below:?}");
        assert_eq!(names(dir.path()), ["notes.txt"]);
    }

    #[test]
    fn what_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let target = Target::new(&path, Replace::Never).unwrap();
        fs::write(&path, "theirs").unwrap();
        assert!(matches!(target.publish(), Err(CheckpointError::OutputExists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
        assert_eq!(names(dir.path()), ["m.gguf"]);
    }

    #[test]
    fn a_killed_runs_file_goes_and_a_live_ones_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(dir.path().join(".m.gguf.moe-merge-dead.part"), "half").unwrap();
        let live = Target::new(&path, Replace::Never).unwrap();
        let second = Target::new(&path, Replace::Never).unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop((live, second));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_source_is_no_target() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(&path, "GGUF").unwrap();
        let target = Target::new(&path, Replace::Force).unwrap();
        assert!(target.protect(&[path]).is_err());
        target.protect(&[dir.path().join("other.gguf")]).unwrap();
    }
}
