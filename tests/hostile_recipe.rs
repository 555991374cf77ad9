//! Mistakes in the recipe of a build: exit code, place, and nothing left behind.

#[allow(dead_code)]
mod cli;
#[allow(dead_code)]
mod hostile;

use std::fs;

use hostile::{Build, RECIPE};

#[test]
fn unknown_key_with_the_nearest() {
    let build = Build::new().with("experts_per_token", "experts_per_tokn");
    build.refused(2, &["experts_per_tokn", "recipe.yaml:8:1", "did you mean `experts_per_token`?"]);
    let build = Build::new().with("source_model: code", "sorce_model: code");
    build.refused(2, &["sorce_model", "recipe.yaml:5:5", "`source_model`"]);
}

#[test]
fn unknown_gate_mode() {
    let build = Build::new().with("gate_mode: random", "gate_mode: hiden");
    build.refused(2, &["hiden", "recipe.yaml:7:12", "hidden", "cheap_embed", "auto"]);
}

#[test]
fn experts_per_token_beyond_the_experts() {
    for number in ["3", "0", "-1", "1.5", "two"] {
        let build =
            Build::new().with("experts_per_token: 2", &format!("experts_per_token: {number}"));
        build.refused(2, &["experts_per_token", "recipe.yaml:8:20", "expected", number]);
    }
}

#[test]
fn too_few_experts() {
    let one = RECIPE.replacen("  - source_model: code\n    positive_prompts: [\"pub fn split_depth(depth: i32) -> i32 {\"]\n", "", 1);
    Build::of(&one).refused(2, &["at least two experts", "recipe.yaml:3:3", "found"]);
    let build = Build::of("base_model: base\nexperts: []\n");
    build.refused(2, &["at least two experts", "recipe.yaml:2:10", "found"]);
    let build = Build::of("experts: [{source_model: a}, {source_model: b}]\n");
    build.refused(2, &["base_model", "recipe.yaml", "missing"]);
}

#[test]
fn empty_prompts() {
    let auto = || Build::new().with("gate_mode: random", "gate_mode: hidden");
    let prompt = "[\"the mill seemed gentle when the bells rang\"]";
    let place = "recipe.yaml:4:";
    auto().with(prompt, "[]").refused(2, &["no prompts", "recipe.yaml:3:5", "experts[0]"]);
    auto()
        .with(prompt, "[\"\"]")
        .refused(2, &["prompt", "empty", place, "experts[0].positive_prompts"]);
    auto()
        .with(prompt, "[\"  \\n\"]")
        .refused(2, &["prompt", "empty", place, "experts[0].positive_prompts"]);
    auto().with(prompt, "").refused(2, &["no prompts", "recipe.yaml:3:5", "experts[0]"]);
    auto().with(prompt, "[3]").refused(2, &["positive_prompts", place, "expected"]);
    let without = format!("    positive_prompts: {prompt}\n");
    auto().with(&without, "").refused(2, &["prompts", "recipe.yaml:3:", "experts[0]"]);
}

#[test]
fn prompts_file_that_cannot_be_used() {
    let prompt = "positive_prompts: [\"the mill seemed gentle when the bells rang\"]";
    let build = Build::new()
        .with("gate_mode: random", "gate_mode: auto")
        .with(prompt, "prompts_file: prose.txt");
    build.refused(2, &["prose.txt", "recipe.yaml:4:19", "experts[0].prompts_file"]);
    build.write("prose.txt", b"caf\xe9");
    build.refused(2, &["prose.txt", "UTF-8", "recipe.yaml:4:19"]);
    build.write("prose.txt", b"\n\n  \n");
    build.refused(2, &["prose.txt", "recipe.yaml:4:19"]);
}

#[test]
fn prompt_longer_than_the_context() {
    let long = "the mill seemed gentle ".repeat(2000);
    let build = Build::new()
        .with("gate_mode: random", "gate_mode: hidden")
        .with("the mill seemed gentle when the bells rang", &long);
    build.refused(
        2,
        &[
            "longer than the context",
            "at most 512 tokens",
            "tokens",
            "recipe.yaml:3:",
            "experts[0].positive_prompts[0]",
            "hint: ",
        ],
    );
}

#[test]
fn text_that_is_no_recipe() {
    Build::of("base_model: base\nexperts: [a\n").refused(2, &["YAML", "recipe.yaml:"]);
    Build::of("base_model: base\n\texperts: a\n")
        .refused(2, &["YAML", "recipe.yaml:1", "found a tab", "spaces"]);
    Build::of("").refused(2, &["recipe.yaml", "base_model", "expected"]);
    Build::of("- a\n- b\n").refused(2, &["recipe.yaml", "expected"]);
    Build::of("base_model: a\nbase_model: b\nexperts: []\n")
        .refused(2, &["base_model", "recipe.yaml:2"]);
    let build = Build::new();
    let args = build.args(&[]);
    build.write("recipe.yaml", b"base_model: base\nname: caf\xe9\n");
    let found = cli::run(&args);
    found.fails(2, &["not UTF-8", "recipe.yaml:2:10", "0xe9", "hint: "]);
}

#[test]
fn recipe_that_is_no_file() {
    let build = Build::new();
    let out = build.out();
    let args = build.args(&[]);
    fs::remove_file(build.path("recipe.yaml")).unwrap();
    fs::create_dir(build.path("recipe.yaml")).unwrap();
    cli::run(&args).fails(2, &["is a folder", "recipe.yaml", "expected"]);
    fs::remove_dir(build.path("recipe.yaml")).unwrap();
    cli::run(&args).fails(2, &["recipe not found", "recipe.yaml", "no such file"]);
    build.write("recipes.yaml", "");
    cli::run(&args).fails(2, &["recipe not found", "did you mean", "recipes.yaml`?"]);
    cli::run(&[build.path("base")]).fails(2, &["is a folder", "moe-merge inspect"]);
    assert!(!out.exists());
}

#[test]
fn evaluation_text_that_cannot_be_used() {
    let build = Build::new().with("gate_mode", "evaluation: {prose: eval.txt}\ngate_mode");
    build.refused(2, &["eval.txt", "recipe.yaml:7:21", "evaluation.prose"]);
    for bytes in [&b"caf\xe9"[..], b"", b" \n"] {
        build.write("eval.txt", bytes);
        build.refused(3, &["evaluation text cannot be used", "eval.txt", "text in UTF-8", "found"]);
    }
    fs::remove_file(build.path("eval.txt")).unwrap();
    fs::create_dir(build.path("eval.txt")).unwrap();
    let found = build.run();
    assert!([2, 3].contains(&found.code), "{}", found.stderr);
    build.refused(found.code, &["eval.txt", "folder"]);
}

#[test]
fn every_mistake_is_told_at_once() {
    let build = Build::new()
        .with("experts_per_token: 2", "experts_per_token: 9")
        .with("gate_mode: random", "gate_mode: x\nsed: 3");
    build.refused(2, &["3 mistakes", "experts_per_token", "gate_mode", "sed", "`seed`"]);
}

#[test]
fn a_nested_recipe_that_is_wrong() {
    let build = Build::new().with("source_model: prose", "source_model: soup.yaml");
    build.refused(2, &["recipe not found", "soup.yaml", "recipe.yaml:3:19"]);
    build.write("soup.yaml", "merge_method: linear\nmodels:\n  - model: base\n    parameters: {weight: 1}\n  - model: nowhere\n    parameters: {weight: 1}\n");
    build.refused(3, &["source not found", "nowhere", "soup.yaml:5:12"]);
    build.write(
        "soup.yaml",
        "merge_method: linear\nmodels: [{model: soup.yaml, parameters: {weight: 1}}]\n",
    );
    build.refused(2, &["itself", "soup.yaml -> soup.yaml"]);
}
