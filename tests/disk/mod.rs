//! File systems that are full sooner than others.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system in memory, mounted while it lives.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// None, with a word on stderr, where nothing can be mounted.
    pub fn mount(at: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let done =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        if done.is_ok_and(|o| o.status.success()) {
            return Some(Self(at.to_owned()));
        }
        let _ =
            writeln!(std::io::stderr(), "SKIPPED: no tmpfs can be mounted, nothing was checked");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
