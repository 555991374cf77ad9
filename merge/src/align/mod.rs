//! Experts whose attention was trained too, fitted to the attention that they get in a MoE.
//!
//! A MoE keeps the attention of its base: of what such an expert can do, some is lost, whatever the router does. The cure is to
//! fit the expert's MLPs to the stream that they now live in, with the dense model that they come from as teacher, on text
//! that it writes itself.

use std::ops::{ControlFlow, Range};

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_model::ModelError;
use moe_merge_model::transplant::{
    Distillation, Distilled, Student, distil, divergences, transplant,
};
use serde::Serialize;

use crate::build::{Observer, Stage};
use crate::error::MergeError;
use crate::recipe::{Align, AlignMethod};

mod error;
mod existing;
mod refit;
mod store;

pub use error::AlignError;
pub use existing::{AlignOptions, Alignment, ExistingReport};
pub(crate) use store::Store;

/// One text of an expert in so many is held out, to tell what was gained.
const HELD_OUT: usize = 8;

/// A base nearer to the expert's predictions than this, in nats, leaves nothing to tell shares of.
const GAP: f64 = 1e-4;

/// Shares of what an expert gains over the base that are left when its MLPs stand behind the base's attention: 1 is all of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize)]
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
        let (fit, held_out) = self.split();
        observer.stage(Stage::Align, self.layers.len() as u64);
        let mut fitted = self.refit(&fit, &mut || observer.advance(1))?;
        // Where there was nothing to mend layer by layer, there is nothing to learn.
        if align.method == AlignMethod::Distil && !fitted.is_empty() {
            observer.stage(Stage::Distil, align.steps as u64);
            let options = Distillation { steps: align.steps, seed, ..Distillation::default() };
            fitted = self.distil(&with(&fitted)?, &fit, &options, &mut || observer.advance(1))?;
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
        Ok((fitted, made))
    }

    /// Texts to fit on, and texts that are held out.
    fn split(&self) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
        let (mut fit, mut held_out) = (Vec::new(), Vec::new());
        for (i, text) in self.texts.iter().enumerate() {
            let own = if i % HELD_OUT == HELD_OUT - 1 { &mut held_out } else { &mut fit };
            own.push(text.clone());
        }
        if held_out.is_empty() {
            held_out.clone_from(&fit);
        }
        (fit, held_out)
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
        texts: &[Vec<u32>],
        options: &Distillation,
        done: &mut dyn FnMut(),
    ) -> Result<Fitted, MergeError> {
        let student = Student { source: start, ..self.student };
        let layers = self.layers.clone();
        let made = distil(student, self.teacher, texts, layers, options, &mut |_| {
            done();
            match self.interrupt.check() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        self.interrupt.check()?;
        made?
            .into_iter()
            .map(|Distilled { layer, sizes, weights }| {
                let place = (self.student.expert, layer);
                let method = AlignMethod::Distil;
                Ok((layer, self.store.put(method, place, sizes, &weights, self.interrupt)?))
            })
            .collect()
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
