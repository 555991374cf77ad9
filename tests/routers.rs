//! Routers of whole builds: without prompts, with a generalist, trained further.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::{Path, PathBuf};

use moe_merge_merge::families::Layout;
use moe_merge_model::{Model, Tokenizer};
use moe_merge_testkit::repository;
use serde_json::{Value, json};

const PROSE: [&str; 2] = [
    "the mill seemed gentle when the bells rang, and Mara wandered home before the snow",
    "that winter the station was quiet; nobody remembered the letter or the old man",
];
const CODE: [&str; 2] = [
    "pub fn split_depth(depth: i32) -> i32 {\n    let mut start = depth;\n    start\n}\n",
    "fn main() {\n    let values = vec![1, 2, 3];\n    for v in values {\n        print(v);\n    }\n}\n",
];

fn recipe(more: &str, prompts: bool) -> String {
    let sources = repository("recipes/quickstart");
    let expert = |name: &str, texts: &[&str]| {
        let texts = if prompts { json!(texts).to_string() } else { "[]".into() };
        let model = format!("{}/{name}", sources.display());
        format!("- {{name: {name}, source_model: \"{model}\", positive_prompts: {texts}}}\n")
    };
    let top_k = if more.contains("experts_per_token") { "" } else { "experts_per_token: 1\n" };
    format!(
        "base_model: \"{}/base\"\n{top_k}{more}experts:\n{}{}",
        sources.display(),
        expert("prose", &PROSE),
        expert("code", &CODE)
    )
}

fn built(temp: &Path, name: &str, more: &str, prompts: bool) -> PathBuf {
    let text = recipe(more, prompts);
    common::build_text(&text, &temp.join("r.yaml"), &temp.join(name), Layout::Hub)
}

fn router_bytes(folder: &Path) -> Vec<u8> {
    let source = common::open(folder);
    let routers = source.tensors.iter().filter(|(name, _)| name.contains("gate.weight"));
    routers.flat_map(|(_, w)| w.bytes().unwrap().to_vec()).collect()
}

/// Share of tokens whose first choice is `expert`, mean over layers.
fn first_choices(folder: &Path, text: &str, expert: usize) -> f64 {
    let source = common::open(folder);
    let tokenizer = Tokenizer::from_source(&source).unwrap();
    let tokens = tokenizer.encode(text).unwrap();
    let text = moe_merge_model::streamed::TokenText { tokens: &tokens, origin: "text" };
    let (mut right, mut all) = (0, 0);
    moe_merge_model::trace::trace(
        &source,
        &[text],
        tokenizer.bos(),
        128,
        &Default::default(),
        &mut |window| {
            let k = window.routing.top_k;
            right += window.routing.ids.chunks(k).filter(|ids| ids[0] == expert as u32).count();
            all += window.routing.tokens;
            Ok(())
        },
    )
    .unwrap();
    right as f64 / all as f64
}

#[test]
fn a_recipe_without_prompts_builds_and_routes() {
    let temp = tempfile::tempdir().unwrap();
    let moe = built(temp.path(), "moe", "self_text: 1200\n", false);
    let (prose, code) = (first_choices(&moe, PROSE[0], 0), first_choices(&moe, CODE[1], 1));
    assert!(prose > 0.7 && code > 0.7, "{prose} {code}");
    let again = built(temp.path(), "again", "self_text: 1200\n", false);
    assert_eq!(router_bytes(&moe), router_bytes(&again));
}

#[test]
fn mergekits_modes_need_prompts() {
    let temp = tempfile::tempdir().unwrap();
    let file = cli::file(temp.path(), "r.yaml", recipe("gate_mode: hidden\n", false).as_bytes());
    let out = temp.path().join("o").display().to_string();
    let found = cli::run(&[&file, "--out", &out]);
    assert_eq!(found.code, 2, "{}", found.stderr);
    assert!(found.stderr.contains("positive_prompts"), "{}", found.stderr);
    assert!(!temp.path().join("o").exists());
}

#[test]
fn a_generalist_is_one_more_expert_and_the_base_itself() {
    let temp = tempfile::tempdir().unwrap();
    let moe = built(temp.path(), "moe", "generalist: true\n", true);
    let source = common::open(&moe);
    assert_eq!(source.config.usize("num_local_experts"), Some(3));
    let base = common::open(&repository("recipes/quickstart/base"));
    let mine = source.tensors["model.layers.3.block_sparse_moe.experts.2.w2.weight"].bytes();
    assert_eq!(mine, base.tensors["model.layers.3.mlp.down_proj.weight"].bytes());
    assert!(
        common::logits(&Model::open(&source).unwrap(), &[1, 5, 9]).iter().all(|l| l.is_finite())
    );

    for (more, what) in [
        ("generalist: true\ngate_mode: logistic\n", "no text"),
        ("generalist: true\nsequential: false\n", "no text"),
    ] {
        let file = cli::file(temp.path(), "r.yaml", recipe(more, true).as_bytes());
        let out = temp.path().join("o").display().to_string();
        let found = cli::run(&[&file, "--out", &out]);
        assert_eq!(found.code, 2, "{}", found.stderr);
        assert!(found.stderr.contains(what), "{}", found.stderr);
    }
}

#[test]
fn whether_a_generalist_pays_is_measured_and_told() {
    let temp = tempfile::tempdir().unwrap();
    let file = cli::file(temp.path(), "r.yaml", recipe("generalist: auto\n", true).as_bytes());
    let out = temp.path().join("o").display().to_string();
    let found = cli::run(&[&file, "--out", &out, "--json"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: Value = serde_json::from_str(&found.stdout).unwrap();
    let said = |w: &Value| w.as_str().unwrap().starts_with("a generalist changes the error");
    let verdict = report["warnings"].as_array().unwrap().iter().find(|w| said(w)).unwrap();
    let kept = verdict.as_str().unwrap().ends_with("it is one of the experts");
    assert_eq!(report["experts"].as_array().unwrap().len(), if kept { 3 } else { 2 });
    let config: Value =
        serde_json::from_slice(&std::fs::read(temp.path().join("o/config.json")).unwrap()).unwrap();
    assert_eq!(config["num_local_experts"], if kept { 3 } else { 2 });
}

#[test]
fn fitting_to_the_merged_stream_is_something_else_than_to_the_bases() {
    let temp = tempfile::tempdir().unwrap();
    let own = built(temp.path(), "a", "gate_mode: logistic\n", true);
    let base = built(temp.path(), "b", "gate_mode: logistic\nsequential: false\n", true);
    assert_ne!(router_bytes(&own), router_bytes(&base));
}

#[test]
fn a_training_that_was_stopped_goes_on_to_the_same_routers() {
    let temp = tempfile::tempdir().unwrap();
    let moe = built(temp.path(), "moe", "", true);
    let prompts = json!({"prose": PROSE, "code": CODE}).to_string();
    let prompts = cli::file(temp.path(), "p.json", prompts.as_bytes());
    let path = moe.display().to_string();
    let trained = |out: &str, state: &str| {
        let out = temp.path().join(out).display().to_string();
        let state = temp.path().join(state).display().to_string();
        let found = cli::run(&[
            "calibrate",
            &path,
            "--prompts",
            &prompts,
            "--steps",
            "4",
            "--state",
            &state,
            "--out",
            &out,
            "--json",
            "--objective",
            "next-token",
            "--self-text",
            "240",
        ]);
        assert_eq!(found.code, 0, "{}", found.stderr);
        let report: Value = serde_json::from_str(&found.stdout).unwrap();
        assert_eq!(report["training"]["steps"], 4);
        PathBuf::from(out)
    };
    let whole = trained("whole", "state.json");
    // The state of a finished run: going on does no step and gives the same routers.
    let again = trained("again", "state.json");
    assert_eq!(router_bytes(&whole), router_bytes(&again));
    assert_ne!(router_bytes(&whole), router_bytes(&moe));
    std::fs::write(temp.path().join("broken.json"), "{}").unwrap();
    let found = cli::run(&[
        "calibrate",
        &path,
        "--prompts",
        &prompts,
        "--steps",
        "4",
        "--state",
        &temp.path().join("broken.json").display().to_string(),
    ]);
    assert_eq!(found.code, 3, "{}", found.stderr);
    assert!(found.stderr.contains("no state of a router training"), "{}", found.stderr);
}

#[test]
fn a_walk_sees_what_the_model_sees() {
    let temp = tempfile::tempdir().unwrap();
    let moe = built(temp.path(), "moe", "gate_mode: random\n", true);
    let source = common::open(&moe);
    let sequences = [vec![1, 5, 9, 30, 77], vec![1, 7, 300]];
    let mut expected = Vec::new();
    moe_merge_model::probe(&source, &sequences, &mut |layer| {
        expected.push(layer.router_input.concat());
        Ok(())
    })
    .unwrap();
    let outputs = moe_merge_model::Outputs::Compare;
    let mut layers = 0;
    moe_merge_model::walk(&source, &sequences, outputs, &mut |view| {
        let near = view.inputs.iter().zip(&expected[view.layer]);
        assert!(near.clone().all(|(a, b)| (a - b).abs() < 1e-4), "layer {}", view.layer);
        assert_eq!(view.outputs.len(), 8 * 2 * 2);
        for p in view.outputs.chunks(4) {
            // Two outputs about their mean are each other's opposite.
            assert!(
                p[0] > 0.0
                    && (p[0] + p[1]).abs() < 1e-4 * p[0]
                    && (p[0] - p[3]).abs() < 1e-4 * p[0]
            );
        }
        layers += 1;
        let name = format!("model.layers.{}.block_sparse_moe.gate.weight", view.layer);
        Ok(source.tensors[&name].to_f32().unwrap())
    })
    .unwrap();
    assert_eq!(layers, expected.len());
    assert_eq!(layers, 6);
}

#[test]
fn the_first_token_gets_experts_that_predict_what_all_would() {
    let temp = tempfile::tempdir().unwrap();
    let moe = built(temp.path(), "moe", "gate_mode: random\nexperts_per_token: 2\n", true);
    let source = common::open(&moe);
    let found = moe_merge_model::first_token(&source, 1, &[0, 1]).unwrap().unwrap();
    assert_eq!(found, moe_merge_model::first_token(&source, 1, &[0, 1]).unwrap().unwrap());
    assert_eq!(found.len(), 6);
    for weights in found.values() {
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
    // Both are to be pleased, so neither gets nearly everything.
    let share = |expert: usize| found.values().map(|w| w[expert]).sum::<f32>() / 6.0;
    assert!((0.2..0.8).contains(&share(0)) && (0.2..0.8).contains(&share(1)), "{found:?}");
    assert_eq!(moe_merge_model::first_token(&source, 1, &[0]).unwrap(), None);
}
