//! Folders that appear at their place complete or not at all.

use std::fs::{self, File};
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with, statvfs};

use crate::error::CheckpointError;
use crate::resume::{Identity, Log};
use stale::Stale;

mod stale;

/// A flag that a signal handler raises and every long loop asks.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    parent: Option<Arc<AtomicBool>>,
}

impl Interrupt {
    /// Asks everything that watches this flag to stop. Safe to call from any thread.
    pub fn trigger(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// A flag for a part of the work: raised with this one, and on its own without touching this one.
    pub fn child(&self) -> Self {
        Self { flag: Arc::default(), parent: Some(self.flag.clone()) }
    }

    /// Whether somebody asked to stop.
    ///
    /// # Errors
    /// [`CheckpointError::Interrupted`] if so.
    pub fn check(&self) -> Result<(), CheckpointError> {
        let raised = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        match raised(&self.flag) || self.parent.as_deref().is_some_and(raised) {
            true => Err(CheckpointError::Interrupted),
            false => Ok(()),
        }
    }
}

/// What to do with an output that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// Refuse.
    Never,
    /// Put the new folder in its place, then delete the old one, if that is a model folder.
    Force,
}

/// What to do with an output that a killed run has left unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unfinished {
    /// Go on from it if it is of the same make, else remove it.
    #[default]
    TakeUp,
    /// Remove it.
    Remove,
}

/// A hidden folder beside the target in which an output grows; [`Staging::publish`] moves it into place, dropping it
/// removes it. A lock file beside it tells a folder in use from one whose process was killed: the latter is removed
/// by the next run with the same target, or taken up by one that makes the same output.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    folder: PathBuf,
    lock_path: PathBuf,
    /// Holds the lock as long as the folder is in use.
    _lock: File,
    replace: Replace,
    published: bool,
    log: Option<Log>,
    left: Option<String>,
}

/// Tries to find a free name before giving up; only stale runs with the same process id take names.
const ATTEMPTS: u32 = 64;

impl Staging {
    /// Prepares to write `target`. Missing parents are created; what killed runs left behind is removed.
    ///
    /// # Errors
    /// * [`CheckpointError::OutputExists`] if `target` is there (an empty folder does not count) and `replace` is
    ///   [`Replace::Never`]
    /// * [`CheckpointError::NotAModel`] if [`Replace::Force`] would delete something that is no checkpoint
    /// * [`CheckpointError::Io`] if the parent cannot be created or written to
    pub fn new(target: &Path, replace: Replace) -> Result<Self, CheckpointError> {
        Self::begin(target, replace, None)
    }

    /// As [`Staging::new`], for an output of the make `identity`: what is written is noted, so that a later run can go on
    /// from it.
    ///
    /// # Errors
    /// As [`Staging::new`].
    pub fn resume(
        target: &Path,
        replace: Replace,
        identity: &Identity,
        unfinished: Unfinished,
    ) -> Result<Self, CheckpointError> {
        Self::begin(target, replace, Some((identity, unfinished)))
    }

    fn begin(
        target: &Path,
        replace: Replace,
        make: Option<(&Identity, Unfinished)>,
    ) -> Result<Self, CheckpointError> {
        let target = resolve(target)?;
        check_target(&target, replace)?;
        let parent = parent_of(&target);
        fs::create_dir_all(parent)
            .map_err(|e| CheckpointError::io("creating the parent folder", parent, e))?;
        let prefix = format!(".{}.moe-merge-", file_name(&target));
        let wanted = make.filter(|(_, unfinished)| *unfinished == Unfinished::TakeUp);
        let mut stale = Stale { identity: wanted.map(|(make, _)| make), found: None, left: None };
        stale.settle(&target, &prefix)?;
        let (folder, lock_path, lock, log) = match stale.found {
            Some((folder, lock_path, lock, log)) => {
                log.tidy(&folder)?;
                (folder, lock_path, lock, Some(log))
            }
            None => {
                let (folder, lock_path, lock) = fresh(&target, &prefix)?;
                let start = |(make, _): (&Identity, _)| Log::start(lock.try_clone()?, make);
                let log = make.map(start).transpose();
                let log = log.map_err(|e| CheckpointError::io("writing", &lock_path, e))?;
                (folder, lock_path, lock, log)
            }
        };
        let (published, left) = (false, stale.left);
        Ok(Self { target, folder, lock_path, _lock: lock, replace, published, log, left })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Where it will be published.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// What is safe of the output, for one that can be resumed.
    pub fn log(&self) -> Option<&Log> {
        self.log.as_ref()
    }

    /// What became of the unfinished output of an earlier run, if there was one.
    pub fn note(&self) -> Option<String> {
        let taken_up = self.log.as_ref().map_or(0, Log::bytes);
        match &self.left {
            _ if taken_up > 0 => Some(format!(
                "goes on from an earlier run that did not end: {} MB were written",
                taken_up / 1_000_000
            )),
            Some(why) => {
                Some(format!("starts anew: what an earlier run had written is of no use, {why}"))
            }
            None => None,
        }
    }

    /// Checks that `bytes`, less those that are there, fit on the file system of the target.
    ///
    /// # Errors
    /// [`CheckpointError::NoRoom`] with both numbers.
    pub fn need(&self, bytes: u64) -> Result<(), CheckpointError> {
        let free = free_bytes(&self.folder)?;
        let needed = bytes.saturating_sub(self.log.as_ref().map_or(0, Log::bytes));
        if needed > free {
            return Err(CheckpointError::NoRoom { path: self.target.clone(), needed, free });
        }
        Ok(())
    }

    /// Refuses a target that holds one of `files`: replacing it would delete what the output is made of.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] naming the file.
    pub fn protect(&self, files: &[PathBuf]) -> Result<(), CheckpointError> {
        let Ok(target) = self.target.canonicalize() else { return Ok(()) };
        for file in files {
            if file.canonicalize().is_ok_and(|f| f.starts_with(&target)) {
                return Err(CheckpointError::Unsupported {
                    what: "the output would replace one of its own sources".into(),
                    file: file.clone(),
                    hint: "choose another folder with `--out`".into(),
                });
            }
        }
        Ok(())
    }

    /// Writes the folder's contents to the disk, then moves it to its place in one step.
    ///
    /// # Errors
    /// As [`Staging::new`] if the target has appeared since, [`CheckpointError::Io`] if the system refuses. The
    /// hidden folder is gone in either case.
    pub fn publish(mut self) -> Result<PathBuf, CheckpointError> {
        sync_tree(&self.folder)?;
        check_target(&self.target, self.replace)?;
        let old_in_place = self.replace == Replace::Force && is_filled_folder(&self.target);
        if old_in_place {
            self.exchange()?;
        } else {
            fs::rename(&self.folder, &self.target).map_err(|e| match e.kind() {
                ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory => {
                    CheckpointError::OutputExists { path: self.target.clone() }
                }
                _ => CheckpointError::io("moving the output into place", &self.target, e),
            })?;
        }
        self.published = true;
        sync_folder(parent_of(&self.target))?;
        if old_in_place {
            // The hidden name now holds the old output.
            fs::remove_dir_all(&self.folder)
                .map_err(|e| CheckpointError::io("removing the old output", &self.folder, e))?;
        }
        Ok(self.target.clone())
    }

    /// Swaps the hidden folder and the target; file systems that cannot do it at once get two renames.
    fn exchange(&self) -> Result<(), CheckpointError> {
        let failed = |e: IoError| CheckpointError::io("replacing the old output", &self.target, e);
        match renameat_with(CWD, &self.folder, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            Err(e) if [rustix::io::Errno::INVAL, rustix::io::Errno::NOSYS].contains(&e) => {}
            Err(e) => return Err(failed(e.into())),
        }
        let aside = with_suffix(&self.folder, ".old");
        fs::rename(&self.target, &aside).map_err(failed)?;
        if let Err(e) = fs::rename(&self.folder, &self.target) {
            let _ = fs::rename(&aside, &self.target);
            return Err(failed(e));
        }
        fs::rename(&aside, &self.folder).map_err(failed)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.folder);
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Bytes that an ordinary user may still write on the file system of `path`.
///
/// # Errors
/// [`CheckpointError::Io`] if the system does not tell.
pub fn free_bytes(path: &Path) -> Result<u64, CheckpointError> {
    let stat =
        statvfs(path).map_err(|e| CheckpointError::io("asking for free space", path, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A full path, with a link to a folder followed, so that the folder and not the link is replaced.
fn resolve(target: &Path) -> Result<PathBuf, CheckpointError> {
    let target = std::path::absolute(target)
        .map_err(|e| CheckpointError::io("resolving the output path", target, e))?;
    if target.file_name().is_none() {
        return Err(CheckpointError::OutputExists { path: target });
    }
    match target.symlink_metadata() {
        Ok(meta) if meta.is_symlink() => Ok(target.canonicalize().unwrap_or(target)),
        _ => Ok(target),
    }
}

/// What tells a model folder, or that of an adapter, from a person's other folders.
const MARKS: [&str; 2] = ["config.json", "adapter_config.json"];

fn check_target(target: &Path, replace: Replace) -> Result<(), CheckpointError> {
    let exists = || CheckpointError::OutputExists { path: target.to_owned() };
    let meta = match target.symlink_metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotADirectory => return Err(exists()),
        Err(e) => return Err(CheckpointError::io("looking at the output", target, e)),
    };
    let empty = meta.is_dir()
        && fs::read_dir(target)
            .map_err(|e| CheckpointError::io("looking at the output", target, e))?
            .next()
            .is_none();
    match replace {
        _ if empty => Ok(()),
        Replace::Never => Err(exists()),
        Replace::Force if meta.is_dir() && MARKS.iter().any(|m| target.join(m).is_file()) => Ok(()),
        Replace::Force => Err(CheckpointError::NotAModel { path: target.to_owned() }),
    }
}

fn is_filled_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

fn parent_of(target: &Path) -> &Path {
    target.parent().unwrap_or(Path::new("/"))
}

fn file_name(target: &Path) -> String {
    target.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Makes a hidden folder with a name of its own; gives it with its lock file, which is held.
fn fresh(target: &Path, prefix: &str) -> Result<(PathBuf, PathBuf, File), CheckpointError> {
    for attempt in 0..ATTEMPTS {
        let name = format!("{prefix}{}-{attempt}", std::process::id());
        let folder = parent_of(target).join(name);
        let lock_path = with_suffix(&folder, ".lock");
        let Some(lock) = take_lock(&lock_path)? else { continue };
        match fs::create_dir(&folder) {
            Ok(()) => return Ok((folder, lock_path, lock)),
            Err(e) => {
                let _ = fs::remove_file(&lock_path);
                if e.kind() != ErrorKind::AlreadyExists {
                    return Err(CheckpointError::io("creating the output folder", &folder, e));
                }
            }
        }
    }
    let taken = IoError::new(ErrorKind::AlreadyExists, "every name for a hidden folder is taken");
    Err(CheckpointError::io("creating the output folder", target, taken))
}

/// Creates and locks `path`; `None` if another process has the name, or took it away between the two steps.
fn take_lock(path: &Path) -> Result<Option<File>, CheckpointError> {
    let file = match File::create_new(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(None),
        Err(e) => {
            return Err(CheckpointError::io(
                "writing to the folder of the output",
                parent_of(path),
                e,
            ));
        }
    };
    if file.try_lock().is_err() {
        return Ok(None);
    }
    // A run that was cleaning up may have locked and removed the name before we locked it.
    Ok(path.exists().then_some(file))
}

/// Writes every file below `folder`, and the folders, to the disk.
fn sync_tree(folder: &Path) -> Result<(), CheckpointError> {
    let entries =
        fs::read_dir(folder).map_err(|e| CheckpointError::io("reading the folder", folder, e))?;
    for entry in entries {
        let path = entry.map_err(|e| CheckpointError::io("reading the folder", folder, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)
                .and_then(|f| f.sync_all())
                .map_err(|e| CheckpointError::io("writing to disk", &path, e))?;
        }
    }
    sync_folder(folder)
}

pub(crate) fn sync_folder(folder: &Path) -> Result<(), CheckpointError> {
    File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(|e| CheckpointError::io("writing to disk", folder, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resume::Point;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn publishes_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("deep/er/model");
        let staging = Staging::new(&target, Replace::Never).unwrap();
        fs::write(staging.path().join("config.json"), "{}").unwrap();
        assert!(!target.exists());
        assert_eq!(staging.publish().unwrap(), target);
        assert_eq!(names(&target), ["config.json"]);
        assert_eq!(names(target.parent().unwrap()), ["model"]);
    }

    #[test]
    fn dropping_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(&dir.path().join("m"), Replace::Never).unwrap();
        fs::write(staging.path().join("x"), "x").unwrap();
        drop(staging);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_is_there_is_refused_before_any_work() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("notes.txt"), "mine").unwrap();
        for target in [&file, &full] {
            let error = Staging::new(target, Replace::Never).unwrap_err();
            assert!(matches!(error, CheckpointError::OutputExists { .. }), "{error:?}");
            let error = Staging::new(target, Replace::Force).unwrap_err();
            assert!(matches!(error, CheckpointError::NotAModel { .. }), "{error:?}");
        }
        let below_a_file = Staging::new(&file.join("m"), Replace::Never).unwrap_err();
        assert!(matches!(below_a_file, CheckpointError::OutputExists { .. }), "{below_a_file:?}");
        let empty = dir.path().join("empty");
        fs::create_dir(&empty).unwrap();
        Staging::new(&empty, Replace::Never).unwrap().publish().unwrap();
        assert_eq!(names(dir.path()), ["empty", "file", "full"]);
    }

    #[test]
    fn force_replaces_a_model_and_keeps_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "old").unwrap();
        fs::write(target.join("old-shard"), "old").unwrap();
        let staging = Staging::new(&target, Replace::Force).unwrap();
        fs::write(staging.path().join("config.json"), "new").unwrap();
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "old");
        staging.publish().unwrap();
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "new");
        assert_eq!(names(&target), ["config.json"]);
        assert_eq!(names(dir.path()), ["m"]);
    }

    #[test]
    fn stale_folders_go_and_live_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        let stale = dir.path().join(".m.moe-merge-1-0");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("half"), "half").unwrap();
        fs::write(dir.path().join(".m.moe-merge-1-0.lock"), "").unwrap();
        fs::create_dir(dir.path().join(".other.moe-merge-1-0")).unwrap();
        let live = Staging::new(&target, Replace::Never).unwrap();
        assert!(!stale.exists());
        let second = Staging::new(&target, Replace::Never).unwrap();
        assert!(live.path().exists() && second.path().exists());
        drop((live, second));
        assert_eq!(names(dir.path()), [".other.moe-merge-1-0"]);
    }

    #[test]
    fn an_output_put_aside_by_a_killed_run_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let aside = dir.path().join(".m.moe-merge-1-0.old");
        fs::create_dir(&aside).unwrap();
        fs::write(aside.join("config.json"), "old").unwrap();
        let target = dir.path().join("m");
        drop(Staging::new(&target, Replace::Force).unwrap());
        // The first run restores it, after its own check of the target.
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "old");
        assert_eq!(names(dir.path()), ["m"]);
    }

    #[test]
    fn an_output_put_aside_comes_back_where_the_new_one_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let (target, identity) = (dir.path().join("m"), Identity::new("recipe", &[]));
        let staging =
            Staging::resume(&target, Replace::Force, &identity, Unfinished::TakeUp).unwrap();
        let point = Point { shard: 0, file: "x".into(), bytes: 1, blake3: String::new() };
        staging.log().unwrap().note(&point);
        // As a process leaves things that is killed between the two renamings.
        let left = dir.path().join(".m.moe-merge-1-0");
        fs::create_dir(&left).unwrap();
        fs::copy(&staging.lock_path, with_suffix(&left, ".lock")).unwrap();
        fs::create_dir(with_suffix(&left, ".old")).unwrap();
        fs::write(with_suffix(&left, ".old").join("config.json"), "old").unwrap();
        drop(staging);
        let again =
            Staging::resume(&target, Replace::Force, &identity, Unfinished::TakeUp).unwrap();
        assert_eq!((again.path(), again.log().unwrap().bytes()), (left.as_path(), 1));
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "old");
        drop(again);
        assert_eq!(names(dir.path()), ["m"]);
    }

    #[test]
    fn a_target_that_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        let staging = Staging::new(&target, Replace::Never).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "theirs").unwrap();
        assert!(matches!(staging.publish(), Err(CheckpointError::OutputExists { .. })));
        assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "theirs");
        assert_eq!(names(dir.path()), ["m"]);
    }

    #[test]
    fn a_link_keeps_pointing_at_the_new_folder() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "old").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let staging = Staging::new(&link, Replace::Force).unwrap();
        fs::write(staging.path().join("config.json"), "new").unwrap();
        staging.publish().unwrap();
        assert_eq!(fs::read_to_string(link.join("config.json")).unwrap(), "new");
        assert!(link.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn room_is_checked_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(&dir.path().join("m"), Replace::Never).unwrap();
        staging.need(1).unwrap();
        match staging.need(u64::MAX) {
            Err(CheckpointError::NoRoom { needed: u64::MAX, free, .. }) => assert!(free > 0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_source_inside_the_target_is_protected() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "{}").unwrap();
        let staging = Staging::new(&target, Replace::Force).unwrap();
        assert!(staging.protect(&[target.join("config.json")]).is_err());
        staging.protect(&[dir.path().join("elsewhere")]).unwrap();
    }
}
