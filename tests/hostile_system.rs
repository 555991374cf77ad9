//! A full disk, missing permissions and signals during a build: what is left is all or nothing.

#[allow(dead_code)]
mod cli;
mod disk;
#[allow(dead_code)]
mod hostile;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use disk::Tmpfs;
use hostile::{Build, entries};

/// Straight to the terminal: the test runner would swallow the line of a passing test.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}, nothing was checked");
}

#[test]
fn full_disk() {
    let build = Build::new();
    let disk = build.path("disk");
    let Some(_mounted) = Tmpfs::mount(&disk, "size=2m") else { return };
    let out = disk.join("out").display().to_string();
    build.write("recipe.yaml", hostile::RECIPE);
    let recipe = build.path("recipe.yaml").display().to_string();
    cli::run(&[&recipe, "--out", &out])
        .fails(4, &["not enough room on disk", &out, "expected", "free", "--out"]);
    assert_eq!(entries(&disk).len(), 0, "{:?}", entries(&disk));
}

#[test]
fn disk_that_fills_up_while_writing() {
    let build = Build::new();
    let disk = build.path("disk");
    // No more files than the first few: the system says that there is no room, whatever the bytes.
    let Some(_mounted) = Tmpfs::mount(&disk, "size=64m,nr_inodes=6") else { return };
    let out = disk.join("out").display().to_string();
    build.write("recipe.yaml", hostile::RECIPE);
    let recipe = build.path("recipe.yaml").display().to_string();
    cli::run(&[&recipe, "--out", &out]).fails(4, &["not enough room on disk", "--out"]);
    assert_eq!(entries(&disk).len(), 0, "{:?}", entries(&disk));
}

#[test]
fn output_on_a_read_only_file_system() {
    let build = Build::new();
    let disk = build.path("disk");
    let Some(_mounted) = Tmpfs::mount(&disk, "size=1m,ro") else { return };
    let out = disk.join("out").display().to_string();
    build.write("recipe.yaml", hostile::RECIPE);
    let recipe = build.path("recipe.yaml").display().to_string();
    cli::run(&[&recipe, "--out", &out])
        .fails(3, &["failed", "Read-only", &disk.display().to_string(), "hint: "]);
}

#[test]
fn no_permission() {
    use std::os::unix::fs::PermissionsExt;
    let mode =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let build = Build::new();
    mode(build.dir(), 0o755);
    let program = build.path("moe-merge");
    fs::copy(env!("CARGO_BIN_EXE_moe-merge"), &program).unwrap();
    mode(&program, 0o755);
    // Root may do anything: run as nobody, if that is possible.
    let nobody = |args: &[std::ffi::OsString]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args(args);
        command.output().ok().filter(|o| !String::from_utf8_lossy(&o.stderr).starts_with("setpriv"))
    };
    let args = build.args(&[]);
    let Some(found) = nobody(&args) else {
        return skipped("no_permission", "the program cannot be run as another user");
    };
    let check = |found: std::process::Output, says: &[&str]| {
        let run = cli::Run {
            code: found.status.code().unwrap(),
            stdout: String::from_utf8(found.stdout).unwrap(),
            stderr: String::from_utf8(found.stderr).unwrap(),
        };
        if std::env::var_os("SHOW_MESSAGES").is_some() {
            println!("---\n{}", run.stderr);
        }
        run.fails(3, says);
    };
    // The folder belongs to root: nothing can be created in it.
    check(found, &["failed", "ermission denied", &build.dir().display().to_string(), "hint: "]);
    for (file, says) in [
        ("prose/model.safetensors", "experts[0].source_model"),
        ("base/config.json", "base_model"),
        ("recipe.yaml", "recipe"),
    ] {
        mode(&build.path(file), 0o600);
        check(nobody(&args).unwrap(), &["ermission denied", file, says, "hint: "]);
        mode(&build.path(file), 0o644);
    }
    assert!(!build.out().exists());
}

/// A build that takes a while: many prompts through the base.
fn slow() -> Build {
    let prompt = "the mill seemed gentle when the bells rang. ".repeat(20);
    let prompts = vec![format!("\"{prompt}\""); 40].join(", ");
    Build::new()
        .with("gate_mode: random", "gate_mode: hidden")
        .with("\"the mill seemed gentle when the bells rang\"", &prompts)
}

fn start(build: &Build) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-merge"));
    command.args(build.args(&[])).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until the hidden folder is there.
fn wait_for_staging(build: &Build) {
    let clock = Instant::now();
    while !entries(build.dir()).iter().any(|n| n.starts_with(".out.moe-merge-")) {
        assert!(clock.elapsed() < Duration::from_secs(60), "{:?}", entries(build.dir()));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn interrupt_leaves_nothing() {
    for name in ["-INT", "-TERM"] {
        let build = slow();
        let child = start(&build);
        wait_for_staging(&build);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(output.stdout.is_empty() && stderr.contains("interrupted"), "{stderr}");
        let left: Vec<_> = entries(build.dir()).into_iter().collect();
        assert_eq!(left, ["base", "code", "prose", "recipe.yaml"]);
    }
}

#[test]
fn interrupt_at_any_time_leaves_all_or_nothing() {
    let build = Build::new();
    for delay in [0, 1, 2, 5, 10, 20, 40, 80] {
        let child = start(&build);
        wait_for_staging(&build);
        std::thread::sleep(Duration::from_millis(delay));
        let _ = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .stderr(Stdio::null())
            .status();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        let complete = all_or_nothing(&build);
        match output.status.code() {
            Some(130) => {}
            Some(0) => assert!(complete),
            other => panic!("{other:?} {stderr}"),
        }
        assert!(
            !entries(build.dir()).iter().any(|n| n.starts_with('.')),
            "{:?}",
            entries(build.dir())
        );
        let _ = fs::remove_dir_all(build.out());
    }
}

/// Whether the output is there; then it is complete.
fn all_or_nothing(build: &Build) -> bool {
    if !build.out().exists() {
        return false;
    }
    let found = cli::run(&["verify".into(), build.out().into_os_string()]);
    assert_eq!(found.code, 0, "{}{}", found.stdout, found.stderr);
    true
}

#[test]
fn a_killed_build_leaves_all_or_nothing_and_the_next_one_cleans_up() {
    let build = slow();
    let mut child = start(&build);
    wait_for_staging(&build);
    signal(&child, "-KILL");
    child.wait().unwrap();
    assert!(!all_or_nothing(&build));
    assert!(entries(build.dir()).iter().any(|n| n.starts_with(".out.moe-merge-")));
    let quick = Build::new();
    build.write("recipe.yaml", hostile::RECIPE);
    let args = [build.path("recipe.yaml").into_os_string(), "--out".into(), build.out().into()];
    assert_eq!(cli::run(&args).code, 0);
    let left: Vec<_> = entries(build.dir()).into_iter().collect();
    assert_eq!(left, ["base", "code", "out", "prose", "recipe.yaml"]);
    for delay in [0, 2, 5, 10, 20, 40] {
        let mut child = start(&quick);
        wait_for_staging(&quick);
        std::thread::sleep(Duration::from_millis(delay));
        let _ = child.kill();
        child.wait().unwrap();
        all_or_nothing(&quick);
        let _ = fs::remove_dir_all(quick.out());
    }
    quick.builds();
}
