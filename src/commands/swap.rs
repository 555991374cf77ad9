//! `swap PATH --expert N --with SOURCE`: one expert in place of another.

use moe_merge_adapt::{Convert, Swap, SwapReport, SwapRequest};

use super::approve::{effect_table, forecast, recalibration, refusals};
use super::build::{notes, versioned};
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
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn summary(report: &SwapReport) -> String {
    let made = match (report.generation, report.staged) {
        (Some(generation), _) => format!("generation {generation}"),
        (None, Some(staged)) => format!("waits to become generation {staged}"),
        (None, None) => "nothing was written".to_owned(),
    };
    let mut text = format!(
        "{}  {made}: expert {} `{}` from `{}`, {} layers, {}\n",
        report.folder.display(),
        report.expert,
        report.name,
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
    if report.bytes_written > 0 {
        text += &format!(
            "  {} written, checks {:.2} s, write {:.2} s\n",
            bytes(report.bytes_written),
            report.seconds.prepare,
            report.seconds.write,
        );
    }
    text += &refusals(&report.refused);
    text += &report.effect.as_ref().map(effect_table).unwrap_or_default();
    text
}

/// A relative difference.
fn percent(difference: f64) -> String {
    format!("{:.1} %", 100.0 * difference)
}
