//! `align PATH`: experts of a MoE, fitted to the attention they have there.

use moe_merge_merge::align::{AlignOptions, AlignReport, Alignment, ExistingReport};
use moe_merge_merge::recipe::{Align, AlignMethod};

use super::build::{Bars, align_table, notes, versioned};
use crate::args::{self, AlignArgs, Common};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, bytes};

/// Makes the next generation.
pub fn run(args: &AlignArgs, common: &Common) -> Result<Outcome, Failure> {
    let method = match args.method {
        args::AlignMethod::Refit => AlignMethod::Refit,
        args::AlignMethod::Distil => AlignMethod::Distil,
    };
    let options = AlignOptions {
        teachers: args.teachers.clone(),
        base: args.base.clone(),
        align: Align { method, tokens: args.tokens as usize, steps: args.steps as usize },
        seed: args.seed,
        interrupt: exit::interrupt().clone(),
    };
    let alignment = Alignment::prepare(&args.path, options)?;
    let report = alignment.run(args.message.as_deref(), args.out.as_deref(), &Bars::new(common))?;
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn summary(report: &ExistingReport) -> String {
    let table = AlignReport { method: report.method, experts: report.experts.clone() };
    format!(
        "{}  generation {}: {} written in {:.1} s\n{}",
        report.output.display(),
        report.generation,
        bytes(report.bytes_written),
        report.seconds,
        align_table(&table)
    )
}
