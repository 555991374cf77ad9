//! `route` on the MoE of the quickstart recipe.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::Path;
use std::sync::LazyLock;

use cli::{file, run};
use serde_json::Value;

/// The quickstart MoE, without its evaluation, and short texts for it.
struct Quickstart {
    dir: tempfile::TempDir,
    moe: String,
    texts: Vec<String>,
}

static QUICKSTART: LazyLock<Quickstart> = LazyLock::new(|| {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    let text = text.split("\nevaluation:").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("moe");
    common::build_text(text, &recipe, &out, moe_merge_merge::families::Layout::Hub);
    let texts = ["prose", "code", "math"].map(|domain| {
        let path = recipe.with_file_name(format!("quickstart/eval_{domain}.txt"));
        let all = std::fs::read_to_string(path).unwrap();
        file(dir.path(), &format!("eval_{domain}.txt"), &all.as_bytes()[..900])
    });
    Quickstart { moe: out.display().to_string(), texts: texts.to_vec(), dir }
});

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn close_to_one(shares: &Value) {
    let sum: f64 = numbers(shares).iter().sum();
    assert!((sum - 1.0).abs() < 1e-9, "{shares}");
}

#[test]
fn figures_of_three_texts_as_json() {
    let q = &*QUICKSTART;
    let mut args = vec!["route", &q.moe, "--json", "--tokens", "--window", "128", "--text"];
    args.extend(q.texts.iter().map(String::as_str));
    let found = run(&args).json();
    assert_eq!(found["experts"], serde_json::json!(["prose", "code", "math"]));
    for (e, text) in found["texts"].as_array().unwrap().iter().enumerate() {
        assert_eq!(
            (&text["label"], &text["label_from"]),
            (&found["experts"][e], &"file name".into())
        );
        assert_eq!(text["origin"], q.texts[e]);
        close_to_one(&text["load"]);
        close_to_one(&text["top1"]);
        close_to_one(&text["weight"]);
        let layers = text["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 6);
        for layer in layers {
            close_to_one(&layer["load"]);
            let entropy = layer["entropy"].as_f64().unwrap();
            assert!((0.0..=3f64.ln()).contains(&entropy), "{entropy}");
            assert_eq!(layer["agreement"]["top1"], layer["top1"][e]);
        }
        // The README shows 92 to 95 % on the whole texts.
        let agreement = text["agreement"]["top1"].as_f64().unwrap();
        assert!(agreement > 0.8, "{agreement}");
        assert!(text["agreement"]["top_k"].as_f64().unwrap() >= agreement);
        check_tokens(text, e);
    }
    assert_eq!(found["agreement"]["chance"], 1.0 / 3.0);
    assert_eq!(found["agreement"]["layers_no_better_than_chance"], serde_json::json!([]));
    let experts = found["agreement"]["experts"].as_array().unwrap();
    assert_eq!(experts.len(), 3);
    assert_eq!(experts[1]["tokens"], found["texts"][1]["tokens"]);
}

/// What is said of each token adds up to what is said of the text.
fn check_tokens(text: &Value, expert: usize) {
    let tokens = text["token_routing"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, text["tokens"].as_u64().unwrap());
    assert_eq!(text["windows"], tokens.len().div_ceil(127));
    let pieces: String = tokens.iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(pieces, std::fs::read_to_string(text["origin"].as_str().unwrap()).unwrap());
    let mut first = 0.0;
    for token in tokens {
        for layer in token["layers"].as_array().unwrap() {
            assert_eq!(layer["experts"].as_array().unwrap().len(), 2);
            assert!((numbers(&layer["weights"]).iter().sum::<f64>() - 1.0).abs() < 1e-5);
            first += f64::from(layer["experts"][0] == expert);
        }
    }
    let share = first / (6 * tokens.len()) as f64;
    assert!((text["agreement"]["top1"].as_f64().unwrap() - share).abs() < 1e-9);
    let positions = text["positions"].as_array().unwrap();
    let counted: u64 = positions.iter().map(|p| p["tokens"].as_u64().unwrap()).sum();
    assert_eq!(counted, tokens.len() as u64);
    assert_eq!(positions[0]["tokens"], text["windows"]);
}

#[test]
fn tables_and_letters_for_people() {
    let q = &*QUICKSTART;
    let prompt = "fn \u{1b}[31mmain() {}\n";
    let args = ["route", &q.moe, "--prompt", prompt, "The river", "--labels", "code,-"];
    let found = run(&args);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));
    let text = &found.stdout;
    for says in [
        "mixtral, 3 experts, top-2\n",
        "\nprompt 1\n",
        "label code (--labels)",
        "  B code ",
        "code chosen, by position in the window",
        "layer  A    B    C      entropy  first  in top-2\n",
        "␛[",
        "agreement with labels, chance is 33 %",
    ] {
        assert!(text.contains(says), "`{says}` is not in\n{text}");
    }
    assert!(!text.contains('\u{1b}') && text.lines().all(|l| l.chars().count() <= 80), "{text}");
    let second = text.split("\nprompt 2\n").nth(1).unwrap();
    assert!(!second.contains("chosen, by position"), "{second}");
}

#[test]
fn pictures_are_written_whole_and_the_same_each_time() {
    let q = &*QUICKSTART;
    let dir = tempfile::tempdir_in(q.dir.path()).unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let write = |svg: &str, html: &str, threads: &str| {
        let mut args = vec!["route", &q.moe, "--svg", svg, "--html", html, "--threads", threads];
        args.extend(["--show", "50", "--text", &q.texts[0], &q.texts[2]]);
        let found = run(&args);
        assert_eq!(found.code, 0, "{}", found.stderr);
        assert!(found.stderr.contains(svg) && found.stderr.contains(html), "{}", found.stderr);
        [svg, html].map(|path| std::fs::read_to_string(path).unwrap())
    };
    // An older file makes way, as for `logits --out`.
    let (svg, html) = (file(dir.path(), "a.svg", b"old"), at("a.html"));
    let one = write(&svg, &html, "1");
    assert_eq!(one, write(&at("b.svg"), &at("b.html"), "2"));
    assert!(one[0].starts_with("<?xml") && one[0].ends_with("</svg>\n"));
    assert!(one[1].starts_with("<!doctype html>") && one[1].ends_with("</html>\n"));
    for picture in &one {
        assert!(
            picture.contains("The first 50 tokens; ") && picture.contains("label math (file name)")
        );
    }
    assert_eq!(one[1].matches("<small class=\"e").count(), 100);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn what_cannot_be_traced_is_explained() {
    let q = &*QUICKSTART;
    let dense = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/base");
    run(&["route", &dense.display().to_string(), "--prompt", "x"])
        .fails(2, &["the model is dense: it has no experts", "family `llama`", "hint: "]);
    run(&["route", &q.moe, "--prompt", "x", "--labels", "cook"])
        .fails(2, &["no expert is called `cook`", "one of prose, code, math, or its number"]);
    run(&["route", &q.moe, "--prompt", "x", "--labels", "code,math"])
        .fails(2, &["`--labels` does not fit the texts", "1, one for each text", "found     2"]);
    run(&["route", &q.moe, "--prompt", "a", ""]).fails(2, &["text is empty", "prompt 2"]);
    let latin = file(q.dir.path(), "latin.txt", b"caf\xe9");
    run(&["route", &q.moe, "--text", &latin]).fails(3, &["text is not UTF-8", &latin, "byte 3"]);
    run(&["route", &q.moe, "--prompt", "x", "--window", "513"])
        .fails(2, &["window is longer than the context", "at most 512 tokens"]);
    run(&["route", &q.moe, "--prompt", "x", "--window", "1"])
        .fails(2, &["`window` is out of range"]);
    run(&["route", &q.moe, "--prompt", "x", "--svg", "p", "--html", "p"])
        .fails(2, &["`--svg` and `--html` name the same file"]);
    let nowhere = q.dir.path().join("no/such/p.svg").display().to_string();
    run(&["route", &q.moe, "--prompt", "x", "-q", "--svg", &nowhere])
        .fails(3, &["writing failed", &nowhere]);
    assert_eq!(run(&["route", &q.moe]).code, 2);
    run(&["route", &q.moe, "--prompt", "x", "--tokens"]).fails(2, &["--json"]);
}

#[test]
fn labels_may_be_numbers_and_a_model_without_a_manifest_has_numbers() {
    let q = &*QUICKSTART;
    let bare = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&q.moe).unwrap().flatten() {
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), bare.path().join(entry.file_name())).unwrap();
        }
    }
    let path = bare.path().display().to_string();
    let found = run(&["route", &path, "--text", &q.texts[1], "--labels", "1", "--json"]).json();
    assert_eq!(found["experts"][1], "expert 1");
    assert_eq!(found["texts"][0]["label"], "expert 1");
    assert!(found["texts"][0]["token_routing"].is_null());
    let found = run(&["route", &path, "--text", &q.texts[1], "--json"]).json();
    assert!(found["texts"][0]["label"].is_null() && found["agreement"].is_null());
    run(&["route", &path, "--prompt", "x", "--labels", "3"]).fails(2, &["a number from 0 to 2"]);
}
