//! `approve PATH`: staged changes go live, or are taken back; the tables that they and others show.

use std::path::Path;

use moe_merge_adapt::{
    ApproveRequest, Effect, Forecast, ProposalReport, Recalibration, approve, discard, proposals,
};
use serde_json::json;

use super::build::{notes, percent, table, versioned};
use crate::args::{ApproveArgs, Common, Rows};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Approves or rejects.
pub fn run(args: &ApproveArgs, common: &Common) -> Result<Outcome, Failure> {
    if args.reject {
        return reject(args, common);
    }
    let request = ApproveRequest {
        folder: args.path.clone(),
        generation: args.generation,
        message: args.message.clone(),
        interrupt: exit::interrupt().clone(),
    };
    let bar = Progress::new(0, Unit::Bytes, common.quiet || common.json);
    let report = approve(&request, &|n| bar.advance(n))?;
    drop(bar);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&proposal_summary(&report))?,
    }
    Ok(Outcome::Done)
}

/// What became of a change that waits, or waited.
pub(super) fn proposal_summary(report: &ProposalReport) -> String {
    let state = match report.live {
        true => format!("generation {} is live", report.generation),
        false => format!("waits to become generation {}", report.generation),
    };
    let mut text = format!(
        "{}  {state}: {} written in {:.2} s\n",
        report.folder.display(),
        bytes(report.bytes_written),
        report.seconds
    );
    text += &refusals(&report.refused);
    text += &report.effect.as_ref().map(effect_table).unwrap_or_default();
    text
}

fn reject(args: &ApproveArgs, common: &Common) -> Result<Outcome, Failure> {
    let waiting = proposals(&args.path)?;
    let generation = args
        .generation
        .or_else(|| waiting.first().filter(|_| waiting.len() == 1).map(|p| p.generation))
        .unwrap_or_default();
    discard(&args.path, generation)?;
    match common.json {
        true => render::json(&json!({"version": 1, "rejected": generation}))?,
        false => render::out(&format!(
            "{}  the change that waited for generation {generation} is gone\n",
            args.path.display()
        ))?,
    }
    Ok(Outcome::Done)
}

/// Which text the effect is measured on.
pub(super) fn forecast(prompts: Option<&Path>, none: bool) -> Forecast {
    match (prompts, none) {
        (_, true) => Forecast::None,
        (Some(file), false) => Forecast::Prompts(file.to_owned()),
        (None, false) => Forecast::Stored,
    }
}

/// Which routers are fitted again, to which text.
pub(super) fn recalibration(rows: Option<Rows>, prompts: Option<&Path>) -> Option<Recalibration> {
    let rows = match rows? {
        Rows::New => moe_merge_adapt::Rows::New,
        Rows::All => moe_merge_adapt::Rows::All,
    };
    Some(Recalibration { rows, prompts: prompts.map(Path::to_owned) })
}

/// What a change does to text, domain by domain.
pub(super) fn effect_table(effect: &Effect) -> String {
    let rows = effect.domains.iter().map(|d| {
        let share = |shares: [f64; 2]| {
            format!("{} -> {}", percent(Some(shares[0])), percent(Some(shares[1])))
        };
        let cells = vec![
            format!("{:.3} -> {:.3}", d.perplexity[0], d.perplexity[1]),
            share(d.first),
            share(d.any),
            percent(Some(d.moved)),
        ];
        (d.domain.clone(), cells)
    });
    let columns = ["perplexity", "visit it first", "visit it", "first choice moves"];
    format!("\neffect on text, by domain\n{}", table(&columns, rows))
}

/// What stands in the way of approval.
pub(super) fn refusals(refused: &[String]) -> String {
    refused.iter().map(|r| format!("  would be refused: {r}\n")).collect()
}
