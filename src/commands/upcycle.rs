//! `upcycle PATH --experts E`: a dense model as a MoE of its copies.

use moe_merge_checkpoint::Replace;
use moe_merge_checkpoint::write::Watch;
use moe_merge_merge::families;
use moe_merge_merge::upcycle::{UpcycleOptions, Upcycling};

use super::build::{notes, versioned};
use super::extract_lora::dtype;
use crate::args::{Common, Layout, UpcycleArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, bytes};

/// Writes the MoE.
pub fn run(args: &UpcycleArgs, common: &Common) -> Result<Outcome, Failure> {
    let replace = if args.force { Replace::Force } else { Replace::Never };
    let options = UpcycleOptions {
        experts: args.experts,
        top_k: args.top_k,
        noise: args.noise,
        reinit: args.reinit,
        keep_first: args.keep_first,
        router_scale: args.router_scale,
        architecture: args.architecture.clone(),
        dtype: args.dtype.map(dtype),
        layout: match args.layout {
            Layout::Hub => families::Layout::Hub,
            Layout::Fused => families::Layout::Fused,
        },
        seed: args.seed,
    };
    let source = super::open(&args.path, common)?;
    let upcycling = Upcycling::prepare(&source, options)?;
    let progress = Progress::new(upcycling.bytes(), Unit::Bytes, common.quiet);
    let watch = Watch { interrupt: exit::interrupt(), progress: &|n| progress.advance(n) };
    let report = upcycling.run(&args.out, replace, watch)?;
    drop(progress);
    notes(&report.warnings, common);
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&format!(
            "{}  {} of {} experts, {} per token, {} neurons of each drawn anew; {}, {:.1} s\n",
            report.output.display(),
            report.family,
            report.experts,
            report.experts_per_token,
            report.neurons_drawn,
            bytes(report.bytes),
            report.seconds,
        ))?,
    }
    Ok(Outcome::Done)
}
