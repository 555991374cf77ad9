//! What an output is made of: `.moe-merge/manifest.json` and the first line of its journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::generation::switch::View;
pub use crate::generation::{JOURNAL_NAME, JournalLine};
use crate::publish::Interrupt;
use crate::write::write_file;

/// Where the manifest is, seen from the model folder.
pub const MANIFEST_NAME: &str = ".moe-merge/manifest.json";

/// The version of this program: the one of the workspace.
pub const TOOL_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Version of the manifest's own format.
pub const MANIFEST_VERSION: u32 = 1;

/// A file with its size and hash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name, seen from the folder it belongs to.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of its content, in hexadecimal.
    pub blake3: String,
}

/// A model or adapter that went into an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// What it is there: `base`, `expert 0`, `shared 0`, …
    pub role: String,
    /// A name without folders.
    pub label: String,
    /// Its weight files.
    pub files: Vec<FileRecord>,
}

/// How an output came to be. Holds no time and no path of a machine: the same recipe gives the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] of the program that wrote it.
    pub version: u32,
    /// Version of the program that wrote the output.
    pub tool_version: String,
    /// 0 for a fresh build; each change counts up.
    pub generation: u32,
    /// Family, `dense` for a model without experts.
    pub family: String,
    /// Names of the experts in order.
    #[serde(default)]
    pub experts: Vec<String>,
    /// How the routers were made.
    #[serde(default)]
    pub gate_mode: Option<String>,
    /// How experts were fitted to the attention that they got, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub align: Option<String>,
    /// Seed of everything random.
    pub seed: u64,
    /// BLAKE3 of the recipe's text.
    #[serde(default)]
    pub recipe_blake3: Option<String>,
    /// What went in.
    pub sources: Vec<SourceRecord>,
    /// What came out: every file but those below `.moe-merge`, sorted by name.
    pub files: Vec<FileRecord>,
}

/// A difference between a folder and its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A file is gone or cannot be read.
    Missing {
        /// Its name.
        file: String,
        /// What the system says.
        reason: String,
    },
    /// A file has another length.
    Size {
        /// Its name.
        file: String,
        /// Bytes in the manifest.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file has another content.
    Hash {
        /// Its name.
        file: String,
        /// Hash in the manifest.
        expected: String,
        /// Hash found.
        found: String,
    },
    /// A weight file that the manifest does not know.
    Unknown {
        /// Its name.
        file: String,
    },
    /// The journal, or the manifest of an older generation, is not as it was written.
    History {
        /// Its path.
        file: String,
        /// What is wrong.
        what: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { file, reason } => write!(f, "`{file}` cannot be read: {reason}"),
            Self::Size { file, expected, found } => {
                write!(f, "`{file}` has {found} bytes, expected {expected}")
            }
            Self::Hash { file, expected, found } => {
                write!(f, "`{file}` has hash {found}, expected {expected}")
            }
            Self::Unknown { file } => write!(f, "`{file}` is not in the manifest"),
            Self::History { file, what, expected, found } => {
                write!(f, "{what} (`{file}`): {found}, expected {expected}")
            }
        }
    }
}

impl Manifest {
    /// Reads the manifest of a model folder; `None` if it has none (a model in one file, GGUF, never has).
    ///
    /// While a change is under way, or after one whose process was killed, it is that of the generation that loaders
    /// see.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
    pub fn load(dir: &Path) -> Result<Option<Self>, CheckpointError> {
        let (path, bytes) = View::of(dir)?.read(MANIFEST_NAME)?;
        bytes.map(|bytes| Self::parse(&bytes, path)).transpose()
    }

    /// Reads a manifest; `path` is for messages.
    pub(crate) fn parse(bytes: &[u8], path: PathBuf) -> Result<Self, CheckpointError> {
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| CheckpointError::Malformed {
                what: "the manifest is not what this program writes".into(),
                file: path.clone(),
                tensor: None,
                expected: format!("a manifest of version {MANIFEST_VERSION}"),
                found: e.to_string(),
                hint: None,
            })?;
        if manifest.version > MANIFEST_VERSION {
            return Err(CheckpointError::Unsupported {
                what: format!("manifest of version {}", manifest.version),
                file: path,
                hint: format!(
                    "it was written by moe-merge {}; this is {TOOL_VERSION}",
                    manifest.tool_version
                ),
            });
        }
        Ok(manifest)
    }

    /// The text of its file, files sorted.
    pub(crate) fn text(&mut self) -> String {
        self.files.sort();
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Writes the manifest and starts the journal with its generation. The last thing to do before publishing.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::NoRoom`].
    pub fn write(&mut self, dir: &Path) -> Result<(), CheckpointError> {
        let record = write_file(dir, MANIFEST_NAME, self.text().as_bytes())?;
        let line = JournalLine {
            generation: self.generation,
            action: "build".into(),
            manifest: record.blake3,
            ..JournalLine::default()
        };
        write_file(dir, JOURNAL_NAME, line.text().as_bytes())?;
        Ok(())
    }

    /// Compares every file of `dir` with the manifest, hashing on all threads.
    ///
    /// # Errors
    /// [`CheckpointError::Interrupted`]; what differs is the result, not an error.
    pub fn check(
        &self,
        dir: &Path,
        interrupt: &Interrupt,
    ) -> Result<Vec<Problem>, CheckpointError> {
        let mut problems = Vec::new();
        let mut to_hash = Vec::new();
        let view = View::of(dir)?;
        let place = |file: &FileRecord| view.find(&file.name).0;
        for file in &self.files {
            match std::fs::metadata(place(file)) {
                Err(e) => {
                    problems
                        .push(Problem::Missing { file: file.name.clone(), reason: e.to_string() });
                }
                Ok(meta) if meta.len() != file.size => problems.push(Problem::Size {
                    file: file.name.clone(),
                    expected: file.size,
                    found: meta.len(),
                }),
                Ok(_) => to_hash.push(file),
            }
        }
        let paths: Vec<PathBuf> = to_hash.iter().map(|f| place(f)).collect();
        for (file, found) in to_hash.iter().zip(hash_each(&paths, interrupt)) {
            match found {
                Ok(found) if found.blake3 == file.blake3 => {}
                Ok(found) => problems.push(Problem::Hash {
                    file: file.name.clone(),
                    expected: file.blake3.clone(),
                    found: found.blake3,
                }),
                Err(CheckpointError::Interrupted) => return Err(CheckpointError::Interrupted),
                Err(e) => problems
                    .push(Problem::Missing { file: file.name.clone(), reason: e.to_string() }),
            }
        }
        let known: BTreeSet<&str> =
            self.files.iter().map(|f| &f.name).chain(&view.passing).map(String::as_str).collect();
        let mut unknown: Vec<String> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|name| name.ends_with(".safetensors") && !known.contains(name.as_str()))
            .collect();
        unknown.sort();
        problems.extend(unknown.into_iter().map(|file| Problem::Unknown { file }));
        Ok(problems)
    }
}

/// Hashes files, one thread of the pool per file; those named twice are read once.
///
/// A source has to be read twice, once for its tensors and once for its hash, as BLAKE3 of a whole file cannot be
/// had from pieces at other offsets. Start this beside the probe or the writer: the pages are then shared, and
/// what is left is about a fifth of a second of one core per GB.
///
/// # Errors
/// [`CheckpointError::Io`] for the first file that cannot be read, [`CheckpointError::Interrupted`].
pub fn hash_files(
    files: &[PathBuf],
    interrupt: &Interrupt,
) -> Result<BTreeMap<PathBuf, FileRecord>, CheckpointError> {
    let unique: Vec<PathBuf> = files.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect();
    let records = hash_each(&unique, interrupt).into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(unique.into_iter().zip(records).collect())
}

/// BLAKE3 of `bytes`, in hexadecimal.
pub fn hash_bytes(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Bytes read at a time: ordinary reads into a small buffer keep the file out of this process's resident memory.
const BUFFER: usize = 1 << 18;

fn hash_each(files: &[PathBuf], interrupt: &Interrupt) -> Vec<Result<FileRecord, CheckpointError>> {
    let results: Vec<Mutex<Option<Result<FileRecord, CheckpointError>>>> =
        files.iter().map(|_| Mutex::default()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = vec![0; BUFFER];
        while let Some((path, slot)) = Some(next.fetch_add(1, Ordering::Relaxed))
            .and_then(|i| Some((files.get(i)?, results.get(i)?)))
        {
            let record = hash_file(path, &mut buffer, interrupt);
            *slot.lock().unwrap_or_else(|p| p.into_inner()) = Some(record);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..rayon::current_num_threads().min(files.len()) {
            scope.spawn(work);
        }
    });
    results
        .into_iter()
        .map(|r| {
            r.into_inner()
                .unwrap_or_else(|p| p.into_inner())
                .unwrap_or(Err(CheckpointError::Interrupted))
        })
        .collect()
}

fn hash_file(
    path: &Path,
    buffer: &mut [u8],
    interrupt: &Interrupt,
) -> Result<FileRecord, CheckpointError> {
    let failed = |e| CheckpointError::io("reading", path, e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hasher, mut size) = (blake3::Hasher::new(), 0);
    loop {
        interrupt.check()?;
        match file.read(buffer).map_err(failed)? {
            0 => break,
            n => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
    Ok(FileRecord {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        size,
        blake3: hasher.finalize().to_hex().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: Vec<FileRecord>) -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            tool_version: TOOL_VERSION.into(),
            generation: 0,
            family: "mixtral".into(),
            experts: vec!["a".into()],
            gate_mode: Some("hidden".into()),
            align: None,
            seed: 0,
            recipe_blake3: None,
            sources: Vec::new(),
            files,
        }
    }

    #[test]
    fn says_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a.safetensors", "b.safetensors", "c.safetensors", "d.json"];
        let files = names.map(|n| write_file(dir.path(), n, b"content").unwrap());
        let mut written = manifest(files.into());
        written.write(dir.path()).unwrap();
        let loaded = Manifest::load(dir.path()).unwrap().unwrap();
        assert_eq!(loaded, written);
        let interrupt = Interrupt::default();
        assert_eq!(loaded.check(dir.path(), &interrupt).unwrap(), []);
        std::fs::remove_file(dir.path().join("a.safetensors")).unwrap();
        std::fs::write(dir.path().join("b.safetensors"), "conTent").unwrap();
        std::fs::write(dir.path().join("c.safetensors"), "cont").unwrap();
        std::fs::write(dir.path().join("e.safetensors"), "").unwrap();
        let problems = loaded.check(dir.path(), &interrupt).unwrap();
        assert!(matches!(&problems[0], Problem::Missing { file, .. } if file == "a.safetensors"));
        assert!(
            matches!(&problems[1], Problem::Size { file, expected: 7, found: 4 } if file == "c.safetensors")
        );
        assert!(matches!(&problems[2], Problem::Hash { file, .. } if file == "b.safetensors"));
        assert_eq!(problems[3], Problem::Unknown { file: "e.safetensors".into() });
        assert_eq!(problems.len(), 4);
        interrupt.trigger();
        assert!(matches!(loaded.check(dir.path(), &interrupt), Err(CheckpointError::Interrupted)));
    }

    #[test]
    fn the_journal_starts_with_the_hash_of_the_manifest() {
        let dir = tempfile::tempdir().unwrap();
        manifest(Vec::new()).write(dir.path()).unwrap();
        let journal = std::fs::read_to_string(dir.path().join(JOURNAL_NAME)).unwrap();
        let line: JournalLine = serde_json::from_str(journal.trim_end()).unwrap();
        let text = std::fs::read(dir.path().join(MANIFEST_NAME)).unwrap();
        assert_eq!(line.manifest, blake3::hash(&text).to_hex().to_string());
        assert_eq!((line.generation, line.previous), (0, None));
    }

    #[test]
    fn hashes_equal_the_reference_and_a_file_named_twice_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let content = vec![7u8; BUFFER + 1];
        std::fs::write(&path, &content).unwrap();
        let found = hash_files(&[path.clone(), path.clone()], &Interrupt::default()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[&path].blake3, blake3::hash(&content).to_hex().to_string());
        assert_eq!(found[&path].size, content.len() as u64);
        let missing = hash_files(&[dir.path().join("y")], &Interrupt::default());
        assert!(matches!(missing, Err(CheckpointError::Io { .. })));
    }

    #[test]
    fn absent_broken_and_newer_manifests() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Manifest::load(dir.path()).unwrap(), None);
        write_file(dir.path(), MANIFEST_NAME, b"{").unwrap();
        assert!(matches!(Manifest::load(dir.path()), Err(CheckpointError::Malformed { .. })));
        let mut newer = manifest(Vec::new());
        newer.version += 1;
        newer.write(dir.path()).unwrap();
        assert!(matches!(Manifest::load(dir.path()), Err(CheckpointError::Unsupported { .. })));
    }
}
