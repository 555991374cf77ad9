//! llama.cpp loads what `export` writes: the same logits, the same tokens, the same greedy text.
//!
//! `MOE_MERGE_LLAMA_CPP` names a Python with llama-cpp-python (`tests/python/setup.sh` makes one);
//! `MOE_MERGE_LLAMA_CPP_MODELS` further models to look at, as `PATH:PATH`.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use moe_merge_checkpoint::gguf::Storage;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Interrupt, Replace, Source};
use moe_merge_merge::families::Layout;
use moe_merge_model::gguf::{Vocabulary, plan};
use moe_merge_model::{Cache, LogitRows, Model, Tokenizer};
use moe_merge_testkit::{python, repository, shared};
use serde_json::{Value, json};

/// Differences allowed between llama.cpp's logits and ours, as a share of the largest.
///
/// In f32 sums come in another order. In the others, llama.cpp rounds what it multiplies with weights to the weights' own
/// precision (11 bits, 8 bits, blocks of 8 bits), in each product of each layer; ours stays in f32.
fn bound(storage: Option<Storage>) -> f64 {
    match storage {
        Some(Storage::F32) => 2e-4,
        Some(Storage::F16) => 4e-3,
        None | Some(Storage::BF16) => 3e-2,
        Some(Storage::Q8_0) => 6e-2,
    }
}

/// llama.cpp takes Gemma's activation from a table of 16-bit numbers.
const GEMMA: f64 = 2e-3;

const TEXTS: [&str; 4] = [
    "fn main() { let x = 12; }\n",
    " Two  spaces,\ttabs and ünïcode ✓.",
    "17 * 9 = 153, so 153 / 17 = 9.\n\n",
    "Solve 8x + 12 = 132. She'll say it's 15's and 1234567.",
];

/// Exports a model and computes what has to come out; the entry for the script.
fn case(name: &str, source: &Source, storage: Option<Storage>, temp: &Path) -> Value {
    let has_tokenizer = source.side_file("tokenizer.json").is_some();
    let vocabulary = if has_tokenizer { Vocabulary::Carried } else { Vocabulary::Absent };
    let export = plan(source, storage, &vocabulary).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    let file = temp.join(format!("{name}.gguf"));
    let interrupt = Interrupt::default();
    let watch = Watch { interrupt: &interrupt, progress: &|_| {} };
    export.plan.write(&file, Replace::Never, &[], watch).unwrap();
    // The weights as they were rounded: the file's own.
    let opened = common::open(&file);
    let model = Model::open(if storage == Some(Storage::Q8_0) { &opened } else { source }).unwrap();
    let vocab = model.spec().vocab;
    // Up to the context that the file names: the window of a model, where llama.cpp has none.
    let context = opened.config.usize("max_position_embeddings").unwrap().min(40);
    let tokens: Vec<u32> = (0..context).map(|i| ((i * 37 + 11) % vocab) as u32).collect();
    let values = common::logits(&model, &tokens);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let logits = temp.join(format!("{name}.safetensors"));
    let view = safetensors::tensor::TensorView::new(
        safetensors::Dtype::F32,
        vec![tokens.len(), vocab],
        &bytes,
    );
    let tensors = [("logits", view.unwrap())];
    std::fs::write(&logits, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let gemma = export.architecture.is_gemma();
    let bound = if gemma { GEMMA.max(bound(storage)) } else { bound(storage) };
    let mut entry = json!({
        "name": name, "file": file, "logits": logits, "tokens": tokens, "bound": bound,
    });
    if model.spec().moe_layers().next().is_some() && storage != Some(Storage::F32) {
        // What is rounded otherwise may send a token that is torn between two experts to the other one.
        entry["others"] = json!(0.1);
    }
    if has_tokenizer {
        let tokenizer = Tokenizer::from_source(source).unwrap();
        let texts = TEXTS
            .iter()
            .map(|text| json!({"text": text, "tokens": tokenizer.encode_prompt(text).unwrap()}));
        entry["texts"] = texts.collect();
        if storage == Some(Storage::F32) {
            entry["greedy"] = greedy(&model, tokenizer.encode_prompt(TEXTS[2]).unwrap());
        }
    }
    entry
}

fn greedy(model: &Model, prompt: Vec<u32>) -> Value {
    const NEW: usize = 24;
    let mut cache = Cache::new(model, prompt.len() + NEW);
    let mut next = model.forward(&prompt, &mut cache, LogitRows::Last).unwrap();
    let mut continuation = Vec::new();
    while continuation.len() < NEW {
        let best = next.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
        continuation.push(best);
        next = model.forward(&[best], &mut cache, LogitRows::Last).unwrap();
    }
    json!({"prompt": prompt, "continuation": continuation})
}

fn check(python: &Path, cases: &[Value], temp: &Path) {
    let list = temp.join("cases.json");
    std::fs::write(&list, serde_json::to_vec(cases).unwrap()).unwrap();
    let script = repository("tests/python/check_gguf.py");
    let output = Command::new(python).arg(script).arg(&list).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}", python.display()));
    let (text, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    assert!(output.status.success(), "{text}{errors}");
    assert_eq!(text.lines().count(), cases.len(), "{errors}");
}

#[test]
fn llama_cpp_runs_every_output_family() {
    let Some(python) = python("MOE_MERGE_LLAMA_CPP") else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    for (recipe, change) in [
        ("mergekit_moe", ("", "")),
        ("qwen3_moe", ("", "")),
        ("deepseek", ("", "")),
        ("ernie4_5_moe", ("", "")),
        ("granitemoeshared", ("", "")),
        ("qwen2_moe", ("experts_per_token: 1", "experts_per_token: 2")),
    ] {
        let path = repository("recipes").join(format!("{recipe}.yaml"));
        let text = std::fs::read_to_string(&path).unwrap().replace(change.0, change.1);
        let folder = common::build_text(&text, &path, &temp.path().join(recipe), Layout::Hub);
        let source = common::open(&folder);
        for storage in [None, Some(Storage::F32)] {
            cases.push(case(&format!("{recipe}_{storage:?}"), &source, storage, temp.path()));
        }
    }
    check(&python, &cases, temp.path());
}

#[test]
fn llama_cpp_runs_every_dtype() {
    let Some(python) = python("MOE_MERGE_LLAMA_CPP") else { return };
    let temp = tempfile::tempdir().unwrap();
    let base = common::open(&repository("recipes/quickstart/base"));
    let storages = [Storage::F32, Storage::F16, Storage::BF16, Storage::Q8_0];
    let mut cases: Vec<Value> =
        storages.map(|s| case(&format!("base_{s:?}"), &base, Some(s), temp.path())).into();
    let spm = common::open(&common::with_sentence_piece(temp.path()));
    cases.push(case("spm", &spm, Some(Storage::F32), temp.path()));
    check(&python, &cases, temp.path());
}

#[test]
fn llama_cpp_runs_every_family() {
    let Some(python) = python("MOE_MERGE_LLAMA_CPP") else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    for name in [
        "deepseek_v2",
        "gemma2",
        "gemma3",
        "llama",
        "llama3_rope",
        "llama_bias",
        "llama_tied",
        "mistral",
        "mixtral",
        "mixtral_top1",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    ] {
        let Some(folder) = shared(&format!("golden/arch/{name}")) else { return };
        cases.push(case(name, &common::open(&folder), Some(Storage::F32), temp.path()));
    }
    check(&python, &cases, temp.path());
}

#[test]
fn llama_cpp_runs_every_feature() {
    let Some(python) = python("MOE_MERGE_LLAMA_CPP") else { return };
    let temp = tempfile::tempdir().unwrap();
    let cases: Vec<Value> = common::made_up_cases()
        .into_iter()
        .map(|(name, config, _)| {
            let source = common::made_up(&temp.path().join(name), &config);
            case(name, &source, Some(Storage::F32), temp.path())
        })
        .collect();
    check(&python, &cases, temp.path());
}

#[test]
fn llama_cpp_runs_further_models() {
    let Some(python) = python("MOE_MERGE_LLAMA_CPP") else { return };
    let Some(models) = std::env::var_os("MOE_MERGE_LLAMA_CPP_MODELS") else { return };
    let temp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = std::env::split_paths(&models).collect();
    for path in paths {
        let source = common::open(&path);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let storages = [Some(Storage::F32), None, Some(Storage::F16), Some(Storage::Q8_0)];
        let cases: Vec<Value> = storages
            .into_iter()
            .map(|s| case(&format!("{name}_{s:?}"), &source, s, temp.path()))
            .collect();
        check(&python, &cases, temp.path());
    }
}
