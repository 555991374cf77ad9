//! The step of a build that fits experts to the attention they get.

use std::sync::Arc;

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_model::Tokenizer;
use moe_merge_model::transplant::Student;
use moe_merge_router::Gate;

use super::{Observer, Prepared, Stage, merged};
use crate::align::{AlignReport, AlignedExpert, Fitted, Store, Survival, Transplant};
use crate::error::MergeError;
use crate::evaluate::{Cut, Evaluation, Score, Scorer};
use crate::families::{Matrix, dense_name};
use crate::gates::TokenPrompts;
use crate::plan::{Assembly, ExpertInput, Plan};
use crate::recipe::{Align, AlignMethod};
use crate::self_text::Writing;

/// Set apart from the seeds of text for routers, so that neither learns from what judges the other.
const SEED: u64 = 0x616c_6967_6e00_0000;

impl Prepared {
    /// Fits the experts as the recipe says; from then on they are part of what is built. `None` where it says nothing.
    pub(crate) fn align(
        &mut self,
        observer: &dyn Observer,
    ) -> Result<Option<AlignReport>, MergeError> {
        let Some(align) = self.align else { return Ok(None) };
        let experts: Vec<usize> =
            (0..self.originals.len()).filter(|&e| !self.same_as_base[e]).collect();
        let store = Store::beside(&self.target, self.plan.dtype)?;
        let texts = self.own_texts(&align, &experts, observer)?;
        let mut report = AlignReport { method: align.method.name(), experts: Vec::new() };
        let mut sources = vec![None; self.originals.len()];
        for (&expert, texts) in experts.iter().zip(&texts) {
            let made = self.fit(&align, expert, texts, &store, observer);
            let (source, made) = made.map_err(|e| self.origins.locate(e))?;
            sources[expert] = source;
            report.experts.extend(made);
        }
        self.take_aligned(sources)?;
        Ok(Some(report))
    }

    /// Bytes that fitting takes at most; 0 where nothing is fitted.
    pub(super) fn fitting_memory(&self) -> u64 {
        /// What the model crate holds of predictions: probabilities, and rows of two heads.
        const PREDICTIONS: u64 = 512 << 20;
        let Some(align) = self.align else { return 0 };
        let d = &self.plan.shape.dims;
        let [tokens, hidden, inter] = [align.tokens, d.hidden, d.intermediate].map(|n| n as u64);
        let mlp = 4 * 3 * hidden * inter;
        // Streams, inputs and targets of all tokens; second moments of the activations; the descent in f64.
        let states = 4 * tokens * 6 * hidden;
        let layer = 8 * inter * inter + 30 * 2 * mlp;
        let trained = match align.method {
            AlignMethod::Refit => 0,
            AlignMethod::Distil => 4 * mlp * d.layers as u64,
        };
        states + layer.max(trained) + PREDICTIONS
    }

    /// Puts sources with fitted MLPs in the place of experts; `None`: the expert stays.
    pub(crate) fn take_aligned(&mut self, sources: Vec<Option<Source>>) -> Result<(), MergeError> {
        (self.align, self.fitted) = (None, sources);
        let plan = |assembly: &mut Assembly| {
            for (expert, source) in assembly.experts.iter_mut().zip(&self.fitted) {
                let Some(source) = source else { continue };
                put(expert, source.clone());
            }
            Plan::new(assembly)
        };
        let warnings = std::mem::take(&mut self.plan.warnings);
        self.plan = plan(&mut self.assembly)?;
        self.plan.warnings = warnings;
        if let Some(other) = &mut self.alternative {
            other.1 = plan(&mut other.0)?;
        }
        Ok(())
    }

    /// Sources with fitted MLPs, once there are any.
    pub(crate) fn fitted(&self) -> &[Option<Source>] {
        &self.fitted
    }

    /// What of each expert's gain survives on the evaluation text of its name, by the perplexity of base and expert in
    /// `evaluation` and that of the expert's MLPs for every token.
    ///
    /// * `plain`: what would have been built without fitting
    pub(super) fn survivals(
        &self,
        report: &mut AlignReport,
        evaluation: &Evaluation,
        plain: &Assembly,
        shared: &[Gate],
        observer: &dyn Observer,
    ) -> Result<(), MergeError> {
        let (interrupt, placement) = (&self.options.interrupt, &self.options.placement);
        let scorer =
            Scorer::new(&self.assembly.base, &self.domains, Cut::default(), interrupt, placement)?;
        let names = self.names();
        let of = |name: &str| evaluation.models.iter().find(|m| m.name == name);
        for made in &mut report.experts {
            let domain = evaluation.domains.iter().position(|d| *d == made.name);
            let (Some(domain), Some(base), Some(own)) = (domain, of("base"), of(&made.name)) else {
                continue;
            };
            let Some(expert) = names.iter().position(|n| *n == made.name) else { continue };
            observer.stage(Stage::Evaluate, 2 * scorer.tokens(&[domain]) as u64);
            let oracle = |assembly: &Assembly| -> Result<f64, MergeError> {
                let source = self.oracle_of(assembly, expert, shared)?;
                let mut done = |tokens| observer.advance(tokens as u64);
                let scores = scorer.score(&source, &[domain], &mut done)?;
                Ok(scores.first().map_or(f64::NAN, Score::perplexity))
            };
            let perplexities = [oracle(plain)?, oracle(&self.assembly)?];
            made.evaluation =
                Survival::of(base.perplexity[domain], own.perplexity[domain], perplexities);
        }
        Ok(())
    }

    /// Text that each of `experts` writes from nothing, or its prompts where it cannot.
    fn own_texts(
        &self,
        align: &Align,
        experts: &[usize],
        observer: &dyn Observer,
    ) -> Result<Vec<Vec<Vec<u32>>>, MergeError> {
        observer.stage(Stage::SelfText, (align.tokens * experts.len()) as u64);
        let tokenizer = Tokenizer::from_source(&self.assembly.base)?;
        let writing = Writing {
            tokenizer: &tokenizer,
            tokens: align.tokens,
            seed: self.assembly.seed ^ SEED,
            interrupt: &self.options.interrupt,
        };
        let mut all = Vec::new();
        for &expert in experts {
            let mut texts = TokenPrompts::default();
            let mut told = |tokens| observer.advance(tokens as u64);
            writing.add(&self.originals[expert], expert, &mut texts, &mut told)?;
            if texts.positive.is_empty() {
                texts.positive.clone_from(&self.experts[expert].positive);
            }
            all.push(texts.positive);
        }
        Ok(all)
    }

    /// One expert: its source with fitted MLPs, and what that did.
    fn fit(
        &mut self,
        align: &Align,
        expert: usize,
        texts: &[Vec<u32>],
        store: &Store,
        observer: &dyn Observer,
    ) -> Result<(Option<Source>, Option<AlignedExpert>), MergeError> {
        let input = &self.assembly.experts[expert];
        let name = input.name.clone();
        if texts.is_empty() {
            self.notes
                .push(format!("expert `{name}` was not fitted: it has no text and can write none"));
            return Ok((None, None));
        }
        let moe = merged(&self.assembly)?;
        let plain = self.assembly.forced(expert)?.experts.swap_remove(0).source;
        let layers = input.layers.clone().unwrap_or(0..self.plan.shape.dims.layers);
        let base = self.plain_base.as_ref().unwrap_or(&self.assembly.base);
        let transplant = Transplant {
            student: Student { source: &moe, expert },
            teacher: &self.originals[expert],
            base: Some(base),
            layers: &layers,
            texts,
            store,
            interrupt: &self.options.interrupt,
        };
        let with = |fitted: &Fitted| {
            let mut assembly = self.assembly.clone();
            put(&mut assembly.experts[expert], with_matrices(&plain, fitted));
            merged(&assembly)
        };
        let (fitted, made) = transplant.run(align, self.assembly.seed, &with, observer)?;
        let source = (!fitted.is_empty()).then(|| with_matrices(&plain, &fitted));
        Ok((source, Some(AlignedExpert { name, ..made })))
    }
}

/// Puts a source with fitted MLPs in the place of an expert's: it has the MLPs of all layers, with their noise and scale.
fn put(expert: &mut ExpertInput, source: Source) {
    let name = std::mem::take(&mut expert.name);
    *expert = ExpertInput { source, name, layers: None, noise_scale: 0.0, residual_scale: 1.0 };
}

/// What the model card says.
pub(super) fn lines(report: &AlignReport) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        format!(
            "Experts fitted to the base's attention (`{}`), share of each one's gain that survives:",
            report.method
        ),
        String::new(),
        "| expert | MLPs as they came | fitted |".to_owned(),
        "|---|---|---|".to_owned(),
    ];
    let percent = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s));
    lines.extend(report.experts.iter().map(|e| {
        let [before, after] = [e.own_text.map(|s| s.before), e.own_text.map(|s| s.after)];
        format!("| {} | {} | {} |", e.name, percent(before), percent(after))
    }));
    lines
}

/// A dense source with other MLPs in some layers.
fn with_matrices(source: &Source, fitted: &Fitted) -> Source {
    let mut new = source.clone();
    for (layer, matrices) in fitted {
        for (matrix, weight) in Matrix::ALL.into_iter().zip(matrices) {
            let weight: WeightRef = Arc::clone(weight);
            new.tensors.insert(dense_name(*layer, matrix), weight);
        }
    }
    new
}
