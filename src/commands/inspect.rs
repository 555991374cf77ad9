//! `inspect PATH`: what a model is made of.

use std::path::Path;

use serde_json::{Map, Value, json};

use moe_merge_checkpoint::adapter::{self, AdapterInfo};
use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::summary::ExpertLayout;
use moe_merge_checkpoint::{JournalLine, Source, Summary, generation};

use crate::args::{Common, PathArgs};
use crate::exit::Outcome;
use crate::render::{self, Failure, aligned, bytes, count};

/// Shows a model or an adapter.
pub fn run(args: &PathArgs, common: &Common) -> Result<Outcome, Failure> {
    if is_adapter(Path::new(&args.path)) {
        let info = adapter::describe(Path::new(&args.path))?;
        match common.json {
            true => render::json(&adapter_document(&info))?,
            false => render::out(&adapter_text(&info))?,
        }
        return Ok(Outcome::Done);
    }
    let source = super::open(&args.path, common)?;
    let summary = Summary::of(&source);
    let manifest = Manifest::load(&source.path)?;
    if common.json {
        render::json(&document(&source, &summary, manifest.as_ref()))?;
    } else {
        render::out(&text(&source, &summary, manifest.as_ref()))?;
    }
    Ok(Outcome::Done)
}

/// A folder with the configuration of a PEFT adapter, and no model beside it.
fn is_adapter(path: &Path) -> bool {
    path.join("adapter_config.json").is_file() && !path.join("config.json").exists()
}

fn adapter_document(info: &AdapterInfo) -> Value {
    json!({
        "version": 1,
        "path": info.path,
        "format": "adapter",
        "kind": adapter_kind(info),
        "base_model": info.base_model,
        "task_type": info.task_type,
        "peft_version": info.peft_version,
        "rank": info.rank,
        "ranks": info.ranks,
        "alpha": info.alpha,
        "rslora": info.rslora,
        "dora": info.dora,
        "scale": scale(info),
        "bias": info.bias,
        "target_modules": info.target_modules,
        "target_parameters": info.target_parameters,
        "modules_to_save": info.modules_to_save,
        "modules": info.modules,
        "replaced": info.replaced,
        "tensors": info.tensors,
        "parameters": info.parameters,
        "bytes": info.bytes,
        "dtypes": info.dtypes,
    })
}

fn adapter_kind(info: &AdapterInfo) -> &'static str {
    if info.dora { "DoRA" } else { "LoRA" }
}

/// What the product of the factors is multiplied by, where no pattern says otherwise.
fn scale(info: &AdapterInfo) -> f64 {
    let rank = info.rank as f64;
    info.alpha / if info.rslora { rank.sqrt() } else { rank }
}

fn adapter_text(info: &AdapterInfo) -> String {
    let task = info.task_type.as_ref().map(|t| format!(", {t}")).unwrap_or_default();
    let peft = info.peft_version.as_ref().map(|v| format!(", PEFT {v}")).unwrap_or_default();
    let mut fields = vec![("adapter", format!("{}{task}{peft}", adapter_kind(info)))];
    fields.push(("base model", info.base_model.clone().unwrap_or("not told".into())));
    let others: Vec<String> =
        info.ranks.iter().filter(|&&r| r != info.rank).map(usize::to_string).collect();
    fields.push((
        "rank",
        match others.is_empty() {
            true => info.rank.to_string(),
            false => format!("{}, in places {}", info.rank, others.join(", ")),
        },
    ));
    let root = if info.rslora { ", by the root of the rank (rslora)" } else { "" };
    fields.push(("alpha", format!("{} (scale {}{root})", info.alpha, scale(info))));
    let mut list = |label, names: &[String]| {
        if !names.is_empty() {
            fields.push((label, names.join(", ")));
        }
    };
    list("targets", &info.target_modules);
    list("parameters", &info.target_parameters);
    list("saved whole", &info.modules_to_save);
    list("replaced", &info.replaced);
    if info.bias != "none" {
        fields.push(("bias", info.bias.clone()));
    }
    fields.push(("modules", count(info.modules.len())));
    fields.push((
        "tensors",
        format!(
            "{}, {} numbers, {} ({})",
            count(info.tensors),
            count(info.parameters as usize),
            bytes(info.bytes),
            info.dtypes.join(", ")
        ),
    ));
    format!("{}\n{}", info.path.display(), aligned(&fields))
}

fn format_of(source: &Source) -> &'static str {
    let gguf = |p: &Path| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if source.files.iter().any(|f| gguf(f)) { "gguf" } else { "safetensors" }
}

fn document(source: &Source, summary: &Summary, manifest: Option<&Manifest>) -> Value {
    let sizes: Map<String, Value> =
        summary.sizes.iter().map(|(key, size)| ((*key).to_owned(), json!(size))).collect();
    let dtypes: Map<String, Value> = summary
        .dtypes
        .iter()
        .map(|(d, s)| (d.to_string(), json!({"tensors": s.tensors, "bytes": s.bytes})))
        .collect();
    let files: Vec<Value> = summary
        .files
        .iter()
        .map(|f| {
            let role = f.role.map(|r| r.to_string());
            json!({"name": f.name, "bytes": f.bytes, "tensors": f.tensors, "role": role})
        })
        .collect();
    json!({
        "version": 1,
        "path": source.label,
        "format": format_of(source),
        "family": summary.family,
        "architecture": summary.architecture,
        "layout": summary.layout.name(),
        "sizes": sizes,
        "experts": summary.experts,
        "experts_per_token": summary.experts_per_token,
        "tensors": summary.tensors,
        "parameters": summary.parameters,
        "bytes": summary.bytes,
        "dtypes": dtypes,
        "other_tensors": others(source),
        "files": files,
        "side_files": source.side.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
        "provenance": manifest,
        "notes": source.notes,
    })
}

fn text(source: &Source, summary: &Summary, manifest: Option<&Manifest>) -> String {
    let mut fields = vec![("family", family(summary))];
    fields.push(("format", format!("{}, {} layout", format_of(source), summary.layout.name())));
    if let Some(experts) = summary.experts {
        let used =
            summary.experts_per_token.map(|k| format!(", {k} per token")).unwrap_or_default();
        fields.push(("experts", format!("{experts}{used}")));
    }
    fields.extend(summary.sizes.iter().map(|(key, size)| (*key, size.to_string())));
    fields.push((
        "tensors",
        format!(
            "{}, {} numbers, {}",
            count(summary.tensors),
            count(summary.parameters as usize),
            bytes(summary.bytes)
        ),
    ));
    let dtypes = summary.dtypes.iter();
    let dtypes: Vec<String> =
        dtypes.map(|(d, s)| format!("{d}: {} tensors, {}", s.tensors, bytes(s.bytes))).collect();
    fields.push(("dtypes", dtypes.join("\n")));
    let files: Vec<(&str, String)> = summary
        .files
        .iter()
        .map(|f| {
            let role = f.role.map(|r| format!(", {r}")).unwrap_or_default();
            (f.name.as_str(), format!("{}, {} tensors{role}", bytes(f.bytes), f.tensors))
        })
        .collect();
    fields.push(("files", aligned(&files).lines().map(str::trim).collect::<Vec<_>>().join("\n")));
    if !source.other.is_empty() {
        fields.push(("not weights", others(source).join("\n")));
    }
    let side: Vec<&str> = source.side.iter().map(|s| s.name.as_str()).collect();
    fields.push(("side files", if side.is_empty() { "none".into() } else { side.join(", ") }));
    fields.extend(manifest.map(|m| ("provenance", provenance(m))));
    fields.extend(history(source).map(|h| ("history", h)));
    if !source.notes.is_empty() {
        fields.push(("notes", source.notes.join("\n")));
    }
    format!("{}\n{}", source.label, aligned(&fields))
}

fn family(summary: &Summary) -> String {
    let family = if summary.family.is_empty() { "unknown" } else { &summary.family };
    let class = summary.architecture.as_ref().map(|a| format!(" ({a})")).unwrap_or_default();
    let kind = if summary.layout == ExpertLayout::Dense && summary.experts.is_none() {
        ", dense"
    } else {
        ""
    };
    format!("{family}{class}{kind}")
}

fn provenance(manifest: &Manifest) -> String {
    let mut lines = vec![format!(
        "moe-merge {}, generation {}, seed {}",
        manifest.tool_version, manifest.generation, manifest.seed
    )];
    lines.extend(manifest.gate_mode.iter().map(|mode| format!("gates: {mode}")));
    if !manifest.experts.is_empty() {
        lines.push(format!("experts: {}", manifest.experts.join(", ")));
    }
    for source in &manifest.sources {
        let hashes: Vec<&str> =
            source.files.iter().map(|f| f.blake3.get(..8).unwrap_or(&f.blake3)).collect();
        lines.push(format!("{}: {} ({})", source.role, source.label, hashes.join(", ")));
    }
    lines.join("\n")
}

/// The generations, if the model was ever changed.
fn history(source: &Source) -> Option<String> {
    let lines = match generation::history(&source.path) {
        Ok(lines) => lines,
        Err(e) => return Some(format!("{e}; `moe-merge verify` tells more")),
    };
    let show = |line: &JournalLine| {
        let time = line.time.as_ref().map(|t| format!(", {t}")).unwrap_or_default();
        let why = line.message.as_ref().map(|m| format!(": {m}")).unwrap_or_default();
        format!("{} {}{time}{why}", line.generation, line.action)
    };
    (lines.len() > 1).then(|| lines.iter().map(show).collect::<Vec<_>>().join("\n"))
}

/// Tensors that are no weights, with dtype and shape.
fn others(source: &Source) -> Vec<String> {
    source.other.iter().map(ToString::to_string).collect()
}
