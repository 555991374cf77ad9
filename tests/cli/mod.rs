//! Running the program and reading what it says.

use std::path::{Path, PathBuf};

/// What a run gave.
pub struct Run {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs `moe-merge` with `args`.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Run {
    let output = assert_cmd::cargo::cargo_bin_cmd!("moe-merge")
        .args(args)
        .env_remove("RUST_LOG")
        // The same numbers on every machine.
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Run {
        code: output.status.code().expect("not killed"),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

impl Run {
    /// The JSON document on stdout, after checking that the run went well and said nothing else.
    pub fn json(&self) -> serde_json::Value {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{}", self.stdout);
        let document: serde_json::Value = serde_json::from_str(&self.stdout).expect("JSON");
        assert_eq!(document["version"], 1);
        document
    }

    /// Checks that the run failed with `code` and told all of `says` on stderr, and nothing on stdout.
    #[track_caller]
    pub fn fails(&self, code: i32, says: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "{}", self.stderr);
        for text in says {
            assert!(self.stderr.contains(text), "`{text}` is not in\n{}", self.stderr);
        }
        assert!(!self.stderr.contains('\u{1b}'), "colours in a pipe");
    }
}

/// The tiny base model, as text for an argument.
pub fn base() -> Option<String> {
    let path = moe_merge_testkit::shared("models/tiny/base")?;
    Some(path.canonicalize().expect("there").display().to_string())
}

/// A copy of a model folder in a temporary one, without the files named.
pub fn copy_without(model: &str, left_out: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(model).expect("a folder").flatten() {
        let name = entry.file_name();
        if !left_out.iter().any(|l| name == *l) {
            std::fs::write(dir.path().join(name), std::fs::read(entry.path()).expect("a file"))
                .expect("room");
        }
    }
    dir
}

/// Writes a file and gives its path as text.
pub fn file(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path: PathBuf = dir.join(name);
    std::fs::write(&path, bytes).expect("room");
    path.display().to_string()
}
