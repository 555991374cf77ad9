//! The step of a build that fits experts to the attention they get.

use std::sync::Arc;

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_model::Tokenizer;
use moe_merge_model::transplant::Student;
use moe_merge_router::Gate;

use super::{Observer, Prepared, Stage, merged};
use crate::align::{
    AlignReport, AlignedExpert, Fitted, Member, Store, Survival, Texts, Transplant, join, memory,
};
use crate::documents::Encoder;
use crate::error::MergeError;
use crate::evaluate::{Cut, Evaluation, Score, Scorer};
use crate::families::{Layout, Matrix, dense_name};
use crate::gates::Routers;
use crate::plan::{Assembly, ExpertInput, Plan};
use crate::recipe::{Align, AlignMethod};

/// Set apart from the seeds of text for routers, so that neither learns from what judges the other.
const SEED: u64 = 0x616c_6967_6e00_0000;

/// What is left to do once there are routers: everything together.
#[derive(Debug, Clone)]
pub(crate) struct Jointly {
    align: Align,
    /// By expert of the recipe; `None` where there is no text.
    members: Vec<Option<Member>>,
    store: Store,
}

impl Jointly {
    /// The same for some of the experts, which come in this order.
    pub(crate) fn of(&self, experts: &[usize]) -> Self {
        let member = |(expert, own): (usize, &usize)| {
            self.members[*own].clone().map(|member| Member { expert, ..member })
        };
        let members = experts.iter().enumerate().map(member).collect();
        Self { members, ..self.clone() }
    }
}

impl Prepared {
    /// Fits the experts as the recipe says; from then on they are part of what is built. `None` where it says nothing.
    pub(crate) fn align(
        &mut self,
        observer: &dyn Observer,
    ) -> Result<Option<AlignReport>, MergeError> {
        let Some(align) = self.align.take() else { return Ok(None) };
        let store = Store::of(&align, &self.target, self.plan.dtype)?;
        let texts = self.own_texts(&align, observer).map_err(|e| self.origins.locate(e))?;
        let layers: Vec<_> = (0..self.originals.len()).map(|e| self.own_layers(e)).collect();
        let mut report =
            AlignReport { method: align.method.name(), experts: Vec::new(), joint: None };
        let mut sources = vec![None; self.originals.len()];
        let same = self.same_as_base.clone();
        for (expert, texts) in texts.iter().enumerate().filter(|(e, _)| !same[*e]) {
            let made = self.fit(&align, expert, texts, &store, observer);
            let (source, made) = made.map_err(|e| self.origins.locate(e))?;
            sources[expert] = source;
            report.experts.extend(made);
        }
        let jointly = (align.method == AlignMethod::Joint).then(|| {
            let member = |((expert, texts), layers): ((usize, Vec<Vec<u32>>), _)| Member {
                expert,
                name: self.assembly.experts[expert].name.clone(),
                teacher: self.originals[expert].clone(),
                texts,
                layers: if self.same_as_base[expert] { 0..0 } else { layers },
            };
            let members = texts.into_iter().enumerate().zip(layers).map(member);
            let members = members.map(|m| (!m.texts.is_empty()).then_some(m)).collect();
            Jointly { align, members, store }
        });
        self.take_aligned(sources, jointly)?;
        Ok(Some(report))
    }

    /// Trains experts and routers together, where the recipe says so; from then on they are part of what is built.
    pub(crate) fn join(
        &mut self,
        routers: &mut Routers,
        report: Option<&mut AlignReport>,
        observer: &dyn Observer,
    ) -> Result<(), MergeError> {
        let Some(Jointly { align, members, store }) = self.jointly.take() else { return Ok(()) };
        let members: Vec<Member> = members.into_iter().flatten().collect();
        let hub = Assembly { layout: Layout::Hub, ..self.assembly.clone() };
        let gates = super::parts::gates(&routers.layers, &routers.shared);
        let moe = Plan::new(&hub)?.source_with(&hub, &gates)?;
        let how = (&align, self.assembly.seed);
        let joined = join(&moe, &members, how, &store, &self.options.interrupt, observer);
        let joined = joined.map_err(|e| self.origins.locate(e))?;
        let mut sources = self.fitted.clone();
        for (expert, fitted) in joined.fitted {
            let plain = self.assembly.forced(expert)?.experts.swap_remove(0).source;
            sources[expert] = Some(with_matrices(&plain, &fitted));
        }
        for (layer, rows) in joined.gates {
            if let Some(gate) = routers.layers.get_mut(layer) {
                gate.rows = rows;
            }
        }
        if let Some(report) = report {
            report.joint = Some(joined.report);
        }
        self.take_aligned(sources, None)
    }

    /// Bytes that fitting takes at most; 0 where nothing is fitted.
    pub(super) fn fitting_memory(&self) -> u64 {
        let Some(align) = &self.align else { return 0 };
        let d = &self.plan.shape.dims;
        memory(align, [d.hidden, d.intermediate, d.layers, self.originals.len()])
    }

    /// Puts sources with fitted MLPs in the place of experts; `None`: the expert stays. `jointly` is left for
    /// [`Prepared::join`].
    pub(crate) fn take_aligned(
        &mut self,
        sources: Vec<Option<Source>>,
        jointly: Option<Jointly>,
    ) -> Result<(), MergeError> {
        (self.align, self.fitted, self.jointly) = (None, sources, jointly);
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

    /// Sources with fitted MLPs, once there are any, and what is left to do with routers.
    pub(crate) fn fitted(&self) -> (&[Option<Source>], Option<&Jointly>) {
        (&self.fitted, self.jointly.as_ref())
    }

    /// Layers in which an expert is itself.
    fn own_layers(&self, expert: usize) -> std::ops::Range<usize> {
        let own = self.assembly.experts[expert].layers.clone();
        own.unwrap_or(0..self.plan.shape.dims.layers)
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

    /// The text of each expert.
    fn own_texts(
        &mut self,
        align: &Align,
        observer: &dyn Observer,
    ) -> Result<Vec<Vec<Vec<u32>>>, MergeError> {
        observer.stage(Stage::SelfText, (align.tokens * self.originals.len()) as u64);
        let tokenizer = Tokenizer::from_source(&self.assembly.base)?;
        let encoder = Encoder::with(&self.assembly.base, tokenizer);
        let names = self.names();
        let texts = Texts {
            align,
            encoder: &encoder,
            names: &names,
            seed: self.assembly.seed ^ SEED,
            interrupt: &self.options.interrupt,
        };
        let mut all = Vec::new();
        for (expert, teacher) in self.originals.iter().enumerate() {
            // Nobody is fitted to the base but behind routers, which have to know its text.
            if self.same_as_base[expert] && align.method != AlignMethod::Joint {
                all.push(Vec::new());
                continue;
            }
            let mut told = |tokens| observer.advance(tokens as u64);
            let prompts = &self.experts[expert];
            all.push(texts.of(expert, prompts, teacher, &mut self.notes, &mut told)?);
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
        let layers = self.own_layers(expert);
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
    if let Some(joint) = &report.joint {
        lines.extend([
            String::new(),
            format!(
                "Then all experts and routers were trained together for {} steps. Divergence of the whole mixture from each \
                 expert's dense model, in nats per token:",
                joint.best_step
            ),
            String::new(),
            "| expert | before | after |".to_owned(),
            "|---|---|---|".to_owned(),
        ]);
        lines.extend(joint.experts.iter().map(|e| {
            let [before, after] = e.divergence;
            format!("| {} | {before:.4} | {after:.4} |", e.name)
        }));
    }
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
