//! A model that is exported and opened again is the same model: tensors, configuration, tokenizer, logits.

mod common;

use std::path::Path;

use moe_merge_checkpoint::gguf::{Architecture, Storage};
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Interrupt, Replace, Source, SourceRef};
use moe_merge_merge::families::Layout;
use moe_merge_model::chat::{AssistantTurn, Message};
use moe_merge_model::gguf::{self, Export, Vocabulary};
use moe_merge_model::{ChatTemplate, Model, Spec, Tokenizer};
use moe_merge_testkit::golden::relative_difference;
use moe_merge_testkit::{repository, shared};

const TEXTS: [&str; 3] =
    ["fn main() { let x = 12; }\n", " Two  spaces,\ttabs and ünïcode ✓.", "</s>17 * 9 = 153\n\n"];

fn export(source: &Source, storage: Option<Storage>, file: &Path) -> Export {
    let vocabulary = match source.side_file("tokenizer.json") {
        Some(_) => Vocabulary::Carried,
        None => Vocabulary::Absent,
    };
    let export = gguf::plan(source, storage, &vocabulary)
        .unwrap_or_else(|e| panic!("{}: {e:?}", source.label));
    write(&export, file);
    export
}

fn write(export: &Export, file: &Path) {
    let interrupt = Interrupt::default();
    let watch = Watch { interrupt: &interrupt, progress: &|_| {} };
    export.plan.write(file, Replace::Never, &[], watch).unwrap();
}

fn tokens(source: &Source) -> Vec<u32> {
    let vocab = source.config.usize("vocab_size").unwrap() as u32;
    (0..8).map(|i| (i * 37 + 11) % vocab).collect()
}

fn logits(source: &Source) -> Vec<f32> {
    common::logits(&Model::open(source).unwrap(), &tokens(source))
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    relative_difference(a, &b.iter().map(|v| f64::from(*v)).collect::<Vec<_>>())
}

/// Every tensor of the model is there with the same values; `bound` for those that went through another arithmetic.
fn same_tensors(source: &Source, opened: &Source, bound: f32) {
    let (ours, theirs) = (Spec::of(source).unwrap(), Spec::of(opened).unwrap());
    for ((name, _), (other, _)) in ours.expected_tensors().iter().zip(theirs.expected_tensors()) {
        let (a, b) = (source.weight(name).unwrap(), opened.weight(&other).unwrap());
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        assert_eq!(a.len(), b.len(), "{name}");
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= bound), "{name} as {other}");
    }
}

fn same_tokenizer(source: &Source, opened: &Source) {
    let [a, b] = [source, opened].map(|s| Tokenizer::from_source(s).unwrap());
    assert_eq!(a.bos(), b.bos());
    assert_eq!(a.eos_ids().iter().min(), b.eos_ids().iter().min());
    for text in TEXTS {
        assert_eq!(a.encode(text).unwrap(), b.encode(text).unwrap(), "{text}");
        let ids = a.encode_prompt(text).unwrap();
        assert_eq!(ids, b.encode_prompt(text).unwrap(), "{text}");
        assert_eq!(a.decode(&ids).unwrap(), b.decode(&ids).unwrap());
    }
}

/// Random checkpoints of every family, f32: what comes back is the same to the last bit.
#[test]
fn every_family_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    for (name, architecture) in [
        ("deepseek_v2", Architecture::Deepseek2),
        ("gemma2", Architecture::Gemma2),
        ("gemma3", Architecture::Gemma3),
        ("llama", Architecture::Llama),
        ("llama3_rope", Architecture::Llama),
        ("llama_bias", Architecture::Llama),
        ("llama_tied", Architecture::Llama),
        ("mistral", Architecture::Llama),
        ("mixtral", Architecture::Llama),
        ("mixtral_top1", Architecture::Llama),
        ("phi3", Architecture::Phi3),
        ("qwen2", Architecture::Qwen2),
        ("qwen2_moe", Architecture::Qwen2Moe),
        ("qwen3", Architecture::Qwen3),
        ("qwen3_moe", Architecture::Qwen3Moe),
    ] {
        let Some(folder) = shared(&format!("golden/arch/{name}")) else { return };
        let source = common::open(&folder);
        let file = temp.path().join(format!("{name}.gguf"));
        assert_eq!(export(&source, None, &file).architecture, architecture);
        let opened = common::open(&file);
        // Gemma's norms have 1 added on the way.
        let bound = if architecture.is_gemma() { 1e-6 } else { 0.0 };
        same_tensors(&source, &opened, bound);
        let (ours, mut theirs) = (Spec::of(&source).unwrap(), Spec::of(&opened).unwrap());
        // What the window cuts off, llama.cpp could not compute.
        theirs.max_positions = ours.max_positions;
        if !matches!(name, "gemma3" | "llama3_rope") {
            assert_eq!(ours, theirs, "{name}");
        }
        let difference = difference(&logits(&opened), &logits(&source));
        assert!(difference <= f64::from(bound), "{name}: {difference}");
    }
}

#[test]
fn every_feature_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    for (name, config, architecture) in common::made_up_cases() {
        let source = common::made_up(&temp.path().join(name), &config);
        let file = temp.path().join(format!("{name}.gguf"));
        let found = export(&source, None, &file).architecture.name();
        assert_eq!(found, architecture, "{name}");
        let opened = common::open(&file);
        let same_family = opened.config.model_type() == source.config.model_type();
        if same_family {
            same_tensors(&source, &opened, if name.starts_with("gemma") { 1e-6 } else { 0.0 });
        }
        let difference = difference(&logits(&opened), &logits(&source));
        assert!(difference <= 2e-6, "{name}: {difference}");
    }
}

/// The MoE of a recipe of the repository, with routers that cost no time.
fn built(recipe: &str, change: (&str, &str), temp: &Path) -> Source {
    let path = repository("recipes").join(format!("{recipe}.yaml"));
    let text = std::fs::read_to_string(&path).unwrap().replace(change.0, change.1);
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("gate_mode:")).collect();
    let text = format!("gate_mode: random\n{}\n", lines.join("\n"));
    let out = temp.join(recipe);
    let _ = std::fs::remove_dir_all(&out);
    common::open(&common::build_text(&text, &path, &out, Layout::Hub))
}

#[test]
fn every_output_family_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    for (recipe, architecture) in [
        ("mergekit_moe", Architecture::Llama),
        ("qwen3_moe", Architecture::Qwen3Moe),
        // DeepSeek's routers are divided by their sum, which llama.cpp does not do under that name.
        ("deepseek", Architecture::GraniteMoe),
        ("ernie4_5_moe", Architecture::Ernie4_5Moe),
        ("granitemoeshared", Architecture::GraniteMoe),
    ] {
        let source = built(recipe, ("", ""), temp.path());
        let file = temp.path().join(format!("{recipe}.gguf"));
        let export = export(&source, Some(Storage::F32), &file);
        assert_eq!(export.architecture, architecture, "{recipe}");
        let opened = common::open(&file);
        if recipe != "deepseek" {
            same_tensors(&source, &opened, 0.0);
        }
        if source.side_file("tokenizer.json").is_some() {
            same_tokenizer(&source, &opened);
        }
        let difference = difference(&logits(&opened), &logits(&source));
        assert!(difference <= 1e-5, "{recipe}: {difference}");
        let again = temp.path().join("again.gguf");
        export_bytes_are_the_same(&export, &file, &again);
    }
}

fn export_bytes_are_the_same(export: &Export, file: &Path, again: &Path) {
    write(export, again);
    assert!(std::fs::read(file).unwrap() == std::fs::read(again).unwrap());
    std::fs::remove_file(again).unwrap();
}

#[test]
fn qwen2_moe_comes_back_where_llama_cpp_weights_experts_the_same_way() {
    let temp = tempfile::tempdir().unwrap();
    let source = built("qwen2_moe", ("", ""), temp.path());
    let error = gguf::plan(&source, None, &Vocabulary::Carried).unwrap_err();
    assert!(error.to_string().contains("it weights the experts of a token otherwise"), "{error}");
    // Two experts, both of which every token visits.
    let all = ("experts_per_token: 1", "experts_per_token: 2");
    let source = built("qwen2_moe", all, temp.path());
    let file = temp.path().join("two.gguf");
    export(&source, Some(Storage::F32), &file);
    let opened = common::open(&file);
    same_tensors(&source, &opened, 0.0);
    let difference = difference(&logits(&opened), &logits(&source));
    assert!(difference <= 1e-5, "{difference}");
}

#[test]
fn every_dtype_keeps_what_it_can() {
    let temp = tempfile::tempdir().unwrap();
    let source = common::open(&repository("recipes/quickstart/base"));
    let exact = logits(&source);
    for (storage, bound) in [
        (None, 0.0),
        (Some(Storage::F32), 0.0),
        (Some(Storage::BF16), 0.0),
        (Some(Storage::F16), 1e-3),
        (Some(Storage::Q8_0), 4e-2),
    ] {
        let file = temp.path().join(format!("{storage:?}.gguf"));
        let export = export(&source, storage, &file);
        let opened = common::open(&file);
        let up = "model.layers.2.mlp.up_proj.weight";
        let kept = match storage {
            None | Some(Storage::BF16) => Dtype::BF16,
            Some(Storage::F16) => Dtype::F16,
            _ => Dtype::F32,
        };
        assert_eq!(opened.weight(up).unwrap().dtype(), kept);
        if bound == 0.0 {
            same_tensors(&source, &opened, 0.0);
        }
        // Rows of 344 numbers are no whole blocks.
        let uneven = storage == Some(Storage::Q8_0);
        assert_eq!(export.notes.iter().any(|n| n.contains("multiple of 32")), uneven);
        let found = difference(&logits(&opened), &exact);
        println!("{storage:?}: {found:.1e}");
        // Weights are the same; products with bf16 as stored may add up in another order than with f32.
        assert!(found <= f64::max(bound, 2e-3), "{storage:?}: {found}");
    }
}

#[test]
fn chat_template_and_further_ends_come_back() {
    let temp = tempfile::tempdir().unwrap();
    let folder = common::copy_of_base(temp.path());
    let template =
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    let generation = r#"{"bos_token_id": 1, "eos_token_id": [2, 17, 18]}"#;
    std::fs::write(folder.join("generation_config.json"), generation).unwrap();
    let source = common::open(&folder);
    let file = temp.path().join("m.gguf");
    export(&source, None, &file);
    let opened = common::open(&file);
    same_tokenizer(&source, &opened);
    let rendered = [&source, &opened].map(|s| {
        let tokenizer = Tokenizer::from_source(s).unwrap();
        assert_eq!(tokenizer.eos_ids(), [2, 17, 18]);
        let template = ChatTemplate::from_source(s, &tokenizer).unwrap();
        template.render(&[Message::new("user", "Hi")], AssistantTurn::Absent).unwrap()
    });
    assert_eq!(rendered, ["<s><user>Hi\n"; 2]);
}

#[test]
fn a_sentence_piece_tokenizer_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    let source = common::open(&common::with_sentence_piece(temp.path()));
    let file = temp.path().join("m.gguf");
    let export = export(&source, None, &file);
    assert!(!export.notes.iter().any(|n| n.contains("merges")), "{:?}", export.notes);
    let opened = common::open(&file);
    same_tokenizer(&source, &opened);
    assert_eq!(logits(&source), logits(&opened));
    let vocabulary = |s: &Source| -> serde_json::Value {
        serde_json::from_slice(&s.side_file("tokenizer.json").unwrap().read().unwrap()).unwrap()
    };
    assert_eq!(vocabulary(&source)["model"]["merges"], vocabulary(&opened)["model"]["merges"]);
}

#[test]
fn computed_weights_are_exported() {
    let temp = tempfile::tempdir().unwrap();
    // A GGUF file with a LoRA on top: dequantised or reordered, and added to, while it is written.
    let adapter = temp.path().join("adapter");
    write_adapter(&adapter);
    let base = repository("recipes/quickstart/base").display().to_string();
    let reference = SourceRef {
        model: base,
        revision: None,
        lora: Some(adapter.display().to_string()),
        lora_revision: None,
    };
    let source = Source::open(&reference, Path::new("")).unwrap();
    let file = temp.path().join("m.gguf");
    export(&source, Some(Storage::F32), &file);
    let opened = common::open(&file);
    same_tensors(&source, &opened, 0.0);
    let plain = common::open(&repository("recipes/quickstart/base"));
    let up = "model.layers.4.mlp.up_proj.weight";
    let values = |s: &Source| s.weight(up).unwrap().to_f32().unwrap();
    assert_ne!(values(&plain), values(&opened));
    // And once more, from a file of its own kind.
    let again = temp.path().join("again.gguf");
    export(&opened, None, &again);
    same_tensors(&source, &common::open(&again), 0.0);
}

/// A LoRA of rank 1 on one projection, in PEFT's format.
fn write_adapter(dir: &Path) {
    use safetensors::tensor::TensorView;
    std::fs::create_dir_all(dir).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up_proj"]}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let bytes = |n: usize| -> Vec<u8> {
        (0..n).flat_map(|i| ((i as f32 * 0.37).sin() * 0.1).to_le_bytes()).collect()
    };
    let (a, b) = (bytes(128), bytes(344));
    let view = |bytes, shape: [usize; 2]| {
        TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap()
    };
    let prefix = "base_model.model.model.layers.4.mlp.up_proj";
    let tensors = [
        (format!("{prefix}.lora_A.weight"), view(&a, [1, 128])),
        (format!("{prefix}.lora_B.weight"), view(&b, [344, 1])),
    ];
    let file = dir.join("adapter_model.safetensors");
    std::fs::write(file, safetensors::serialize(tensors, None).unwrap()).unwrap();
}
