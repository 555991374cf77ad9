//! Memory-mapped files: the one place of this crate with `unsafe`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::CheckpointError;

/// A file mapped read-only; clones share the mapping.
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
        // SAFETY: the map is read-only and never handed out as anything but bytes. Another process that truncates the
        // file while we read can end this one with SIGBUS, as with every program that maps files; it cannot
        // make us write anywhere.
        let map = unsafe { memmap2::Mmap::map(&file) }
            .map_err(|e| CheckpointError::io("mapping", path, e))?;
        Ok(Self { map: Arc::new(map), path: Arc::new(path.to_owned()) })
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
