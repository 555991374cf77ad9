//! moe-merge as an engine of `runtime.py`: a process that stays, as the peers' do. MODEL_FOLDER and THREADS as arguments, one
//! JSON document per line; see `engines.py` for what the lines say.

use std::error::Error;
use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::path::Path;

use moe_merge_checkpoint::{Source, SourceRef};
use moe_merge_kernels::Exec;
use moe_merge_model::generate::{EndOfText, Generation, generate};
use moe_merge_model::{Model, Sampling, Tokenizer};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: compare_ours MODEL_FOLDER THREADS";
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or(usage)?;
    let threads = arguments.next().ok_or(usage)?.parse()?;
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let source = Source::open(&folder.parse::<SourceRef>()?, Path::new("."))?;
    let tokenizer = Tokenizer::from_source(&source)?;
    // As the command `generate` does by itself.
    let model = Model::open_with(&source, Exec::fast())?;
    let engine = format!("moe-merge {}", env!("CARGO_PKG_VERSION"));
    answer(&json!({"ready": true, "engine": engine, "detail": "in a process that stays"}))?;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let prompt = request["prompt"].as_array().ok_or("`prompt` is no list")?;
        let prompt: Vec<u32> = prompt.iter().filter_map(Value::as_u64).map(|t| t as u32).collect();
        let generation = Generation {
            max_new_tokens: request["new"].as_u64().ok_or("`new` is no number")? as usize,
            sampling: Sampling::default(),
            end_of_text: EndOfText::Ignore,
        };
        let mut go_on = |_: &str| ControlFlow::Continue(());
        let found = generate(&model, &tokenizer, &prompt, generation, &mut go_on)?;
        answer(&json!({
            "prefill_seconds": found.prefill.as_secs_f64(),
            "decode_seconds": found.decode.as_secs_f64(),
            "tokens": found.tokens,
        }))?;
    }
    Ok(())
}

fn answer(value: &Value) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}
