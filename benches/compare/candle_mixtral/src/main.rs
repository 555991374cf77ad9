//! candle-transformers' Mixtral as an engine of `../runtime.py`: MODEL_FOLDER as argument, one JSON document per line.
//!
//! f32 only: its bf16 and f16 fail on a CPU. Threads come from `RAYON_NUM_THREADS`.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::mixtral::{Config, Model};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let folder =
        PathBuf::from(std::env::args().nth(1).ok_or("usage: candle-mixtral MODEL_FOLDER")?);
    let model = load(&folder)?;
    answer(
        &json!({"ready": true, "engine": "candle-transformers 0.11.1", "detail": "Mixtral, f32"}),
    )?;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let prompt = request["prompt"].as_array().ok_or("`prompt` is no list")?;
        let prompt: Vec<u32> = prompt.iter().filter_map(Value::as_u64).map(|t| t as u32).collect();
        let new = request["new"].as_u64().ok_or("`new` is no number")? as usize;
        // A copy shares the weights and starts with no keys and values: the model cannot forget those it has.
        answer(&run(&mut model.clone(), &prompt, new)?)?;
    }
    Ok(())
}

fn answer(value: &Value) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// The model, widened to f32; a tied head takes the embeddings.
fn load(folder: &Path) -> Result<Model, Failure> {
    let text = std::fs::read(folder.join("config.json"))?;
    let mut config: Value = serde_json::from_slice(&text)?;
    // Its configuration has no window that is absent.
    if config["sliding_window"].is_null() {
        config["sliding_window"] = config["max_position_embeddings"].clone();
    }
    config["use_flash_attn"] = false.into();
    let tied = config["tie_word_embeddings"].as_bool().unwrap_or(false);
    let config: Config = serde_json::from_value(config)?;
    let mut shards: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    // SAFETY: nobody writes to the files while this runs.
    let weights =
        unsafe { VarBuilder::from_mmaped_safetensors(&shards, DType::F32, &Device::Cpu)? };
    let weights = weights.rename_f(move |name| match name {
        "lm_head.weight" if tied => "model.embed_tokens.weight".into(),
        other => other.into(),
    });
    Ok(Model::new(&config, weights)?)
}

/// The prompt's pass and `new - 1` passes of one token, greedily.
fn run(model: &mut Model, prompt: &[u32], new: usize) -> Result<Value, Failure> {
    let mut tokens = Vec::with_capacity(new);
    let started = Instant::now();
    tokens.push(step(model, prompt, 0)?);
    let prefill = started.elapsed();
    let started = Instant::now();
    while tokens.len() < new {
        let last = tokens[tokens.len() - 1];
        tokens.push(step(model, &[last], prompt.len() + tokens.len() - 1)?);
    }
    Ok(json!({
        "prefill_seconds": prefill.as_secs_f64(),
        "decode_seconds": started.elapsed().as_secs_f64(),
        "tokens": tokens,
    }))
}

fn step(model: &mut Model, tokens: &[u32], start: usize) -> Result<u32, Failure> {
    let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    let logits = model.forward(&input, start)?.flatten_all()?;
    Ok(logits.argmax(0)?.to_scalar::<u32>()?)
}
