//! Writers that are killed, starved or locked out leave the old output or none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The example that writes a MoE; `cargo test` builds it beside this test.
fn assemble(models: &Path, target: &Path) -> Command {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap();
    let program = folder.join("examples/assemble");
    assert!(program.is_file(), "build it: cargo build -p moe-merge-merge --example assemble");
    let mut command = Command::new(program);
    command.args(["mixtral", "hub", "0"]).arg(target);
    command.args(["base", "prose", "code", "math"].map(|m| models.join(m)));
    command
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect()
}

#[test]
fn killed_at_any_point_the_target_is_absent_or_complete() {
    let Some(models) = moe_merge_testkit::shared("models/tiny") else { return };
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("m");
    let mut absent = 0;
    for wait_ms in [5, 20, 60, 120, 250] {
        let mut child =
            assemble(&models, &target).env("SLOW_MS", "20").stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        if target.exists() {
            assert!(target.join(".moe-merge/manifest.json").is_file());
            fs::remove_dir_all(&target).unwrap();
        } else {
            absent += 1;
        }
    }
    assert!(absent > 0, "no run was killed before it was done");
    let Output { status, .. } = assemble(&models, &target).output().unwrap();
    assert!(status.success());
    assert_eq!(entries(dir.path()), [target], "what the killed runs left is gone");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let Some(models) = moe_merge_testkit::shared("models/tiny") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"])
        .arg(dir.path())
        .stderr(Stdio::null())
        .status();
    if !mount.is_ok_and(|s| s.success()) {
        use std::io::Write;
        let _ =
            writeln!(std::io::stderr(), "SKIPPED a_full_disk_leaves_nothing: cannot mount a tmpfs");
        return;
    }
    let output = assemble(&models, &dir.path().join("m")).output();
    let left = entries(dir.path());
    let _ = Command::new("umount").arg(dir.path()).status();
    let output = output.unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("NoRoom"), "{message}");
    assert!(left.is_empty(), "{left:?}");
}
