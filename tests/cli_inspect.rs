//! `inspect`, `verify` and `logits` on the tiny base model.

#[allow(dead_code)]
mod cli;

use cli::{base, copy_without, run};

#[test]
fn inspect_shows_what_the_tiny_base_is() {
    let Some(base) = base() else { return };
    let found = run(&["inspect", &base]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""));
    for line in [
        "  family                   llama (LlamaForCausalLM), dense\n",
        "  hidden_size              128\n",
        "  tensors                  56, 1 220 224 numbers, 2.4 MB\n",
        "  dtypes                   bf16: 56 tensors, 2.4 MB\n",
        "  files                    model.safetensors  2.4 MB, 56 tensors, shared\n",
        "  side files               tokenizer.json, tokenizer_config.json, generation_config.json\n",
    ] {
        assert!(found.stdout.contains(line), "{line:?} is not in\n{}", found.stdout);
    }
}

#[test]
fn inspect_as_json() {
    let Some(base) = base() else { return };
    let document = run(&["inspect", &base, "--json"]).json();
    assert_eq!(document["family"], "llama");
    assert_eq!(document["layout"], "dense");
    assert_eq!(document["sizes"]["vocab_size"], 1024);
    assert_eq!(document["dtypes"]["bf16"]["tensors"], 56);
    assert_eq!(document["experts"], serde_json::Value::Null);
    assert_eq!(document["provenance"], serde_json::Value::Null);
}

#[test]
fn inspect_tells_hub_experts_from_fused_ones() {
    let Some(mixtral) = moe_merge_testkit::shared("golden/arch/mixtral") else { return };
    let document = run(&["inspect", mixtral.to_str().unwrap(), "--json"]).json();
    assert_eq!(document["family"], "mixtral");
    let experts = document["experts"].as_u64().unwrap();
    assert!(experts >= 2 && document["experts_per_token"].as_u64().unwrap() <= experts);
    assert!(["hub", "fused"].contains(&document["layout"].as_str().unwrap()));
}

#[test]
fn verify_finds_nothing_wrong_with_the_tiny_base() {
    let Some(base) = base() else { return };
    let found = run(&["verify", &base]);
    assert_eq!((found.code, found.stderr.as_str()), (0, ""), "{}", found.stdout);
    assert!(found.stdout.ends_with("nothing is wrong\n"), "{}", found.stdout);
    let document = run(&["verify", &base, "--json"]).json();
    assert_eq!((&document["ok"], &document["tensors"]), (&true.into(), &56.into()));
}

#[test]
fn verify_lists_every_problem_and_ends_with_one() {
    let Some(base) = base() else { return };
    let dir = copy_without(&base, &["config.json", "model.safetensors"]);
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{base}/config.json")).unwrap()).unwrap();
    config["intermediate_size"] = 345.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut weights = std::fs::read(format!("{base}/model.safetensors")).unwrap();
    // The last number of the file becomes a NaN.
    let end = weights.len();
    weights[end - 2..].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    let found = run(&["verify", dir.path().to_str().unwrap(), "--json"]);
    assert_eq!((found.code, found.stderr.as_str()), (1, ""), "{}", found.stdout);
    let document: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    let problems: Vec<&str> =
        document["problems"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    // Three projections in each of six layers, and the NaN.
    assert_eq!(problems.len(), 19, "{problems:#?}");
    assert!(problems.contains(
        &"`model.layers.0.mlp.up_proj.weight` has shape [344, 128], expected [345, 128]"
    ));
    assert!(problems.iter().any(|p| p.contains("holds NaN or infinity")), "{problems:#?}");
}

#[test]
fn logits_are_written_with_their_shapes() {
    let Some(base) = base() else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("l.safetensors");
    let out = out.to_str().unwrap();
    let document = run(&["logits", &base, "--tokens", "1,5,7", "--out", out, "--json"]).json();
    assert_eq!(document["tensors"]["logits"], serde_json::json!([3, 1024]));
    let tensors = moe_merge_testkit::golden::load(out.as_ref());
    assert_eq!(tensors.len(), 8);
    assert_eq!(tensors["hidden_0"].shape, [3, 128]);
    assert_eq!(tensors["hidden_6"].shape, [3, 128]);
    assert!(tensors["logits"].values.iter().all(|v| v.is_finite()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a part was left");
}
