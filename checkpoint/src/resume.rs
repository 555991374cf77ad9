//! Outputs that a killed run left unfinished: what they are made of, and what of them was handed to the system.
//!
//! While an output grows, its lock file holds one line of JSON that says what it is made of, then one line with a hash each
//! time that more tensors of a shard were handed to the system. A run that is killed cannot remove it; the next run that
//! makes the same output of the same things goes on from there, and ends with the same bytes. Where the machine itself
//! went down before the disk had them, the hash differs, and the shard is made anew.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::manifest::TOOL_VERSION;

/// What an output is made of: two runs with the same make the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the program.
    tool_version: String,
    /// BLAKE3 of the recipe and of all else that decides what is made.
    recipe: String,
    /// BLAKE3 of path, size, and times of change of every file that goes in.
    inputs: String,
}

/// Files beside a weight file that decide what its numbers mean.
const BESIDE: &[&str] = &[
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

impl Identity {
    /// Of an output that `recipe`, with all else that decides what is made, makes from `inputs`. Weight files are not
    /// read: size and times tell whether they are what they were. The small files beside them count too.
    pub fn new(recipe: &str, inputs: &[PathBuf]) -> Self {
        let recipe = blake3::hash(recipe.as_bytes()).to_hex().to_string();
        let mut files: Vec<PathBuf> = inputs.to_vec();
        for folder in inputs.iter().filter_map(|f| f.parent()) {
            files.extend(BESIDE.iter().map(|name| folder.join(name)));
        }
        let mut files: Vec<PathBuf> =
            files.into_iter().filter_map(|f| f.canonicalize().ok()).collect();
        files.sort();
        files.dedup();
        let mut hasher = blake3::Hasher::new();
        for file in files {
            let Ok(meta) = fs::metadata(&file) else { continue };
            let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
            hasher.update(format!("{file:?} {} {times:?}\n", meta.len()).as_bytes());
        }
        let inputs = hasher.finalize().to_hex().to_string();
        Self { tool_version: TOOL_VERSION.into(), recipe, inputs }
    }

    /// Why an output of `other` is of no use to this one.
    fn differs(&self, other: &Self) -> String {
        if self.tool_version != other.tool_version {
            format!("it was begun by moe-merge {}", other.tool_version)
        } else if self.recipe != other.recipe {
            "its recipe was another".into()
        } else {
            "its inputs have changed since".into()
        }
    }
}

/// So much of a shard was handed to the system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// Number of the shard in its plan.
    pub shard: usize,
    /// Name of its file.
    pub file: String,
    /// Bytes from its beginning; they end where a tensor ends.
    pub bytes: u64,
    /// BLAKE3 of these bytes.
    pub blake3: String,
}

/// What of an output is written, kept in its lock file.
#[derive(Debug)]
pub struct Log {
    file: Mutex<File>,
    found: BTreeMap<usize, Point>,
}

impl Log {
    /// Starts an empty log in a fresh lock file.
    pub(crate) fn start(mut file: File, identity: &Identity) -> std::io::Result<Self> {
        let line = serde_json::to_string(identity).unwrap_or_default() + "\n";
        file.write_all(line.as_bytes())?;
        Ok(Self { file: Mutex::new(file), found: BTreeMap::new() })
    }

    /// Takes up what is in the lock file of a killed run, if it made the same; else says why not (nothing where it had
    /// made nothing that is worth a word).
    pub(crate) fn take_up(file: File, identity: &Identity) -> Result<Self, Option<String>> {
        let mut lines = BufReader::new(&file).lines().map_while(Result::ok);
        let first = lines.next().ok_or(None)?;
        let other: Identity = serde_json::from_str(&first).map_err(|_| None)?;
        // A line that was being written when the run was killed, and what follows, count for nothing.
        let points = lines.map_while(|line| serde_json::from_str::<Point>(&line).ok());
        let found: BTreeMap<usize, Point> = points.map(|point| (point.shard, point)).collect();
        if found.is_empty() {
            return Err(None);
        }
        if *identity != other {
            return Err(Some(identity.differs(&other)));
        }
        let mut log = Self { file: Mutex::new(file), found };
        log.rewrite(identity).map_err(|_| None)?;
        Ok(log)
    }

    /// Leaves one line for each shard, and no half line at the end.
    fn rewrite(&mut self, identity: &Identity) -> std::io::Result<()> {
        let mut text = serde_json::to_string(identity).unwrap_or_default() + "\n";
        for point in self.found.values() {
            text += &(serde_json::to_string(point).unwrap_or_default() + "\n");
        }
        let file = self.file.get_mut().unwrap_or_else(|e| e.into_inner());
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(text.as_bytes())
    }

    /// Notes that these bytes were handed to the system. A note that cannot be made is no reason to stop: only a later run
    /// could have used it.
    pub(crate) fn note(&self, point: &Point) {
        let line = serde_json::to_string(point).unwrap_or_default() + "\n";
        let _ = self.file.lock().unwrap_or_else(|e| e.into_inner()).write_all(line.as_bytes());
    }

    /// What an earlier run had of shard `number`.
    pub(crate) fn point(&self, number: usize) -> Option<&Point> {
        self.found.get(&number)
    }

    /// Bytes that an earlier run had written.
    pub fn bytes(&self) -> u64 {
        self.found.values().map(|p| p.bytes).sum()
    }

    /// Removes everything from `folder` but the shards that the log speaks of.
    pub(crate) fn tidy(&self, folder: &Path) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::io("tidying an unfinished output", folder, e);
        for entry in fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if self.found.values().any(|p| p.file == name) {
                continue;
            }
            match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            }
            .map_err(failed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(shard: usize, bytes: u64) -> Point {
        let file = format!(".shard-{shard}.partial");
        Point { shard, file, bytes, blake3: "0".into() }
    }

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn the_same_things_made_the_same_way_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (weights, config) = (dir.path().join("w.safetensors"), dir.path().join("config.json"));
        fs::write(&weights, "w").unwrap();
        fs::write(&config, "{}").unwrap();
        let of = |recipe: &str| Identity::new(recipe, std::slice::from_ref(&weights));
        let first = of("ab");
        assert_eq!(first, of("ab"));
        assert_eq!(of("ac").differs(&first), "its recipe was another");
        // Written anew, with as many bytes.
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&config, "[]").unwrap();
        assert_eq!(of("ab").differs(&first), "its inputs have changed since");
        let old = Identity { tool_version: "0.0.1".into(), ..first.clone() };
        assert_eq!(first.differs(&old), "it was begun by moe-merge 0.0.1");
    }

    #[test]
    fn a_log_is_taken_up_until_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let identity = Identity::new("recipe", &[]);
        let log = Log::start(open(&path), &identity).unwrap();
        for (shard, bytes) in [(0, 10), (2, 7), (0, 20)] {
            log.note(&point(shard, bytes));
        }
        let mut text = fs::read_to_string(&path).unwrap();
        text += "{\"shard\":2,\"fi";
        fs::write(&path, &text).unwrap();
        let log = Log::take_up(open(&path), &identity).unwrap();
        assert_eq!((log.point(0), log.point(1)), (Some(&point(0, 20)), None));
        assert_eq!(log.bytes(), 27);
        log.note(&point(1, 5));
        let log = Log::take_up(open(&path), &identity).unwrap();
        assert_eq!(log.bytes(), 32);
        for name in [".shard-0.partial", ".shard-9.partial", "config.json"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join(".moe-merge")).unwrap();
        log.tidy(dir.path()).unwrap();
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [".shard-0.partial"]);
    }

    #[test]
    fn another_recipe_is_named_and_nothing_is_no_news() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let (one, two) = (Identity::new("one", &[]), Identity::new("two", &[]));
        let log = Log::start(open(&path), &one).unwrap();
        assert_eq!(Log::take_up(open(&path), &one).unwrap_err(), None);
        log.note(&point(0, 1));
        let why = Log::take_up(open(&path), &two).unwrap_err();
        assert_eq!(why.as_deref(), Some("its recipe was another"));
        fs::write(&path, "").unwrap();
        assert_eq!(Log::take_up(open(&path), &one).unwrap_err(), None);
        fs::write(&path, "no JSON\n").unwrap();
        assert_eq!(Log::take_up(open(&path), &one).unwrap_err(), None);
    }
}
