//! `swap PATH --expert N --with SOURCE`: one expert in place of another.

use moe_merge_adapt::{Convert, Swap, SwapReport, SwapRequest};

use super::approve::{forecast, recalibration};
use super::build::{notes, versioned};
use super::edit::{made, outcome};
use crate::args::{Common, SwapArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Makes the next generation, or tells what would be done.
pub fn run(args: &SwapArgs, common: &Common) -> Result<Outcome, Failure> {
    let request = SwapRequest {
        layers: args.layers.clone(),
        convert: if args.fit.convert { Convert::Yes } else { Convert::Never },
        name: args.fit.name.clone(),
        calibrate: recalibration(args.fit.calibrate, args.how.prompts.as_deref()),
        forecast: forecast(args.how.prompts.as_deref(), args.how.no_forecast),
        message: args.how.message.clone(),
        interrupt: exit::interrupt().clone(),
        ..SwapRequest::new(&args.path, &args.expert, &args.with)
    };
    let swap = Swap::prepare(request)?;
    let report = match args.how.dry_run {
        true => swap.plan().clone(),
        false => {
            let bar =
                Progress::new(swap.plan().expert_bytes, Unit::Bytes, common.quiet || common.json);
            match args.how.stage {
                true => swap.stage(&|n| bar.advance(n))?,
                false => swap.run(&|n| bar.advance(n))?,
            }
        }
    };
    notes(&report.change.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn summary(report: &SwapReport) -> String {
    let change = &report.change;
    let mut text = format!(
        "{}  {}: expert {} `{}` from `{}`, {} layers, {}\n",
        change.folder.display(),
        made(change),
        change.expert,
        change.name,
        report.with,
        report.layers.len(),
        bytes(report.expert_bytes),
    );
    text += &format!(
        "  its weights differ from the old ones by {}, the rest of the two models by {}\n",
        percent(report.difference),
        percent(report.compatibility.difference),
    );
    if let Some([from, to]) = &report.converted {
        text += &format!("  rounded from {from} to {to}\n");
    }
    text + &outcome(change)
}

/// A relative difference.
fn percent(difference: f64) -> String {
    format!("{:.1} %", 100.0 * difference)
}
