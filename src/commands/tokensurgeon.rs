//! `tokensurgeon MODEL DONOR`: a model with the vocabulary of another.

use moe_merge_checkpoint::Replace;
use moe_merge_checkpoint::write::Watch;
use moe_merge_merge::surgery::{Approximation, Surgery, SurgeryOptions, SurgeryReport};

use super::build::{notes, versioned};
use crate::args::{Common, RowMethod, TokensurgeonArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes, count};

/// Writes the model and tells how many rows are its own.
pub fn run(args: &TokensurgeonArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    let options = SurgeryOptions {
        approximation: match args.method {
            RowMethod::Omp => Approximation::Omp { k: args.k },
            RowMethod::Subword => Approximation::Subword,
            RowMethod::Mean => Approximation::Mean,
            RowMethod::Zero => Approximation::Zero,
        },
        byte_match: args.byte_match,
    };
    let model = super::open(&args.model, common)?;
    let donor = super::open(&args.donor, common)?;
    let surgery = Surgery::prepare(&model, &donor, options)?;
    let progress = Progress::new(surgery.made(), Unit::Tokens, common.quiet);
    progress.doing("rows of the new vocabulary");
    let watch = Watch { interrupt: exit::interrupt(), progress: &|_| {} };
    let report = surgery.run(&args.out, replace, &|n| progress.advance(n), watch)?;
    drop(progress);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn summary(report: &SurgeryReport) -> String {
    let mut text = format!(
        "{}  {} rows: {} own, {} made, {} without a token; {}, {:.1} s\n",
        report.output.display(),
        count(report.rows),
        count(report.shared),
        count(report.made),
        count(report.padding),
        bytes(report.bytes),
        report.seconds,
    );
    for (name, left) in &report.left {
        text += &format!(
            "  {name}: sums leave {:.1} % of the donor's rows, on average\n",
            100.0 * left
        );
    }
    text
}
