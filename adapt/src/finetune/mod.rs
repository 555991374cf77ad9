//! Fine-tune one expert of a MoE, or the MLPs of a dense model, and leave everything else as it is.
//!
//! Text is read while it is needed, sequences of any length are packed without padding, and gradients go into low-rank
//! factors beside gate, up and down of the expert ([`moe_merge_model::expert_training`]). What comes out is a PEFT adapter,
//! or the next generation of the model's folder with the factors merged into that expert's weights, rounded once.
//!
//! ```no_run
//! use moe_merge_adapt::finetune::*;
//! use moe_merge_checkpoint::Interrupt;
//!
//! let options = FinetuneOptions {
//!     expert: Some("math".into()),
//!     data: vec!["lessons.jsonl".into()],
//!     ..FinetuneOptions::default()
//! };
//! let tuning = Finetune::prepare("models/moe", options)?;
//! let output = Output::Adapter { dir: "math-adapter".into(), packing: Packing::Modules };
//! let report = tuning.run(&output, &mut Silent)?;
//! println!("{} steps", report.steps);
//! # Ok::<(), FinetuneError>(())
//! ```

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::{CheckpointError, Explain, Kind, Source, SourceRef};
use moe_merge_kernels::{Accuracy, Exec};
use moe_merge_merge::documents::{Encoder, expert_names};
use moe_merge_model::expert_training::{FactorKind, FactorPlan, Goal, Lesson, Route, Trainee};
use moe_merge_model::{ModelError, Spec};
use serde::Serialize;
use serde_json::{Value, json};

mod adapter;
mod batches;
mod data;
mod domains;
mod error;
mod known;
mod options;
mod output;
mod parquet;
mod record;
mod state;
mod teacher;
mod train;
mod trained;

pub use adapter::Packing;
pub use data::DataReport;
pub use domains::DomainReport;
pub use error::FinetuneError;
pub use moe_merge_model::expert_training::optimise::{Optimiser, Schedule};
pub use options::{FinetuneOptions, Output, Update};
pub use state::{EvaluationRecord, StepRecord};
pub use train::{Progress, Stopped, Training, Watcher};

use data::Corpus;
use train::Run;

/// Nobody watches.
pub struct Silent;

impl Watcher for Silent {
    fn stage(&mut self, _: &str) {}
    fn progress(&mut self, _: &Progress<'_>) {}
}

/// A model whose expert is to be trained, and the text, opened and checked.
#[derive(Debug)]
pub struct Finetune {
    source: Source,
    spec: Spec,
    /// As a person wrote the model's path.
    path: String,
    /// Whether an adapter is on top of it.
    adapted: bool,
    /// Number and name of the expert, in a MoE.
    expert: Option<(usize, String)>,
    names: Vec<String>,
    window: usize,
    plan: FactorPlan,
    options: FinetuneOptions,
    /// The generation that was read.
    generation: u32,
}

/// What a fine-tuning did.
#[derive(Debug, Clone, Serialize)]
pub struct FinetuneReport {
    /// Adapter folder, or the model's own.
    pub output: PathBuf,
    /// The model's generation now, where it was changed.
    pub generation: Option<u32>,
    /// The generation that waits for approval, where it was staged.
    pub staged: Option<u32>,
    /// `model_type` of the model.
    pub family: String,
    /// Name of the expert; none in a dense model.
    pub expert: Option<String>,
    /// Layers with factors.
    pub layers: Vec<usize>,
    /// Numbers that were trained.
    pub parameters: usize,
    /// Steps made, those of earlier runs included.
    pub steps: u64,
    /// The step that the result is from.
    pub best_step: u64,
    /// Why it ended.
    pub stopped: Stopped,
    /// Tokens that went through the model in training.
    pub tokens: u64,
    /// Tokens per second, median over steps.
    pub tokens_per_second: f64,
    /// Loss of the first and of the last step.
    pub loss: [f64; 2],
    /// Loss on held-out text before the first step and at the best, in nats per token.
    pub validation: Option<[f64; 2]>,
    /// Share of the tokens that visited the expert, mean over layers and steps.
    pub coverage: f64,
    /// What the data are.
    pub data: DataReport,
    /// Perplexity of each domain before and after.
    pub domains: Vec<DomainReport>,
    /// Bytes written.
    pub bytes_written: u64,
    /// Seconds in all.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl Finetune {
    /// Opens the model and checks the options. Nothing is written.
    ///
    /// # Errors
    /// [`FinetuneError`]: no model, no such expert, options out of range.
    pub fn prepare(path: &str, options: FinetuneOptions) -> Result<Self, FinetuneError> {
        options.check()?;
        let reference: SourceRef = path.parse()?;
        // The generation comes first: if the model is changed while it is read, the change that follows is refused.
        let generation = Manifest::load(Path::new(path))?.map_or(0, |m| m.generation);
        let source = Source::open(&reference, Path::new("."))?;
        let spec = Spec::of(&source)?;
        let experts = spec.moe_layers().map(|(_, moe)| moe.experts).min().unwrap_or(0);
        let names = if experts > 0 { expert_names(&source.path, experts)? } else { Vec::new() };
        let expert = find(&source.path, &names, options.expert.as_deref())?;
        let window = options.window_of(spec.max_positions)?;
        options.check_router(&spec)?;
        let layers = options.layers_of(&spec)?;
        let plan = FactorPlan {
            kind: match options.update {
                Update::LowRank { rank, .. } => FactorKind::LowRank(rank),
                Update::Full => FactorKind::Full,
            },
            scale: options.update.scale(),
            parts: options.parts.clone(),
            layers,
            seed: options.training.seed,
        };
        let (path, adapted) = (path.to_owned(), reference.lora.is_some());
        Ok(Self { source, spec, path, adapted, expert, names, window, plan, options, generation })
    }

    /// Name of the expert; none in a dense model.
    pub fn expert(&self) -> Option<&str> {
        self.expert.as_ref().map(|(_, name)| name.as_str())
    }

    fn number(&self) -> Option<usize> {
        self.expert.as_ref().map(|(number, _)| *number)
    }

    /// Trains, and writes what was learnt.
    ///
    /// # Errors
    /// [`FinetuneError`]; the model is then as before, and there is no adapter.
    pub fn run(
        &self,
        output: &Output,
        watcher: &mut dyn Watcher,
    ) -> Result<FinetuneReport, FinetuneError> {
        let clock = Instant::now();
        let place = self.place(output)?;
        let file = self.state_file(output);
        let encoder = Encoder::new(&self.source)?;
        watcher.stage("reading text");
        let interrupt = &self.options.interrupt;
        let corpus = Corpus::open(&self.options.data, &encoder, self.window, interrupt)?;
        let (documents, held_out) = self.split(&corpus, &encoder)?;
        let mut notes = Vec::new();
        let (route, exec) = (self.options.route, self.options.exec);
        let trainee = self.open(&self.source, self.number(), route, exec, &mut notes)?;
        let teacher = self.teacher(&mut notes)?;
        let begun = self.begun(&corpus)?;
        if let Some(file) = file.as_deref().filter(|_| !self.options.resume) {
            train::fresh(file)?;
        }
        let mut factors = trainee.factors(&self.plan);
        if factors.pairs.is_empty() {
            return Err(self.nothing_to_train());
        }
        let earlier = file.as_deref().filter(|f| f.exists());
        let earlier = earlier.map(|file| state::State::load(file, &begun)).transpose()?;
        if self.keep() > 0.0 && self.options.keep_data.is_empty() && self.options.keep_text > 0 {
            watcher.stage("experts write text");
        }
        let kept = self.kept(&encoder, &mut notes)?;
        kept.iter().for_each(|kept| kept.damping.begin(&mut factors));
        let state = earlier.unwrap_or_else(|| state::State::new(factors, begun));
        let penalty = self.penalty(&encoder, &trainee, &state.factors)?;
        let held = if kept.is_some() { self.keep() } else { 0.0 };
        let mut run = Run {
            trainee: &trainee,
            goal: teacher.as_ref().map_or(Goal::NextToken, Goal::Teacher),
            kept,
            penalty,
            corpus: &corpus,
            documents,
            held_out,
            options: &self.options.training,
            state,
            file,
            interrupt,
        };
        watcher.stage("training");
        let mut log = record::Log::open(self.options.log.as_deref(), &run.state)?;
        let stopped = run.go(&mut record::Recorder { log: &mut log, watcher })?;
        watcher.stage("comparing domains");
        let domains = self.domains(&encoder, &run.state.best, &mut notes)?;
        watcher.stage("writing");
        let mut report = self.report(&run.state, stopped, &corpus);
        let expert = self.expert();
        let suffered = expert.and_then(|name| domains::suffered(&domains, name, held));
        report.domains = domains;
        report.warnings.extend(notes);
        report.warnings.extend(suffered);
        report.warnings.extend(log.note());
        if let Some(plot) = &self.options.plot {
            record::plot(plot, &run.state)?;
        }
        self.write(place, &run.state, &mut report)?;
        if let Some(file) = &run.file {
            std::fs::remove_file(file).map_err(|e| CheckpointError::io("removing", file, e))?;
        }
        report.seconds = clock.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Where the state is kept: as said, else beside the adapter.
    fn state_file(&self, output: &Output) -> Option<PathBuf> {
        let beside = || match output {
            Output::Adapter { dir, .. } => {
                // Without the slash that may stand at its end.
                let mut name = dir.components().collect::<PathBuf>().into_os_string();
                name.push(".state");
                Some(PathBuf::from(name))
            }
            Output::Apply { .. } | Output::Stage { .. } => None,
        };
        self.options.state.clone().or_else(beside)
    }

    /// The model whose predictions are learnt, if one is named.
    fn teacher(&self, notes: &mut Vec<String>) -> Result<Option<Trainee>, FinetuneError> {
        let Some(path) = &self.options.teacher else { return Ok(None) };
        let source = teacher::source(path, (&self.source, &self.spec), self.window)?;
        // Of a MoE one expert is named, and gets nothing: routers say who is visited.
        let expert = Spec::of(&source)?.moe_layers().next().map(|_| 0);
        Ok(Some(self.open(&source, expert, Route::Natural, self.options.exec, notes)?))
    }

    /// Opens a model where models are to run; where that is only a wish and there is no room, on the processor.
    fn open(
        &self,
        source: &Source,
        expert: Option<usize>,
        route: Route,
        exec: Exec,
        notes: &mut Vec<String>,
    ) -> Result<Trainee, ModelError> {
        let o = &self.options;
        match Trainee::open_on(source, expert, route, exec, &o.placement) {
            Err(e @ ModelError::Device(_)) if o.fall_back && e.kind() == Kind::NoRoom => {
                notes.push(format!("{}: {e}: it ran on the processor", source.label));
                Trainee::open_with(source, expert, route, exec)
            }
            opened => opened,
        }
    }

    /// Documents to train on, and batches of text that is not.
    fn split(
        &self,
        corpus: &Corpus<'_>,
        encoder: &Encoder<'_>,
    ) -> Result<(Vec<usize>, Vec<Vec<Lesson>>), FinetuneError> {
        let tokens = self.options.validation_tokens;
        let (seed, interrupt) = (self.options.training.seed, &self.options.interrupt);
        let (train, lessons) = match &self.options.validation {
            Some(file) => {
                let files = std::slice::from_ref(file);
                let other = Corpus::open(files, encoder, self.window, interrupt)?;
                let all = (0..other.len()).collect();
                ((0..corpus.len()).collect(), domains::first(&other, all, tokens)?)
            }
            None => {
                let (train, held) = batches::hold_out(corpus.len(), self.options.hold_out, seed);
                (train, domains::first(corpus, held, tokens)?)
            }
        };
        Ok((train, domains::batched(lessons, self.options.training.batch_tokens)))
    }

    /// What has to stay the same when a run goes on.
    fn begun(&self, corpus: &Corpus<'_>) -> Result<Value, FinetuneError> {
        Ok(json!({
            "expert": self.number(),
            "update": self.options.update,
            "parts": self.options.parts,
            "layers": [self.plan.layers.start, self.plan.layers.end],
            "route": self.options.route,
            "teacher": self.options.teacher,
            "keep": self.keep(),
            "keep_data": self.options.keep_data,
            "keep_text": self.options.keep_text,
            "router_penalty": self.options.router_penalty,
            "fast": self.options.exec.accuracy == Accuracy::Fast,
            "window": self.window,
            "training": self.options.training,
            "hold_out": self.options.hold_out,
            "validation": self.options.validation,
            "data": format!("{:016x}", corpus.fingerprint()),
            "generation": self.generation,
        }))
    }

    fn nothing_to_train(&self) -> FinetuneError {
        FinetuneError::Option {
            name: "--layers",
            expected: "at least one layer with experts".into(),
            found: format!("{}..{}", self.plan.layers.start, self.plan.layers.end),
            hint: None,
        }
    }

    fn report(
        &self,
        state: &state::State,
        stopped: Stopped,
        corpus: &Corpus<'_>,
    ) -> FinetuneReport {
        let mut speeds: Vec<f64> = state.steps.iter().map(|s| s.tokens_per_second).collect();
        speeds.sort_by(f64::total_cmp);
        let losses = |e: Option<&StepRecord>| e.map_or(0.0, |s| s.loss);
        let least = state.evaluations.iter().map(|e| e.loss).fold(f64::INFINITY, f64::min);
        let count = state.steps.len().max(1) as f64;
        let coverage = state.steps.iter().map(|s| s.coverage).sum::<f64>() / count;
        let mut layers: Vec<usize> = state.best.pairs.keys().map(|(l, _)| *l).collect();
        layers.dedup();
        let mut warnings = self.source.notes.clone();
        if coverage < 0.5 && self.options.route == Route::Natural {
            warnings.push(format!(
                "only {:.0} % of the tokens visit this expert: `--route forced` trains it on all of them",
                100.0 * coverage
            ));
        }
        FinetuneReport {
            output: PathBuf::new(),
            generation: None,
            staged: None,
            family: self.spec.family.into(),
            expert: self.expert().map(str::to_owned),
            layers,
            parameters: state.best.parameters(),
            steps: state.step,
            best_step: state.best_step,
            stopped,
            tokens: state.steps.iter().map(|s| s.tokens).sum(),
            tokens_per_second: speeds.get(speeds.len() / 2).copied().unwrap_or(0.0),
            loss: [losses(state.steps.first()), losses(state.steps.last())],
            validation: state.evaluations.first().map(|first| [first.loss, least]),
            coverage,
            data: corpus.report.clone(),
            domains: Vec::new(),
            bytes_written: 0,
            seconds: 0.0,
            warnings,
        }
    }
}

/// Number and name of the expert that a person means: names first, then numbers.
fn find(
    path: &Path,
    names: &[String],
    wanted: Option<&str>,
) -> Result<Option<(usize, String)>, FinetuneError> {
    let Some(text) = wanted.filter(|_| !names.is_empty()) else {
        return match (wanted, names.is_empty()) {
            (None, true) => Ok(None),
            _ => Err(missing(path, names, wanted)),
        };
    };
    let by_name = names.iter().position(|n| n == text);
    let number = by_name.or_else(|| text.parse().ok().filter(|e| *e < names.len()));
    let number = number.ok_or_else(|| missing(path, names, wanted))?;
    Ok(Some((number, names[number].clone())))
}

fn missing(path: &Path, names: &[String], wanted: Option<&str>) -> FinetuneError {
    let named = |(e, name): (usize, &String)| match *name == e.to_string() {
        true => name.clone(),
        false => format!("`{name}` ({e})"),
    };
    FinetuneError::NoExpert {
        path: path.to_owned(),
        found: wanted.unwrap_or_default().to_owned(),
        experts: names.iter().enumerate().map(named).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_by_name_and_number() {
        let names = ["prose", "1", "code"].map(String::from);
        let found = |wanted| find(Path::new("m"), &names, wanted).map(|e| e.map(|e| e.0));
        assert_eq!(found(Some("code")).unwrap(), Some(2));
        assert_eq!(found(Some("0")).unwrap(), Some(0));
        assert_eq!(found(Some("1")).unwrap(), Some(1));
        for wanted in [Some("3"), Some("maths"), None] {
            assert!(matches!(found(wanted), Err(FinetuneError::NoExpert { .. })), "{wanted:?}");
        }
        assert!(find(Path::new("m"), &[], None).unwrap().is_none());
        assert!(find(Path::new("m"), &[], Some("0")).is_err());
    }
}
