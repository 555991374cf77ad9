//! GGUF files against gguf-py (block formats, bit by bit) and against the models they were converted from.

use moe_merge_checkpoint::{Dtype, Source, gguf};
use moe_merge_testkit::{golden, repository, shared};
use tokenizers::Tokenizer;

#[test]
fn every_quantisation_equals_gguf_py() {
    let Some(expected) = shared("golden/gguf/quants.expected.safetensors") else { return };
    let expected = golden::load(&expected);
    let found = gguf::open_raw(&repository("checkpoint/tests/data/quants.gguf")).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert_eq!(found.len(), 14);
    for (name, weight) in &found {
        let expected = &expected[name];
        assert_eq!(weight.shape(), expected.shape, "{name}");
        let values = weight.to_f32().unwrap();
        for (i, (v, e)) in values.iter().zip(&expected.values).enumerate() {
            assert_eq!(f64::from(*v).to_bits(), e.to_bits(), "{name} at {i}: {v} against {e}");
        }
        let mut middle = vec![0.0; weight.cols()];
        weight.read_rows(1..2, &mut middle).unwrap();
        assert_eq!(middle, values[weight.cols()..2 * weight.cols()], "{name}");
    }
}

/// Token ids of each text of `checkpoint/tests/data/NAME` against the tokenizer that `source` carries.
fn same_tokens(source: &Source, name: &str) {
    let tokenizer = tokenizer(source);
    let json = std::fs::read(repository("checkpoint/tests/data").join(name)).unwrap();
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_slice(&json).unwrap();
    assert!(cases.len() > 10);
    for (text, expected) in cases {
        let found = tokenizer.encode(text.as_str(), true).unwrap();
        assert_eq!(found.get_ids(), expected, "{text:?} became {:?}", found.get_tokens());
    }
}

fn tokenizer(source: &Source) -> Tokenizer {
    let bytes = source.side_file("tokenizer.json").unwrap().read().unwrap();
    Tokenizer::from_bytes(bytes).unwrap()
}

fn open(name: &str) -> Source {
    gguf::open(&repository("checkpoint/tests/data").join(name)).unwrap()
}

#[test]
fn tiny_llama_has_its_original_names_and_row_order() {
    let source = open("tiny.gguf");
    let path = repository("checkpoint/tests/data/tiny.expected.safetensors");
    // Largest error over the largest value: half a step of the format, and the rounding of its f16 scale.
    const Q8: f64 = 0.5 / 127.0 + 1.0 / 2048.0;
    let steps = [
        ("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, 0.0),
        ("model.layers.0.self_attn.k_proj.weight", Dtype::F16, 1e-6),
        ("model.layers.1.self_attn.q_proj.weight", Dtype::F32, Q8),
        ("model.layers.1.self_attn.k_proj.weight", Dtype::F32, Q8),
        ("model.layers.1.self_attn.v_proj.weight", Dtype::F32, 1.0 / 16.0 * 1.01),
        ("model.layers.0.self_attn.o_proj.weight", Dtype::F32, 1.0 / 31.0 * 1.01),
        ("model.norm.weight", Dtype::F32, 0.0),
    ];
    let expected = golden::load(&path);
    assert_eq!(expected.len(), steps.len());
    for (name, dtype, bound) in steps {
        let weight = source.weight(name).unwrap();
        assert_eq!(weight.shape(), expected[name].shape, "{name}");
        assert_eq!(weight.dtype(), dtype, "{name}");
        let difference =
            golden::relative_difference(&weight.to_f32().unwrap(), &expected[name].values);
        println!("{name}: largest difference {difference:.2e}");
        assert!(difference <= bound, "{name}: {difference} above {bound}");
    }
    let modules = [
        "input_layernorm",
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "post_attention_layernorm",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ];
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    for layer in 0..2 {
        names.extend(modules.map(|m| format!("model.layers.{layer}.{m}.weight")));
    }
    names.push("model.norm.weight".into());
    assert_eq!(source.tensors.keys().cloned().collect::<Vec<_>>(), names);
    assert!(source.other.is_empty());
    assert_eq!(source.notes, ["tokenizer rebuilt from GGUF metadata"]);
}

#[test]
fn tiny_llama_has_its_original_configuration() {
    let source = open("tiny.gguf");
    let expected = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024,
        "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "head_dim": 32, "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "float32"
    });
    assert_eq!(serde_json::Value::Object(source.config.0.clone()), expected);
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&source.side_file(name).unwrap().read().unwrap()).unwrap()
    };
    assert_eq!(json("generation_config.json")["eos_token_id"], 2);
    let config = json("tokenizer_config.json");
    assert_eq!(config["bos_token"], "<s>");
    assert_eq!(config["unk_token"], "<unk>");
    assert_eq!(config["chat_template"], "{% for m in messages %}{{ m['content'] }}{% endfor %}");
}

#[test]
fn byte_level_tokenizer_gives_the_original_ids() {
    let source = open("tiny.gguf");
    same_tokens(&source, "tiny.tokens.json");
    let text = "fn main() { println!(\"🙂 naïve\"); }";
    let tokenizer = tokenizer(&source);
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
}

#[test]
fn sentence_piece_tokenizer_joins_by_score() {
    let source = open("spm.gguf");
    same_tokens(&source, "spm.tokens.json");
    assert!(source.tensors.contains_key("lm_head.weight"));
    assert_eq!(source.config.bool("tie_word_embeddings"), Some(false));
    assert_eq!(source.config.str("torch_dtype"), Some("float16"));
    let tokenizer = tokenizer(&source);
    let ids = tokenizer.encode("two  words 漢", false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "two  words 漢");
}

/// The real model: `MOE_MERGE_SMOLLM2` names `SmolLM2-135M-Instruct.Q4_1.gguf`.
#[test]
fn smollm2_is_what_transformers_makes_of_it() {
    let Some(path) = std::env::var_os("MOE_MERGE_SMOLLM2") else {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "SKIPPED smollm2: MOE_MERGE_SMOLLM2 is not set");
        return;
    };
    let source = gguf::open(path.as_ref()).unwrap();
    assert_eq!(source.tensors.len(), 272);
    assert_eq!(source.config.usize("head_dim"), Some(64));
    assert_eq!(source.config.f64("rope_theta"), Some(100_000.0));
    assert_eq!(source.config.f64("rms_norm_eps"), Some(1e-5));
    // Row 37 from its start and row 101 to its end, as transformers 5.23 dequantises and reorders them.
    let layer = |n: usize, module: &str| format!("model.layers.{n}.{module}.weight");
    let rows = [
        (
            layer(3, "self_attn.q_proj"),
            [0.275_695_8, 0.331_939_7, 0.163_208, -0.174_255_37],
            [-0.211_791_99, 0.261_169_43],
        ),
        (
            layer(3, "self_attn.k_proj"),
            [-0.660_156_25, -0.246_032_71, 0.582_214_36, -0.494_506_84],
            [0.172_546_39, 0.041_320_8],
        ),
        (
            layer(29, "self_attn.k_proj"),
            [-0.078_918_46, 0.004_150_390_6, 0.128_753_66, 0.045_684_814],
            [-0.175_598_14, 0.102_081_3],
        ),
        (
            layer(7, "mlp.down_proj"),
            [0.292_053_22, 0.118_652_344, 0.118_652_344, 0.060_852_05],
            [-0.132_873_54, -0.377_624_5],
        ),
        (
            "model.embed_tokens.weight".into(),
            [-0.028_112_411, -0.079_376_22, -0.100_873_95, -0.077_722_55],
            [0.041_742_325, -0.041_742_325f32],
        ),
    ];
    for (name, first, last) in rows {
        let weight = source.weight(&name).unwrap();
        let mut row = vec![0.0; weight.cols()];
        weight.read_rows(37..38, &mut row).unwrap();
        assert_eq!(row[..4], first, "{name}");
        weight.read_rows(101..102, &mut row).unwrap();
        assert_eq!(row[weight.cols() - 2..], last, "{name}");
    }
    let tokenizer = tokenizer(&source);
    if let Some(expected) = shared("golden/gguf/smollm2.expected.safetensors") {
        let text = "The expert that knows arithmetic says that 12 + 30 = 42, and the other one writes Rust: fn main() {";
        let found = tokenizer.encode(text, true).unwrap();
        assert_eq!(found.get_ids(), golden::load(&expected)["input_ids"].ids());
    }
    let chat = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", true).unwrap();
    assert_eq!((chat.get_ids()[0], *chat.get_ids().last().unwrap()), (1, 2));
}
