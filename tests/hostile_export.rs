//! `export --gguf` where it cannot be done: what it says, and that nothing is left.

#[allow(dead_code)]
mod cli;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use moe_merge_testkit::{repository, shared};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of the quickstart's base that can be damaged.
struct Case {
    dir: TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (repository("recipes/quickstart/base"), dir.path().join("base"));
        fs::create_dir(&to).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn json(&self, name: &str, change: impl Fn(&mut Value)) -> &Self {
        let path = self.path("base").join(name);
        let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
        self
    }

    fn run(&self, more: &[&str]) -> cli::Run {
        self.run_to(&self.path("m.gguf"), more)
    }

    fn run_to(&self, file: &Path, more: &[&str]) -> cli::Run {
        let (base, file) = (self.path("base"), file.display().to_string());
        let base = base.display().to_string();
        cli::run(&[&["export", &base, "--gguf", &file], more].concat())
    }

    /// Fails so, and leaves nothing.
    #[track_caller]
    fn refused(&self, code: i32, more: &[&str], says: &[&str]) {
        self.run(more).fails(code, says);
        assert_eq!(self.names(), ["base"]);
    }

    fn names(&self) -> Vec<String> {
        entries(self.dir.path())
    }
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_told() {
    let case = Case::new();
    let document = case.run(&["--json", "--dtype", "q8_0"]).json();
    assert_eq!(
        (&document["architecture"], &document["tokenizer"]),
        (&json!("llama"), &json!(true))
    );
    assert_eq!(document["bytes"], fs::metadata(case.path("m.gguf")).unwrap().len());
    assert!(document["dtypes"]["Q8_0"]["tensors"].as_u64().unwrap() > 0, "{document}");
    let found = case.run(&["--force"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(found.stdout.contains("architecture  llama"), "{}", found.stdout);
    assert_eq!(case.names(), ["base", "m.gguf"]);
    let file = case.path("m.gguf").display().to_string();
    let verified = cli::run(&["verify", &file]);
    assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
}

#[test]
fn targets_that_are_there() {
    let case = Case::new();
    assert_eq!(case.run(&[]).code, 0);
    let written = fs::read(case.path("m.gguf")).unwrap();
    case.run(&[]).fails(2, &["output exists already", "m.gguf", "--force", "--gguf"]);
    fs::write(case.path("notes.txt"), "mine").unwrap();
    let notes = case.path("notes.txt");
    case.run_to(&notes, &["--force"]).fails(2, &["no GGUF file", "notes.txt", "another file"]);
    case.run_to(&case.path("base"), &["--force"]).fails(2, &["no GGUF file", "a folder"]);
    case.run_to(&notes.join("m.gguf"), &[]).fails(2, &["output exists already"]);
    assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
    // A model does not replace itself.
    let file = case.path("m.gguf").display().to_string();
    cli::run(&["export", &file, "--gguf", &file, "--force", "-q"])
        .fails(3, &["one of its own sources"]);
    assert_eq!(fs::read(case.path("m.gguf")).unwrap(), written);
    assert_eq!(case.names(), ["base", "m.gguf", "notes.txt"]);
}

#[test]
fn models_that_llama_cpp_cannot_run() {
    let gelu = Case::new();
    gelu.json("config.json", |c| c["hidden_act"] = json!("gelu"));
    gelu.refused(3, &[], &["another activation", "`llama`", "Silu", "Gelu"]);
    let unknown = Case::new();
    unknown.json("config.json", |c| c["model_type"] = json!("bloom"));
    unknown.refused(3, &[], &["model_type", "bloom"]);
    let Some(mixed) = shared("golden/arch/qwen2_moe_mixed") else { return };
    let case = Case::new();
    let mixed = mixed.display().to_string();
    let file = case.path("m.gguf").display().to_string();
    cli::run(&["export", &mixed, "--gguf", &file, "--no-tokenizer"])
        .fails(3, &["experts in other layers", "`qwen2moe`", "[1] of 2"]);
    let olmoe = shared("golden/arch/olmoe").unwrap().display().to_string();
    cli::run(&["export", &olmoe, "--gguf", &file, "--no-tokenizer"])
        .fails(3, &["key-value heads", "`olmoe`"]);
    assert_eq!(case.names(), ["base"]);
}

#[test]
fn tokenizers_that_cannot_be_carried_over() {
    let case = Case::new();
    fs::remove_file(case.path("base/tokenizer.json")).unwrap();
    case.refused(3, &[], &["no tokenizer", "--no-tokenizer"]);
    fs::write(case.path("base/tokenizer.model"), "spm").unwrap();
    case.refused(3, &[], &["`tokenizer.model`", "no `tokenizer.json`"]);
    let found = case.run(&["--no-tokenizer", "-q"]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));

    let case = Case::new();
    case.json("tokenizer.json", |t| t["model"] = json!({"type": "Unigram", "vocab": []}));
    case.refused(3, &[], &["`Unigram`", "tokenizer.json"]);

    let case = Case::new();
    case.json("tokenizer.json", |t| {
        t["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]});
    });
    case.refused(3, &[], &["pre-tokenizer", "Punctuation", "--pre NAME", "gpt-2"]);
    let found = case.run(&["--pre", "falcon"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(found.stderr.contains("`falcon` is not known to this program"), "{}", found.stderr);

    let case = Case::new();
    case.json("tokenizer_config.json", |t| t["eos_token"] = json!("<nothing>"));
    case.refused(3, &[], &["`eos_token` is no token", "<nothing>", "tokenizer_config.json"]);

    let case = Case::new();
    fs::write(case.path("base/tokenizer.json"), "{").unwrap();
    case.refused(3, &[], &["`tokenizer.json` cannot be read", "tokenizer.json"]);

    let case = Case::new();
    case.json("tokenizer.json", |t| t["model"]["vocab"]["zzz"] = json!(5000));
    case.refused(3, &[], &["larger than the model", "zzz", "1024 rows"]);
}

#[test]
fn numbers_that_are_none() {
    let case = Case::new();
    let path = case.path("base/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&0x7fc0u16.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    case.refused(3, &[], &["not finite", "model.safetensors", "tensor"]);
    case.refused(3, &["-q", "--dtype", "q8_0"], &["not finite", "model.safetensors", "tensor"]);
}

/// Straight to the terminal: the test runner would swallow the line of a passing test.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}, nothing was checked");
}

/// A small file system in memory, mounted while it lives.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mut command = Command::new("mount");
        let done = command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).output();
        done.is_ok_and(|o| o.status.success()).then(|| Self(at))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn full_and_read_only_disks() {
    let case = Case::new();
    let Some(disk) = Tmpfs::mount(case.path("small"), "size=1m") else {
        return skipped("full_and_read_only_disks", "no tmpfs can be mounted here");
    };
    let file = disk.0.join("m.gguf");
    case.run_to(&file, &[]).fails(4, &["not enough room", "m.gguf", "expected", "free", "--gguf"]);
    assert!(entries(&disk.0).is_empty());
    let Some(disk) = Tmpfs::mount(case.path("full"), "size=8m,nr_inodes=1") else { return };
    case.run_to(&disk.0.join("m.gguf"), &[]).fails(4, &["not enough room"]);
    assert!(entries(&disk.0).is_empty());
    let Some(disk) = Tmpfs::mount(case.path("fixed"), "size=8m,ro") else { return };
    case.run_to(&disk.0.join("m.gguf"), &[]).fails(3, &["failed", "ead-only", "hint: "]);
}

/// The disk fills up in the middle: a limit on the size of files that the program runs under.
#[test]
fn a_write_that_fails_half_way() {
    let case = Case::new();
    let mut command = Command::new("sh");
    command.arg("-c").arg("trap '' XFSZ; ulimit -f 1000; exec \"$@\"").arg("sh");
    command.arg(env!("CARGO_BIN_EXE_moe-merge")).arg("export").arg(case.path("base"));
    command.arg("--gguf").arg(case.path("m.gguf"));
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("writing failed") && stderr.contains("m.gguf"), "{stderr}");
    assert_eq!(case.names(), ["base"]);
}

#[test]
fn interrupt_at_any_time_leaves_all_or_nothing() {
    let case = Case::new();
    for delay in [0, 2, 4, 8, 12, 16, 24, 40] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-merge"));
        command.arg("export").arg(case.path("base")).arg("--gguf").arg(case.path("m.gguf"));
        command.args(["--dtype", "q8_0"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).output();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => assert_eq!(case.names(), ["base", "m.gguf"]),
            // Before the handler is there, the system ends the program.
            Some(130) | None => {
                let left = case.names();
                assert!(left == ["base"] || left == ["base", "m.gguf"], "{left:?}");
            }
            other => panic!("{other:?} {stderr}"),
        }
        let _ = fs::remove_file(case.path("m.gguf"));
    }
}
