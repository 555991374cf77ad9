//! `RECIPE.yaml`: the main job.

use std::sync::Mutex;

use moe_merge_checkpoint::publish::{Replace, Unfinished};
use moe_merge_merge::MergeError;
use moe_merge_merge::align::{AlignReport, Survival};
use moe_merge_merge::build::{
    BuildOptions, BuildReport, DenseReport, Observer, Prepared, PreparedDense, RecipeText, Stage,
};
use moe_merge_merge::calibrate::RoutingReport;
use moe_merge_merge::evaluate::Evaluation;
use moe_merge_merge::families::Layout;
use moe_merge_merge::recipe::{self, Recipe};
use serde_json::json;

use crate::args::{self, BuildArgs, Common, MergekitArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure};

/// Builds what the recipe says, or shows what would be built.
pub fn run(args: &BuildArgs, flags: &MergekitArgs, common: &Common) -> Result<Outcome, Failure> {
    let text = recipe::read(&args.recipe)?;
    let text = RecipeText { path: &args.recipe, text: &text };
    let options = BuildOptions {
        out: args.output().cloned(),
        replace: if args.force { Replace::Force } else { Replace::Never },
        unfinished: if args.no_resume { Unfinished::Remove } else { Unfinished::TakeUp },
        layout: match args.layout {
            args::Layout::Hub => Layout::Hub,
            args::Layout::Fused => Layout::Fused,
        },
        interrupt: exit::interrupt().clone(),
        placement: super::device::find(common)?,
        shard_limit: flags.shard_size,
    };
    notes(&flags.notes, common);
    match recipe::parse_seeded(text.text, text.path, flags.seed).map_err(MergeError::from)? {
        Recipe::Moe(recipe) => {
            let prepared = Prepared::new(&recipe, text, options)?;
            if args.dry_run {
                return plan(&prepared, common);
            }
            let report = prepared.build(&Bars::new(common))?;
            notes(&report.warnings, common);
            match common.json {
                true => render::json(&moe_json(&report)?)?,
                false => render::out(&summary(&report))?,
            }
        }
        Recipe::Dense(recipe) => {
            let prepared = PreparedDense::new(&recipe, text, options)?;
            if args.dry_run {
                return dense_plan(&prepared, common);
            }
            let report = prepared.build(&Bars::new(common))?;
            notes(&report.warnings, common);
            match common.json {
                true => render::json(&dense_json(&report)?)?,
                false => render::out(&dense_summary(&report))?,
            }
        }
    }
    Ok(Outcome::Done)
}

/// Notes on stderr.
pub(super) fn notes(warnings: &[String], common: &Common) {
    if !common.quiet {
        warnings.iter().for_each(|w| render::note(w));
    }
}

/// A bar for each stage, one after the other.
pub(super) struct Bars {
    bar: Mutex<Option<Progress>>,
    /// What the stages are about.
    subject: Mutex<String>,
    quiet: bool,
}

impl Bars {
    /// Bars that show nothing if the user wants none.
    pub fn new(common: &Common) -> Self {
        Self {
            bar: Mutex::new(None),
            subject: Mutex::default(),
            quiet: common.quiet || common.json,
        }
    }
}

impl Observer for Bars {
    fn stage(&self, stage: Stage, total: u64) {
        let (unit, what) = match stage {
            Stage::SelfText => (Unit::Tokens, "experts write text"),
            Stage::Fit => (Unit::Steps, "fitting weights"),
            Stage::Align => (Unit::Layers, "fitting an expert"),
            Stage::Distil => (Unit::Steps, "distilling an expert"),
            Stage::Gates => (Unit::Layers, "computing routers"),
            Stage::Train => (Unit::Steps, "training routers"),
            Stage::Write => (Unit::Bytes, "writing"),
            Stage::Evaluate => (Unit::Tokens, "scoring evaluation text"),
        };
        let bar = Progress::new(total, unit, self.quiet);
        let subject = self.subject.lock().unwrap_or_else(|e| e.into_inner());
        match subject.is_empty() {
            true => bar.doing(what),
            false => bar.doing(&format!("{what}: {subject}")),
        }
        *self.bar.lock().unwrap_or_else(|e| e.into_inner()) = Some(bar);
    }

    fn advance(&self, units: u64) {
        if let Some(bar) = self.bar.lock().unwrap_or_else(|e| e.into_inner()).as_ref() {
            bar.advance(units);
        }
    }

    fn subject(&self, what: &str) {
        what.clone_into(&mut self.subject.lock().unwrap_or_else(|e| e.into_inner()));
    }
}

fn plan(prepared: &Prepared, common: &Common) -> Result<Outcome, Failure> {
    let (plan, assembly) = (prepared.plan(), prepared.assembly());
    notes(&plan.warnings, common);
    if common.json {
        let tensors: Vec<_> = plan
            .tensors
            .iter()
            .map(|t| {
                json!({
                    "name": t.name, "shape": t.shape, "dtype": t.dtype.to_string(),
                    "file": t.role.stem(), "from": t.from, "bytes": t.size(),
                })
            })
            .collect();
        render::json(&json!({
            "version": 1,
            "output": prepared.target(),
            "family": assembly.family.name(),
            "experts": assembly.experts.iter().map(|e| &e.name).collect::<Vec<_>>(),
            "experts_per_token": assembly.top_k,
            "disk_bytes": plan.disk_bytes,
            "peak_memory_bytes": prepared.peak_memory(),
            "prompt_tokens": prepared.prompt_tokens(),
            "self_text_tokens": prepared.self_text_tokens(),
            "tensors": tensors,
            "warnings": plan.warnings,
        }))?;
        return Ok(Outcome::Done);
    }
    let mut text = format!(
        "{}  {}, {} experts, top-{}, {}\n\nfile                    tensors      bytes  from\n",
        prepared.target().display(),
        assembly.family.name(),
        assembly.experts.len(),
        assembly.top_k,
        plan.dtype,
    );
    for group in plan.tensors.chunk_by(|a, b| a.role == b.role) {
        let mut from: Vec<&str> = group.iter().map(|t| t.from.as_str()).collect();
        from.sort_unstable();
        from.dedup();
        let bytes: u64 = group.iter().map(|t| t.size()).sum();
        text += &format!(
            "{:22}  {:>7}  {:>9}  {}\n",
            group[0].role.stem(),
            group.len(),
            render::bytes(bytes),
            from.join(", ")
        );
    }
    text += &format!(
        "\ndisk {}, peak memory about {}, {} prompt tokens{}; nothing was written\n",
        render::bytes(plan.disk_bytes),
        render::bytes(prepared.peak_memory()),
        render::count(prepared.prompt_tokens()),
        match prepared.self_text_tokens() {
            0 => String::new(),
            tokens => format!(", {} more that the experts write", render::count(tokens)),
        },
    );
    render::out(&text)?;
    Ok(Outcome::Done)
}

fn dense_plan(prepared: &PreparedDense, common: &Common) -> Result<Outcome, Failure> {
    notes(prepared.notes(), common);
    let fitting = prepared.fitting_memory()?;
    match common.json {
        true => {
            let (output, disk) = (&prepared.target, prepared.bytes);
            let plan = json!({"version": 1, "output": output, "disk_bytes": disk,
                "fitting_memory_bytes": fitting});
            render::json(&plan)?;
        }
        false => {
            let fitting = fitting.map_or(String::new(), |bytes| {
                format!(", fitting takes {} of memory", render::bytes(bytes))
            });
            render::out(&format!(
                "{}  dense merge, {}{fitting}; nothing was written\n",
                prepared.target.display(),
                render::bytes(prepared.bytes)
            ))?;
        }
    }
    Ok(Outcome::Done)
}

/// What was built, for a person.
fn summary(report: &BuildReport) -> String {
    let s = &report.seconds;
    let mut text = format!(
        "{}  {}, {} experts, top-{}, {} in {:.1} s (open {:.1}, {}routers {:.1}, write {:.1}, evaluate {:.1})\n",
        report.output.display(),
        report.family,
        report.experts.len(),
        report.experts_per_token,
        render::bytes(report.bytes),
        s.open + s.align + s.gates + s.write + s.evaluate,
        s.open,
        report.align.as_ref().map_or(String::new(), |_| format!("fitting {:.1}, ", s.align)),
        s.gates,
        s.write,
        s.evaluate,
    );
    if report.self_text_tokens > 0 {
        text += &format!("the experts wrote {} tokens\n", render::count(report.self_text_tokens));
    }
    if let Some(align) = &report.align {
        text += &align_table(align);
    }
    if let Some(forecast) = &report.forecast {
        text += &forecast_table(forecast, &report.experts, report.experts_per_token);
    }
    if let Some(evaluation) = &report.evaluation {
        text += &evaluation_tables(evaluation, &report.experts);
    }
    text
}

/// What of each expert survives behind the base's attention.
pub(super) fn align_table(align: &AlignReport) -> String {
    let evaluated = align.experts.iter().any(|e| e.evaluation.is_some());
    let mut columns = vec!["layers", "tokens", "nats off", "fitted", "survives", "fitted"];
    if evaluated {
        columns.extend(["on evaluation text", "fitted"]);
    }
    let rows = align.experts.iter().map(|e| {
        let mut cells = vec![e.layers.to_string(), render::count(e.tokens)];
        let both =
            |s: Option<Survival>| [percent(s.map(|s| s.before)), percent(s.map(|s| s.after))];
        cells.extend(e.divergence.map(|nats| format!("{nats:.4}")));
        cells.extend(both(e.own_text));
        if evaluated {
            cells.extend(both(e.evaluation));
        }
        (e.name.clone(), cells)
    });
    let mut text = format!("\nexperts fitted to the attention they get (`{}`)\n", align.method);
    text += &table(&columns, rows);
    text += "  nats off: divergence from the dense model's predictions, for each token of its text that was held out\n  survives: share of its gain over the base that is left\n";
    if let Some(joint) = &align.joint {
        let rows = joint
            .experts
            .iter()
            .map(|e| (e.name.clone(), e.divergence.map(|nats| format!("{nats:.4}")).to_vec()));
        text += &format!(
            "\nexperts and routers together, {} steps, best after {}\n",
            joint.steps, joint.best_step
        );
        text += &table(&["nats off", "trained"], rows);
        text += "  nats off: the same for the whole mixture, behind its routers\n";
    }
    text
}

/// How well routers did on prompts that they had not seen.
pub(super) fn forecast_table(
    forecast: &RoutingReport,
    experts: &[String],
    experts_per_token: usize,
) -> String {
    let rows = experts.iter().zip(&forecast.experts).map(|(name, e)| {
        let rival = e.rival.map_or("-".into(), |r| experts[r.other].clone());
        let cells = [percent(e.accuracy), percent(e.coverage), percent(Some(e.load)), rival];
        (name.clone(), cells.to_vec())
    });
    let mut text = "\nrouter, on prompts it had not seen\n".to_owned();
    let top_k = format!("in its top-{experts_per_token}");
    text += &table(&["own tokens first", &top_k, "load", "nearest rival"], rows);
    if !forecast.chance_layers.is_empty() {
        text += &format!("  no better than chance: layers {:?}\n", forecast.chance_layers);
    }
    for pair in &forecast.indistinguishable {
        let (a, b) = (&experts[pair.expert], &experts[pair.other]);
        text += &format!("  `{a}` and `{b}` cannot be told apart by their prompts\n");
    }
    text
}

fn evaluation_tables(evaluation: &Evaluation, experts: &[String]) -> String {
    let rows = evaluation.routing.iter().map(|row| {
        (row.domain.clone(), row.first.iter().map(|&share| percent(Some(share))).collect())
    });
    let columns: Vec<&str> = experts.iter().map(String::as_str).collect();
    let mut text = "\nrouting of held-out text: share of tokens whose first choice is the expert, mean over layers\n".to_owned();
    text += &table(&columns, rows);
    let domains: Vec<&str> = evaluation.domains.iter().map(String::as_str).collect();
    let rows = evaluation.models.iter().map(|model| {
        (model.name.clone(), model.perplexity.iter().map(|p| format!("{p:.3}")).collect())
    });
    let recovered: Vec<Option<f64>> = (0..domains.len()).map(|d| evaluation.recovered(d)).collect();
    let any = recovered.iter().any(Option::is_some);
    let last = any
        .then(|| ("recovered".to_owned(), recovered.into_iter().map(percent).collect::<Vec<_>>()));
    text += &format!("\nperplexity of held-out text, windows of {} tokens\n", evaluation.window);
    text += &table(&domains, rows.chain(last));
    if any {
        text += "  recovered: share of what the expert of that name gains over the base\n";
    }
    text
}

/// Columns to the right of row names, aligned.
pub(super) fn table(columns: &[&str], rows: impl Iterator<Item = (String, Vec<String>)>) -> String {
    let rows: Vec<_> = rows.collect();
    let width = |text: &str| text.chars().count();
    let first = rows.iter().map(|(name, _)| width(name)).max().unwrap_or(0);
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(i, c)| rows.iter().map(|(_, r)| width(&r[i])).chain([width(c)]).max().unwrap_or(0))
        .collect();
    let line = |name: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells.zip(&widths).map(|(cell, w)| format!("  {cell:>w$}")).collect();
        format!("  {name:first$}{cells}\n")
    };
    let mut text = line("", &mut columns.iter().copied());
    for (name, cells) in &rows {
        text += &line(name, &mut cells.iter().map(String::as_str));
    }
    text
}

pub(super) fn percent(share: Option<f64>) -> String {
    // Adding zero turns -0 into 0.
    share.map_or("-".into(), |s| format!("{:.0} %", (100.0 * s).round() + 0.0))
}

fn dense_summary(report: &DenseReport) -> String {
    let mut text = format!(
        "{}  {}, {} in {:.1} s\n",
        report.output.display(),
        report.method,
        render::bytes(report.bytes),
        report.seconds
    );
    for own in &report.texts {
        let written = match own.written {
            0 => String::new(),
            tokens => format!(", {} of them written by itself", render::count(tokens)),
        };
        text +=
            &format!("  text of {}: {} tokens{written}\n", own.model, render::count(own.tokens));
    }
    text
}

/// A report as a document with `version`.
pub(super) fn versioned(
    report: serde_json::Result<serde_json::Value>,
) -> Result<serde_json::Value, Failure> {
    let report = report.map_err(|e| Failure::Output(e.into()))?;
    let mut document = json!({"version": 1});
    if let (Some(document), serde_json::Value::Object(fields)) = (document.as_object_mut(), report)
    {
        document.extend(fields);
    }
    Ok(document)
}

fn moe_json(report: &BuildReport) -> Result<serde_json::Value, Failure> {
    versioned(serde_json::to_value(report))
}

fn dense_json(report: &DenseReport) -> Result<serde_json::Value, Failure> {
    versioned(serde_json::to_value(report))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [("a", ["1.5", "22 %"]), ("long", ["10.25", "-"])];
        let rows = rows.map(|(n, r)| (n.to_owned(), r.map(str::to_owned).to_vec()));
        let text = table(&["x", "share"], rows.into_iter());
        assert_eq!(text, "            x  share\n  a       1.5   22 %\n  long  10.25      -\n");
    }
}
