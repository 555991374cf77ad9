//! The whole model: a prompt of 512 tokens, and one token after another, on a model of the shapes of a four-expert MoE of
//! SmolLM2-135M with random weights, over what registers and memory allow.
//!
//! `cargo bench -p moe-merge-model`

#[path = "../../kernels/benches/limits/mod.rs"]
mod limits;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::Path;

use limits::flops::bf16_limit;
use limits::reading::{map, read};
use limits::shapes::{EXPERTS, HIDDEN, INTER, LAYERS, TOP_K};
use limits::{Bar, Bench, Side, TOKENS, pool, threads_text, two_threads};
use moe_merge_checkpoint::{Source, SourceRef};
use moe_merge_kernels::Exec;
use moe_merge_model::{Cache, LogitRows, Model};
use serde_json::{Map, Value, json};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const VOCAB: usize = 49_152;
const PROMPT: usize = 512;

/// Weights that a token visits in all layers: projections and experts.
const LAYER_WEIGHTS: usize =
    LAYERS * (2 * HIDDEN * (HEADS + KV_HEADS) * DIM + TOP_K * 3 * HIDDEN * INTER);

/// Multiplications and additions of one token of the prompt; logits are computed for the last one only.
fn prompt_flops() -> f64 {
    let scores = LAYERS * PROMPT.div_ceil(2) * HEADS * 2 * DIM;
    let head = VOCAB * HIDDEN / PROMPT;
    2.0 * (LAYER_WEIGHTS + scores + head) as f64
}

/// Bytes of weights that a decoded token reads.
const TOKEN_BYTES: usize = 2 * (LAYER_WEIGHTS + VOCAB * HIDDEN);

/// Name and shape of every tensor.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
        add("self_attn.q_proj", &[HEADS * DIM, HIDDEN]);
        add("self_attn.k_proj", &[KV_HEADS * DIM, HIDDEN]);
        add("self_attn.v_proj", &[KV_HEADS * DIM, HIDDEN]);
        add("self_attn.o_proj", &[HIDDEN, HEADS * DIM]);
        add("block_sparse_moe.gate", &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            add(&format!("block_sparse_moe.experts.{expert}.w1"), &[INTER, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w3"), &[INTER, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w2"), &[HIDDEN, INTER]);
        }
    }
    all
}

fn config() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "vocab_size": VOCAB,
        "max_position_embeddings": 8192, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "sliding_window": null,
    })
}

/// Writes configuration and weights: matrices uniform between -0.04 and 0.04, norms 1.
fn write(folder: &Path) -> std::io::Result<()> {
    fs::write(folder.join("config.json"), config().to_string())?;
    let (mut header, mut end) = (Map::new(), 0);
    let tensors = tensors();
    for (name, shape) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]});
        header.insert(name.clone(), entry);
        end += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut file =
        BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for (name, shape) in &tensors {
        for _ in 0..shape.iter().product::<usize>() {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32;
            let value = if name.ends_with("norm.weight") { 1.0 } else { 0.08 * uniform - 0.04 };
            file.write_all(&((value.to_bits() >> 16) as u16).to_le_bytes())?;
        }
    }
    file.flush()
}

fn prefill(bench: &mut Bench, model: &Model, threads: usize) {
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 7919) % VOCAB as u32).collect();
    let mut cache = Cache::new(model, PROMPT);
    let (limit, pool) = (bf16_limit(Exec::fast().isa), pool(threads));
    bench.against(
        ("model", &format!("prompt of {PROMPT} tokens, {}", threads_text(threads))),
        threads,
        (TOKENS, limit.name),
        if threads == 1 { Bar::AtLeast(0.6, 0.8) } else { Bar::None },
        [
            Side::new(PROMPT as f64, || {
                cache.clear();
                let logits = pool.install(|| model.forward(&prompt, &mut cache, LogitRows::Last));
                black_box(logits.expect("the prompt fits"));
            }),
            Side::new(limit.flops * threads as f64 / prompt_flops(), || {
                pool.install(|| limit.run());
            }),
        ],
    );
}

fn decode(bench: &mut Bench, model: &Model, file: &[u8], threads: usize) {
    const BEFORE: usize = 64;
    let mut cache = Cache::new(model, PROMPT);
    let before: Vec<u32> = (0..BEFORE as u32).collect();
    model.forward(&before, &mut cache, LogitRows::Last).expect("the tokens fit");
    let (pool, part) = (pool(threads), &file[..TOKEN_BYTES]);
    let mut token = 0;
    bench.against(
        ("model", &format!("one token after {BEFORE}, {}", threads_text(threads))),
        threads,
        (TOKENS, "xor over as many bytes of the file"),
        if threads == 1 { Bar::AtLeast(0.8, 0.9) } else { Bar::None },
        [
            Side::new(1.0, || {
                cache.truncate(BEFORE);
                // Every token has a way of its own through the experts.
                token = (token + 7919) % VOCAB as u32;
                let logits = pool.install(|| model.forward(&[token], &mut cache, LogitRows::Last));
                black_box(logits.expect("the token fits"));
            }),
            Side::new(1.0, || pool.install(|| read(part))),
        ],
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let path: SourceRef = folder.path().display().to_string().parse()?;
    let source = Source::open(&path, Path::new("."))?;
    let model = Model::open_with(&source, Exec::fast())?;
    let file = map(&File::open(folder.path().join("model.safetensors"))?);
    let mut bench = Bench::default();
    for threads in if two_threads() { vec![1, 2] } else { vec![1] } {
        prefill(&mut bench, &model, threads);
        decode(&mut bench, &model, &file, threads);
    }
    bench.finish();
    Ok(())
}
