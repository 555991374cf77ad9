//! From one generation to the next, such that a reader sees one of them whole, whenever this process ends.
//!
//! 1. Everything is prepared below `.moe-merge/staging` and on the disk.
//! 2. `.moe-merge/pending.json` says what will be done. From here on another process can finish or undo it.
//! 3. Files that will go get a second name in `.moe-merge/store`; new shards go to their places. No reader minds: the
//!    index does not name them.
//! 4. The new index takes the place of the old one: **the switch**. Where there was no index but one
//!    `model.safetensors`, loaders prefer that file as long as it is there: removing its name is the switch.
//!    Going back to such a model, the file appears again: that is the switch then.
//! 5. A new `config.json`, manifest and journal take their places, old shards lose theirs, then `pending.json` goes.
//!    Until `config.json` has its place, [`View`] finds it in the staging folder.
//!
//! Before the switch everything is undone, after it everything is finished, and both can be done again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::CONFIG;
use super::journal::read_optional;
use crate::error::CheckpointError;
use crate::manifest::hash_bytes;
use crate::publish::sync_folder;
use crate::write::INDEX_NAME;

/// The only weight file of a small model.
pub(super) const SINGLE: &str = "model.safetensors";

/// Where a change is prepared.
pub(super) const STAGING: &str = ".moe-merge/staging";

/// Where manifests and indices of older generations are.
pub(super) const MANIFESTS: &str = ".moe-merge/manifests";

/// Where shards of older generations are, each named by its hash.
pub(super) const STORE: &str = ".moe-merge/store";

pub(crate) const PENDING: &str = ".moe-merge/pending.json";

/// The same while it is prepared.
pub(super) const NOTE: &str = "pending.json";

/// A change that is prepared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pending {
    /// The generation that will be.
    pub generation: u32,
    /// BLAKE3 of the new index.
    pub index: String,
    /// Whether the model becomes [`SINGLE`] again: then this file, in the staging folder, makes the switch.
    #[serde(default)]
    pub to_single: bool,
    /// New shards in the staging folder, which go to the model folder under the same name.
    pub place: Vec<String>,
    /// The name that [`SINGLE`] gets, where the model was that file and it is still needed.
    pub single: Option<String>,
    /// Files of the model folder that the new generation does not need, with their hash.
    pub store: Vec<(String, String)>,
    /// Files in the staging folder and what they become, seen from the model folder, after the switch.
    pub finish: Vec<(String, String)>,
}

/// The file in the store with this hash.
pub(super) fn blob(folder: &Path, blake3: &str) -> PathBuf {
    folder.join(STORE).join(format!("{blake3}.safetensors"))
}

impl Pending {
    fn load(folder: &Path) -> Result<Option<Self>, CheckpointError> {
        let path = folder.join(PENDING);
        let Some(bytes) = read_optional(&path)? else { return Ok(None) };
        let pending: Self =
            serde_json::from_slice(&bytes).map_err(|e| CheckpointError::Malformed {
                what: "the note about an unfinished change cannot be read".into(),
                file: path.clone(),
                tensor: None,
                expected: "what this program writes there".into(),
                found: e.to_string(),
                hint: Some("if `moe-merge verify` finds nothing else wrong, delete it".into()),
            })?;
        let names = pending.place.iter().chain(&pending.single);
        let names = names.chain(pending.store.iter().map(|(name, _)| name));
        let hashes = pending.store.iter().map(|(_, hash)| hash);
        let finish = pending.finish.iter().flat_map(|(from, to)| [from, to]);
        let bad = names
            .chain(finish)
            .find(|n| crate::index::unsafe_name(n).is_some())
            .or_else(|| hashes.into_iter().find(|h| !h.bytes().all(|b| b.is_ascii_hexdigit())));
        match bad {
            None => Ok(Some(pending)),
            Some(name) => Err(CheckpointError::Malformed {
                what: "the note about an unfinished change names a file outside the folder".into(),
                file: path,
                tensor: None,
                expected: "names below the model folder".into(),
                found: format!("`{name}`"),
                hint: Some("do not use this folder unless you know where it comes from".into()),
            }),
        }
    }

    /// Whether readers that go by the index see the new generation.
    fn switched(&self, folder: &Path) -> Result<bool, CheckpointError> {
        if self.to_single {
            return Ok(folder.join(SINGLE).exists());
        }
        let index = read_optional(&folder.join(INDEX_NAME))?;
        Ok(index.is_some_and(|bytes| hash_bytes(&bytes) == self.index))
    }

    /// Steps 2 to 5. After an error before the switch the folder is as before.
    ///
    /// The result tells what could not be tidied up after the switch; the next command does it.
    pub fn run(&self, folder: &Path) -> Result<Option<CheckpointError>, CheckpointError> {
        let done = self.announce(folder).and_then(|()| self.switch(folder));
        if let Err(error) = done {
            if !crashed() && !self.switched(folder)? {
                self.undo(folder)?;
            }
            return Err(error);
        }
        Ok(self.finish(folder).err())
    }

    /// What [`Pending::run`] finds in the staging folder as [`NOTE`].
    pub fn text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    fn announce(&self, folder: &Path) -> Result<(), CheckpointError> {
        step("announce")?;
        rename(&folder.join(STAGING).join(NOTE), &folder.join(PENDING))?;
        sync_folder(&folder.join(".moe-merge"))
    }

    /// Steps 3 and 4.
    fn switch(&self, folder: &Path) -> Result<(), CheckpointError> {
        if !self.store.is_empty() {
            let store = folder.join(STORE);
            fs::create_dir_all(&store)
                .map_err(|e| CheckpointError::io("creating a folder", &store, e))?;
        }
        for (name, hash) in &self.store {
            step("store")?;
            link(&folder.join(name), &blob(folder, hash))?;
        }
        for name in &self.place {
            step("place")?;
            rename(&folder.join(STAGING).join(name), &folder.join(name))?;
        }
        if let Some(name) = &self.single {
            step("second name")?;
            link(&folder.join(SINGLE), &folder.join(name))?;
        }
        let store = (!self.store.is_empty()).then(|| folder.join(STORE));
        let places: Vec<PathBuf> = std::iter::once(folder.to_owned()).chain(store).collect();
        sync_all(&places)?;
        step("switch")?;
        let last = if self.to_single { SINGLE } else { INDEX_NAME };
        rename(&folder.join(STAGING).join(last), &folder.join(last))?;
        sync_folder(folder)
    }

    /// Step 5, and the second half of the switch for a model in one file.
    fn finish(&self, folder: &Path) -> Result<(), CheckpointError> {
        step("first name")?;
        if let Some(name) = &self.single {
            move_or_unlink(&folder.join(SINGLE), &folder.join(name))?;
        }
        if self.to_single && !self.finish.iter().any(|(_, to)| to == INDEX_NAME) {
            remove(&folder.join(INDEX_NAME))?;
        }
        for (name, hash) in &self.store {
            step("unlink")?;
            move_or_unlink(&folder.join(name), &blob(folder, hash))?;
        }
        for (from, to) in &self.finish {
            step("finish")?;
            let (from, to) = (folder.join(STAGING).join(from), folder.join(to));
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)
                    .map_err(|e| CheckpointError::io("creating a folder", parent, e))?;
            }
            if from.exists() {
                rename(&from, &to)?;
            }
        }
        sync_all(&[folder.to_owned(), folder.join(".moe-merge"), folder.join(MANIFESTS)])?;
        step("forget")?;
        self.forget(folder)
    }

    /// Back to the generation before.
    fn undo(&self, folder: &Path) -> Result<(), CheckpointError> {
        let single = self.single.iter().filter(|_| folder.join(SINGLE).exists());
        for name in self.place.iter().chain(single) {
            remove(&folder.join(name))?;
        }
        for (name, hash) in &self.store {
            if folder.join(name).exists() {
                remove(&blob(folder, hash))?;
            }
        }
        // Only if nothing else is in it.
        let _ = fs::remove_dir(folder.join(STORE));
        sync_folder(folder)?;
        self.forget(folder)
    }

    fn forget(&self, folder: &Path) -> Result<(), CheckpointError> {
        clear_staging(folder)?;
        // Should the disk forget that the note is gone, it only asks for what has been done already.
        remove(&folder.join(PENDING))
    }
}

/// Finishes or undoes what a process that ended half way has left. The caller holds the lock.
pub(super) fn recover(folder: &Path) -> Result<(), CheckpointError> {
    match Pending::load(folder)? {
        None => clear_staging(folder),
        Some(pending) if pending.switched(folder)? => pending.finish(folder),
        Some(pending) => pending.undo(folder),
    }
}

/// Whether there is something to [`recover`].
pub(super) fn is_unfinished(folder: &Path) -> bool {
    folder.join(PENDING).exists() || folder.join(STAGING).exists()
}

/// What readers go by, whatever a writer is doing.
#[derive(Debug, Clone)]
pub(crate) struct View {
    folder: PathBuf,
    /// Files of the generation that loaders see which are not at their place yet.
    staged: BTreeMap<String, PathBuf>,
    /// Weight files that lie in the folder for the moment and do not belong to that generation.
    pub passing: BTreeSet<String>,
    /// Whether loaders still see [`SINGLE`] of the generation before.
    behind: bool,
}

impl View {
    /// Looks at the folder.
    pub fn of(folder: &Path) -> Result<Self, CheckpointError> {
        let mut view = Self {
            folder: folder.to_owned(),
            staged: BTreeMap::new(),
            passing: BTreeSet::new(),
            behind: false,
        };
        let Some(pending) = Pending::load(folder)? else { return Ok(view) };
        if !pending.switched(folder)? {
            view.passing.extend(pending.place.into_iter().chain(pending.single));
            return Ok(view);
        }
        let goes = pending.single.is_some() || pending.store.iter().any(|(name, _)| name == SINGLE);
        view.behind = goes && folder.join(SINGLE).exists();
        view.passing.extend(pending.single.map(|_| SINGLE.to_owned()));
        view.passing.extend(pending.store.into_iter().map(|(name, _)| name));
        let staging = folder.join(STAGING);
        view.staged.extend(pending.finish.into_iter().map(|(from, to)| (to, staging.join(from))));
        Ok(view)
    }

    /// Where `config.json` of the generation that loaders see is; it may move to its place at any time.
    pub fn config(&self) -> PathBuf {
        match self.behind {
            true => self.folder.join(CONFIG),
            false => self.find(CONFIG).0,
        }
    }

    /// Where a file of the history is, and its name.
    pub fn find(&self, name: &str) -> (PathBuf, String) {
        let staged = self.staged.get(name).filter(|path| path.exists()).cloned();
        (staged.unwrap_or_else(|| self.folder.join(name)), name.to_owned())
    }

    /// A file of the history by its name, and its bytes if it is there.
    pub fn read(&self, name: &str) -> Result<(PathBuf, Option<Vec<u8>>), CheckpointError> {
        if let Some(staged) = self.staged.get(name)
            && let Some(bytes) = read_optional(staged)?
        {
            return Ok((staged.clone(), Some(bytes)));
        }
        let path = self.folder.join(name);
        read_optional(&path).map(|bytes| (path, bytes))
    }
}

/// Waits until files and folders are on the disk, all at the same time: a disk takes for several about as long as for
/// one.
pub(super) fn sync_all(paths: &[PathBuf]) -> Result<(), CheckpointError> {
    std::thread::scope(|scope| {
        let waiting: Vec<_> = paths.iter().map(|p| scope.spawn(|| sync_folder(p))).collect();
        waiting.into_iter().try_for_each(|thread| {
            // It cannot panic.
            thread.join().unwrap_or(Err(CheckpointError::Interrupted))
        })
    })
}

/// Removes what a change was prepared in.
pub(super) fn clear_staging(folder: &Path) -> Result<(), CheckpointError> {
    let staging = folder.join(STAGING);
    match fs::remove_dir_all(&staging) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(CheckpointError::io("removing a folder", &staging, e))
        }
        _ => Ok(()),
    }
}

/// Removes what a change that failed has prepared, unless it is needed to finish it.
pub(super) fn abandon(folder: &Path) -> Result<(), CheckpointError> {
    match crashed() || folder.join(PENDING).exists() {
        true => Ok(()),
        false => clear_staging(folder),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::rename(from, to).map_err(|e| CheckpointError::io("moving a file into place", to, e))
}

fn remove(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(CheckpointError::io("removing a file", path, e))
        }
        _ => Ok(()),
    }
}

/// Gives a file a second name. Where the file system has none of that, [`move_or_unlink`] moves it later.
fn link(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    match fs::hard_link(from, to) {
        Err(e)
            if [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::NotFound]
                .contains(&e.kind()) =>
        {
            Err(CheckpointError::io("giving a file a second name", from, e))
        }
        _ => Ok(()),
    }
}

/// Takes the first name away from a file that has a second one; one that has none is moved there, or copied where the
/// two folders are on different file systems.
fn move_or_unlink(first: &Path, second: &Path) -> Result<(), CheckpointError> {
    if !first.exists() {
        return Ok(());
    }
    if second.exists() {
        return remove(first);
    }
    match fs::rename(first, second) {
        Err(e) if e.kind() == ErrorKind::CrossesDevices => {
            let half = second.with_extension("partial");
            fs::copy(first, &half)
                .and_then(|_| File::open(&half)?.sync_all())
                .and_then(|()| fs::rename(&half, second))
                .map_err(|e| CheckpointError::io("keeping an old shard", second, e))?;
            remove(first)
        }
        Err(e) => Err(CheckpointError::io("keeping an old shard", second, e)),
        Ok(()) => Ok(()),
    }
}

#[cfg(not(test))]
fn step(_: &'static str) -> Result<(), CheckpointError> {
    Ok(())
}

#[cfg(not(test))]
fn crashed() -> bool {
    false
}

#[cfg(test)]
pub(super) use crash::{crashed, step};

/// Ends a change before any of its steps, as a kill would: nothing is tidied up.
#[cfg(test)]
pub(super) mod crash {
    use std::cell::Cell;

    use crate::error::CheckpointError;

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Lets `steps` steps happen, then no more; `None` lets all of them.
    pub fn after(steps: Option<usize>) {
        LEFT.set(steps);
    }

    pub fn crashed() -> bool {
        LEFT.get() == Some(0)
    }

    pub fn step(_: &'static str) -> Result<(), CheckpointError> {
        match LEFT.get() {
            None => Ok(()),
            Some(0) => Err(CheckpointError::Interrupted),
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }
}
