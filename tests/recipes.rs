//! Every recipe of the repository runs, and what it writes passes `verify`.

use std::path::Path;

use assert_cmd::Command;
use moe_merge_testkit::repository;

fn moe_merge() -> Command {
    let mut command = Command::cargo_bin("moe-merge").unwrap();
    command.current_dir(repository(""));
    command
}

fn check(recipe: &Path, out: &Path) {
    moe_merge().arg(recipe).arg("--out").arg(out).assert().success();
    moe_merge().arg("verify").arg(out).assert().success();
}

#[test]
fn recipes_run_as_they_are() {
    let temp = tempfile::tempdir().unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(repository("recipes")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_owned();
        let is_recipe = path.extension().is_some_and(|e| e == "yaml");
        // The quickstart has a test of its own; SmolLM2 needs a file of 98 MB.
        if !is_recipe || name == "smollm2" || name == "quickstart" {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{} explains itself on top", path.display());
        check(&path, &temp.path().join(name));
        count += 1;
    }
    assert!(count >= 7, "{count} recipes");
}

#[test]
fn the_quickstart_beats_the_base_on_every_domain() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("quickstart");
    let run = moe_merge()
        .args(["recipes/quickstart.yaml", "--json", "--out"])
        .arg(&out)
        .assert()
        .success();
    let report: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    assert_eq!(report["version"], 1);
    let models = report["evaluation"]["models"].as_array().unwrap();
    let row = |name: &str| models.iter().find(|m| m["name"] == name).unwrap()["perplexity"].clone();
    let (base, moe) = (row("base"), row("MoE"));
    for (domain, own) in ["prose", "code", "math"].iter().enumerate() {
        let (base, moe) = (base[domain].as_f64().unwrap(), moe[domain].as_f64().unwrap());
        let own = row(own)[domain].as_f64().unwrap();
        let recovered = (base.ln() - moe.ln()) / (base.ln() - own.ln());
        assert!(recovered > 0.5, "domain {domain}: {recovered} of the gain");
        let first = report["evaluation"]["routing"][domain]["first"][domain].as_f64().unwrap();
        assert!(first > 0.8, "domain {domain}: {first} of its tokens");
    }
    moe_merge().arg("verify").arg(&out).assert().success();
}

#[test]
fn a_command_line_of_mergekit_works() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = temp.path().join("config.yml");
    // The models are where the program runs, not beside the recipe.
    let text = "merge_method: dare_ties\nbase_model: recipes/quickstart/base\ndtype: bfloat16\n\
                models: [{model: recipes/quickstart/code, parameters: {weight: 1, density: 0.5}}]\n";
    std::fs::write(&recipe, text).unwrap();
    // The numbers of the tensors, whatever file they are in.
    let build_of = |recipe: &Path, out: &str, flags: &[&str]| {
        let out = temp.path().join(out);
        let run = moe_merge().arg(recipe).arg(&out).args(flags).assert().success();
        moe_merge().arg("verify").arg(&out).assert().success();
        let mut tensors = std::collections::BTreeMap::new();
        let mut shards = 0;
        for entry in std::fs::read_dir(&out).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                shards += 1;
                let bytes = std::fs::read(&path).unwrap();
                for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
                    tensors.insert(name.to_owned(), view.data().to_vec());
                }
            }
        }
        let told = String::from_utf8(run.get_output().stderr.clone()).unwrap();
        (tensors, shards, told)
    };
    let build = |out: &str, flags: &[&str]| build_of(&recipe, out, flags);
    let (plain, one, _) = build("plain", &[]);
    let (seven, _, _) = build("seven", &["--random-seed", "7"]);
    let (cut, several, told) =
        build("cut", &["--cuda", "--lazy-unpickle", "--out-shard-size", "200k", "-j", "2"]);
    assert!(plain != seven, "another seed draws another mask");
    // The seed is that of recipes within the recipe, too.
    let outer = temp.path().join("outer.yml");
    let written = text.trim_end().replace('\n', "\n      ");
    for (kind, inner) in
        [("file", "config.yml".to_owned()), ("inline", format!("\n      {written}"))]
    {
        let text = format!("merge_method: passthrough\nmodels:\n  - model: {inner}\n");
        std::fs::write(&outer, text).unwrap();
        let (nested, _, _) = build_of(&outer, kind, &["--random-seed", "7"]);
        assert!(nested == seven, "{kind}");
    }
    assert!(plain == cut, "how it is cut changes no number");
    assert!(one == 1 && several > 1, "{one} and {several} shards");
    assert!(told.contains("--cuda") && !told.contains("lazy"), "{told}");
}

#[test]
fn a_dry_run_tells_what_fitting_takes() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = temp.path().join("fit.yaml");
    let plan = |method: &str, more: &str| -> serde_json::Value {
        let model = |name: &str| {
            let prompts =
                if more.is_empty() { "" } else { ", prompts: [\"some words of its own\"]" };
            format!("{{model: recipes/quickstart/{name}{prompts}}}")
        };
        let models = format!("[{}, {}]", model("code"), model("math"));
        let text = format!("merge_method: {method}\nmodels: {models}\n{more}");
        std::fs::write(&recipe, text).unwrap();
        let run = moe_merge().arg(&recipe).args(["--dry-run", "--json"]).assert().success();
        serde_json::from_slice(&run.get_output().stdout).unwrap()
    };
    // Gate and up, 128 numbers to twice 344, take most; and 128 numbers of f32 for each of at most 3000 tokens.
    let site = 128 * (4 * 128 + 24 * 2 * 344);
    let more = "self_text: 1000\nprompt_tokens: 500\n";
    let streams = 2 * 1500 * 128 * 4;
    assert_eq!(plan("regmean", more)["fitting_memory_bytes"], site + streams);
    assert_eq!(plan("regmean_stream", more)["fitting_memory_bytes"], site + 2 * streams);
    let linear = plan("linear\nparameters: {weight: 1}", "");
    assert!(linear["fitting_memory_bytes"].is_null() && linear["disk_bytes"].is_u64(), "{linear}");
}
