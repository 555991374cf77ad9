//! From a recipe to a published folder: sources, plan, gates, files, and what came of it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::publish::{Interrupt, Replace, Staging, Unfinished};
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Identity, Source, SourceRef};
use moe_merge_model::{Placement, Tokenizer};
use serde::Serialize;

use crate::align::AlignReport;
use crate::error::MergeError;
use crate::evaluate::{Domain, Evaluation, evaluate};
use crate::families::Layout;
use crate::gates::{self, GateRequest, Routers, TokenPrompts};
use crate::lessons::room;
use crate::origins::Origins;
use crate::plan::{Assembly, Content, Plan};
use crate::recipe::Align;
use crate::self_text::Writing;
use crate::write::{Provenance, remarks, write};

mod aligned;
mod dense;
mod open;
mod parts;

pub(crate) use aligned::Jointly;
pub use dense::{DenseReport, PreparedDense};

/// What a person asks for beside the recipe.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Folder to write, instead of the one that the recipe names.
    pub out: Option<PathBuf>,
    /// What to do if it is there.
    pub replace: Replace,
    /// What to do with what a killed run has left of it.
    pub unfinished: Unfinished,
    /// How experts lie on disk.
    pub layout: Layout,
    /// Raised to stop.
    pub interrupt: Interrupt,
    /// Where evaluation text is scored. What is written is computed on the processor, the same wherever it is built.
    pub placement: Placement,
    /// Bytes of a shard's tensors, at most; by default as the usual tools cut.
    pub shard_limit: Option<u64>,
}

impl BuildOptions {
    /// What is made of `files` by a recipe, which is given with the text of all files that it names.
    fn identity(&self, recipe: &str, files: &[PathBuf]) -> Identity {
        Identity::new(&format!("{recipe} {:?} {:?}", self.layout, self.shard_limit), files)
    }

    /// Prepares to write `target`, which is of the make `identity`.
    fn staging(&self, target: &Path, identity: &Identity) -> Result<Staging, MergeError> {
        Ok(Staging::resume(target, self.replace, identity, self.unfinished)?)
    }
}

/// A part of a build that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Models writing text, counted in tokens.
    SelfText,
    /// Fitting an expert to the attention it gets, counted in layers.
    Align,
    /// Fitting the weights of a dense merge to what its models do, counted in groups of weights.
    Fit,
    /// Distilling an expert from its dense model, counted in steps.
    Distil,
    /// Computing gates, counted in layers.
    Gates,
    /// Training routers, counted in steps.
    Train,
    /// Writing, counted in bytes.
    Write,
    /// Scoring evaluation text, counted in tokens.
    Evaluate,
}

/// Told how far a build is; called from several threads.
pub trait Observer: Sync {
    /// A stage begins, with `total` of its units to do.
    fn stage(&self, stage: Stage, total: u64);

    /// So many units more are done.
    fn advance(&self, units: u64);

    /// What the stages that follow are about, where a command goes through them several times.
    fn subject(&self, what: &str) {
        let _ = what;
    }
}

/// What a build did.
#[derive(Debug, Clone, Serialize)]
pub struct BuildReport {
    /// The folder.
    pub output: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// `model_type` of the result.
    pub family: String,
    /// Names of the experts, in order.
    pub experts: Vec<String>,
    /// Experts that each token visits.
    pub experts_per_token: usize,
    /// How the routers were made.
    pub gate_mode: String,
    /// Tokens in all prompts, what the experts wrote themselves included.
    pub prompt_tokens: usize,
    /// Tokens that the experts wrote themselves.
    pub self_text_tokens: usize,
    /// Forecast from held-out prompts, for learned gates.
    pub forecast: Option<moe_merge_router::report::RoutingReport>,
    /// What fitting the experts did, if the recipe asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub align: Option<AlignReport>,
    /// Perplexities and loads, if the recipe gives evaluation text.
    pub evaluation: Option<Evaluation>,
    /// Seconds spent on opening and checking sources, on fitting, on gates, on writing, on evaluation.
    pub seconds: Seconds,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Where the time of a build went.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Seconds {
    /// Opening and checking.
    pub open: f64,
    /// Fitting experts to the attention they get.
    pub align: f64,
    /// Prompts through the base, and fitting of routers.
    pub gates: f64,
    /// Writing and publishing.
    pub write: f64,
    /// Evaluation.
    pub evaluate: f64,
}

/// A MoE recipe whose sources are open and checked: everything that can be found wrong without computing has been.
#[derive(Debug)]
pub struct Prepared {
    assembly: Assembly,
    plan: Plan,
    estimator: &'static moe_merge_router::Estimator,
    experts: Vec<TokenPrompts>,
    shared: Vec<TokenPrompts>,
    /// The base as it is, where the output's attention is not its own.
    plain_base: Option<Source>,
    /// Which experts are the base itself.
    same_as_base: Vec<bool>,
    domains: Vec<Domain>,
    origins: Origins,
    bos: bool,
    /// Tokens that each expert writes, 0 for none.
    self_text: Vec<usize>,
    /// Whether gates are fitted to the merged model's own stream.
    sequential: bool,
    /// The same with the base as one more expert, where measuring decides.
    alternative: Option<Box<(Assembly, Plan)>>,
    /// How experts are to be fitted; `None` once they are.
    align: Option<Align>,
    /// Where experts come from, whatever is done to them.
    originals: Vec<Source>,
    /// Sources of experts with fitted MLPs.
    fitted: Vec<Option<Source>>,
    /// What is to be done with experts once there are routers.
    jointly: Option<Jointly>,
    notes: Vec<String>,
    target: PathBuf,
    provenance: Provenance,
    identity: Identity,
    options: BuildOptions,
    opened: f64,
}

/// The recipe as a file.
#[derive(Debug, Clone, Copy)]
pub struct RecipeText<'a> {
    /// Where it is: its folder is where relative paths start.
    pub path: &'a Path,
    /// What is in it.
    pub text: &'a str,
}

impl RecipeText<'_> {
    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// `--out`, else the recipe's `output:`, else `merged/<recipe name>`, all from the current folder.
    fn target(&self, out: Option<&PathBuf>, output: Option<&PathBuf>) -> PathBuf {
        let default = || {
            let stem = self.path.file_stem().map_or("model".into(), |s| s.to_string_lossy());
            Path::new("merged").join(stem.as_ref())
        };
        out.or(output).cloned().unwrap_or_else(default)
    }
}

impl Prepared {
    /// Bytes of memory that the build takes at most, beside the program itself: the writer, or one layer of the base
    /// with the hidden states of all prompts. Evaluation text is not counted.
    pub fn peak_memory(&self) -> u64 {
        let dims = &self.plan.shape.dims;
        let layer = |name: &str| name.starts_with("model.layers.0.");
        let tensors = self.assembly.base.tensors.iter().filter(|(name, _)| layer(name));
        let weights: u64 = tensors.map(|(_, w)| w.size_in(w.dtype())).sum();
        let learned = self.estimator.method.learned() && self.sequential;
        let experts = self.assembly.experts.len();
        // All experts of a layer are there together, and a token takes the comparison of their outputs with it.
        let (weights, made, compared) = if learned {
            let layers: u64 =
                self.plan.tensors.iter().map(|t| t.size() / t.dtype.size() as u64).sum();
            (weights * experts as u64, room(layers), experts * experts)
        } else {
            (weights, 0, 0)
        };
        let tokens = self.prompt_tokens() + self.self_text.iter().sum::<usize>() + made;
        // The residual stream, the router's input and what attention and MLP hold for one batch beside them.
        let token = 4 * dims.hidden + 2 * dims.intermediate + compared;
        let states = (4 * tokens * token) as u64;
        self.plan.peak_memory.max(weights + states).max(self.fitting_memory())
    }

    /// What will be written.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What it is made of.
    pub fn assembly(&self) -> &Assembly {
        &self.assembly
    }

    /// Where it will be written.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Tokens that the experts will write themselves, about.
    pub fn self_text_tokens(&self) -> usize {
        self.self_text.iter().sum()
    }

    /// Tokens in all prompts.
    pub fn prompt_tokens(&self) -> usize {
        self.experts.iter().chain(&self.shared).map(TokenPrompts::tokens).sum()
    }

    /// Computes the gates, writes, publishes, evaluates.
    ///
    /// # Errors
    /// [`MergeError`]; then there is no output, unless evaluating failed after it was published.
    pub fn build(mut self, observer: &dyn Observer) -> Result<BuildReport, MergeError> {
        let staging = self.options.staging(&self.target, &self.identity)?;
        let taken_up = staging.note();
        staging.need(self.plan.disk_bytes)?;
        self.provenance.name =
            self.target.file_name().map_or("moe".into(), |n| n.to_string_lossy().into_owned());
        let mut seconds = Seconds { open: self.opened, ..Seconds::default() };

        let clock = Instant::now();
        let plain = self.assembly.clone();
        let mut align = self.align(observer)?;
        seconds.align = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let (mut routers, self_text_tokens) = self.routers(observer)?;
        self.join(&mut routers, align.as_mut(), observer)?;
        staging.need(self.plan.disk_bytes)?;
        self.provenance.report = forecast_lines(&routers, &self.names());
        self.provenance.report.extend(align.iter().flat_map(aligned::lines));
        self.provenance.align = align.as_ref().map(|a| a.method.into());
        seconds.gates = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let total = self.plan.tensors.iter().map(|t| t.size()).sum();
        observer.stage(Stage::Write, total);
        let progress = |bytes| observer.advance(bytes);
        let watch = Watch { interrupt: &self.options.interrupt, progress: &progress };
        let gates = parts::gates(&routers.layers, &routers.shared);
        let written = write(&self.assembly, &self.plan, &gates, &self.provenance, &staging, watch)
            .map_err(|e| self.origins.locate(e))?;
        staging.publish()?;
        let output = self.target.clone();
        seconds.write = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let evaluation = self.evaluate(&output, observer)?;
        if let (Some(align), Some(evaluation)) = (&mut align, &evaluation) {
            self.survivals(align, evaluation, &plain, &routers.shared, observer)?;
        }
        seconds.evaluate = clock.elapsed().as_secs_f64();

        let mut warnings = std::mem::take(&mut self.plan.warnings);
        warnings.extend(taken_up);
        let computed = self.plan.tensors.iter().filter_map(|t| match &t.content {
            Content::Weight(weight) => Some((&*t.name, weight)),
            _ => None,
        });
        warnings.extend(remarks(computed));
        warnings.extend(std::mem::take(&mut self.notes));
        warnings.extend(routers.notes);
        warnings.extend(degenerate_line(&routers.degenerate));
        Ok(BuildReport {
            output,
            bytes: written.bytes,
            family: self.assembly.family.name().into(),
            experts: self.names(),
            experts_per_token: self.assembly.top_k,
            gate_mode: self.estimator.name.into(),
            prompt_tokens: self.prompt_tokens(),
            self_text_tokens,
            forecast: routers.forecast,
            align,
            evaluation,
            seconds,
            warnings,
        })
    }

    fn names(&self) -> Vec<String> {
        self.assembly.experts.iter().map(|e| e.name.clone()).collect()
    }

    /// Lets the experts write what the recipe asks for, or what they need where they have no prompts.
    fn write_texts(&mut self, observer: &dyn Observer) -> Result<usize, MergeError> {
        let total: usize = self.self_text.iter().sum();
        if total == 0 {
            return Ok(0);
        }
        observer.stage(Stage::SelfText, total as u64);
        let tokenizer = Tokenizer::from_source(&self.assembly.base)?;
        let mut written = 0;
        for (expert, &tokens) in self.self_text.iter().enumerate().filter(|(_, n)| **n > 0) {
            let input = &self.assembly.experts[expert];
            let writing = Writing {
                tokenizer: &tokenizer,
                tokens,
                seed: self.assembly.seed,
                interrupt: &self.options.interrupt,
            };
            let mut told = |tokens| observer.advance(tokens as u64);
            let prompts = &mut self.experts[expert];
            let source = self.originals.get(expert).unwrap_or(&input.source);
            match writing.add(source, expert, prompts, &mut told)? {
                Some(tokens) => written += tokens,
                None => self.notes.push(format!(
                    "expert `{}` cannot write text: the tokenizer has no token that begins or ends one",
                    input.name
                )),
            }
        }
        Ok(written)
    }

    fn gates(&self, observer: &dyn Observer) -> Result<Routers, MergeError> {
        self.gates_of(&self.assembly, observer)
    }

    fn gates_of(
        &self,
        assembly: &Assembly,
        observer: &dyn Observer,
    ) -> Result<Routers, MergeError> {
        observer.stage(Stage::Gates, self.plan.shape.dims.layers as u64);
        let learned = self.estimator.method.learned() && self.sequential;
        let moe = learned.then(|| merged(assembly)).transpose()?;
        let request = GateRequest {
            base: &assembly.base,
            moe: moe.as_ref(),
            estimator: self.estimator,
            experts: &self.experts,
            shared: &self.shared,
            top_k: assembly.top_k,
            seed: assembly.seed,
            bos: self.bos,
            interrupt: &self.options.interrupt,
        };
        gates::compute(&request, &mut |_| observer.advance(1))
    }

    /// Where measuring decides: routers with the base as one more expert too, and the better of the two.
    fn with_or_without_generalist(
        &mut self,
        without: Routers,
        observer: &dyn Observer,
    ) -> Result<Routers, MergeError> {
        let Some(other) = self.alternative.take() else { return Ok(without) };
        let with = self.gates_of(&other.0, observer).map_err(|e| self.origins.locate(e))?;
        let (Some(a), Some(b)) = (without.error, with.error) else { return Ok(without) };
        let pays = b < GENERALIST_PAYS * a;
        let verdict = if pays { "it is one of the experts" } else { "it is left out" };
        self.notes.push(format!(
            "a generalist changes the error of the layers' output from {:.1} % to {:.1} %: {verdict}",
            100.0 * a,
            100.0 * b
        ));
        if !pays {
            return Ok(without);
        }
        (self.assembly, self.plan) = *other;
        self.same_as_base.push(true);
        Ok(with)
    }

    fn evaluate(
        &self,
        output: &Path,
        observer: &dyn Observer,
    ) -> Result<Option<Evaluation>, MergeError> {
        if self.domains.is_empty() {
            return Ok(None);
        }
        let moe = SourceRef {
            model: output.display().to_string(),
            revision: None,
            lora: None,
            lora_revision: None,
        };
        let moe = Source::open(&moe, Path::new(""))?;
        let models = self.references();
        let tokenizer = Tokenizer::from_source(&moe)?;
        let mut tokens = 0;
        for domain in &self.domains {
            tokens += tokenizer.encode(&domain.text)?.len();
        }
        let passes = 1 + models.iter().filter(|(_, source)| source.is_some()).count();
        observer.stage(Stage::Evaluate, (tokens * passes) as u64);
        let interrupt = &self.options.interrupt;
        let mut done = |tokens| observer.advance(tokens as u64);
        evaluate(&models, &moe, &self.domains, interrupt, &self.options.placement, &mut done)
            .map(Some)
    }
}

/// A generalist is one more expert in every layer; it has to lower the error by a tenth to be worth its bytes.
const GENERALIST_PAYS: f64 = 0.9;

/// The name of the expert that is the base itself.
const GENERALIST: &str = "generalist";

/// The merged model in memory, in the layout with one tensor for each expert.
fn merged(assembly: &Assembly) -> Result<Source, MergeError> {
    let assembly = Assembly { layout: Layout::Hub, ..assembly.clone() };
    Ok(Plan::new(&assembly)?.source(&assembly))
}

/// What the model card says about the routers.
fn forecast_lines(routers: &Routers, names: &[String]) -> Vec<String> {
    let Some(forecast) = &routers.forecast else { return Vec::new() };
    let mut lines = vec![
        "| expert | own held-out tokens routed to it | among its top-k | predicted load |"
            .to_owned(),
        "|---|---|---|---|".to_owned(),
    ];
    let percent = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s));
    for (name, expert) in names.iter().zip(&forecast.experts) {
        lines.push(format!(
            "| {name} | {} | {} | {} |",
            percent(expert.accuracy),
            percent(expert.coverage),
            percent(Some(expert.load))
        ));
    }
    lines
}

/// mergekit's warning about gates whose rows point nearly the same way, all layers in one line.
fn degenerate_line(layers: &[moe_merge_router::report::DegenerateGate]) -> Option<String> {
    let worst = layers.iter().max_by(|a, b| a.condition.total_cmp(&b.condition))?;
    Some(format!(
        "the gate rows of {} layers point nearly the same way (worst: layer {}, condition number {:.1}); \
         `gate_mode: auto` does not have this weakness",
        layers.len(),
        worst.layer,
        worst.condition
    ))
}
