//! Wrong calls: exit code, stdout and stderr.

#[allow(dead_code)]
mod cli;

use cli::{base, file, run};

#[test]
fn wrong_usage_ends_with_two() {
    for args in
        [&["inspect"][..], &["logits", "m"], &["generate", "m"], &["inspect", "m", "--nope"]]
    {
        let found = run(args);
        assert_eq!((found.code, found.stdout.as_str()), (2, ""), "{args:?}");
        assert!(found.stderr.starts_with("error: "), "{}", found.stderr);
    }
    let found = run::<&str>(&[]);
    assert_eq!((found.code, found.stdout.as_str()), (2, ""));
    assert!(found.stderr.contains("Usage: moe-merge"), "{}", found.stderr);
}

#[test]
fn a_device_that_is_not_there_is_an_error_only_for_those_who_ask_for_it() {
    let Some(base) = base() else { return };
    let dir = tempfile::tempdir().unwrap();
    let logits = |device: &str| {
        let out = dir.path().join(device).display().to_string();
        let given = ["logits", &base, "--tokens", "1,5", "--out", &out, "--device", device];
        let found = run(&given);
        (found, std::fs::read(out).ok())
    };
    let (found, written) = logits("cuda");
    found.fails(2, &["CUDA", "`--device cpu`"]);
    assert!(written.is_none());
    let [(auto, by_auto), (cpu, by_cpu)] = ["auto", "cpu"].map(logits);
    assert_eq!((auto.code, cpu.code), (0, 0), "{}{}", auto.stderr, cpu.stderr);
    assert!(by_auto.is_some() && by_auto == by_cpu, "no device, no difference");
    assert!(!auto.stderr.contains("CUDA"), "{}", auto.stderr);
}

#[test]
fn a_dense_model_has_no_experts_to_visit() {
    let Some(base) = base() else { return };
    run(&["generate", &base, "--prompt", "a", "--experts-per-token", "2"])
        .fails(2, &["2 experts per token", "a mixture-of-experts model"]);
}

#[test]
fn an_instruction_set_that_is_not_there_is_told() {
    let output = assert_cmd::cargo::cargo_bin_cmd!("moe-merge")
        .args(["inspect", "."])
        .env("MOE_MERGE_ISA", "avx3")
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("`avx3`") && told.contains("portable"), "{told}");
    assert!(told.contains("hint: ") && told.contains("MOE_MERGE_ISA"), "{told}");
}

#[test]
fn a_path_that_does_not_exist_is_named() {
    for command in ["inspect", "verify"] {
        run(&[command, "/nowhere/model"]).fails(3, &["/nowhere/model"]);
    }
    run(&["generate", "/nowhere/model", "--prompt", "x"]).fails(3, &["/nowhere/model"]);
}

#[test]
fn a_folder_without_a_model_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    run(&["inspect", &path]).fails(3, &[&path]);
    let broken = tempfile::tempdir().unwrap();
    file(broken.path(), "config.json", b"{");
    file(broken.path(), "model.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    let path = broken.path().display().to_string();
    run(&["inspect", &path]).fails(3, &["config.json", "JSON"]);
}

#[test]
fn token_ids_outside_the_vocabulary_are_refused() {
    let Some(base) = base() else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x.safetensors").display().to_string();
    run(&["logits", &base, "--tokens", "1,1024", "--out", &out])
        .fails(2, &["token id is outside the vocabulary", "0 to 1023", "1024"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let nowhere = dir.path().join("no/such/x.safetensors").display().to_string();
    run(&["logits", &base, "--tokens", "1", "--out", &nowhere])
        .fails(3, &["writing failed", &nowhere]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_moe-merge"))
        .args(["man"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn completions_and_manual_name_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let found = run(&["completions", shell]);
        assert_eq!((found.code, found.stderr.as_str()), (0, ""));
        assert!(found.stdout.contains("perplexity"), "{shell}");
    }
    let found = run(&["man"]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));
    for command in ["inspect", "verify", "logits", "perplexity", "generate", "completions"] {
        assert!(found.stdout.contains(command), "{command}");
    }
}
