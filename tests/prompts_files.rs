//! Prompts in files, through a whole build: what is cut or left out reaches the report.

mod common;

use std::fs;
use std::path::Path;

use moe_merge_checkpoint::publish::{Interrupt, Replace};
use moe_merge_merge::build::{BuildOptions, BuildReport, Prepared, RecipeText};
use moe_merge_merge::families::Layout;
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_testkit::shared;

fn build(folder: &Path, text: &str) -> BuildReport {
    let path = folder.join("recipe.yaml");
    let Ok(Recipe::Moe(recipe)) = recipe::parse(text, &path) else { panic!("{text}") };
    let options = BuildOptions {
        out: Some(folder.join("out")),
        unfinished: Default::default(),
        replace: Replace::Force,
        layout: Layout::Hub,
        interrupt: Interrupt::default(),
        placement: Default::default(),
        shard_limit: None,
    };
    let prepared = Prepared::new(&recipe, RecipeText { path: &path, text }, options).unwrap();
    prepared.build(&common::Silent).unwrap()
}

#[test]
fn one_labelled_file_serves_all_experts_and_the_budget_is_told() {
    let Some(tiny) = shared("models/tiny") else { return };
    let folder = tempfile::tempdir().unwrap();
    fs::copy(tiny.join("prompts.json"), folder.path().join("all.json")).unwrap();
    let long = fs::read_to_string(tiny.join("eval_math.txt")).unwrap().replace("\n\n", "\n");
    fs::write(folder.path().join("math.txt"), long).unwrap();
    let recipe = |keys: &str| {
        let expert = |name: &str, files: &str| {
            let source = tiny.join(name).display().to_string();
            format!("  - {{source_model: {source}, name: {name}, prompts_file: {files}}}\n")
        };
        let base = tiny.join("base").display().to_string();
        format!(
            "base_model: {base}\nexperts:\n{}{}{}{}{keys}\n",
            expert("prose", "all.json"),
            expert("code", "all.json"),
            expert("math", "[all.json, math.txt]"),
            expert("facts", "all.json"),
        )
    };
    let has = |report: &BuildReport, text: &str| report.warnings.iter().any(|w| w.contains(text));
    let report = build(folder.path(), &recipe("prompt_tokens: 1500"));
    assert!(!has(&report, "left out"), "{:#?}", report.warnings);
    let cut = "expert `math`: 1 of 7 documents cut into pieces of 512 tokens, 1 cut short: budget of 1500 tokens";
    assert!(has(&report, cut), "{:#?}", report.warnings);
    assert!(!has(&report, "`code`: 1 of"), "{:#?}", report.warnings);
    let report = build(folder.path(), &recipe("prompt_tokens: 100"));
    assert!(
        has(&report, "left out: budget of 100 tokens (`prompt_tokens`)"),
        "{:#?}",
        report.warnings
    );
}
