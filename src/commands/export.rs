//! `export PATH --gguf FILE`: a model for llama.cpp and Ollama.

use std::collections::BTreeMap;

use serde_json::json;

use moe_merge_checkpoint::gguf::Storage;
use moe_merge_checkpoint::{CheckpointError, Replace, write::Watch};
use moe_merge_model::gguf::{self, Export, Vocabulary};

use crate::args::{Common, ExportArgs, GgufDtype};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, aligned, bytes, count};

/// Writes the file and tells what is in it.
pub fn run(args: &ExportArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    if !args.force && args.gguf.symlink_metadata().is_ok() {
        // Reading a tokenizer first would only delay the answer.
        return Err(CheckpointError::OutputExists { path: args.gguf.clone() }.into());
    }
    let source = super::open(&args.path, common)?;
    let vocabulary = match (&args.pre, args.no_tokenizer) {
        (_, true) => Vocabulary::Absent,
        (Some(name), _) => Vocabulary::Named(name.clone()),
        (None, _) => Vocabulary::Carried,
    };
    let export = gguf::plan(&source, args.dtype.map(storage), &vocabulary)?;
    if !common.quiet && !common.json {
        export.notes.iter().for_each(|n| render::note(n));
    }
    let progress = Progress::new(export.plan.tensor_bytes(), Unit::Bytes, common.quiet);
    progress.doing(&args.gguf.display().to_string());
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let size = export.plan.write(&args.gguf, replace, &source.files, watch)?;
    drop(progress);
    report(args, common, &export, size)?;
    Ok(Outcome::Done)
}

fn storage(dtype: GgufDtype) -> Storage {
    match dtype {
        GgufDtype::F32 => Storage::F32,
        GgufDtype::F16 => Storage::F16,
        GgufDtype::Bf16 => Storage::BF16,
        GgufDtype::Q8_0 => Storage::Q8_0,
    }
}

fn report(args: &ExportArgs, common: &Common, export: &Export, size: u64) -> Result<(), Failure> {
    let tensors = &export.plan.tensors;
    let mut kinds = BTreeMap::<Storage, (usize, u64)>::new();
    for tensor in tensors {
        let (number, size) = kinds.entry(tensor.storage).or_default();
        *number += 1;
        *size += tensor.size();
    }
    let path = args.gguf.display().to_string();
    if common.json {
        let kinds: serde_json::Map<_, _> = kinds
            .iter()
            .map(|(s, (n, b))| (s.kind().to_string(), json!({"tensors": n, "bytes": b})))
            .collect();
        return render::json(&json!({
            "version": 1,
            "path": path,
            "architecture": export.architecture.name(),
            "tensors": tensors.len(),
            "bytes": size,
            "dtypes": kinds,
            "tokenizer": !args.no_tokenizer,
            "notes": export.notes,
        }));
    }
    let kinds: Vec<String> = kinds
        .iter()
        .map(|(s, (n, b))| format!("{}: {} tensors, {}", s.kind(), count(*n), bytes(*b)))
        .collect();
    let fields = [
        ("architecture", export.architecture.name().to_owned()),
        ("tensors", count(tensors.len())),
        ("dtypes", kinds.join("\n")),
        ("size", bytes(size)),
    ];
    render::out(&format!("{path}\n{}", aligned(&fields)))
}
