//! `extract-lora BASE TUNED`: the difference of two models as an adapter.

use std::collections::BTreeMap;

use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Replace};
use moe_merge_merge::extract::{ExtractOptions, ExtractReport, Extraction, Filter, Packing, Scale};

use super::build::{notes, versioned};
use crate::args::{AdapterPacking, Common, ExtractLoraArgs, FloatDtype};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Writes the adapter and tells what it keeps.
pub fn run(args: &ExtractLoraArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    let options = ExtractOptions {
        rank: args.rank,
        threshold: args.threshold,
        energy: args.energy,
        expert: args.expert.clone(),
        embed_lora: args.embed_lora,
        skip_undecomposable: args.skip_undecomposable,
        filter: Filter::new(&args.include, &args.exclude)?,
        scale: if args.no_distribute_scale { Scale::A } else { Scale::Both },
        packing: match args.packing {
            AdapterPacking::Modules => Packing::Modules,
            AdapterPacking::Fused => Packing::Fused,
        },
        dtype: dtype(args.dtype),
        base_name: args.base.clone(),
    };
    let base = super::open(&args.base, common)?;
    let tuned = super::open(&args.tuned, common)?;
    let extraction = Extraction::prepare(&base, &tuned, options)?;
    let progress = Progress::new(extraction.numbers(), Unit::Numbers, common.quiet);
    progress.doing(&args.out.display().to_string());
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let report = extraction.run(&args.out, replace, watch)?;
    drop(progress);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

/// The dtype that was chosen.
pub fn dtype(dtype: FloatDtype) -> Dtype {
    match dtype {
        FloatDtype::Float32 => Dtype::F32,
        FloatDtype::Bfloat16 => Dtype::BF16,
        FloatDtype::Float16 => Dtype::F16,
    }
}

/// What stands in a line of the table: modules of one name, over all layers.
#[derive(Default)]
struct Line {
    modules: usize,
    ranks: (usize, usize),
    sum: f64,
    worst: Option<(f64, String)>,
}

fn summary(report: &ExtractReport) -> String {
    let mut lines: BTreeMap<&str, Line> = BTreeMap::new();
    for m in &report.modules {
        let name = m.module.rsplit('.').next().unwrap_or(&m.module);
        let line = lines.entry(name).or_default();
        let (least, most) = line.ranks;
        let least = if line.modules == 0 { m.rank } else { least.min(m.rank) };
        line.ranks = (least, most.max(m.rank));
        line.modules += 1;
        line.sum += m.energy_kept;
        if line.worst.as_ref().is_none_or(|(kept, _)| m.energy_kept < *kept) {
            line.worst = Some((m.energy_kept, m.module.clone()));
        }
    }
    let mut text = format!(
        "{}  rank {}, {:.1} % of the change kept; {}, {:.1} s\n",
        report.output.display(),
        report.rank,
        100.0 * report.energy_kept,
        bytes(report.bytes),
        report.seconds,
    );
    let width = lines.keys().map(|n| n.len()).max().unwrap_or(0).max(6);
    if !lines.is_empty() {
        text += &format!("  {:width$}  number   rank   kept  least, and where\n", "module");
    }
    for (name, line) in &lines {
        let (least, most) = line.ranks;
        let ranks = if least == most { most.to_string() } else { format!("{least}-{most}") };
        let (kept, at) = line.worst.clone().unwrap_or_default();
        text += &format!(
            "  {name:width$}  {:6}  {ranks:>5}  {:5.1}  {:.1} in {at}\n",
            line.modules,
            100.0 * line.sum / line.modules as f64,
            100.0 * kept,
        );
    }
    for (what, number) in [
        ("stored whole", report.saved.len()),
        ("changed and left out", report.left_out.len()),
        ("unchanged", report.unchanged),
    ] {
        if number > 0 {
            text += &format!("  {what}: {number} modules\n");
        }
    }
    text
}
