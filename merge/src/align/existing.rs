//! Experts of an existing MoE, fitted to the attention that they have there: the next generation of its folder.

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::generation::{Change, NewTensors, commit};
use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::publish::{Interrupt, Replace, Staging};
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Source, SourceRef, WeightRef};
use moe_merge_model::spec::{ExpertNames, Mlp};
use moe_merge_model::transplant::Student;
use moe_merge_model::{ModelError, Spec, Tokenizer};
use serde::Serialize;
use serde_json::json;

use super::{AlignError, AlignedExpert, Fitted, Store, Transplant};
use crate::build::{Observer, Stage};
use crate::calibrate::copy;
use crate::documents::expert_names;
use crate::error::MergeError;
use crate::gates::TokenPrompts;
use crate::recipe::Align;
use crate::self_text::Writing;

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct AlignOptions {
    /// Experts by name or number, each with the dense model that it comes from.
    pub teachers: Vec<(String, String)>,
    /// The dense model that experts are compared with, to tell shares of their gain.
    pub base: Option<String>,
    /// How.
    pub align: Align,
    /// Seed of everything random.
    pub seed: u64,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

/// A MoE and teachers of its experts, opened and checked.
#[derive(Debug)]
pub struct Alignment {
    source: Source,
    spec: Spec,
    /// Names of all experts.
    names: Vec<String>,
    teachers: Vec<(usize, Source)>,
    base: Option<Source>,
    generation: u32,
    options: AlignOptions,
}

/// What fitting did.
#[derive(Debug, Clone, Serialize)]
pub struct ExistingReport {
    /// The folder.
    pub output: PathBuf,
    /// Its generation now.
    pub generation: u32,
    /// The generation before.
    pub parent: u32,
    /// The method.
    pub method: &'static str,
    /// The experts that had a teacher.
    pub experts: Vec<AlignedExpert>,
    /// Bytes of the new shards and the new index.
    pub bytes_written: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl Alignment {
    /// Opens the MoE at `path` and the teachers. Nothing is written.
    ///
    /// # Errors
    /// [`AlignError`]: no folder, no MoE, an expert that does not exist or is named twice, experts that lie in one tensor, a
    /// teacher that cannot be opened.
    pub fn prepare(path: &str, options: AlignOptions) -> Result<Self, AlignError> {
        let reference: SourceRef = path.parse()?;
        // The generation comes first: if the model is changed while it is read, the change that follows is refused.
        let generation = Manifest::load(Path::new(path))?.map_or(0, |m| m.generation);
        let source = Source::open(&reference, Path::new("."))?;
        if reference.lora.is_some() || !source.path.is_dir() {
            return Err(MergeError::NotAFolder { found: path.to_owned() }.into());
        }
        let spec = Spec::of(&source)?;
        let Some((_, first)) = spec.moe_layers().next() else {
            let (path, family) = (source.path.clone(), spec.family);
            return Err(ModelError::NoExperts { path, family }.into());
        };
        if first.names == ExpertNames::Granite {
            return Err(AlignError::Stacked { family: spec.family });
        }
        let names = expert_names(&source.path, first.experts)?;
        let open = |text: &str| -> Result<Source, AlignError> {
            Ok(Source::open(&text.parse()?, Path::new("."))?)
        };
        let mut teachers: Vec<(usize, Source)> = Vec::new();
        for (expert, teacher) in &options.teachers {
            let by_number = || expert.parse().ok().filter(|n| *n < names.len());
            let number = names.iter().position(|n| n == expert).or_else(by_number);
            let unknown = || AlignError::Expert { name: expert.clone(), known: names.clone() };
            let number = number.ok_or_else(unknown)?;
            if teachers.iter().any(|(other, _)| *other == number) {
                return Err(AlignError::Twice { name: names[number].clone() });
            }
            teachers.push((number, open(teacher)?));
        }
        let base = options.base.as_deref().map(open).transpose()?;
        Ok(Self { source, spec, names, teachers, base, generation, options })
    }

    /// Fits the experts one after the other and makes the next generation of the folder, or of a copy of it at `out`.
    ///
    /// # Errors
    /// [`AlignError`]; then the model is as before, and there is no copy.
    pub fn run(
        self,
        message: Option<&str>,
        out: Option<&Path>,
        observer: &dyn Observer,
    ) -> Result<ExistingReport, AlignError> {
        let clock = Instant::now();
        let staging = out.map(|out| Staging::new(out, Replace::Never)).transpose()?;
        let store = Store::beside(&self.source.path, self.dtype())?;
        let (mut tensors, mut experts) = (Vec::new(), Vec::new());
        for (expert, teacher) in &self.teachers {
            observer.subject(&self.names[*expert]);
            let (fitted, made) = self.fit(*expert, teacher, &store, observer)?;
            experts.push(AlignedExpert { name: self.names[*expert].clone(), ..made });
            if !fitted.is_empty() {
                let role = format!("expert-{expert:02}");
                tensors.push(NewTensors { role, tensors: self.named(*expert, &fitted) });
            }
        }
        let mut report = ExistingReport {
            output: self.source.path.clone(),
            generation: self.generation,
            parent: self.generation,
            method: self.options.align.method.name(),
            experts,
            bytes_written: 0,
            seconds: 0.0,
            warnings: self.source.notes.clone(),
        };
        if tensors.is_empty() {
            report.warnings.push("nothing was written: fitting made no expert better".into());
        } else {
            self.write(tensors, message, staging, observer, &mut report)?;
        }
        report.seconds = clock.elapsed().as_secs_f64();
        Ok(report)
    }

    fn write(
        &self,
        tensors: Vec<NewTensors>,
        message: Option<&str>,
        staging: Option<Staging>,
        observer: &dyn Observer,
        report: &mut ExistingReport,
    ) -> Result<(), AlignError> {
        let interrupt = &self.options.interrupt;
        let folder = match &staging {
            Some(staging) => {
                copy::copy(&self.source.path, staging.path(), interrupt)?;
                staging.path().to_owned()
            }
            None => self.source.path.clone(),
        };
        let all = tensors.iter().flat_map(|t| &t.tensors);
        observer.stage(Stage::Write, all.map(|(_, w)| w.size_in(w.dtype())).sum());
        let progress = |bytes| observer.advance(bytes);
        let Align { method, tokens, steps } = self.options.align;
        let change = Change {
            action: "align",
            message,
            tensors,
            details: json!({
                "method": method.name(), "tokens": tokens, "steps": steps, "seed": self.options.seed,
                "experts": report.experts,
            }),
            gate_mode: None,
            parent: Some(self.generation),
            ..Change::default()
        };
        let made = commit(&folder, &change, Watch { interrupt, progress: &progress })?;
        report.output = match staging {
            Some(staging) => staging.publish()?,
            None => folder,
        };
        (report.generation, report.parent) = (made.number, made.parent);
        report.bytes_written = made.bytes_written;
        report.warnings.extend(made.notes);
        Ok(())
    }

    fn fit(
        &self,
        expert: usize,
        teacher: &Source,
        store: &Store,
        observer: &dyn Observer,
    ) -> Result<(Fitted, AlignedExpert), AlignError> {
        let texts = self.texts(expert, teacher, observer)?;
        let layers = 0..self.spec.layers.len();
        let transplant = Transplant {
            student: Student { source: &self.source, expert },
            teacher,
            base: self.base.as_ref(),
            layers: &layers,
            texts: &texts,
            store,
            interrupt: &self.options.interrupt,
        };
        let with = |fitted: &Fitted| {
            let mut source = self.source.clone();
            source.tensors.extend(self.named(expert, fitted));
            Ok(source)
        };
        Ok(transplant.run(&self.options.align, self.options.seed, &with, observer)?)
    }

    /// How experts are stored.
    fn dtype(&self) -> Dtype {
        let stored = self.spec.moe_layers().find_map(|(layer, moe)| {
            let [gate, ..] = moe.names.expert(0)?;
            Some(self.source.tensors.get(&format!("model.layers.{layer}.{gate}"))?.dtype())
        });
        stored.unwrap_or(Dtype::F32)
    }

    /// What the teacher writes, in the MoE's tokens.
    fn texts(
        &self,
        expert: usize,
        teacher: &Source,
        observer: &dyn Observer,
    ) -> Result<Vec<Vec<u32>>, AlignError> {
        let tokenizer = Tokenizer::from_source(&self.source)?;
        let tokens = self.options.align.tokens;
        observer.stage(Stage::SelfText, tokens as u64);
        let (seed, interrupt) = (self.options.seed, &self.options.interrupt);
        let writing = Writing { tokenizer: &tokenizer, tokens, seed, interrupt };
        let mut texts = TokenPrompts::default();
        let mut told = |tokens| observer.advance(tokens as u64);
        let written = writing.add(teacher, expert, &mut texts, &mut told)?;
        match written {
            Some(_) if !texts.positive.is_empty() => Ok(texts.positive),
            _ => Err(AlignError::Silent { teacher: teacher.label.clone() }),
        }
    }

    /// Fitted matrices under the names of the MoE.
    fn named(&self, expert: usize, fitted: &Fitted) -> Vec<(String, WeightRef)> {
        let mut all = Vec::new();
        for (layer, matrices) in fitted {
            let Mlp::Moe(moe) = &self.spec.layers[*layer].mlp else { continue };
            let Some(names) = moe.names.expert(expert) else { continue };
            let named = names.into_iter().zip(matrices);
            all.extend(named.map(|(n, w)| (format!("model.layers.{layer}.{n}"), w.clone())));
        }
        all
    }
}

impl From<moe_merge_model::TextError> for AlignError {
    fn from(error: moe_merge_model::TextError) -> Self {
        Self::Merge(MergeError::from(error))
    }
}
