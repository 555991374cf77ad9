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
    skipped(&format!("reference data `{path}` is not here"));
    None
}

/// The Python interpreter that the environment variable `variable` names.
///
/// Where it is unset, this says so loudly and the caller returns, as with [`shared`]. `tests/python/setup.sh` makes
/// environments that have what the tests import.
pub fn python(variable: &str) -> Option<PathBuf> {
    program(variable, "Python (tests/python/setup.sh makes one)")
}

/// The program that the environment variable `variable` names; as [`python`] for a program that is `what`.
pub fn program(variable: &str, what: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    if found.is_none() {
        skipped(&format!("`{variable}` names no {what}"));
    }
    found
}

/// Says on stderr that the running test compares nothing, and why.
fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    // Straight to the terminal: the test runner would swallow a plain `eprintln!` of a passing test.
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}, nothing was compared");
}

/// A file of this repository, by its path from the root.
pub fn repository(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}
