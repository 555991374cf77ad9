//! `finetune PATH`: one expert learns from text.

use moe_merge_adapt::finetune::{
    Finetune, FinetuneOptions, FinetuneReport, Optimiser, Output, Packing, Progress, Schedule,
    Training, Update, Watcher,
};
use moe_merge_model::expert_training::{Part, Route};

use super::build::{table, versioned};
use crate::args::{self, Common, FinetuneArgs};
use crate::exit::{self, Outcome};
use crate::progress::{Progress as Bar, Unit};
use crate::render::{self, Failure, bytes, count};

/// Trains, and writes an adapter or a generation.
pub fn run(args: &FinetuneArgs, common: &Common) -> Result<Outcome, Failure> {
    let options = FinetuneOptions {
        placement: super::device::find(common)?,
        fall_back: common.device == args::Device::Auto,
        ..options(args)
    };
    let tuning = Finetune::prepare(&args.path, options)?;
    let output = match &args.out {
        Some(dir) => Output::Adapter {
            dir: dir.clone(),
            packing: match args.packing {
                args::Packing::Modules => Packing::Modules,
                args::Packing::Fused => Packing::Fused,
            },
        },
        None if args.stage => Output::Stage { message: args.message.clone() },
        None => Output::Apply { message: args.message.clone() },
    };
    let report = tuning.run(&output, &mut Shown { quiet: common.quiet, bar: None })?;
    if !common.quiet && !common.json {
        report.warnings.iter().for_each(|w| render::note(w));
        data_notes(&report).iter().for_each(|n| render::note(n));
    }
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&report))?)?,
        false => render::out(&summary(&report))?,
    }
    Ok(Outcome::Done)
}

fn options(args: &FinetuneArgs) -> FinetuneOptions {
    let part = |t: &args::Target| match t {
        args::Target::Gate => Part::Gate,
        args::Target::Up => Part::Up,
        args::Target::Down => Part::Down,
    };
    let router = args.train_router.then_some(Part::Router);
    let alpha = args.alpha.unwrap_or(2.0 * args.rank as f64);
    FinetuneOptions {
        expert: args.expert.clone(),
        data: args.data.clone(),
        validation: args.validation.clone(),
        hold_out: args.hold_out,
        evaluation: args.evaluation.iter().map(|n| (n.0.clone(), n.1.clone())).collect(),
        evaluation_tokens: args.eval_tokens,
        update: match args.full {
            true => Update::Full,
            false => Update::LowRank { rank: args.rank, alpha, rslora: args.rslora },
        },
        parts: args.targets.iter().map(part).chain(router).collect(),
        layers: args.layers.map(|l| l.0..l.1),
        route: match args.route {
            args::Route::Natural => Route::Natural,
            args::Route::Forced => Route::Forced,
            args::Route::Always => Route::Always,
        },
        teacher: args.teacher.clone(),
        window: args.window,
        exec: args.accuracy.exec(),
        keep: args.keep,
        keep_data: args.keep_data.clone(),
        keep_text: args.keep_text,
        router_penalty: args.router_penalty.unwrap_or(100.0),
        training: training(args),
        state: args.state.clone(),
        resume: args.resume,
        log: args.log.clone(),
        plot: args.plot.clone(),
        interrupt: exit::interrupt().clone(),
        ..FinetuneOptions::default()
    }
}

fn training(args: &FinetuneArgs) -> Training {
    Training {
        epochs: args.epochs,
        steps: args.steps,
        optimiser: match args.optimiser {
            args::Optimiser::Adamw => Optimiser::AdamW { weight_decay: args.weight_decay },
            args::Optimiser::Sgd => Optimiser::Sgd,
        },
        learning_rate: args.learning_rate,
        schedule: match args.schedule {
            args::Schedule::Cosine => Schedule::Cosine,
            args::Schedule::Linear => Schedule::Linear,
            args::Schedule::Constant => Schedule::Constant,
        },
        warmup: args.warmup,
        clip: args.clip,
        batch_tokens: args.batch_tokens,
        accumulate: args.accumulate,
        evaluate_every: args.evaluate_every,
        patience: args.patience,
        dropout: args.dropout,
        seed: args.seed,
    }
}

/// A bar on a terminal.
struct Shown {
    quiet: bool,
    bar: Option<Bar>,
}

impl Watcher for Shown {
    fn stage(&mut self, what: &str) {
        let bar = Bar::new(0, Unit::Steps, self.quiet);
        bar.doing(what);
        self.bar = Some(bar);
    }

    fn progress(&mut self, progress: &Progress<'_>) {
        let Some(bar) = &self.bar else { return };
        bar.set(progress.done, progress.steps);
        if let Some(step) = progress.step {
            bar.doing(&format!("loss {:.3}  {:.0} tokens/s", step.loss, step.tokens_per_second));
        }
    }
}

/// What was left out of the data.
fn data_notes(report: &FinetuneReport) -> Vec<String> {
    let data = &report.data;
    let mut notes = Vec::new();
    if data.bad > 0 {
        let told = data.bad_lines.join("\n      ");
        let more = data.bad - data.bad_lines.len();
        let more = if more > 0 { format!("\n      and {more} more") } else { String::new() };
        notes.push(format!("{} lines or rows are no documents:\n      {told}{more}", data.bad));
    }
    for (number, what) in [
        (data.empty, "documents are empty"),
        (data.cut, "documents are longer than the window: their ends are left out (`--window`)"),
        (data.unanswered, "documents have no answer within the window and are left out"),
    ] {
        if number > 0 {
            notes.push(format!("{} {what}", count(number)));
        }
    }
    notes
}

fn summary(report: &FinetuneReport) -> String {
    let what = match &report.expert {
        Some(expert) => format!("expert `{expert}`"),
        None => "the MLPs".into(),
    };
    let output = report.output.display();
    let place = match (report.generation, report.staged) {
        (Some(generation), _) => format!("{output}  generation {generation}"),
        (None, Some(staged)) => format!("{output}  generation {staged} waits for `approve`"),
        (None, None) => output.to_string(),
    };
    let mut text = format!(
        "{place}: {what}, {} layers, {} numbers; {} written\n",
        report.layers.len(),
        count(report.parameters),
        bytes(report.bytes_written),
    );
    let held = report.validation.map_or(String::new(), |[before, after]| {
        format!(", loss on held-out text {before:.4} -> {after:.4}")
    });
    text += &format!(
        "{} steps, factors of step {}, {} tokens of {} documents, {:.0} % of them through the expert{held}; {:.0} tokens/s, {:.1} s\n",
        report.steps,
        report.best_step,
        count(report.tokens as usize),
        count(report.data.documents),
        100.0 * report.coverage,
        report.tokens_per_second,
        report.seconds,
    );
    if !report.domains.is_empty() {
        let rows = report.domains.iter().map(|d| {
            let change = 100.0 * (d.after / d.before - 1.0);
            let mut cells = vec![
                count(d.tokens),
                format!("{:.3}", d.before),
                format!("{:.3}", d.after),
                format!("{change:+.2} %"),
            ];
            let share = |[before, after]: [f64; 2]| {
                format!("{:.1} % -> {:.1} %", 100.0 * before, 100.0 * after)
            };
            if report.expert.is_some() {
                cells.push(d.visits.map_or("-".into(), share));
            }
            (d.name.clone(), cells)
        });
        let mut heads = vec!["tokens", "before", "after", "change"];
        if report.expert.is_some() {
            heads.push("visit the expert");
        }
        text += "\nperplexity of each domain\n";
        text += &table(&heads, rows);
    }
    text
}
