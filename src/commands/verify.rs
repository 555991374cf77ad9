//! `verify PATH`: whether a model is whole.

use std::path::Path;

use serde_json::json;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::{Source, generation};
use moe_merge_model::Spec;
use moe_merge_model::verify::{Verification, verify};

use crate::args::{Common, PathArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes, count};

/// Checks a model and lists everything that is wrong.
pub fn run(args: &PathArgs, common: &Common) -> Result<Outcome, Failure> {
    let folder = Path::new(&args.path);
    if folder.is_dir() {
        // A change whose process was killed is finished or undone; what may not be written stays, and is understood.
        let _ = generation::recover(folder);
    }
    let mut checked = look(args, common)?;
    if !checked.1.findings.is_empty() {
        let now = Manifest::load(&checked.0.path)?.map(|m| m.generation);
        if now != checked.1.generation {
            // The model was changed while it was read.
            checked = look(args, common)?;
        }
    }
    let (source, found) = checked;
    let problems: Vec<String> = found.findings.iter().map(|f| f.to_string()).collect();
    if common.json {
        render::json(&json!({
            "version": 1,
            "path": source.label,
            "ok": problems.is_empty(),
            "tensors": found.tensors,
            "bytes": found.bytes,
            "hashed_files": found.hashed,
            "generation": found.generation,
            "extra_tensors": found.extra,
            "problems": problems,
            "notes": found.notes,
        }))?;
    } else {
        let hashes = match (found.hashed, found.generation) {
            (Some(files), Some(generation)) => {
                format!("{files} files compared with the manifest of generation {generation}")
            }
            _ => "no manifest to compare with".to_owned(),
        };
        let mut text = format!(
            "{}: {} tensors read, {}; {hashes}\n",
            source.label,
            count(found.tensors),
            bytes(found.bytes)
        );
        found
            .extra
            .iter()
            .for_each(|t| text += &format!("  extra    `{t}` is not used by the model\n"));
        found.notes.iter().for_each(|n| text += &format!("  note     {n}\n"));
        problems.iter().for_each(|p| text += &format!("  problem  {p}\n"));
        text += &match problems.len() {
            0 => "nothing is wrong\n".to_owned(),
            1 => "1 problem\n".to_owned(),
            n => format!("{n} problems\n"),
        };
        render::out(&text)?;
    }
    Ok(if problems.is_empty() { Outcome::Done } else { Outcome::CheckFailed })
}

/// Opens and reads everything.
fn look(args: &PathArgs, common: &Common) -> Result<(Source, Verification), Failure> {
    let source = super::open(&args.path, common)?;
    let spec = Spec::of(&source)?;
    let total = source.tensors.values().map(|w| w.size_in(w.dtype())).sum();
    let progress = Progress::new(total, Unit::Bytes, common.quiet);
    let found = verify(
        &source,
        &spec.expected_tensors(),
        &spec.optional_tensors(),
        exit::interrupt(),
        &|n| {
            progress.advance(n);
        },
    )?;
    Ok((source, found))
}
