//! New routers for an existing MoE: labelled text to gates to the next generation of its folder.
//!
//! Works on every folder of the supported MoE families, whoever wrote it. Nothing but the routers changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use moe_merge_checkpoint::generation::{Change, NewTensors, commit};
use moe_merge_checkpoint::manifest::{Manifest, hash_bytes};
use moe_merge_checkpoint::publish::{Interrupt, Replace, Staging};
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{CheckpointError, Dtype, Source, SourceRef, WeightRef};
use moe_merge_model::spec::{Mlp, MoeMlp};
use moe_merge_model::{ModelError, Spec};

use moe_merge_router::{Estimator, Gate, Method};
use serde::Serialize;
use serde_json::{Value, json};

use crate::build::{Observer, Stage};
use crate::documents::{
    Cutting, DEFAULT_PROMPT_TOKENS, Encoder, Unprompted, encode_labelled, expert_names,
    read_labelled,
};
use crate::error::MergeError;
use crate::gates::{self, GateRequest, Routers, TokenPrompts};
use crate::self_text::Writing;
use crate::training::{TrainOptions, TrainSummary, Training};

mod alone;
pub(crate) mod copy;
mod error;

pub use alone::alone;
pub use error::CalibrateError;
pub use moe_merge_router::report::RoutingReport;

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct CalibrateOptions {
    /// Name of an estimator.
    pub estimator: String,
    /// Text of all experts, as [`read_labelled`] takes it.
    pub prompts: Option<PathBuf>,
    /// Most tokens for each expert from `prompts`; estimators of mergekit take prompts whole.
    pub prompt_tokens: Option<usize>,
    /// Tokens that each expert writes itself, about.
    pub self_text: usize,
    /// Training after the estimator.
    pub train: Option<TrainOptions>,
    /// Seed of everything random.
    pub seed: u64,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

/// A MoE and text for its routers, opened and checked.
#[derive(Debug)]
pub struct Calibration {
    source: Source,
    spec: Spec,
    /// Numbers of the MoE layers, and what they are.
    layers: Vec<(usize, MoeMlp)>,
    names: Vec<String>,
    estimator: &'static Estimator,
    prompts: Vec<TokenPrompts>,
    bos: bool,
    /// Hash of the prompt file.
    prompts_blake3: Option<String>,
    /// The generation that was read.
    generation: u32,
    options: CalibrateOptions,
    notes: Vec<String>,
}

/// What a calibration did.
#[derive(Debug, Clone, Serialize)]
pub struct CalibrateReport {
    /// The folder.
    pub output: PathBuf,
    /// Its generation now.
    pub generation: u32,
    /// The generation before.
    pub parent: u32,
    /// `model_type` of the model.
    pub family: String,
    /// Names of the experts, in order.
    pub experts: Vec<String>,
    /// Experts that each token visits.
    pub experts_per_token: usize,
    /// Layers that got a new router.
    pub layers: usize,
    /// How the routers were made.
    pub estimator: String,
    /// Tokens in all text, what the experts wrote themselves included.
    pub prompt_tokens: usize,
    /// Tokens that the experts wrote themselves.
    pub self_text_tokens: usize,
    /// Forecast from held-out prompts, for learned gates; before any training.
    pub forecast: Option<RoutingReport>,
    /// What training did.
    pub training: Option<TrainSummary>,
    /// Bytes of the new shard and the new index.
    pub bytes_written: u64,
    /// Seconds for the routers, and for the new generation.
    pub seconds: Seconds,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Routers that were computed and not written.
#[derive(Debug)]
pub struct Fitted {
    /// The routers under their names.
    pub tensors: Vec<(String, WeightRef)>,
    /// What a journal should keep.
    pub details: Value,
    /// How they were made.
    pub estimator: &'static str,
    /// Forecast from held-out prompts, for learned gates.
    pub forecast: Option<RoutingReport>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Where the time of a calibration went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Text that experts write, text through the model, fitting.
    pub routers: f64,
    /// Writing and switching, with the copy where another folder was asked for.
    pub write: f64,
}

impl Calibration {
    /// Opens the MoE at `path` and the text. Nothing is written.
    ///
    /// # Errors
    /// [`CalibrateError`]: no folder, a dense model, an unknown estimator, prompts of experts that the model has not, no
    /// text for an expert.
    pub fn prepare(path: &str, options: CalibrateOptions) -> Result<Self, CalibrateError> {
        let reference: SourceRef = path.parse()?;
        // The generation comes first: if the model is changed while it is read, the change that follows is refused.
        let generation = Manifest::load(Path::new(path))?.map_or(0, |m| m.generation);
        let source = Source::open(&reference, Path::new("."))?;
        if reference.lora.is_some() || !source.path.is_dir() {
            return Err(MergeError::NotAFolder { found: path.to_owned() }.into());
        }
        Self::of(source, None, generation, options)
    }

    /// The same for a model that is open already, and may not be on disk as it is.
    ///
    /// * `names`: of its experts, where its folder does not tell them
    /// * `generation`: the one that it comes from
    ///
    /// # Errors
    /// As [`Calibration::prepare`].
    pub fn of(
        source: Source,
        names: Option<Vec<String>>,
        generation: u32,
        options: CalibrateOptions,
    ) -> Result<Self, CalibrateError> {
        let estimator =
            moe_merge_router::find(&options.estimator).map_err(CalibrateError::Estimator)?;
        let spec = Spec::of(&source)?;
        let layers = moe_layers(&spec);
        let Some((_, first)) = layers.first() else {
            let (path, family) = (source.path.clone(), spec.family);
            return Err(ModelError::NoExperts { path, family }.into());
        };
        let names = match names {
            Some(names) => names,
            None => expert_names(&source.path, first.experts)?,
        };
        // Training learns from text, whatever it starts from.
        let drawn = matches!(estimator.method, Method::Seed(_)) && options.train.is_none();
        if !drawn && options.prompts.is_none() && options.self_text == 0 {
            return Err(CalibrateError::NoText { estimator: estimator.name });
        }
        if options.self_text > 0 && first.names.expert(0).is_none() {
            return Err(CalibrateError::SelfText { family: spec.family });
        }
        let mut notes = source.notes.clone();
        let (mut prompts, mut bos, mut prompts_blake3) =
            (vec![TokenPrompts::default(); names.len()], false, None);
        if !drawn {
            let encoder = Encoder::new(&source)?;
            bos = encoder.tokenizer().bos().is_some();
            if let Some(file) = &options.prompts {
                let unprompted = match options.self_text {
                    0 => Unprompted::Refused,
                    _ => Unprompted::Allowed,
                };
                let (labelled, left_out) = read_labelled(file, &names, unprompted)?;
                let cutting = match estimator.method {
                    method if method.learned() => {
                        Cutting::Budget(options.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS))
                    }
                    _ => Cutting::Whole,
                };
                let (encoded, cut) = encode_labelled(&encoder, &labelled, cutting)?;
                notes.extend(left_out.into_iter().chain(cut));
                prompts = encoded;
                let text =
                    std::fs::read(file).map_err(|e| CheckpointError::io("reading", file, e))?;
                prompts_blake3 = Some(hash_bytes(&text));
            }
        }
        Ok(Self {
            source,
            spec,
            layers,
            names,
            estimator,
            prompts,
            bos,
            prompts_blake3,
            generation,
            options,
            notes,
        })
    }

    /// The model.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Names of its experts, in order.
    pub fn experts(&self) -> &[String] {
        &self.names
    }

    /// Layers that will get a new router.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Tokens of text from files.
    pub fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(TokenPrompts::tokens).sum()
    }

    /// What was left out or cut.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Computes the routers and makes them the next generation of the folder, or of a copy of it at `out`.
    ///
    /// # Errors
    /// [`CalibrateError`]; then the model is as before, and there is no copy.
    pub fn run(
        mut self,
        message: Option<&str>,
        out: Option<&Path>,
        observer: &dyn Observer,
    ) -> Result<CalibrateReport, CalibrateError> {
        let staging = out.map(|out| Staging::new(out, Replace::Never)).transpose()?;
        let clock = Instant::now();
        let self_text_tokens = self.write_texts()?;
        let (routers, training) = self.routers(observer)?;
        let mut seconds = Seconds { routers: clock.elapsed().as_secs_f64(), write: 0.0 };

        let clock = Instant::now();
        let tensors = self.new_tensors(&routers)?;
        let details = self.details(&routers, self_text_tokens, training.as_ref());
        let folder = match &staging {
            Some(staging) => {
                copy::copy(&self.source.path, staging.path(), &self.options.interrupt)?;
                staging.path().to_owned()
            }
            None => self.source.path.clone(),
        };
        let bytes = tensors.iter().map(|(_, w)| w.size_in(w.dtype())).sum();
        observer.stage(Stage::Write, bytes);
        let progress = |bytes| observer.advance(bytes);
        let change = Change {
            action: "calibrate",
            message,
            tensors: vec![NewTensors { role: "router".into(), tensors }],
            details,
            gate_mode: Some(self.estimator.name.into()),
            parent: Some(self.generation),
            ..Change::default()
        };
        let watch = Watch { interrupt: &self.options.interrupt, progress: &progress };
        let made = commit(&folder, &change, watch)?;
        let output = match staging {
            Some(staging) => staging.publish()?,
            None => folder,
        };
        seconds.write = clock.elapsed().as_secs_f64();
        let mut warnings = self.notes;
        warnings.extend(routers.notes);
        warnings.extend(made.notes);
        Ok(CalibrateReport {
            output,
            generation: made.number,
            parent: made.parent,
            family: self.spec.family.into(),
            experts_per_token: self.layers[0].1.router.top_k,
            experts: self.names,
            layers: self.layers.len(),
            estimator: self.estimator.name.into(),
            prompt_tokens: self.prompts.iter().map(TokenPrompts::tokens).sum(),
            self_text_tokens,
            forecast: routers.forecast,
            training,
            bytes_written: made.bytes_written,
            seconds,
            warnings,
        })
    }

    /// Computes the routers and writes nothing: their tensors, what a journal should keep, the forecast and notes.
    ///
    /// # Errors
    /// [`CalibrateError`].
    pub fn fitted(mut self, observer: &dyn Observer) -> Result<Fitted, CalibrateError> {
        let self_text_tokens = self.write_texts()?;
        let (routers, training) = self.routers(observer)?;
        let tensors = self.new_tensors(&routers)?;
        let details = self.details(&routers, self_text_tokens, training.as_ref());
        let mut notes = self.notes;
        notes.extend(routers.notes);
        let estimator = self.estimator.name;
        Ok(Fitted { tensors, details, estimator, forecast: routers.forecast, notes })
    }

    /// Lets each expert, alone in the model, write text of its own, which joins its prompts.
    fn write_texts(&mut self) -> Result<usize, CalibrateError> {
        if self.options.self_text == 0 {
            return Ok(0);
        }
        let encoder = Encoder::new(&self.source)?;
        let tokenizer = encoder.tokenizer();
        let writing = Writing {
            tokenizer,
            tokens: self.options.self_text,
            seed: self.options.seed,
            interrupt: &self.options.interrupt,
        };
        let mut written = 0;
        for (expert, prompts) in self.prompts.iter_mut().enumerate() {
            let refused = || CalibrateError::SelfText { family: self.spec.family };
            let source = alone::alone(&self.source, &self.spec, expert).ok_or_else(refused)?;
            written += writing.add(&source, expert, prompts, &mut |_| {})?.ok_or_else(refused)?;
        }
        Ok(written)
    }

    /// The estimator's gates, then trained ones where that is asked for. A training that was stopped goes on from its state.
    fn routers(
        &self,
        observer: &dyn Observer,
    ) -> Result<(Routers, Option<TrainSummary>), CalibrateError> {
        let training = self.options.train.as_ref().map(|options| Training {
            moe: &self.source,
            experts: &self.prompts,
            bos: self.bos,
            seed: self.options.seed,
            options,
            interrupt: &self.options.interrupt,
        });
        let mut routers = if training.as_ref().is_some_and(Training::begun) {
            let layers = vec![Gate::default(); self.spec.layers.len()];
            Routers { layers, ..Routers::default() }
        } else {
            observer.stage(Stage::Gates, self.spec.layers.len() as u64);
            self.fit(observer)?
        };
        let Some(training) = training else { return Ok((routers, None)) };
        let start = self
            .layers
            .iter()
            .map(|(layer, _)| (*layer, routers.layers[*layer].rows.clone()))
            .collect();
        let (gates, summary) = training.run(start, observer)?;
        for (layer, rows) in gates {
            let hidden = self.spec.hidden;
            routers.layers[layer] = Gate { experts: rows.len() / hidden, hidden, rows };
        }
        Ok((routers, Some(summary)))
    }

    /// Gates of all layers, from what the MoE's own layers see.
    fn fit(&self, observer: &dyn Observer) -> Result<Routers, CalibrateError> {
        let request = GateRequest {
            base: &self.source,
            moe: Some(&self.source),
            estimator: self.estimator,
            experts: &self.prompts,
            shared: &[],
            top_k: self.layers[0].1.router.top_k,
            seed: self.options.seed,
            bos: self.bos,
            interrupt: &self.options.interrupt,
        };
        Ok(gates::compute(&request, &mut |_| observer.advance(1))?)
    }

    /// The routers under their names; where a family adds a bias to the choice, it becomes zero: it was made for the
    /// old router.
    fn new_tensors(
        &mut self,
        routers: &Routers,
    ) -> Result<Vec<(String, WeightRef)>, CalibrateError> {
        let mut tensors: Vec<(String, WeightRef)> = Vec::new();
        let mut biased = 0;
        for (layer, moe) in &self.layers {
            let name = router_name(*layer, moe);
            let gate = &routers.layers[*layer];
            let shape = [gate.experts, gate.hidden];
            let weight = OwnedWeight::from_f32(&name, &gate.rows, &shape, Dtype::F32);
            tensors.push((name, Arc::new(weight)));
            let Some(bias) = moe.selection_bias else { continue };
            let name = format!("model.layers.{layer}.{bias}");
            let Some(old) = self.source.tensors.get(&name) else { continue };
            if old.to_f32()?.iter().any(|v| *v != 0.0) {
                biased += 1;
                let zeros = OwnedWeight::zeros(&name, old.shape(), old.dtype());
                tensors.push((name, Arc::new(zeros)));
            }
        }
        if biased > 0 {
            self.notes.push(format!(
                "the bias on the choice of experts, made for the old routers, is zero now ({biased} layers)"
            ));
        }
        Ok(tensors)
    }

    /// What the journal keeps.
    fn details(
        &self,
        routers: &Routers,
        self_text_tokens: usize,
        training: Option<&TrainSummary>,
    ) -> Value {
        let tokens: Vec<usize> = self.prompts.iter().map(TokenPrompts::tokens).collect();
        let accuracy = routers.forecast.as_ref().map(|f| {
            let each: Vec<Option<f64>> = f.experts.iter().map(|e| e.accuracy).collect();
            json!(each)
        });
        json!({
            "estimator": self.estimator.name,
            "experts": self.names,
            "prompts_blake3": self.prompts_blake3,
            "tokens": tokens,
            "self_text_tokens": self_text_tokens,
            "seed": self.options.seed,
            "held_out_accuracy": accuracy,
            "training": training,
        })
    }
}

/// The layers with routed experts.
fn moe_layers(spec: &Spec) -> Vec<(usize, MoeMlp)> {
    let all = spec.layers.iter().enumerate();
    all.filter_map(|(number, layer)| match &layer.mlp {
        Mlp::Moe(moe) => Some((number, moe.clone())),
        Mlp::Dense(_) => None,
    })
    .collect()
}

/// The name of a router's weight.
fn router_name(layer: usize, moe: &MoeMlp) -> String {
    format!("model.layers.{layer}.{}", moe.names.router())
}
