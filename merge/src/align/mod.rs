//! Experts whose attention was trained too, fitted to the attention that they get in a MoE.
//!
//! A MoE keeps the attention of its base: of what such an expert can do, some is lost, whatever the router does. The cure is to
//! fit the expert's MLPs to the stream that they now live in, with the dense model that they come from as teacher, on text
//! that it writes itself.

use std::ops::Range;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_model::ModelError;
use moe_merge_model::transplant::{
    Distillation, Pupil, Student, Visits, distil, divergences, transplant,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::build::{Observer, Stage};
use crate::error::MergeError;
use crate::recipe::{Align, AlignMethod};

mod error;
mod existing;
mod joint;
mod refit;
mod state;
mod store;
mod texts;

pub use error::AlignError;
pub use existing::{AlignOptions, Alignment, ExistingReport};
pub use joint::{JointExpert, JointReport};
pub(crate) use joint::{Member, join};
use state::{Done, Keeper, kept};
pub(crate) use store::Store;
pub(crate) use texts::Texts;

/// A base nearer to the expert's predictions than this, in nats, leaves nothing to tell shares of.
const GAP: f64 = 1e-4;

/// Shares of what an expert gains over the base that are left when its MLPs stand behind the base's attention: 1 is all of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Survival {
    /// With the MLPs as they come.
    pub before: f64,
    /// With fitted ones.
    pub after: f64,
}

impl Survival {
    /// From perplexities: of the base, of the expert itself, and of the two ways to use its MLPs. `None` where the expert
    /// gains less than a thousandth of a nat.
    pub(crate) fn of(base: f64, own: f64, [before, after]: [f64; 2]) -> Option<Self> {
        let gap = base.ln() - own.ln();
        let share = |p: f64| (base.ln() - p.ln()) / gap;
        (gap > 1e-3).then(|| Self { before: share(before), after: share(after) })
    }
}

/// What became of one expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlignedExpert {
    /// Its name.
    pub name: String,
    /// Layers that got new matrices.
    pub layers: usize,
    /// Tokens it was fitted on.
    pub tokens: usize,
    /// Divergence from the predictions of its dense model on text of its own that was held out, in nats per token: with MLPs as
    /// they came, and fitted.
    pub divergence: [f64; 2],
    /// The same as shares of its gain, by divergence from its predictions; `None` where base and expert predict the
    /// same.
    pub own_text: Option<Survival>,
    /// On the evaluation text of its name, by perplexity, where the recipe has one.
    pub evaluation: Option<Survival>,
}

/// What fitting did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlignReport {
    /// The method.
    pub method: &'static str,
    /// Experts in order; those that are the base itself are left out.
    pub experts: Vec<AlignedExpert>,
    /// What training all of them together did, behind the routers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub joint: Option<JointReport>,
}

/// One expert with everything it is fitted with.
#[derive(Clone, Copy)]
pub(crate) struct Transplant<'a> {
    /// The MoE, and where in it the expert stands.
    pub student: Student<'a>,
    /// The model that it comes from.
    pub teacher: &'a Source,
    /// What its gain is taken against, where that is known.
    pub base: Option<&'a Source>,
    /// Layers in which it is itself.
    pub layers: &'a Range<usize>,
    /// Texts of its kind.
    pub texts: &'a [Vec<u32>],
    pub store: &'a Store,
    pub interrupt: &'a Interrupt,
}

/// Bytes that fitting takes at most.
///
/// * sizes: width of the stream, and of an expert; layers; experts that are fitted
pub(crate) fn memory(align: &Align, sizes: [usize; 4]) -> u64 {
    /// What the model crate holds of a teacher's predictions: probabilities, and rows of two heads.
    const PREDICTIONS: u64 = 512 << 20;
    let [hidden, inter, layers, experts] = sizes.map(|n| n as u64);
    let mlp = 4 * 3 * hidden * inter;
    // Streams, inputs and targets of all tokens; second moments of the activations; the descent in f64.
    let states = 4 * align.tokens as u64 * 6 * hidden;
    let layer = 8 * inter * inter + 30 * 2 * mlp;
    // Numbers, their gradients, the best ones, and two moments unless the rank is low.
    let copies = if align.rank.is_some() { 3 } else { 5 };
    let (trained, teachers) = match align.method {
        AlignMethod::Refit => (0, 1),
        AlignMethod::Distil => (copies * mlp * layers, 1),
        AlignMethod::Joint => (copies * mlp * layers * experts, experts),
    };
    states + layer.max(trained) + teachers * PREDICTIONS
}

/// New matrices by layer.
pub(crate) type Fitted = Vec<(usize, [WeightRef; 3])>;

impl Transplant<'_> {
    /// Fits the expert as `align` says; what makes nothing better is dropped again, and no matrices are left.
    ///
    /// * `with`: the MoE with other matrices for the expert
    ///
    /// # Errors
    /// As [`transplant`], [`distil`] and [`refit::fit`]; interruption; a disk that is full.
    pub fn run(
        &self,
        align: &Align,
        seed: u64,
        with: &dyn Fn(&Fitted) -> Result<Source, MergeError>,
        observer: &dyn Observer,
    ) -> Result<(Fitted, AlignedExpert), MergeError> {
        let begun = self.begun(align, seed);
        let done = self.keeper("done", &begun);
        if let Some(kept) = done.as_ref().map(Keeper::done::<Done>).transpose()?.flatten() {
            let one = |layer: &usize| -> Result<_, MergeError> {
                Ok((*layer, self.store.get(kept.method, (self.student.expert, *layer))?))
            };
            let fitted = kept.layers.iter().map(one).collect::<Result<Fitted, _>>()?;
            return Ok((fitted, kept.made));
        }
        let (fit, held_out) = texts::split(self.texts);
        observer.stage(Stage::Align, self.layers.len() as u64);
        let mut fitted = self.refit(&fit, &mut || observer.advance(1))?;
        // Where there was nothing to mend layer by layer, there is nothing to learn.
        if align.method == AlignMethod::Distil && !fitted.is_empty() {
            observer.stage(Stage::Distil, align.steps as u64);
            let (start, options) = (with(&fitted)?, joint::options(align, seed));
            let keeper = self.keeper("distil", &begun);
            let mut told = || observer.advance(1);
            fitted = self.distil(&start, [&fit, &held_out], &options, keeper, &mut told)?;
        }
        let tokens = fit.iter().map(Vec::len).sum();
        let (nats, base) = self.divergences(&with(&fitted)?, &held_out)?;
        let mut made = AlignedExpert {
            name: String::new(),
            layers: fitted.len(),
            tokens,
            divergence: nats,
            own_text: None,
            evaluation: None,
        };
        if nats[1] > nats[0] {
            fitted.clear();
            (made.layers, made.divergence[1]) = (0, nats[0]);
        }
        made.own_text = base.filter(|base| *base > GAP).map(|base| {
            let [before, after] = made.divergence.map(|nats| 1.0 - nats / base);
            Survival { before, after }
        });
        if let Some(done) = done {
            let method = match align.method {
                AlignMethod::Distil => AlignMethod::Distil,
                AlignMethod::Refit | AlignMethod::Joint => AlignMethod::Refit,
            };
            let layers = fitted.iter().map(|(layer, _)| *layer).collect();
            done.finish(&Done { method, layers, made: made.clone() })?;
            self.keeper("distil", &begun).map_or(Ok(()), |k| k.forget())?;
        }
        Ok((fitted, made))
    }

    /// What has to be the same for what was kept to be of use.
    fn begun(&self, align: &Align, seed: u64) -> Value {
        let folder = &self.student.source.path;
        json!({
            "student": self.student.source.label, "expert": self.student.expert,
            "generation": Manifest::load(folder).ok().flatten().map(|m| m.generation),
            "teacher": self.teacher.label, "base": self.base.map(|b| &b.label),
            "layers": [self.layers.start, self.layers.end],
            "method": align.method.name(), "steps": align.steps, "rank": align.rank,
            "stream": align.stream, "seed": seed,
        })
    }

    /// A file of this expert's in the folder that keeps things, if there is one.
    fn keeper(&self, what: &str, begun: &Value) -> Option<Keeper> {
        let name = format!("expert-{:02}.{what}", self.student.expert);
        Some(Keeper::new(self.store.kept()?, &name, begun.clone(), &[self.texts]))
    }

    /// Fits layer by layer. `done` is told of each layer.
    ///
    /// # Errors
    /// As [`transplant`] and [`refit::fit`]; interruption; a disk that is full.
    fn refit(&self, texts: &[Vec<u32>], done: &mut dyn FnMut()) -> Result<Fitted, MergeError> {
        let (mut fitted, mut failed) = (Fitted::new(), None);
        let ran = transplant(self.student, self.teacher, texts, self.layers.clone(), &mut |view| {
            let new = self.layer(&view).map_err(|e| {
                failed = Some(e);
                ModelError::Stopped("a layer was not fitted".into())
            })?;
            done();
            fitted.extend(new.clone().map(|new| (view.layer, new)));
            Ok(new)
        });
        failed.map_or(Ok(()), Err)?;
        ran?;
        Ok(fitted)
    }

    fn layer(
        &self,
        view: &moe_merge_model::transplant::LayerFit<'_>,
    ) -> Result<Option<[WeightRef; 3]>, MergeError> {
        self.interrupt.check()?;
        let Some(flat) = refit::fit(view)? else { return Ok(None) };
        let expert = self.student.expert;
        let place = (expert, view.layer);
        let new = self.store.put(AlignMethod::Refit, place, view.sizes(), &flat, self.interrupt)?;
        Ok(Some(new))
    }

    /// Trains all layers together, from the matrices that the expert has in `start`. `done` is told of each step.
    ///
    /// # Errors
    /// As [`distil`]; interruption; a disk that is full.
    fn distil(
        &self,
        start: &Source,
        [texts, held_out]: [&[Vec<u32>]; 2],
        options: &Distillation,
        mut keeper: Option<Keeper>,
        done: &mut dyn FnMut(),
    ) -> Result<Fitted, MergeError> {
        let (expert, layers) = (self.student.expert, self.layers.clone());
        let pupil = Pupil { expert, teacher: self.teacher, texts, held_out, layers };
        let made = kept(&mut keeper, self.interrupt, done, &mut |state, told| {
            distil(start, std::slice::from_ref(&pupil), Visits::Forced, options, state, told)
        })?;
        let put = |m: moe_merge_model::transplant::Matrices| {
            let place = (m.expert, m.layer);
            let method = AlignMethod::Distil;
            let new = self.store.put(method, place, m.sizes, &m.weights, self.interrupt)?;
            Ok((m.layer, new))
        };
        made.matrices.into_iter().map(put).collect()
    }

    /// Divergence from the teacher's predictions on `texts`, in nats per token: of the expert as it came and in `fitted`, and
    /// of the base.
    fn divergences(
        &self,
        fitted: &Source,
        texts: &[Vec<u32>],
    ) -> Result<([f64; 2], Option<f64>), MergeError> {
        let of = |source| Student { source, ..self.student };
        let students: Vec<Student<'_>> =
            [self.student, of(fitted)].into_iter().chain(self.base.map(of)).collect();
        let nats = divergences(self.teacher, &students, texts)?;
        Ok(([nats[0], nats[1]], nats.get(2).copied()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survival_by_hand() {
        let e = std::f64::consts::E;
        let found = Survival::of(e.powi(3), e, [e.powf(2.5), e.powf(1.5)]).unwrap();
        assert!((found.before - 0.25).abs() < 1e-12 && (found.after - 0.75).abs() < 1e-12);
        assert_eq!(Survival::of(2.0, 2.0, [2.0, 2.0]), None);
    }
}
