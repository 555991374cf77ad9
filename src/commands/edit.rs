//! `add`, `drop`, `extract`: one expert more, one less, one as a dense model.

use std::path::Path;

use moe_merge_adapt::{
    AddRequest, ChangeReport, Convert, DropRequest, Edit, EditReport, ExtractRequest, Moe,
    default_output,
};
use moe_merge_checkpoint::Replace;

use super::approve::{effect_table, forecast, recalibration, refusals};
use super::build::{notes, versioned};
use crate::args::{AddArgs, Common, DropArgs, ExtractArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes, count};

/// Adds an expert, or tells what would be done.
pub fn add(args: &AddArgs, common: &Common) -> Result<Outcome, Failure> {
    let mut edit = Edit::add(AddRequest {
        folder: args.path.clone(),
        with: args.with.clone(),
        name: args.fit.name.clone(),
        convert: if args.fit.convert { Convert::Yes } else { Convert::Never },
        calibrate: recalibration(args.fit.calibrate, args.how.prompts.as_deref()),
        message: args.how.message.clone(),
        interrupt: exit::interrupt().clone(),
    })?;
    edit.forecast(&forecast(args.how.prompts.as_deref(), args.how.no_forecast))?;
    make(edit, How::of(args.how.dry_run, args.how.stage), common)
}

/// Drops an expert, or tells what would be done.
pub fn drop(args: &DropArgs, common: &Common) -> Result<Outcome, Failure> {
    let mut edit = Edit::drop(DropRequest {
        folder: args.path.clone(),
        expert: args.expert.clone(),
        message: args.how.message.clone(),
        interrupt: exit::interrupt().clone(),
    })?;
    edit.forecast(&forecast(args.how.prompts.as_deref(), args.how.no_forecast))?;
    make(edit, How::of(args.how.dry_run, args.how.stage), common)
}

/// How far a change goes.
#[derive(Debug, Clone, Copy)]
enum How {
    /// It is told.
    Planned,
    /// It waits for approval.
    Staged,
    /// It is live.
    Live,
}

impl How {
    fn of(dry_run: bool, stage: bool) -> Self {
        match (dry_run, stage) {
            (true, _) => Self::Planned,
            (false, true) => Self::Staged,
            (false, false) => Self::Live,
        }
    }
}

fn make(edit: Edit, how: How, common: &Common) -> Result<Outcome, Failure> {
    let bar = Progress::new(edit.bytes(), Unit::Bytes, common.quiet || common.json);
    let report = match how {
        How::Planned => edit.plan().clone(),
        How::Staged => edit.stage(&|n| bar.advance(n))?,
        How::Live => edit.run(&|n| bar.advance(n))?,
    };
    std::mem::drop(bar);
    notes(&report.change.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn summary(report: &EditReport) -> String {
    let change = &report.change;
    let done = if report.action == "add" { "is new" } else { "is gone" };
    format!(
        "{}  {}: `{}` {done}; experts {}\n",
        change.folder.display(),
        made(change),
        change.name,
        report.experts.join(", "),
    ) + &outcome(change)
}

/// What came of a change.
pub(super) fn made(change: &ChangeReport) -> String {
    match (change.generation, change.staged) {
        (Some(generation), _) => format!("generation {generation}"),
        (None, Some(staged)) => format!("waits to become generation {staged}"),
        (None, None) => "nothing was written".to_owned(),
    }
}

/// What was written, what stands in the way, what it does to text.
pub(super) fn outcome(change: &ChangeReport) -> String {
    let mut text = String::new();
    if change.bytes_written > 0 {
        text += &format!(
            "  {} written, checks {:.2} s, write {:.2} s\n",
            bytes(change.bytes_written),
            change.seconds.prepare,
            change.seconds.write,
        );
    }
    text += &refusals(&change.refused);
    text + &change.effect.as_ref().map(effect_table).unwrap_or_default()
}

/// Writes an expert as a dense model.
pub fn extract(args: &ExtractArgs, common: &Common) -> Result<Outcome, Failure> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            let moe = Moe::open(&args.path)?;
            let expert = moe.expert(&args.expert)?;
            default_output(Path::new(&args.path), &moe.names[expert])
        }
    };
    let request = ExtractRequest {
        folder: args.path.clone(),
        expert: args.expert.clone(),
        out,
        replace: if args.force { Replace::Force } else { Replace::Never },
        interrupt: exit::interrupt().clone(),
    };
    let bar = Progress::new(0, Unit::Bytes, common.quiet || common.json);
    let report = moe_merge_adapt::extract(&request, &|n| bar.advance(n))?;
    std::mem::drop(bar);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&format!(
            "{}  {}: expert {} `{}`, {} tensors, {}\n",
            report.output.display(),
            report.family,
            report.expert,
            report.name,
            count(report.tensors),
            bytes(report.bytes),
        ))?,
    }
    Ok(Outcome::Done)
}
