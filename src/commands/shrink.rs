//! `shrink PATH --experts N`: several experts merged into one.

use moe_merge_checkpoint::Replace;
use moe_merge_checkpoint::write::Watch;
use moe_merge_merge::MergeError;
use moe_merge_merge::calibrate::{CalibrateOptions, CalibrateReport, Calibration};
use moe_merge_merge::shrink::{ShrinkReport, Shrinking, usage};
use moe_merge_model::Spec;

use super::build::{Bars, notes, versioned};
use super::device;
use crate::args::{Common, ShrinkArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Writes the smaller model and tells which experts became one.
pub fn run(args: &ShrinkArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    if args.calibrate.is_some() && args.experts == 1 {
        return Err(MergeError::Argument {
            what: "routers have nothing to choose".into(),
            name: "--calibrate".into(),
            expected: "at least 2 experts that are left".into(),
            found: "--experts 1".into(),
            hint: Some("leave `--calibrate` out".into()),
        }
        .into());
    }
    let source = super::open(&args.path, common)?;
    let layers = Spec::of(&source)?.moe_layers().count() as u64;
    let used = match args.text.is_empty() {
        true => None,
        false => {
            let placement = device::find(common)?;
            let size = args.text.iter().filter_map(|t| std::fs::metadata(t).ok()).map(|m| m.len());
            // Every layer sees every token; about four bytes of text are one.
            let progress =
                Progress::new(size.sum::<u64>() * layers / 4, Unit::Tokens, common.quiet);
            let mut told = |tokens: usize| progress.advance(tokens as u64);
            Some(usage(&source, &args.text, &placement, exit::interrupt(), &mut told)?)
        }
    };
    let progress = Progress::new(layers, Unit::Layers, common.quiet);
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let shrinking = Shrinking::prepare(&source, args.experts, used.as_ref(), watch)?;
    drop(progress);
    let progress = Progress::new(shrinking.bytes(), Unit::Bytes, common.quiet);
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let report = shrinking.run(&args.out, replace, watch)?;
    drop(progress);
    notes(&report.warnings, common);
    let calibrated = match args.calibrate {
        Some(tokens) => Some(calibrate(&report, tokens as usize, common)?),
        None => None,
    };
    if common.json {
        let mut document = versioned(serde_json::to_value(&report))?;
        if let (Some(calibrated), Some(fields)) = (&calibrated, document.as_object_mut()) {
            let calibrated = serde_json::to_value(calibrated);
            fields.insert("calibrated".into(), calibrated.map_err(|e| Failure::Output(e.into()))?);
        }
        render::json(&document)?;
        return Ok(Outcome::Done);
    }
    let fitted = calibrated.as_ref().map(super::calibrate::summary).unwrap_or_default();
    render::out(&(summary(&report) + &fitted))?;
    Ok(Outcome::Done)
}

/// Fits the routers of what was written to text of its own experts.
fn calibrate(
    report: &ShrinkReport,
    tokens: usize,
    common: &Common,
) -> Result<CalibrateReport, Failure> {
    let options = CalibrateOptions {
        estimator: "auto".into(),
        prompts: None,
        prompt_tokens: None,
        self_text: tokens,
        train: None,
        seed: 0,
        interrupt: exit::interrupt().clone(),
    };
    let path = report.output.display().to_string();
    let calibration = Calibration::prepare(&path, options)?;
    let made = calibration.run(Some("after shrink"), None, &Bars::new(common))?;
    notes(&made.warnings, common);
    Ok(made)
}

fn summary(report: &ShrinkReport) -> String {
    let [before, after] = report.experts;
    let mut text = format!(
        "{}  {after} of {before} experts, {} per token; {}, {:.1} s\n  layer   lost  experts\n",
        report.output.display(),
        report.experts_per_token,
        bytes(report.bytes),
        report.seconds,
    );
    for layer in &report.layers {
        let group = |g: &Vec<usize>| g.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
        let groups: Vec<String> = layer.groups.iter().map(group).collect();
        let loss = 100.0 * layer.loss;
        text += &format!("  {:5}  {loss:4.1} %  {}\n", layer.layer, groups.join("  "));
    }
    text
}
