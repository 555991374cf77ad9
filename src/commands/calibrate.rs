//! `calibrate PATH`: the routers of a MoE, computed anew.

use serde_json::json;

use moe_merge_adapt::Moe;
use moe_merge_checkpoint::{Change, NewTensors};
use moe_merge_merge::calibrate::{CalibrateOptions, CalibrateReport, Calibration};
use moe_merge_merge::training::TrainOptions;
use moe_merge_model::router_training;

use super::approve::proposal_summary;
use super::build::{Bars, forecast_table, notes, versioned};
use crate::args::{CalibrateArgs, Common, Objective};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, bytes, count};

/// Makes the next generation, or tells what would be done.
pub fn run(args: &CalibrateArgs, common: &Common) -> Result<Outcome, Failure> {
    let options = CalibrateOptions {
        estimator: args.estimator.clone(),
        prompts: args.prompts.clone(),
        prompt_tokens: args.prompt_tokens.map(|n| n as usize),
        self_text: args.self_text,
        train: args.steps.map(|steps| TrainOptions {
            steps: steps.into(),
            learning_rate: args.learning_rate,
            objective: match args.objective {
                Objective::Distil => router_training::Objective::Distil,
                Objective::NextToken => router_training::Objective::NextToken,
            },
            load_balance: args.load_balance,
            z_loss: args.z_loss,
            state: args.state.clone(),
        }),
        seed: args.seed,
        interrupt: exit::interrupt().clone(),
    };
    // Opened first: if the model is changed while it is read, approval is refused.
    let moe = args.stage.then(|| Moe::open(&args.path)).transpose()?;
    let calibration = Calibration::prepare(&args.path, options)?;
    if args.dry_run {
        return plan(&calibration, args, common);
    }
    if let Some(moe) = &moe {
        return stage(moe, calibration, args, common);
    }
    let out = args.out.as_deref();
    let report = calibration.run(args.message.as_deref(), out, &Bars::new(common))?;
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

/// Lets the new routers wait for approval.
fn stage(
    moe: &Moe,
    calibration: Calibration,
    args: &CalibrateArgs,
    common: &Common,
) -> Result<Outcome, Failure> {
    let fitted = calibration.fitted(&Bars::new(common))?;
    let change = Change {
        action: "calibrate",
        message: args.message.as_deref(),
        tensors: vec![NewTensors { role: "router".into(), tensors: fitted.tensors }],
        details: fitted.details,
        gate_mode: Some(fitted.estimator.into()),
        parent: Some(moe.generation()),
        ..Change::default()
    };
    let report = moe_merge_adapt::propose(moe, &change, exit::interrupt(), &|_| {})?;
    notes(&fitted.notes, common);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&proposal_summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn plan(
    calibration: &Calibration,
    args: &CalibrateArgs,
    common: &Common,
) -> Result<Outcome, Failure> {
    notes(calibration.notes(), common);
    if common.json {
        render::json(&json!({
            "version": 1,
            "output": args.out.as_ref().unwrap_or(&calibration.source().path),
            "experts": calibration.experts(),
            "layers": calibration.layers(),
            "estimator": args.estimator,
            "prompt_tokens": calibration.prompt_tokens(),
            "self_text_tokens": args.self_text * calibration.experts().len(),
            "warnings": calibration.notes(),
        }))?;
        return Ok(Outcome::Done);
    }
    let experts = calibration.experts();
    let own = match args.self_text {
        0 => String::new(),
        n => format!(", {} written by the experts", count(n * experts.len())),
    };
    render::out(&format!(
        "{}  {} layers, experts {}; `{}` on {} tokens{own}; nothing was written\n",
        calibration.source().label,
        calibration.layers(),
        experts.join(", "),
        args.estimator,
        count(calibration.prompt_tokens()),
    ))?;
    Ok(Outcome::Done)
}

/// What was done, for a person.
pub(super) fn summary(report: &CalibrateReport) -> String {
    let own = match report.self_text_tokens {
        0 => String::new(),
        n => format!(" ({} written by the experts)", count(n)),
    };
    let mut text = format!(
        "{}  generation {}: {} routers of {} experts, `{}` on {} tokens{own}; {} written, routers {:.1} s, write {:.2} s\n",
        report.output.display(),
        report.generation,
        report.layers,
        report.experts.len(),
        report.estimator,
        count(report.prompt_tokens),
        bytes(report.bytes_written),
        report.seconds.routers,
        report.seconds.write,
    );
    if let Some(t) = &report.training {
        let loss = t.held_out.map_or(String::new(), |[before, after]| {
            format!(", loss on held-out text {before:.4} -> {after:.4}")
        });
        text += &format!(
            "trained for {} steps, routers of step {}{loss}; {:.0} tokens/s\n",
            t.steps, t.best_step, t.tokens_per_second
        );
    }
    if let Some(forecast) = &report.forecast {
        text += &forecast_table(forecast, &report.experts, report.experts_per_token);
    }
    text
}
