use std::path::{Path, PathBuf};

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{Explain, SourceRef};
use serde_json::json;

use crate::recipe::{ARCHITECTURES, Architecture};

use super::*;
use crate::config_out::moe_config;

fn open(path: &Path) -> Source {
    let text = path.display().to_string();
    Source::open(&text.parse::<SourceRef>().unwrap(), Path::new("/")).unwrap()
}

/// A source of zeros with the tensors of a small llama.
pub(crate) fn zeros(label: &str, model_type: &str, extra: &[&str]) -> Source {
    let config = json!({
        "model_type": model_type, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "dtype": "float32",
    });
    let mut source = Source {
        label: label.into(),
        path: PathBuf::from(label),
        config: ConfigJson(config.as_object().unwrap().clone()),
        tensors: Default::default(),
        other: Vec::new(),
        files: Vec::new(),
        side: Vec::new(),
        notes: Vec::new(),
    };
    let mut add = |name: String, shape: &[usize]| {
        let weight = Arc::new(OwnedWeight::zeros(&name, shape, Dtype::F32)) as WeightRef;
        source.tensors.insert(name, weight);
    };
    add("model.embed_tokens.weight".into(), &[10, 8]);
    add("model.norm.weight".into(), &[8]);
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![8]),
            ("post_attention_layernorm", vec![8]),
            ("self_attn.q_proj", vec![8, 8]),
            ("self_attn.k_proj", vec![4, 8]),
            ("self_attn.v_proj", vec![4, 8]),
            ("self_attn.o_proj", vec![8, 8]),
            ("mlp.gate_proj", vec![6, 8]),
            ("mlp.up_proj", vec![6, 8]),
            ("mlp.down_proj", vec![8, 6]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), &shape);
        }
    }
    for name in extra {
        add((*name).to_owned(), &[8]);
    }
    source
}

fn request<'a>(
    base: &'a Source,
    experts: &[&'a Source],
    shared: &[&'a Source],
    gate: SharedGate,
) -> Request<'a> {
    Request { base, experts: experts.to_vec(), shared: shared.to_vec(), shared_gate: gate }
}

/// Keys of mergekit's configuration that say nothing about the model.
const NOISE: &[&str] = &[
    "_name_or_path",
    "attention_bias",
    "chunk_size_feed_forward",
    "head_dim",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "transformers_version",
];

#[test]
fn configurations_say_what_mergekits_say() {
    for (case, family, base, shared) in [
        ("mixtral_hidden", "mixtral", "llama", 0),
        ("mixtral_from_mistral", "mixtral", "mistral", 0),
        ("qwen2_moe_hidden", "qwen2_moe", "qwen2", 1),
        ("qwen2_moe_from_llama", "qwen2_moe", "llama", 1),
        ("qwen3_moe_hidden", "qwen3_moe", "qwen3", 0),
        ("deepseek_hidden", "deepseek", "llama", 0),
        ("deepseek_shared", "deepseek", "llama", 1),
    ] {
        let Some(golden) = moe_merge_testkit::shared("golden/moe") else { return };
        let base = open(&golden.join(base).join("base"));
        let family = OUTPUTS.iter().find(|f| f.name() == family).unwrap();
        let dims = Dims::of(&base).unwrap();
        let shape = Shape { dims, experts: 3, shared, top_k: 2 };
        let ours = moe_config(&base.config, *family, &shape, Dtype::F32);
        let text = std::fs::read_to_string(golden.join(format!("{case}.config.json"))).unwrap();
        let theirs: Map<String, Value> = serde_json::from_str(&text).unwrap();
        let mut compared = 0;
        for (key, value) in theirs.iter().filter(|(k, _)| !NOISE.contains(&k.as_str())) {
            let found = ours.get(key).unwrap_or(&Value::Null);
            assert_eq!(found, value, "{case}: `{key}`");
            compared += 1;
        }
        assert!(compared > 20, "{case}: {compared} keys");
        assert_eq!(ours["torch_dtype"], ours["dtype"]);
        assert_eq!(ours["rope_theta"], ours["rope_parameters"]["rope_theta"]);
        assert!(ours["rope_scaling"].is_null());
    }
}

#[test]
fn names_of_the_hub_layout() {
    let [mixtral, qwen3, qwen2, ernie, ..] = OUTPUTS else { panic!("four families") };
    assert_eq!(
        mixtral.expert(1, 2, Matrix::Up),
        "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    );
    assert_eq!(mixtral.router(1, Layout::Hub), "model.layers.1.block_sparse_moe.gate.weight");
    assert_eq!(mixtral.router(1, Layout::Fused), "model.layers.1.mlp.gate.weight");
    assert_eq!(qwen3.expert(0, 1, Matrix::Down), "model.layers.0.mlp.experts.1.down_proj.weight");
    assert_eq!(qwen2.shared_gate(0).unwrap(), "model.layers.0.mlp.shared_expert_gate.weight");
    assert_eq!(
        ernie.shared(3, Matrix::Gate).unwrap(),
        "model.layers.3.mlp.shared_experts.gate_proj.weight"
    );
}

/// The families that a recipe can mean by `architecture: text`.
fn families_called(text: &str) -> Vec<&'static str> {
    Architecture::candidates(text).into_iter().map(Architecture::name).collect()
}

#[test]
fn every_family_has_its_word_in_recipes() {
    let mut outputs: Vec<&str> = OUTPUTS.iter().map(|f| f.name()).collect();
    let mut words: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
    outputs.sort_unstable();
    words.sort_unstable();
    assert_eq!(outputs, words);
}

#[test]
fn auto_takes_what_fits() {
    let (base, a) = (zeros("base", "llama", &[]), zeros("a", "llama", &[]));
    let pick = |base: &Source, shared: &[&Source], gate, name: Option<&str>| {
        let wanted: Vec<&str> = name.map(families_called).unwrap_or_default();
        select(&wanted, &request(base, &[&a, &a], shared, gate)).map(|f| f.name())
    };
    use SharedGate::{Absent, Computed};
    assert_eq!(pick(&base, &[], Absent, None).unwrap(), "mixtral");
    assert_eq!(pick(&base, &[&a], Computed, None).unwrap(), "qwen2_moe");
    assert_eq!(pick(&base, &[&a], Absent, None).unwrap(), "ernie4_5_moe");
    assert_eq!(pick(&base, &[&a, &a], Absent, None).unwrap(), "ernie4_5_moe");
    assert_eq!(pick(&base, &[], Absent, Some("DeepSeek")).unwrap(), "deepseek");
    assert_eq!(pick(&base, &[&a], Computed, Some("Qwen")).unwrap(), "qwen2_moe");
    assert_eq!(pick(&zeros("q", "qwen3", &[]), &[], Absent, Some("Qwen")).unwrap(), "qwen3_moe");
    assert_eq!(pick(&zeros("q", "qwen3", &[]), &[], Absent, None).unwrap(), "qwen3_moe");
}

#[test]
fn refusals_give_the_reason_and_a_way_out() {
    let a = zeros("a", "llama", &[]);
    let refused = |base: &Source, shared: &[&Source], gate, name: Option<&str>| {
        let wanted: Vec<&str> = name.map(families_called).unwrap_or_default();
        let e = select(&wanted, &request(base, &[&a, &a], shared, gate)).unwrap_err();
        (e.to_string(), e.hint().unwrap())
    };
    let biased = zeros("b", "llama", &["model.layers.0.self_attn.q_proj.bias"]);
    let (what, hint) = refused(&biased, &[], SharedGate::Absent, None);
    assert!(
        what.contains("no bias on `self_attn.q_proj`") && hint.contains("qwen2_moe"),
        "{what} {hint}"
    );
    let (what, _) = refused(&zeros("g", "gemma2", &[]), &[], SharedGate::Absent, None);
    assert!(what.contains("1 + weight"), "{what}");
    let (what, hint) = refused(&zeros("q", "qwen2", &[]), &[], SharedGate::Absent, None);
    assert!(what.contains("0 shared experts") && hint.contains("shared_experts"), "{what} {hint}");
    let llama = zeros("l", "llama", &[]);
    let (what, hint) = refused(&llama, &[&a], SharedGate::Absent, Some("qwen2_moe"));
    assert!(what.contains("gate") && hint.contains("ernie4_5_moe"), "{what} {hint}");
    let (what, _) = refused(&llama, &[&a], SharedGate::Computed, Some("deepseek"));
    assert!(what.contains("no gate for shared experts"), "{what}");
}

#[test]
fn experts_that_do_not_fit_are_named_with_the_base() {
    let base = zeros("base", "llama", &[]);
    let check = |expert: &Source| {
        let e = check_sources(&request(&base, &[expert], &[], SharedGate::Absent)).unwrap_err();
        let fields = format!("{e} {:?}", e.fields());
        assert!(fields.contains("\"base\"") && fields.contains("\"bad\""), "{fields}");
        fields
    };
    for (key, value) in [
        ("hidden_size", 4),
        ("intermediate_size", 7),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 4),
        ("vocab_size", 11),
    ] {
        let mut bad = zeros("bad", "llama", &[]);
        bad.config.0.insert(key.into(), json!(value));
        assert!(check(&bad).contains(key), "{key}");
    }
    let mut bad = zeros("bad", "llama", &[]);
    bad.config.0.insert("hidden_act".into(), json!("gelu"));
    assert!(check(&bad).contains("activation"));
    let mut bad = zeros("bad", "llama", &[]);
    bad.tensors.remove("model.layers.1.mlp.up_proj.weight");
    let e = check_sources(&request(&base, &[&bad], &[], SharedGate::Absent)).unwrap_err();
    let fields = e.fields();
    assert!(fields.contains(&("file", "bad".into())), "{fields:?}");
    assert!(fields.contains(&("tensor", "model.layers.1.mlp.up_proj.weight".into())), "{fields:?}");
    let bad = zeros("bad", "llama", &["model.layers.0.mlp.up_proj.bias"]);
    assert!(check(&bad).contains("biases in its experts"));
    assert!(check(&zeros("bad", "mistral", &[])).contains("model type"));
}

#[test]
fn rope_window_and_stray_tensors_are_warnings() {
    let mut base = zeros("base", "mistral", &[]);
    base.config.0.insert("sliding_window".into(), json!(32));
    let mut expert = zeros("e", "mistral", &["model.value_head.weight"]);
    expert.config.0.insert("rope_theta".into(), json!(1e6));
    let warnings =
        warn_about_sources(&request(&base, &[&expert, &expert], &[], SharedGate::Absent));
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].contains("last 32 of 64"));
    assert!(warnings[1].contains("rotary"));
    assert!(warnings[2].contains("`model.value_head.weight`"));
}
