//! `shrink PATH --experts N`: several experts merged into one.

use moe_merge_checkpoint::Replace;
use moe_merge_checkpoint::write::Watch;
use moe_merge_merge::shrink::{ShrinkReport, Shrinking, usage};
use moe_merge_model::Spec;

use super::build::{notes, versioned};
use super::device;
use crate::args::{Common, ShrinkArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Writes the smaller model and tells which experts became one.
pub fn run(args: &ShrinkArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
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
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
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
