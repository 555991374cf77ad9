//! Families that the shared reference data lacks, against transformers: `data/make_families.py` made the files.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::Source;
use moe_merge_model::{Cache, LogitRows, Model};
use moe_merge_testkit::golden::{self, LOGITS_F32, relative_difference};
use serde_json::json;

fn source(path: &Path) -> Source {
    let name = path.display().to_string();
    Source::open(&name.parse().unwrap(), Path::new(".")).unwrap()
}

fn data(name: &str) -> PathBuf {
    moe_merge_testkit::repository("model/tests/data").join(name)
}

fn check(name: &str) {
    let expected = golden::load(&data(name).join("expected.safetensors"));
    let model = Model::open(&source(&data(name))).unwrap();
    let tokens = expected["input_ids"].ids();
    let (hidden, logits) = model.hidden_states(&tokens).unwrap();
    for (i, state) in hidden.iter().enumerate() {
        let difference = relative_difference(state, &expected[&format!("hidden_{i}")].values);
        assert!(difference <= LOGITS_F32, "{name} hidden {i}: {difference:e}");
    }
    let difference = relative_difference(&logits, &expected["logits"].values);
    assert!(difference <= LOGITS_F32, "{name} logits: {difference:e}");
    let mut cache = Cache::new(&model, tokens.len());
    let mut single = Vec::new();
    for token in &tokens {
        single.extend(model.forward(&[*token], &mut cache, LogitRows::Last).unwrap());
    }
    let difference = relative_difference(&single, &expected["logits"].values);
    assert!(difference <= LOGITS_F32, "{name} logits token by token: {difference:e}");
}

#[test]
fn ernie4_5_moe() {
    check("ernie4_5_moe");
}

#[test]
fn granitemoeshared() {
    check("granitemoeshared");
}

#[test]
fn deepseek_v2_with_groups_query_latent_and_yarn() {
    check("deepseek_v2_yarn");
}

#[test]
fn mixtral_in_the_fused_layout() {
    check("mixtral_fused");
}

/// The first DeepSeek without shared experts is a Mixtral under other names, as long as weights are renormalised.
#[test]
fn deepseek_v1_equals_mixtral() {
    let expected = golden::load(&data("mixtral_fused").join("expected.safetensors"));
    let mut source = source(&data("mixtral_fused"));
    for (key, value) in [
        ("model_type", json!("deepseek")),
        ("n_routed_experts", json!(3)),
        ("n_shared_experts", json!(null)),
        ("moe_intermediate_size", json!(24)),
        ("first_k_dense_replace", json!(0)),
        ("moe_layer_freq", json!(1)),
        ("norm_topk_prob", json!(true)),
        ("scoring_func", json!("softmax")),
    ] {
        source.config.0.insert(key.to_owned(), value);
    }
    let renamed = |name: &String| {
        [("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")]
            .iter()
            .fold(name.clone(), |name, (from, to)| name.replace(from, to))
    };
    source.tensors = source.tensors.iter().map(|(n, w)| (renamed(n), w.clone())).collect();
    let tokens = expected["input_ids"].ids();
    let logits = |source: &Source| Model::open(source).unwrap().hidden_states(&tokens).unwrap().1;
    let difference = relative_difference(&logits(&source), &expected["logits"].values);
    assert!(difference <= LOGITS_F32, "{difference:e}");
    source.config.0.insert("norm_topk_prob".to_owned(), json!(false));
    let difference = relative_difference(&logits(&source), &expected["logits"].values);
    assert!(difference > 1e-2, "weights that are not renormalised must show");
}

#[test]
fn experts_per_token_can_be_chosen_when_a_model_runs() {
    let mut source = source(&data("mixtral_fused"));
    let tokens = [1, 5, 9, 2];
    let run = |model: &Model| model.hidden_states(&tokens).unwrap().1;
    let mut model = Model::open(&source).unwrap();
    let as_configured = run(&model);
    for experts in [1, 3] {
        model.set_experts_per_token(experts).unwrap();
        source.config.0.insert("num_experts_per_tok".to_owned(), json!(experts));
        assert_eq!(run(&model), run(&Model::open(&source).unwrap()));
        assert_ne!(run(&model), as_configured);
    }
    for experts in [0, 4] {
        assert!(model.set_experts_per_token(experts).is_err());
    }
    model.set_experts_per_token(2).unwrap();
    assert_eq!(run(&model), as_configured);
}
