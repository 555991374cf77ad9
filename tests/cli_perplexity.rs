//! `perplexity` on the tiny checkpoints.

#[allow(dead_code)]
mod cli;

use cli::{base, file, run};

/// The first lines of an evaluation text: enough to compare, short enough for unoptimised code.
fn text(domain: &str, bytes: usize) -> Option<String> {
    let path = moe_merge_testkit::shared(&format!("models/tiny/eval_{domain}.txt"))?;
    let all = std::fs::read_to_string(path).unwrap();
    let end = (0..=bytes).rev().find(|&i| all.is_char_boundary(i)).unwrap();
    Some(all[..end].to_owned())
}

#[test]
fn two_files_as_json() {
    let (Some(base), Some(prose), Some(code)) = (base(), text("prose", 1500), text("code", 1500))
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (prose, code) = (
        file(dir.path(), "prose.txt", prose.as_bytes()),
        file(dir.path(), "code.txt", code.as_bytes()),
    );
    let args = ["perplexity", &base, "--text", &prose, &code, "--window", "128", "--json"];
    let document = run(&args).json();
    let files = document["files"].as_array().unwrap();
    assert_eq!((&files[0]["path"], &files[1]["path"]), (&prose.into(), &code.into()));
    for (row, expected) in files.iter().zip([3.0591, 3.9306]) {
        let perplexity = row["perplexity"].as_f64().unwrap();
        // A short piece of the text that perplexity.json measures: near it, not at it.
        assert!((perplexity / expected - 1.0).abs() < 0.2, "{perplexity} against {expected}");
        let nats = row["nats_per_token"].as_f64().unwrap();
        assert!((nats.exp() - perplexity).abs() < 1e-9);
        assert!(row["tokens"].as_u64().unwrap() > 200);
    }
    assert!(document["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_table_for_people() {
    let (Some(base), Some(prose)) = (base(), text("prose", 300)) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "prose.txt", prose.as_bytes());
    let found = run(&["perplexity", &base, "--text", &path, "--stride", "20", "--window", "40"]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""), "{}", found.stdout);
    let lines: Vec<&str> = found.stdout.lines().collect();
    assert!(lines[0].starts_with("text") && lines[0].ends_with("perplexity"), "{}", lines[0]);
    assert!(lines[1].starts_with(&path) && lines[2].starts_with("windows of 40 tokens, "));
}

#[test]
fn what_cannot_be_measured_is_explained() {
    let Some(base) = base() else { return };
    let dir = tempfile::tempdir().unwrap();
    let empty = file(dir.path(), "empty.txt", b"");
    run(&["perplexity", &base, "--text", &empty]).fails(2, &["text is empty", &empty]);
    let latin = file(dir.path(), "latin.txt", b"caf\xe9");
    run(&["perplexity", &base, "--text", &latin])
        .fails(3, &["text is not UTF-8", &latin, "byte 3", "hint: convert it"]);
    let absent = dir.path().join("absent.txt").display().to_string();
    run(&["perplexity", &base, "--text", &absent]).fails(3, &["reading failed", &absent]);
    let good = file(dir.path(), "good.txt", b"The river");
    run(&["perplexity", &base, "--text", &good, "--window", "513"])
        .fails(2, &["window is longer than the context", "at most 512 tokens", "513 tokens"]);
    run(&["perplexity", &base, "--text", &good, "--stride", "512"])
        .fails(2, &["`stride` is out of range", "1 to 511"]);
}
