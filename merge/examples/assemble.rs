//! Writes a MoE with made-up routers, for load checks and for tests that kill or starve the writer.
//!
//! `assemble FAMILY LAYOUT SHARED TARGET BASE EXPERT...` (`LAYOUT`: `hub` or `fused`; `SHARED`: how many of the experts, from
//! the front, are shared too). `SLOW_MS` in the environment waits that long after every chunk.

use std::error::Error;
use std::path::Path;

use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Interrupt, Replace, Source, SourceRef, Staging};
use moe_merge_merge::families::{Layout, OUTPUTS, SharedGate};
use moe_merge_merge::{Assembly, ExpertInput, Gates, Plan, Provenance, write};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [family, layout, shared, target, base, experts @ ..] = &args[..] else {
        return Err("usage: assemble FAMILY LAYOUT SHARED TARGET BASE EXPERT...".into());
    };
    let open = |path: &String| Source::open(&path.parse::<SourceRef>()?, Path::new("."));
    let expert = |path: &String| -> Result<ExpertInput, Box<dyn Error>> {
        Ok(ExpertInput {
            source: open(path)?,
            name: path.rsplit('/').next().unwrap_or(path).to_owned(),
            layers: None,
            noise_scale: 0.0,
            residual_scale: 1.0,
        })
    };
    let family = *OUTPUTS.iter().find(|f| f.name() == family).ok_or("unknown family")?;
    let shared: usize = shared.parse()?;
    let assembly = Assembly {
        base: open(base)?,
        experts: experts.iter().map(expert).collect::<Result<_, _>>()?,
        shared: experts[..shared].iter().map(expert).collect::<Result<_, _>>()?,
        shared_gate: match family.name() {
            "qwen2_moe" => SharedGate::Computed,
            _ => SharedGate::Absent,
        },
        top_k: 2,
        dtype: None,
        family,
        layout: if layout == "fused" { Layout::Fused } else { Layout::Hub },
        seed: 0,
    };
    let started = std::time::Instant::now();
    let plan = Plan::new(&assembly)?;
    let dims = plan.shape.dims;
    let row = |n: usize, l: usize| (0..n).map(|i| ((i * 31 + l * 17) as f32).sin()).collect();
    let gates = Gates {
        layers: (0..dims.layers).map(|l| row(plan.shape.experts * dims.hidden, l)).collect(),
        shared: Some((0..dims.layers).map(|l| row(dims.hidden, l)).collect()),
    };
    let staging = Staging::new(Path::new(target), Replace::Never)?;
    let wait = std::env::var("SLOW_MS").ok().and_then(|v| v.parse().ok()).unwrap_or(0);
    let progress = |_| {
        if wait > 0 {
            std::thread::sleep(std::time::Duration::from_millis(wait));
        }
    };
    let watch = Watch { interrupt: &Interrupt::default(), progress: &progress };
    let written = write(&assembly, &plan, &gates, &Provenance::default(), &staging, watch)?;
    let streamed = started.elapsed();
    staging.publish()?;
    plan.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    println!(
        "{} bytes, streamed in {:.3} s, on disk after {:.3} s",
        written.bytes,
        streamed.as_secs_f64(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
