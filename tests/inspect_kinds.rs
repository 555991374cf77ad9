//! `inspect` of what is no dense folder: an adapter, a GGUF file, a built MoE.

#[allow(dead_code)]
mod cli;
#[allow(dead_code)]
mod hostile;

use cli::run;
use hostile::Build;
use serde_json::json;

fn repository(path: &str) -> String {
    moe_merge_testkit::repository(path).canonicalize().unwrap().display().to_string()
}

#[test]
fn an_adapter() {
    let path = repository("recipes/smollm2/rust");
    let document = run(&["inspect", &path, "--json"]).json();
    assert_eq!((&document["format"], &document["kind"]), (&json!("adapter"), &json!("LoRA")));
    assert_eq!(document["base_model"], "HuggingFaceTB/SmolLM2-135M-Instruct");
    assert_eq!((&document["rank"], &document["ranks"]), (&json!(8), &json!([8])));
    assert_eq!((&document["alpha"], &document["scale"]), (&json!(16.0), &json!(2.0)));
    let mut targets: Vec<&str> = document["target_modules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    targets.sort_unstable();
    assert_eq!(targets, ["down_proj", "gate_proj", "up_proj"]);
    // Three modules in each of thirty layers, two factors each.
    assert_eq!(document["modules"].as_array().unwrap().len(), 90);
    assert_eq!(document["tensors"], 180);
    // 8 * (576 + 1536) numbers for each of them.
    assert_eq!(document["parameters"], 90 * 8 * (576 + 1536));

    let found = run(&["inspect", &path]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));
    assert!(found.stdout.starts_with(&format!("{path}\n")), "{}", found.stdout);
    for line in
        ["LoRA, CAUSAL_LM, PEFT 0.21.2", "16 (scale 2)", "gate_proj", "180, 1 520 640 numbers"]
    {
        assert!(found.stdout.contains(line), "`{line}` is not in\n{}", found.stdout);
    }
}

#[test]
fn a_damaged_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    std::fs::write(dir.path().join("adapter_config.json"), "{").unwrap();
    run(&["inspect", &path]).fails(3, &["adapter_config.json", "JSON"]);
    let config = std::fs::read(repository("recipes/smollm2/rust/adapter_config.json")).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    run(&["inspect", &path]).fails(3, &["adapter_model.safetensors", "hint: "]);
}

#[test]
fn gguf_files() {
    let path = repository("checkpoint/tests/data/tiny.gguf");
    let document = run(&["inspect", &path, "--json"]).json();
    assert_eq!((&document["format"], &document["layout"]), (&json!("gguf"), &json!("dense")));
    assert_eq!(document["family"], "llama");
    assert!(document["sizes"]["hidden_size"].as_u64().unwrap() > 0);
    assert!(document["tensors"].as_u64().unwrap() > 0);
    let found = run(&["inspect", &path]);
    assert_eq!(found.code, 0);
    assert!(found.stdout.contains("gguf, dense layout"), "{}", found.stdout);
    // Neither is a whole model: one is a bag of quantised tensors, the other a tokenizer.
    for name in ["quants", "spm"] {
        let path = repository(&format!("checkpoint/tests/data/{name}.gguf"));
        let found = run(&["inspect", &path]);
        if found.code != 0 {
            found.fails(3, &[&path]);
        }
    }
}

#[test]
fn a_built_moe() {
    let build = Build::new();
    build.builds();
    let out = build.out().display().to_string();
    let document = run(&["inspect", &out, "--json"]).json();
    assert_eq!((&document["family"], &document["layout"]), (&json!("mixtral"), &json!("hub")));
    assert_eq!((&document["experts"], &document["experts_per_token"]), (&json!(2), &json!(2)));
    let files = document["files"].as_array().unwrap();
    let roles: Vec<&str> = files.iter().map(|f| f["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["expert 0", "expert 1", "routers", "shared"]);
    let provenance = &document["provenance"];
    assert_eq!((&provenance["gate_mode"], &provenance["seed"]), (&json!("random"), &json!(0)));
    assert_eq!(provenance["experts"], json!(["prose", "code"]));
    assert_eq!(provenance["sources"].as_array().unwrap().len(), 3);
    let found = run(&["inspect", &out]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));
    for line in
        ["mixtral (MixtralForCausalLM)", "2, 2 per token", "gates: random", "experts: prose, code"]
    {
        assert!(found.stdout.contains(line), "`{line}` is not in\n{}", found.stdout);
    }
}
