//! `history PATH` and `rollback PATH`: what was done to a model, and taking it back.

use moe_merge_adapt::{Entry, History, RollbackReport};
use moe_merge_checkpoint::CheckpointError;
use serde_json::json;

use super::build::{notes, versioned};
use crate::args::{Common, HistoryArgs, RollbackArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, bytes};

/// Lists the generations, after forgetting older ones if that is asked for.
pub fn run(args: &HistoryArgs, common: &Common) -> Result<Outcome, Failure> {
    if !args.path.is_dir() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(CheckpointError::io("opening the model folder", &args.path, missing).into());
    }
    let pruned = args.prune.then(|| moe_merge_adapt::prune(&args.path, args.keep)).transpose()?;
    let history = moe_merge_adapt::history(&args.path)?;
    if common.json {
        let mut document = versioned(serde_json::to_value(&history))?;
        if let Some(pruned) = &pruned {
            document["pruned"] = json!(pruned);
        }
        render::json(&document)?;
        return Ok(Outcome::Done);
    }
    let mut text = listing(&history);
    if let Some(pruned) = &pruned {
        text += &format!("{} files forgotten, {} freed\n", pruned.files, bytes(pruned.bytes));
    }
    render::out(&text)?;
    Ok(Outcome::Done)
}

fn listing(history: &History) -> String {
    if history.generations.is_empty() {
        return format!("{}  no history: never changed by moe-merge\n", history.folder.display());
    }
    let mut text = format!("{}\n", history.folder.display());
    for entry in &history.generations {
        text += &line(entry, history.live);
    }
    for waiting in &history.staged {
        let why = waiting.message.as_ref().map(|m| format!(": {m}")).unwrap_or_default();
        let late = if waiting.outdated { "  (the model was changed since)" } else { "" };
        let (generation, action) = (waiting.generation, &waiting.action);
        text += &format!("? {generation:>3}  {action}, waits for approval{why}{late}\n");
    }
    text
}

fn line(entry: &Entry, live: Option<u32>) -> String {
    let l = &entry.line;
    let mark = if live == Some(l.generation) { '*' } else { ' ' };
    let mut text = format!("{mark} {:>3}  {}", l.generation, l.action);
    if let Some(to) = entry.same_as {
        text += &format!(" to {to}");
    }
    let detail = |key: &str| l.details[key].as_str();
    match (detail("name"), detail("with")) {
        (Some(name), Some(with)) => text += &format!(" {name} with {with}"),
        (Some(name), None) => text += &format!(" {name}"),
        _ => {}
    }
    let written: u64 = l.added.iter().map(|f| f.size).sum();
    if written > 0 && entry.same_as.is_none() {
        text += &format!(", {}", bytes(written));
    }
    let who = [l.time.as_deref(), l.user.as_deref()].into_iter().flatten().collect::<Vec<_>>();
    if !who.is_empty() {
        text += &format!(", {}", who.join(" "));
    }
    text.extend(l.message.iter().map(|m| format!(": {m}")));
    if !entry.restorable {
        text += "  (files gone: cannot come back)";
    }
    text + "\n"
}

/// Makes the next generation of the files of an earlier one.
pub fn rollback(args: &RollbackArgs, common: &Common) -> Result<Outcome, Failure> {
    let message = args.message.as_deref();
    let report = moe_merge_adapt::rollback(&args.path, args.to, message, exit::interrupt())?;
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&rollback_summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn rollback_summary(report: &RollbackReport) -> String {
    format!(
        "{}  generation {}: the files of generation {} again, in {:.2} s\n",
        report.folder.display(),
        report.generation,
        report.to,
        report.seconds
    )
}
