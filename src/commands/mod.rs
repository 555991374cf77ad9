//! One file for each command.

mod align;
mod approve;
mod build;
mod calibrate;
mod completions;
mod device;
mod diff;
mod edit;
mod evaluate;
mod export;
mod extract_lora;
mod finetune;
mod generate;
mod history;
mod inspect;
mod layershuffle;
mod logits;
mod merge_tensors;
mod perplexity;
mod route;
mod serve;
mod shrink;
mod swap;
mod tokensurgeon;
mod upcycle;
mod verify;

use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, Source};

use crate::args::{Command, Common};
use crate::exit::Outcome;
use crate::render::{self, Failure};

pub use build::run as build;

/// Runs a command.
///
/// # Errors
/// What it met, to be shown to the user.
pub fn run(command: &Command, common: &Common) -> Result<Outcome, Failure> {
    match command {
        Command::Inspect(args) => inspect::run(args, common),
        Command::Verify(args) => verify::run(args, common),
        Command::Logits(args) => logits::run(args, common),
        Command::Perplexity(args) => perplexity::run(args, common),
        Command::Generate(args) => generate::run(args, common),
        Command::Route(args) => route::run(args, common),
        Command::Align(args) => align::run(args, common),
        Command::Calibrate(args) => calibrate::run(args, common),
        Command::Evaluate(args) => evaluate::run(args, common),
        Command::Swap(args) => swap::run(args, common),
        Command::Add(args) => edit::add(args, common),
        Command::Drop(args) => edit::drop(args, common),
        Command::Extract(args) => edit::extract(args, common),
        Command::Diff(args) => diff::run(args, common),
        Command::Approve(args) => approve::run(args, common),
        Command::History(args) => history::run(args, common),
        Command::Rollback(args) => history::rollback(args, common),
        Command::Finetune(args) => finetune::run(args, common),
        Command::Export(args) => export::run(args, common),
        Command::Serve(args) => serve::run(args, common),
        Command::ExtractLora(args) => extract_lora::run(args, common),
        Command::Layershuffle(args) => layershuffle::run(args, common),
        Command::MergeTensors(args) => merge_tensors::run(args, common),
        Command::Shrink(args) => shrink::run(args, common),
        Command::Tokensurgeon(args) => tokensurgeon::run(args, common),
        Command::Upcycle(args) => upcycle::run(args, common),
        Command::Completions { shell } => completions::script(*shell),
        Command::Man => completions::manual(),
    }
}

/// Opens the model that was named on the command line, and tells what should be known about it.
fn open(path: &str, common: &Common) -> Result<Source, Failure> {
    let source = Source::open(&path.parse()?, Path::new("."))?;
    if !common.quiet && !common.json {
        source.notes.iter().for_each(|n| render::note(n));
    }
    Ok(source)
}

/// A text file.
fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))?;
    Ok(String::from_utf8(bytes).map_err(|e| CheckpointError::Malformed {
        what: "text is not UTF-8".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "text in UTF-8".into(),
        found: format!("byte {} is not part of a character", e.utf8_error().valid_up_to()),
        hint: Some("convert it, for example with `iconv -t UTF-8`".into()),
    })?)
}

/// Writes a file beside its place, then renames, so that no half file is left.
fn write_beside(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    let written = std::fs::write(beside, bytes).and_then(|()| std::fs::rename(beside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(beside);
    }
    Ok(written.map_err(|e| CheckpointError::io("writing", path, e))?)
}
