//! `evaluate`: the same numbers as a build gives, without one; and what it refuses.

#[allow(dead_code)]
mod cli;

use std::path::Path;

use moe_merge_testkit::repository;
use serde_json::Value;

/// A recipe of two of the quickstart's experts with short texts, and more `lines`.
fn recipe(temp: &Path, name: &str, lines: &str) -> String {
    let quickstart = repository("recipes/quickstart").canonicalize().unwrap();
    let mut text = format!("base_model: \"{}\"\n", quickstart.join("base").display());
    text += "experts:\n";
    let prompts = [
        (
            "prose",
            "the mill seemed gentle when the bells rang, and Mara wandered home",
            "that winter the station was quiet",
        ),
        (
            "code",
            "pub fn split_depth(depth: i32) -> i32 { let mut start = depth; start }",
            "impl Parser { fn next(&mut self) {} }",
        ),
    ];
    for (expert, one, two) in prompts {
        let source = quickstart.join(expert).display().to_string();
        text += &format!(
            "- {{name: {expert}, source_model: \"{source}\", positive_prompts: [\"{one}\", \"{two}\"]}}\n"
        );
    }
    text += "evaluation:\n";
    for (expert, ..) in prompts {
        let all = std::fs::read(quickstart.join(format!("eval_{expert}.txt"))).unwrap();
        let file = cli::file(temp, &format!("{expert}.txt"), &all[..2500]);
        text += &format!("  {expert}: \"{file}\"\n");
    }
    text += lines;
    cli::file(temp, name, text.as_bytes())
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn near(a: &[f64], b: &[f64]) {
    let close = |(a, b): (&f64, &f64)| (a / b - 1.0).abs() < 1e-9;
    assert!(a.len() == b.len() && a.iter().zip(b).all(close), "{a:?} against {b:?}");
}

/// The evaluation of a build, and of `evaluate` with the recipe's own estimator.
fn both(lines: &str) -> (Value, Value) {
    let temp = tempfile::tempdir().unwrap();
    let recipe = recipe(temp.path(), "x.yaml", lines);
    let out = temp.path().join("moe").display().to_string();
    let built = cli::run(&[recipe.as_str(), "--out", &out, "--json", "-q"]).json();
    let before = std::fs::read_dir(temp.path()).unwrap().count();
    let mode = built["gate_mode"].as_str().unwrap();
    let args = ["evaluate", &recipe, "--estimators", mode, "--json", "-q"];
    let measured = cli::run(&args).json();
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), before, "nothing is written");
    assert_eq!(measured["window"], built["evaluation"]["window"]);
    let rows = built["evaluation"]["models"].as_array().unwrap();
    for (row, own) in rows.iter().zip(measured["models"].as_array().unwrap()) {
        assert_eq!(row["name"], own[0]);
        near(&numbers(&row["perplexity"]), &numbers(&own[1]));
    }
    let moe = numbers(&rows.last().unwrap()["perplexity"]);
    let [row] = measured["routers"].as_array().unwrap().as_slice() else { panic!("{measured}") };
    let domains = row["domains"].as_array().unwrap();
    let found: Vec<f64> = domains.iter().map(|d| d["perplexity"].as_f64().unwrap()).collect();
    near(&moe, &found);
    for (domain, shares) in domains.iter().enumerate() {
        let first = &built["evaluation"]["routing"][domain]["first"][domain];
        assert_eq!(&shares["accuracy"], first);
    }
    (built, measured)
}

#[test]
fn the_numbers_are_those_of_a_build() {
    // Another dtype, attention that is computed.
    both("gate_mode: logistic\ndtype: float16\nattention: average\n");
    // Stacked experts.
    both("gate_mode: hidden_avg\narchitecture: granitemoeshared\nexperts_per_token: 1\n");
    // A gated shared expert with noise and scale, rounded as on disk.
    let base = repository("recipes/quickstart/base").canonicalize().unwrap();
    let shared = format!(
        "gate_mode: auto\nsequential: false\narchitecture: qwen2_moe\nshared_experts:\n- source_model: \"{}\"\n  \
         positive_prompts: [a text of any kind]\n  residual_scale: 0.3\n  noise_scale: 0.01\n",
        base.display()
    );
    both(&shared);
}

#[test]
fn an_oracle_is_the_expert_where_only_mlps_were_trained() {
    for lines in ["gate_mode: random\n", "gate_mode: random\narchitecture: granitemoeshared\n"] {
        let (_, measured) = both(lines);
        for (domain, facts) in measured["domains"].as_array().unwrap().iter().enumerate() {
            let own = numbers(&measured["models"][domain + 1][1])[domain];
            let oracle = facts["oracle"].as_f64().unwrap();
            assert!((oracle / own - 1.0).abs() < 1e-5, "{oracle} against {own}");
        }
    }
}

#[test]
fn every_combination_is_a_row() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = recipe(temp.path(), "x.yaml", "experts_per_token: 1\n");
    let args = ["evaluate", &recipe, "--estimators", "logistic,random", "--prompts", "1,2"];
    let more = ["--top-k", "1,2,3", "--tokens", "100", "--window", "64"];
    let run = cli::run(&[&args[..], &more, &["--json"]].concat());
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((run.code, &found["window"]), (0, &64.into()), "{}", run.stderr);
    let rows: Vec<String> = found["routers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| {
            format!("{} {} {}", r["router"].as_str().unwrap(), r["experts_per_token"], r["prompts"])
        })
        .collect();
    // Random gates read no prompts: their number changes nothing.
    let expected = [
        "logistic 1 1",
        "random 1 0",
        "logistic 2 1",
        "random 2 0",
        "logistic 1 2",
        "logistic 2 2",
    ];
    assert_eq!(rows, expected);
    assert_eq!(found["domains"][0]["tokens"], 100);
    assert_eq!(found["notes"][0], "top-3 of 2 experts cannot be");
    let by_position = found["routers"][0]["mean"]["by_position"].as_array().unwrap();
    assert!(
        by_position.len() == 8 && by_position[7].is_null(),
        "windows of 64 have no position 64"
    );

    let shown = cli::run(&[&args[..], &more, &["--positions"]].concat()).stdout;
    for text in ["top-2 / 1 prompt / logistic", "  oracle ", "from 9th token", "32-63"] {
        assert!(shown.contains(text), "`{text}` is not in\n{shown}");
    }
}

#[test]
fn self_text_is_written_once_for_all_that_need_it() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = recipe(temp.path(), "x.yaml", "experts_per_token: 1\n");
    let args = ["evaluate", &recipe, "--estimators", "hidden", "--tokens", "64", "--top-k", "1,2"];
    let more = ["--self-text", "200", "--no-prompts", "--json", "-q"];
    let found = cli::run(&[&args[..], &more].concat()).json();
    let rows = found["routers"].as_array().unwrap();
    let routers: Vec<&str> = rows.iter().map(|r| r["router"].as_str().unwrap()).collect();
    let half = ["hidden", "auto+self-text", "auto (no prompts)"];
    assert_eq!(routers, [half, half].concat());
    for (one, two) in rows[..3].iter().zip(&rows[3..]) {
        assert_eq!(one["self_text_tokens"], two["self_text_tokens"]);
        assert_eq!(one["prompt_tokens"], two["prompt_tokens"]);
    }
    assert_eq!(rows[0]["self_text_tokens"], 0);
    assert!(rows[1]["self_text_tokens"].as_u64().unwrap() > 200, "{}", rows[1]);
}

#[test]
fn what_cannot_be_is_explained() {
    let temp = tempfile::tempdir().unwrap();
    let good = recipe(temp.path(), "x.yaml", "experts_per_token: 1\n");
    let text = std::fs::read_to_string(&good).unwrap();
    let end = text.find("evaluation:").unwrap();
    let silent = cli::file(temp.path(), "silent.yaml", &text.as_bytes()[..end]);
    let says = ["no text to evaluate on", "silent.yaml", "prose: held_out_prose.txt"];
    cli::run(&["evaluate", &silent]).fails(2, &says);
    let refused = |args: &[&str], says: &[&str]| {
        cli::run(&[&["evaluate", good.as_str()], args].concat()).fails(2, says);
    };
    refused(&["--estimators", "hiden"], &["`hiden`", "did you mean `hidden`?"]);
    refused(&["--experts", "prose,poems"], &["no expert `poems`", "some of prose, code"]);
    refused(&["--experts", "prose"], &["at least two experts", "found     prose"]);
    refused(&["--experts", "code,code"], &["`code` is asked for twice"]);
    refused(&["--top-k", "5", "--estimators", "random"], &["top-5 of 2 experts cannot be"]);
    refused(&["--window", "100000"], &["window is longer than the context"]);
    let soup = repository("recipes/soup.yaml").display().to_string();
    cli::run(&["evaluate", &soup]).fails(2, &["a dense recipe has no routers"]);
}
