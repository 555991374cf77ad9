//! Which generation of a model loaders see.

use std::path::Path;
use std::time::Duration;

use super::journal::{JOURNAL_NAME, JournalLine};
use super::recover;
use super::switch::{SINGLE, View};
use crate::error::CheckpointError;
use crate::folder::{self, Stamp};
use crate::manifest::hash_bytes;
use crate::source::Source;
use crate::source_ref::SourceRef;

/// Which generation of a model loaders see, and what tells that it was replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    /// Its number; 0 for a model without history.
    pub number: u32,
    /// BLAKE3 of its manifest; for a model without history, of what tells its files from others.
    pub hash: String,
    stamp: Stamp,
}

/// Looks at the journal of a model; anything but a folder is its own only generation.
///
/// # Errors
/// [`CheckpointError::Io`], and [`CheckpointError::Malformed`] if the last line cannot be read. Whether the history is
/// whole is asked with [`super::history`].
pub fn current(path: &Path) -> Result<Current, CheckpointError> {
    let stamp = folder::stamp(path);
    let (journal, text) = View::of(path)?.read(JOURNAL_NAME)?;
    let Some(text) = text else {
        let hash = hash_bytes(format!("{stamp:?}").as_bytes());
        return Ok(Current { number: 0, hash, stamp });
    };
    let last = text.strip_suffix(b"\n").unwrap_or(&text).rsplit(|b| *b == b'\n').next();
    let line: JournalLine = serde_json::from_slice(last.unwrap_or_default()).map_err(|e| {
        CheckpointError::Malformed {
            what: "the last line of the journal cannot be read".into(),
            file: journal,
            tensor: None,
            expected: "a generation as JSON".into(),
            found: e.to_string(),
            hint: Some("somebody changed the journal by hand, or the file is damaged".into()),
        }
    })?;
    Ok(Current { number: line.generation, hash: line.manifest, stamp })
}

/// Whether loaders may see another model by now: a cheap question, for asking often.
pub fn is_replaced(path: &Path, current: &Current) -> bool {
    folder::stamp(path) != current.stamp
}

/// How often a model may be replaced while it is opened, and how long a change gets to come to its end.
const REPLACED: usize = 16;
const PAUSE: Duration = Duration::from_millis(20);

/// Opens a model and says which generation it is. A change that a killed process left half done is finished or undone.
///
/// * `found`: where the model was found before, if it was: it need not be opened twice then
///
/// # Errors
/// As [`Source::open`] and [`current`]; [`CheckpointError::Busy`] if it is replaced again and again meanwhile.
pub fn open(
    reference: &SourceRef,
    base_dir: &Path,
    found: Option<&Path>,
) -> Result<(Source, Current), CheckpointError> {
    let mut before = found.map(current).transpose()?;
    let mut path = base_dir.to_owned();
    for _ in 0..REPLACED {
        let source = Source::open(reference, base_dir)?;
        path.clone_from(&source.path);
        let now = current(&path)?;
        // Only what was opened between two equal answers is what they say.
        if before.as_ref() == Some(&now) && !is_between(&path)? {
            return Ok((source, now));
        }
        if before.replace(now).is_some() && !recover(&path)? {
            std::thread::sleep(PAUSE);
        }
    }
    Err(CheckpointError::Busy { path })
}

/// Whether the index is the new one while loaders still prefer the old model in one file.
fn is_between(path: &Path) -> Result<bool, CheckpointError> {
    Ok(View::of(path)?.passing.contains(SINGLE) && path.join(SINGLE).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_without_history_is_told_from_others_by_its_files() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("model");
        let from = moe_merge_testkit::repository("recipes/quickstart/base");
        std::fs::create_dir(&folder).unwrap();
        for file in std::fs::read_dir(from).unwrap().flatten() {
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        let reference: SourceRef = folder.display().to_string().parse().unwrap();
        let (source, first) = open(&reference, Path::new("."), None).unwrap();
        assert_eq!((source.path.as_path(), first.number), (folder.as_path(), 0));
        assert!(!is_replaced(&folder, &first));
        assert_eq!(current(&folder).unwrap(), first);
        let config = folder.join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(folder.join("beside"), text).unwrap();
        std::fs::rename(folder.join("beside"), &config).unwrap();
        assert!(is_replaced(&folder, &first));
        let (_, second) = open(&reference, Path::new("."), Some(&folder)).unwrap();
        assert_ne!(second.hash, first.hash);
    }
}
