//! Test helpers: reference data, tolerances, small files. A dev-dependency only.

#![forbid(unsafe_code)]

use std::path::PathBuf;

pub mod golden;

/// A path below the folder of reference data that lies beside the project.
///
/// Where it is absent (a stranger's clone), this says so loudly and the caller returns: the test counts as run, but
/// its output tells that it compared nothing. `MOE_MERGE_SHARED` names another folder.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("MOE_MERGE_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")),
        PathBuf::from,
    );
    let found = root.join(path);
    if found.exists() {
        return Some(found);
    }
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    // Straight to the terminal: the test runner would swallow a plain `eprintln!` of a passing test.
    use std::io::Write;
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED {test}: reference data `{path}` is not here, nothing was compared"
    );
    None
}

/// A file of this repository, by its path from the root.
pub fn repository(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}
