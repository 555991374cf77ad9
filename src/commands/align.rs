//! `align PATH`: experts of a MoE, fitted to the attention they have there.

use moe_merge_adapt::Moe;
use moe_merge_merge::align::{AlignOptions, AlignReport, Alignment, ExistingReport};
use moe_merge_merge::recipe::{Align, AlignMethod};
use serde_json::json;

use super::approve::proposal_summary;
use super::build::{Bars, align_table, notes, versioned};
use crate::args::{self, AlignArgs, Common};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, bytes, count};

/// Makes the next generation, or tells what would be done.
pub fn run(args: &AlignArgs, common: &Common) -> Result<Outcome, Failure> {
    let method = match args.method {
        args::AlignMethod::Refit => AlignMethod::Refit,
        args::AlignMethod::Distil => AlignMethod::Distil,
        args::AlignMethod::Joint => AlignMethod::Joint,
    };
    let options = AlignOptions {
        teachers: args.teachers.clone(),
        base: args.base.clone(),
        align: Align {
            method,
            tokens: args.tokens as usize,
            self_text: !args.no_self_text,
            steps: args.steps as usize,
            rank: args.rank.map(|r| r as usize),
            stream: args.stream,
            state: args.state.clone(),
            ..Align::default()
        },
        data: args.data.clone(),
        prompts: args.prompts.clone(),
        seed: args.seed,
        interrupt: exit::interrupt().clone(),
    };
    // Opened first: if the model is changed while it is read, approval is refused.
    let moe = args.stage.then(|| Moe::open(&args.path)).transpose()?;
    let alignment = Alignment::prepare(&args.path, options)?;
    if args.dry_run {
        return plan(&alignment, args, common);
    }
    if let Some(moe) = &moe {
        return stage(moe, &alignment, args, common);
    }
    let report = alignment.run(args.message.as_deref(), args.out.as_deref(), &Bars::new(common))?;
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

/// Lets the fitted experts wait for approval.
fn stage(
    moe: &Moe,
    alignment: &Alignment,
    args: &AlignArgs,
    common: &Common,
) -> Result<Outcome, Failure> {
    let aligned = alignment.fitted(&Bars::new(common))?;
    notes(&aligned.notes, common);
    if aligned.tensors.is_empty() {
        notes(&["nothing was staged: fitting made no expert better".to_owned()], common);
        return Ok(Outcome::Done);
    }
    let change = aligned.change(args.message.as_deref(), moe.generation());
    let report = moe_merge_adapt::propose(moe, &change, exit::interrupt(), &|_| {})?;
    notes(&report.warnings, common);
    let (method, experts, joint) =
        (alignment.method().name(), aligned.experts.clone(), aligned.joint.clone());
    match common.json {
        true => {
            let mut told = versioned(serde_json::to_value(&report))?;
            told["experts"] = json!(experts);
            told["joint"] = json!(joint);
            render::json(&told)?;
        }
        false => {
            let table = align_table(&AlignReport { method, experts, joint });
            render::out(&(proposal_summary(&report) + &table))?;
        }
    }
    Ok(Outcome::Done)
}

fn plan(alignment: &Alignment, args: &AlignArgs, common: &Common) -> Result<Outcome, Failure> {
    notes(alignment.notes(), common);
    let (method, output) =
        (alignment.method().name(), args.out.as_ref().unwrap_or(&alignment.source().path));
    if common.json {
        let experts = alignment.teachers().map(|(name, teacher)| json!([name, teacher]));
        render::json(&json!({
            "version": 1,
            "output": output,
            "method": method,
            "teachers": experts.collect::<Vec<_>>(),
            "tokens": args.tokens,
            "memory": alignment.memory(),
            "warnings": alignment.notes(),
        }))?;
        return Ok(Outcome::Done);
    }
    let experts: Vec<String> =
        alignment.teachers().map(|(name, teacher)| format!("{name} to {teacher}")).collect();
    render::out(&format!(
        "{}  `{method}`: {}; {} tokens for each, up to {} of memory; nothing was written\n",
        output.display(),
        experts.join(", "),
        count(args.tokens as usize),
        bytes(alignment.memory()),
    ))?;
    Ok(Outcome::Done)
}

fn summary(report: &ExistingReport) -> String {
    let (method, experts, joint) = (report.method, report.experts.clone(), report.joint.clone());
    format!(
        "{}  generation {}: {} written in {:.1} s\n{}",
        report.output.display(),
        report.generation,
        bytes(report.bytes_written),
        report.seconds,
        align_table(&AlignReport { method, experts, joint })
    )
}
