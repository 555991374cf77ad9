//! Experts of an existing MoE, fitted to the attention that they have there: the next generation of its folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use moe_merge_checkpoint::generation::{Change, NewTensors, commit};
use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::publish::{Interrupt, Replace, Staging};
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Source, SourceRef, WeightRef};
use moe_merge_model::spec::{ExpertNames, Mlp, MoeMlp};
use moe_merge_model::transplant::Student;
use moe_merge_model::{ModelError, Spec};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    AlignError, AlignedExpert, Fitted, JointReport, Member, Store, Texts, Transplant, join, memory,
};
use crate::build::{Observer, Stage};
use crate::calibrate::copy;
use crate::documents::{
    Cutting, Encoder, PromptFile, Unprompted, encode_labelled, expert_names, read_labelled,
};
use crate::error::MergeError;
use crate::gates::TokenPrompts;
use crate::recipe::{Align, AlignMethod};

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct AlignOptions {
    /// Experts by name or number, each with the dense model that it comes from.
    pub teachers: Vec<(String, String)>,
    /// The dense model that experts are compared with, to tell shares of their gain.
    pub base: Option<String>,
    /// How. Text of experts comes from `data` and `prompts`.
    pub align: Align,
    /// Text of experts, by name or number.
    pub data: Vec<(String, PathBuf)>,
    /// Text of all experts, as [`read_labelled`] takes it.
    pub prompts: Option<PathBuf>,
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
    /// By expert.
    prompts: Vec<TokenPrompts>,
    generation: u32,
    options: AlignOptions,
    notes: Vec<String>,
}

/// What fitting came to, before anything of it is written.
#[derive(Debug)]
pub struct Aligned {
    /// New tensors under their names, a file for each expert; empty where nothing got better.
    pub tensors: Vec<NewTensors>,
    /// The experts that had a teacher.
    pub experts: Vec<AlignedExpert>,
    /// What training everything together did.
    pub joint: Option<JointReport>,
    /// What a journal should keep.
    pub details: Value,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Where the tensors are.
    _store: Store,
}

impl Aligned {
    /// The change of generation `parent` that this is.
    pub fn change<'m>(&self, message: Option<&'m str>, parent: u32) -> Change<'m> {
        Change {
            action: "align",
            message,
            tensors: self.tensors.clone(),
            details: self.details.clone(),
            parent: Some(parent),
            ..Change::default()
        }
    }
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
    /// What training everything together did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub joint: Option<JointReport>,
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
        let numbered = |expert: &str| {
            let by_number = || expert.parse().ok().filter(|n| *n < names.len());
            let unknown = || AlignError::Expert { name: expert.to_owned(), known: names.clone() };
            names.iter().position(|n| n == expert).or_else(by_number).ok_or_else(unknown)
        };
        let mut teachers: Vec<(usize, Source)> = Vec::new();
        for (expert, teacher) in &options.teachers {
            let number = numbered(expert)?;
            if teachers.iter().any(|(other, _)| *other == number) {
                return Err(AlignError::Twice { name: names[number].clone() });
            }
            teachers.push((number, open(teacher)?));
        }
        let untaught = |e: &usize| teachers.iter().all(|(taught, _)| taught != e);
        let untaught: Vec<usize> = (0..names.len()).filter(untaught).collect();
        if options.align.method == AlignMethod::Joint && !untaught.is_empty() {
            let names = untaught.into_iter().map(|e| names[e].clone()).collect();
            return Err(AlignError::Untaught { names });
        }
        let mut options = options;
        for (expert, file) in &options.data {
            let name = names[numbered(expert)?].clone();
            let file = PromptFile::read(file).map_err(MergeError::from)?;
            options.align.data.push((name, file));
        }
        check(&options)?;
        let (mut prompts, mut notes) = (vec![TokenPrompts::default(); names.len()], Vec::new());
        if let Some(file) = &options.prompts {
            let (labelled, left_out) = read_labelled(file, &names, Unprompted::Allowed)?;
            let cutting = Cutting::Budget(options.align.tokens);
            let (encoded, _) = encode_labelled(&Encoder::new(&source)?, &labelled, cutting)?;
            (prompts, notes) = (encoded, left_out);
            options.align.prompts = true;
        }
        let base = options.base.as_deref().map(open).transpose()?;
        Ok(Self { source, spec, names, teachers, base, prompts, generation, options, notes })
    }

    /// Names of the experts that have a teacher, with what it is.
    pub fn teachers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.teachers.iter().map(|(e, s)| (self.names[*e].as_str(), s.label.as_str()))
    }

    /// How they are fitted.
    pub fn method(&self) -> AlignMethod {
        self.options.align.method
    }

    /// Bytes of memory that fitting takes at most, beside the program itself.
    pub fn memory(&self) -> u64 {
        let inter = self.spec.moe_layers().map(|(_, moe)| moe.inter).max().unwrap_or(0);
        let layers = self.spec.layers.len();
        memory(&self.options.align, [self.spec.hidden, inter, layers, self.teachers.len()])
    }

    /// The model.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What was left out of the text.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Fits the experts one after the other, with `joint` then all together, and makes the next generation of the folder, or of
    /// a copy of it at `out`.
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
        let aligned = self.fitted(observer)?;
        let mut report = ExistingReport {
            output: self.source.path.clone(),
            generation: self.generation,
            parent: self.generation,
            method: self.options.align.method.name(),
            experts: aligned.experts.clone(),
            joint: aligned.joint.clone(),
            bytes_written: 0,
            seconds: 0.0,
            warnings: aligned.notes.clone(),
        };
        if aligned.tensors.is_empty() {
            report.warnings.push("nothing was written: fitting made no expert better".into());
        } else {
            let change = aligned.change(message, self.generation);
            self.write(&change, staging, observer, &mut report)?;
        }
        report.seconds = clock.elapsed().as_secs_f64();
        Ok(report)
    }

    fn write(
        &self,
        change: &Change<'_>,
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
        let all = change.tensors.iter().flat_map(|t| &t.tensors);
        observer.stage(Stage::Write, all.map(|(_, w)| w.size_in(w.dtype())).sum());
        let progress = |bytes| observer.advance(bytes);
        let made = commit(&folder, change, Watch { interrupt, progress: &progress })?;
        report.output = match staging {
            Some(staging) => staging.publish()?,
            None => folder,
        };
        (report.generation, report.parent) = (made.number, made.parent);
        report.bytes_written = made.bytes_written;
        report.warnings.extend(made.notes);
        Ok(())
    }

    /// Fits the experts, and writes nothing.
    ///
    /// # Errors
    /// [`AlignError`].
    pub fn fitted(&self, observer: &dyn Observer) -> Result<Aligned, AlignError> {
        let align = &self.options.align;
        let store = Store::of(align, &self.source.path, self.dtype())?;
        let mut notes: Vec<String> = self.source.notes.iter().chain(&self.notes).cloned().collect();
        let (mut all, mut experts, mut members) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (expert, teacher) in &self.teachers {
            let (expert, name) = (*expert, self.names[*expert].clone());
            observer.subject(&name);
            let texts = self.texts(expert, teacher, &mut notes, observer)?;
            let (fitted, made) = self.fit(expert, teacher, &texts, &store, observer)?;
            experts.push(AlignedExpert { name: name.clone(), ..made });
            if !fitted.is_empty() {
                all.insert(expert, self.named(expert, &fitted));
            }
            if align.method == AlignMethod::Joint {
                let layers = 0..self.spec.layers.len();
                members.push(Member { expert, name, teacher: teacher.clone(), texts, layers });
            }
        }
        let (mut joint, mut routers) = (None, Vec::new());
        if align.method == AlignMethod::Joint {
            observer.subject("all experts");
            let mut moe = self.source.clone();
            moe.tensors.extend(all.values().flatten().cloned());
            let how = (align, self.options.seed);
            let joined = join(&moe, &members, how, &store, &self.options.interrupt, observer)?;
            let new = joined.fitted.iter().map(|(e, fitted)| (*e, self.named(*e, fitted)));
            all.extend(new);
            routers = self.routers(&joined.gates);
            joint = Some(joined.report);
        }
        let role = |expert: usize| format!("expert-{expert:02}");
        let files = all.into_iter().map(|(e, tensors)| NewTensors { role: role(e), tensors });
        let mut tensors: Vec<NewTensors> = files.collect();
        if !routers.is_empty() {
            tensors.push(NewTensors { role: "router".into(), tensors: routers });
        }
        let details = json!({
            "method": align.method.name(), "tokens": align.tokens, "steps": align.steps,
            "rank": align.rank, "stream": align.stream, "seed": self.options.seed,
            "experts": experts, "joint": joint,
        });
        Ok(Aligned { tensors, experts, joint, details, notes, _store: store })
    }

    fn fit(
        &self,
        expert: usize,
        teacher: &Source,
        texts: &[Vec<u32>],
        store: &Store,
        observer: &dyn Observer,
    ) -> Result<(Fitted, AlignedExpert), AlignError> {
        let layers = 0..self.spec.layers.len();
        let transplant = Transplant {
            student: Student { source: &self.source, expert },
            teacher,
            base: self.base.as_ref(),
            layers: &layers,
            texts,
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

    /// Text of one expert, in the MoE's tokens.
    fn texts(
        &self,
        expert: usize,
        teacher: &Source,
        notes: &mut Vec<String>,
        observer: &dyn Observer,
    ) -> Result<Vec<Vec<u32>>, AlignError> {
        let align = &self.options.align;
        observer.stage(Stage::SelfText, align.tokens as u64);
        let encoder = Encoder::new(&self.source)?;
        let (seed, interrupt) = (self.options.seed, &self.options.interrupt);
        let texts = Texts { align, encoder: &encoder, names: &self.names, seed, interrupt };
        let mut told = |tokens| observer.advance(tokens as u64);
        let texts = texts.of(expert, &self.prompts[expert], teacher, notes, &mut told)?;
        if texts.is_empty() {
            let (name, teacher) = (self.names[expert].clone(), teacher.label.clone());
            return Err(AlignError::Silent { name, teacher });
        }
        Ok(texts)
    }

    /// Routers under the names of the MoE.
    fn routers(&self, gates: &BTreeMap<usize, Vec<f32>>) -> Vec<(String, WeightRef)> {
        let named = |(layer, moe): (usize, &MoeMlp)| {
            let name = format!("model.layers.{layer}.{}", moe.names.router());
            let rows = gates.get(&layer)?;
            let shape = [moe.experts, self.spec.hidden];
            let weight = OwnedWeight::from_f32(&name, rows, &shape, Dtype::F32);
            Some((name, Arc::new(weight) as WeightRef))
        };
        self.spec.moe_layers().filter_map(named).collect()
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

/// What has no meaning together.
fn check(options: &AlignOptions) -> Result<(), AlignError> {
    let align = &options.align;
    let refit = align.method == AlignMethod::Refit;
    let gradients = "`--method distil` or `--method joint`";
    let text = "`--data` or `--prompts` beside it";
    let checks = [
        ("--rank", refit && align.rank.is_some(), gradients),
        ("--stream", refit && align.stream != 0.0, gradients),
        ("--stream", !(align.stream.is_finite() && align.stream >= 0.0), "a number of 0 or more"),
        (
            "--no-self-text",
            !align.self_text && align.data.is_empty() && options.prompts.is_none(),
            text,
        ),
    ];
    let wrong = checks.into_iter().find(|(_, wrong, _)| *wrong);
    wrong.map_or(Ok(()), |(name, _, expected)| Err(AlignError::Option { name, expected }))
}

impl From<moe_merge_model::TextError> for AlignError {
    fn from(error: moe_merge_model::TextError) -> Self {
        Self::Merge(MergeError::from(error))
    }
}
