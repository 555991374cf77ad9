//! Memory-mapped files: the one place of this crate with `unsafe`.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use crate::error::CheckpointError;

/// What a mapped file is, whatever its name: device, inode, bytes.
type Identity = (u64, u64, u64);

/// Mappings that are in use: two models that have a file in common, as generations of one folder do, share its memory.
///
/// While a mapping lives, its inode cannot become another file.
static MAPS: LazyLock<Mutex<HashMap<Identity, Weak<memmap2::Mmap>>>> =
    LazyLock::new(Mutex::default);

/// A file mapped read-only; clones share the mapping, as do all who open the same file.
#[derive(Debug, Clone)]
pub struct MappedFile {
    map: Arc<memmap2::Mmap>,
    path: Arc<PathBuf>,
}

impl MappedFile {
    /// Maps `path`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the file cannot be opened or mapped.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file =
            std::fs::File::open(path).map_err(|e| CheckpointError::io("opening", path, e))?;
        let meta = file.metadata().map_err(|e| CheckpointError::io("opening", path, e))?;
        let identity = (meta.dev(), meta.ino(), meta.len());
        let mut maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = maps.get(&identity).and_then(Weak::upgrade) {
            return Ok(Self { map, path: Arc::new(path.to_owned()) });
        }
        // SAFETY: the map is read-only and never handed out as anything but bytes. Another process that truncates the
        // file while we read can end this one with SIGBUS, as with every program that maps files; it cannot
        // make us write anywhere.
        let map = unsafe { memmap2::Mmap::map(&file) }
            .map_err(|e| CheckpointError::io("mapping", path, e))?;
        let map = Arc::new(map);
        maps.retain(|_, map| map.strong_count() > 0);
        maps.insert(identity, Arc::downgrade(&map));
        Ok(Self { map, path: Arc::new(path.to_owned()) })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Tells the system that the pages of `range` will not be needed soon, so that resident memory stays bounded.
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is shared, read-only and backed by the file: pages that are dropped here come back
        // with the same bytes at the next access.
        let _ = unsafe {
            self.map.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                range.start,
                range.len(),
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_is_mapped_once_and_another_under_its_name_is_not_mistaken_for_it() {
        let temp = tempfile::tempdir().unwrap();
        let (path, link) = (temp.path().join("a"), temp.path().join("b"));
        std::fs::write(&path, b"old").unwrap();
        std::fs::hard_link(&path, &link).unwrap();
        let (first, second) = (MappedFile::open(&path).unwrap(), MappedFile::open(&link).unwrap());
        assert!(Arc::ptr_eq(&first.map, &second.map));
        assert_eq!((first.path(), second.path()), (path.as_path(), link.as_path()));
        let beside = temp.path().join("c");
        std::fs::write(&beside, b"new").unwrap();
        std::fs::rename(&beside, &path).unwrap();
        let third = MappedFile::open(&path).unwrap();
        assert_eq!((first.bytes(), third.bytes()), (&b"old"[..], &b"new"[..]));
        // Files of no bytes are no special case.
        std::fs::write(&beside, b"").unwrap();
        assert!(MappedFile::open(&beside).unwrap().bytes().is_empty());
    }
}
