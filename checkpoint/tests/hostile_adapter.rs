//! One adapter for every way to be refused.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{CheckpointError, Explain, Kind, Source, adapter};
use safetensors::tensor::{Dtype, TensorView};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/adapters").join(name)
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Copies the adapter `case`, lets `config` and `tensors` change it, and gives the error of applying it.
fn refused(
    case: &str,
    config: impl Fn(&mut serde_json::Map<String, serde_json::Value>),
    tensors: impl Fn(&mut Tensors),
) -> (String, Vec<(&'static str, String)>, String) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(data(case).join("adapter_config.json")).unwrap();
    let mut json: serde_json::Map<_, _> = serde_json::from_slice(&bytes).unwrap();
    config(&mut json);
    let json = serde_json::to_vec(&json).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), json).unwrap();
    let file = data(case).join("adapter_model.safetensors");
    let mut all: Tensors = moe_merge_testkit::golden::load(&file)
        .into_iter()
        .map(|(name, t)| (name, t.shape, t.values.iter().map(|v| *v as f32).collect()))
        .collect();
    tensors(&mut all);
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = all
        .into_iter()
        .map(|(name, shape, v)| (name, shape, v.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = stored
        .iter()
        .map(|(name, shape, v)| (name, TensorView::new(Dtype::F32, shape.clone(), v).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
    explained(adapter::apply(base(case), dir.path()).expect_err("this adapter must be refused"))
}

fn explained(error: CheckpointError) -> (String, Vec<(&'static str, String)>, String) {
    assert_eq!(error.kind(), Kind::Input);
    (error.to_string(), error.fields(), error.hint().unwrap_or_default())
}

fn base(case: &str) -> Source {
    let cases: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data("cases.json")).unwrap()).unwrap();
    let path = data(cases[case]["base"].as_str().unwrap());
    Source::open(&path.display().to_string().parse().unwrap(), Path::new("/")).unwrap()
}

fn same<T>(_: &mut T) {}

fn field<'a>(fields: &'a [(&'static str, String)], name: &str) -> &'a str {
    &fields.iter().find(|(key, _)| *key == name).expect("field").1
}

fn set(
    key: &'static str,
    value: serde_json::Value,
) -> impl Fn(&mut serde_json::Map<String, serde_json::Value>) {
    move |map| {
        map.insert(key.into(), value.clone());
    }
}

#[test]
fn variants_that_are_no_plain_lora() {
    for (key, value, says) in [
        ("peft_type", serde_json::json!("LOHA"), "PEFT type `LOHA`"),
        ("layer_replication", serde_json::json!([[0, 2], [0, 2]]), "repeats layers"),
        ("alora_invocation_tokens", serde_json::json!([1, 2]), "activated LoRA"),
        ("use_qalora", serde_json::json!(true), "QALoRA"),
        ("init_lora_weights", serde_json::json!("pissa_niter_4"), "pissa_niter_4"),
        ("init_lora_weights", serde_json::json!("olora"), "olora"),
        ("init_lora_weights", serde_json::json!("corda"), "corda"),
        ("init_lora_weights", serde_json::json!("loftq"), "loftq"),
        ("init_lora_weights", serde_json::json!("something"), "not known"),
    ] {
        let (what, fields, hint) = refused("linear", set(key, value), same);
        assert!(what.contains(says), "{what}");
        assert!(field(&fields, "file").ends_with("adapter_config.json") && !hint.is_empty());
    }
}

#[test]
fn values_of_the_wrong_type() {
    for (key, value) in [
        ("r", serde_json::json!(0)),
        ("r", serde_json::json!("8")),
        ("lora_alpha", serde_json::json!(null)),
        ("use_dora", serde_json::json!("yes")),
        ("bias", serde_json::json!("some")),
        ("rank_pattern", serde_json::json!({"q_proj": -1})),
        ("alpha_pattern", serde_json::json!({"(": 1})),
        ("trainable_token_indices", serde_json::json!([-1])),
    ] {
        let (what, ..) = refused("linear", set(key, value), same);
        assert!(what.contains(key), "{key}: {what}");
    }
}

#[test]
fn rank_that_disagrees_with_the_tensor() {
    let (what, fields, _) = refused("linear", set("r", 5.into()), same);
    assert!(what.contains("rank"), "{what}");
    assert!(field(&fields, "expected").starts_with("[5, in]"), "{fields:?}");
    assert!(field(&fields, "tensor").contains("lora_A"));
}

#[test]
fn tensors_left_over() {
    let extra = |t: &mut Tensors| {
        t.push(("base_model.model.model.layers.9.x.lora_A.weight".into(), vec![1, 1], vec![1.0]))
    };
    let (what, fields, _) = refused("linear", same, extra);
    assert!(what.starts_with("1 tensors"), "{what}");
    assert!(field(&fields, "found").contains("layers.9.x.lora_A"));
}

#[test]
fn factor_without_its_twin() {
    let (what, fields, _) =
        refused("linear", same, |t| t.retain(|x| !x.0.contains("layers.1.mlp.down_proj.lora_B")));
    assert!(what.contains("missing"), "{what}");
    assert!(field(&fields, "tensor").contains("layers.1.mlp.down_proj.lora_B"));
}

#[test]
fn shape_that_does_not_fit() {
    let (what, fields, _) = refused("linear", same, |t| {
        for (_, shape, values) in t.iter_mut().filter(|x| x.0.contains("q_proj.lora_A")) {
            shape[1] += 1;
            values.resize(shape[0] * shape[1], 0.0);
        }
    });
    assert!(what.contains("does not fit"), "{what}");
    assert!(field(&fields, "expected").contains("[16, 16]"));
    assert!(field(&fields, "found").contains("[16, 17]"));
}

#[test]
fn another_vocabulary() {
    let longer = |name: &'static str, axis: usize| {
        move |t: &mut Tensors| {
            for (_, shape, values) in t.iter_mut().filter(|x| x.0.contains(name)) {
                shape[axis] += 2;
                values.resize(shape[0] * shape[1], 0.0);
            }
        }
    };
    for (case, name, axis) in [
        ("embedding", "lora_embedding_A", 1),
        ("embedding", "lm_head.lora_B", 0),
        ("embedding", "embed_tokens.base_layer", 0),
        ("modules_to_save", "lm_head.weight", 0),
    ] {
        let (what, fields, _) = refused(case, same, longer(name, axis));
        assert!(what.contains("vocabulary"), "{case} {name}: {what}");
        assert_eq!(field(&fields, "expected"), "48 tokens, as in the base");
        assert_eq!(field(&fields, "found"), "50 tokens");
    }
}

#[test]
fn nan_in_a_factor() {
    let (what, fields, _) = refused("linear", same, |t| t[1].2[3] = f32::NAN);
    assert!(what.contains("not finite"), "{what}");
    assert!(field(&fields, "found").ends_with("index 3"));
}

#[test]
fn dora_without_magnitude_and_magnitude_without_dora() {
    let (_, fields, _) = refused("dora", same, |t| t.retain(|x| !x.0.contains("magnitude")));
    assert!(field(&fields, "tensor").contains("lora_magnitude_vector"));
    let (what, ..) = refused("dora", set("use_dora", false.into()), same);
    assert!(what.contains("use_dora"), "{what}");
}

#[test]
fn trained_tokens_that_do_not_fit() {
    for indices in [
        serde_json::json!({"embed_tokens": [5, 48, 0], "lm_head": [7]}),
        serde_json::json!({"embed_tokens": [5, 5, 0], "lm_head": [7]}),
        serde_json::json!({"embed_tokens": [5], "lm_head": [7]}),
        serde_json::json!(null),
    ] {
        let (what, ..) = refused("trainable_tokens", set("trainable_token_indices", indices), same);
        assert!(what.contains("trainable_token_indices"), "{what}");
    }
}

#[test]
fn packed_experts_of_another_size() {
    let (what, fields, _) = refused("packed_experts", same, |t| {
        for (_, shape, values) in t.iter_mut().filter(|x| x.0.contains("experts.lora_A")) {
            shape[1] -= 1;
            values.truncate(shape[0] * shape[1]);
        }
    });
    assert!(what.contains("packed experts"), "{what}");
    assert!(field(&fields, "expected").contains("3 experts"));
}

#[test]
fn bias_that_the_base_does_not_have() {
    let dir = data("lora_bias");
    let path = data("llama").display().to_string();
    let base = Source::open(&path.parse().unwrap(), Path::new("/")).unwrap();
    let (what, ..) = explained(adapter::apply(base, &dir).unwrap_err());
    assert!(what.contains("bias"), "{what}");
}

#[test]
fn folder_without_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let (_, _, hint) = explained(adapter::apply(base("linear"), dir.path()).unwrap_err());
    assert!(hint.contains("adapter_config.json"));
    std::fs::copy(data("linear/adapter_config.json"), dir.path().join("adapter_config.json"))
        .unwrap();
    let (_, fields, _) = explained(adapter::apply(base("linear"), dir.path()).unwrap_err());
    assert!(field(&fields, "path").ends_with("adapter_model.safetensors"));
    std::fs::write(dir.path().join("adapter_model.bin"), b"pickle").unwrap();
    let (what, _, hint) = explained(adapter::apply(base("linear"), dir.path()).unwrap_err());
    assert!(what.contains("pickle") && hint.contains("save_file"), "{what}");
    std::fs::write(dir.path().join("adapter_config.json"), b"[1").unwrap();
    let (what, ..) = explained(adapter::apply(base("linear"), dir.path()).unwrap_err());
    assert!(what.contains("not a JSON object"), "{what}");
}
