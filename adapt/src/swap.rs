//! One expert in place of another.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use moe_merge_checkpoint::generation::commit;
use moe_merge_checkpoint::manifest::SourceRecord;
use moe_merge_checkpoint::weight::Retyped;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Change, Dtype, Interrupt, NewTensors, WeightRef};
use moe_merge_merge::build::{Observer, Stage};
use moe_merge_model::spec::{Mlp, MoeMlp};
use serde::Serialize;
use serde_json::{Value, json};

use crate::calibrate::{Recalibrated, Recalibration};
use crate::compatibility::{Compatibility, difference, root_mean_square};
use crate::donor::Donor;
use crate::effect::Watched;
use crate::error::AdaptError;
use crate::mlp::{self, Matrices};
use crate::moe::Moe;
use crate::proposal::{applied, stage};
use crate::report::{ChangeReport, Forecast};

/// Whether weights of another dtype are rounded to the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Convert {
    /// They are refused, unless nothing is lost.
    #[default]
    Never,
    /// They are rounded once, to nearest even.
    Yes,
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct SwapRequest {
    /// The model's folder.
    pub folder: String,
    /// The expert that goes: a name or a number.
    pub expert: String,
    /// Where the new one comes from: SOURCE, or `MOE#EXPERT`. Relative paths are taken from the working folder.
    pub with: String,
    /// Only in these layers.
    pub layers: Option<Range<usize>>,
    /// What to do about other dtypes.
    pub convert: Convert,
    /// A new name for the expert.
    pub name: Option<String>,
    /// Whether the routers are fitted again.
    pub calibrate: Option<Recalibration>,
    /// Whether the effect on text is measured.
    pub forecast: Forecast,
    /// Why, for the journal.
    pub message: Option<String>,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

impl SwapRequest {
    /// All layers, no message.
    pub fn new(folder: &str, expert: &str, with: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            expert: expert.to_owned(),
            with: with.to_owned(),
            layers: None,
            convert: Convert::Never,
            name: None,
            calibrate: None,
            forecast: Forecast::None,
            message: None,
            interrupt: Interrupt::default(),
        }
    }
}

/// What a swap does, or did.
#[derive(Debug, Clone, Serialize)]
pub struct SwapReport {
    /// What every change reports.
    #[serde(flatten)]
    pub change: ChangeReport,
    /// Where the new expert comes from.
    pub with: String,
    /// Layers in which it changes.
    pub layers: Vec<usize>,
    /// Bytes of the new matrices, as the model stores them.
    pub expert_bytes: u64,
    /// Dtypes before and after rounding, if there was any.
    pub converted: Option<[String; 2]>,
    /// How far the two models are from each other outside the experts.
    pub compatibility: Compatibility,
    /// How far the new matrices are from the old ones: root mean square of `|new - old| / |old|` over a sample of rows.
    pub difference: f64,
    /// How the routers were fitted again, if they were.
    pub calibrated: Option<Value>,
}

/// A swap that was checked and can be made.
#[derive(Debug)]
pub struct Swap {
    request: SwapRequest,
    moe: Moe,
    donor: Donor,
    expert: usize,
    /// Layers with their experts, where the expert changes.
    layers: Vec<(usize, MoeMlp)>,
    tensors: Vec<(String, WeightRef)>,
    /// New routers, if they are fitted again.
    recalibrated: Option<Recalibrated>,
    report: SwapReport,
}

/// Nobody watches routers being fitted.
pub(crate) struct Unwatched;

impl Observer for Unwatched {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// Replaces one expert; see [`Swap`].
///
/// # Errors
/// As [`Swap::prepare`] and [`Swap::run`].
pub fn swap(request: &SwapRequest) -> Result<SwapReport, AdaptError> {
    Swap::prepare(request.clone())?.run(&|_| {})
}

impl Swap {
    /// Opens both models and checks that they go together. Nothing is written.
    ///
    /// # Errors
    /// [`AdaptError`]: no MoE, no such expert or layers, sizes or activation that differ, a dtype that would lose numbers,
    /// and what opening meets.
    pub fn prepare(request: SwapRequest) -> Result<Self, AdaptError> {
        let clock = Instant::now();
        let moe = Moe::open(&request.folder)?;
        let expert = moe.expert(&request.expert)?;
        let layers = moe.layers(request.layers.as_ref())?;
        let donor = Donor::open(&request.with, Path::new(""))?;
        check_sizes(&moe, &donor)?;
        let mut report = blank(&request, &moe, &donor, expert)?;
        report.layers = layers.iter().map(|(l, _)| *l).collect();
        report.change.warnings.extend(report.compatibility.note(&donor.label));
        let mut differences = Vec::new();
        let mut tensors = Vec::new();
        for (layer, experts) in &layers {
            let old = old_matrices(&moe, *layer, expert)?;
            let Some(new) = donor.matrices(*layer)? else {
                return Err(no_expert_there(&moe, &donor, *layer));
            };
            let (new, rounded) = convert(&old, new, request.convert)?;
            report.converted = report.converted.or(rounded);
            for (old, new) in old.iter().zip(&new) {
                report.expert_bytes += new.size_in(new.dtype());
                differences.push(difference(old.as_ref(), new.as_ref())?);
            }
            let hidden = moe.spec.hidden;
            tensors.extend(mlp::replaced(&moe.source, hidden, *layer, experts, expert, new)?);
        }
        report.difference = root_mean_square(&differences);
        if report.difference == 0.0 {
            report.change.warnings.push("the new expert has the weights of the old one".into());
        }
        report.change.seconds.prepare = clock.elapsed().as_secs_f64();
        let mut swap =
            Self { request, moe, donor, expert, layers, tensors, recalibrated: None, report };
        swap.recalibrate()?;
        swap.forecast()?;
        Ok(swap)
    }

    /// Fits the routers again, if that is asked for.
    fn recalibrate(&mut self) -> Result<(), AdaptError> {
        let Some(wanted) = &self.request.calibrate else { return Ok(()) };
        let clock = Instant::now();
        let after = applied(&self.moe.source, &self.change());
        let names = self.names().unwrap_or_else(|| self.moe.names.clone());
        let interrupt = &self.request.interrupt;
        let found = wanted.run(&self.moe, &after, &names, self.expert, interrupt, &Unwatched)?;
        self.report.change.warnings.extend(found.notes.iter().cloned());
        self.report.calibrated = Some(found.details.clone());
        self.report.change.seconds.calibrate = clock.elapsed().as_secs_f64();
        self.recalibrated = Some(found);
        Ok(())
    }

    /// Measures the effect on text, if that is asked for.
    fn forecast(&mut self) -> Result<(), AdaptError> {
        let watched = Watched { before: Some(self.expert), after: Some(self.expert) };
        let (forecast, interrupt) = (&self.request.forecast, &self.request.interrupt);
        let mut report = self.report.change.clone();
        report.forecast(&self.moe, &self.change(), watched, forecast, interrupt)?;
        self.report.change = report;
        Ok(())
    }

    /// What the swap will do.
    pub fn plan(&self) -> &SwapReport {
        &self.report
    }

    /// Makes the next generation; `progress` is told the bytes just written, from any thread.
    ///
    /// # Errors
    /// As [`commit`]; then the model is as before.
    pub fn run(self, progress: &(dyn Fn(u64) + Sync)) -> Result<SwapReport, AdaptError> {
        let clock = Instant::now();
        let watch = Watch { interrupt: &self.request.interrupt, progress };
        let made = commit(&self.moe.source.path, &self.change(), watch)?;
        let mut report = self.report;
        report.change.made(made, clock);
        Ok(report)
    }

    /// Writes the change beside the model, where it waits for [`crate::approve`].
    ///
    /// # Errors
    /// What writing meets; then nothing is left.
    pub fn stage(self, progress: &(dyn Fn(u64) + Sync)) -> Result<SwapReport, AdaptError> {
        let watch = Watch { interrupt: &self.request.interrupt, progress };
        let staged = stage(&self.moe, &self.change(), self.report.change.effect.clone(), watch)?;
        let mut report = self.report;
        report.change.waits(staged);
        Ok(report)
    }

    fn change(&self) -> Change<'_> {
        let mut tensors = vec![NewTensors { role: self.role(), tensors: self.tensors.clone() }];
        if let Some(routers) = &self.recalibrated {
            let routers = routers.tensors.clone();
            tensors.push(NewTensors { role: "router".into(), tensors: routers });
        }
        Change {
            action: "swap",
            message: self.request.message.as_deref(),
            tensors,
            gate_mode: self.recalibrated.as_ref().and_then(|r| r.gate_mode.clone()),
            details: self.details(),
            parent: Some(self.moe.generation()),
            experts: self.names(),
            sources: self.sources(),
            ..Change::default()
        }
    }

    /// The role of the new shard: the expert's own, or that of all experts where a family has them in one tensor.
    fn role(&self) -> String {
        match self.layers.iter().all(|(_, moe)| moe.names.expert(0).is_some()) {
            true => format!("expert-{:02}", self.expert),
            false => "experts".into(),
        }
    }

    /// Names of all experts, if one gets a new name.
    fn names(&self) -> Option<Vec<String>> {
        let name = self.request.name.as_ref()?;
        let mut names = self.moe.names.clone();
        names[self.expert].clone_from(name);
        Some(names)
    }

    /// What the model is made of then.
    fn sources(&self) -> Option<Vec<SourceRecord>> {
        let mut sources = self.moe.manifest.as_ref()?.sources.clone();
        let role = format!("expert {}", self.expert);
        let whole = self.layers.len() == self.moe.spec.moe_layers().count();
        let record = |role: String| SourceRecord {
            role,
            label: self.donor.short_label(),
            // The journal has the hash of the shard that was made of it.
            files: Vec::new(),
        };
        if whole {
            sources.retain(|s| s.role != role && !s.role.starts_with(&format!("{role}, layers ")));
            sources.push(record(role));
        } else {
            sources.push(record(format!("{role}, layers {}", runs(&self.report.layers))));
        }
        sources.sort_by(|a, b| a.role.cmp(&b.role));
        Some(sources)
    }

    /// What the journal keeps.
    fn details(&self) -> Value {
        json!({
            "expert": self.expert,
            "name": self.report.change.name,
            "with": self.donor.short_label(),
            "layers": runs(&self.report.layers),
            "converted": self.report.converted,
            "expert_difference": self.report.difference,
            "base_difference": self.report.compatibility.difference,
            "calibrated": self.report.calibrated,
            "effect": self.report.change.effect,
        })
    }
}

/// A report of what is known before a tensor is looked at.
fn blank(
    request: &SwapRequest,
    moe: &Moe,
    donor: &Donor,
    expert: usize,
) -> Result<SwapReport, AdaptError> {
    let name = request.name.clone().unwrap_or_else(|| moe.names[expert].clone());
    let mut change = ChangeReport::new(moe, expert, name);
    change.warnings.extend(donor.source.notes.iter().cloned());
    Ok(SwapReport {
        change,
        with: donor.label.clone(),
        layers: Vec::new(),
        expert_bytes: 0,
        converted: None,
        compatibility: compatibility(moe, donor)?,
        difference: 0.0,
        calibrated: None,
    })
}

/// Layer numbers as runs: `0..4, 7..8`.
pub(crate) fn runs(layers: &[usize]) -> String {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for &layer in layers {
        match runs.last_mut() {
            Some(run) if run.end == layer => run.end += 1,
            _ => runs.push(layer..layer + 1),
        }
    }
    let shown: Vec<String> = runs.iter().map(|r| format!("{}..{}", r.start, r.end)).collect();
    shown.join(", ")
}

/// How far the two models are from each other outside the experts.
pub(crate) fn compatibility(moe: &Moe, donor: &Donor) -> Result<Compatibility, AdaptError> {
    let (ours, theirs) = ((&moe.source, &moe.spec), (&donor.source, &donor.spec));
    Ok(Compatibility::measure(ours, theirs)?)
}

/// Refuses a source whose MLPs have other sizes, another function, or stand in another number of layers.
pub(crate) fn check_sizes(moe: &Moe, donor: &Donor) -> Result<(), AdaptError> {
    let differ = |what: &str, expected: String, found: String| {
        Err(AdaptError::Incompatible {
            what: format!("the source has {what} than the model"),
            model: moe.source.label.clone(),
            source_label: donor.label.clone(),
            expected,
            found,
        })
    };
    let width = |mlp: &Mlp| match mlp {
        Mlp::Dense(dense) => dense.inter,
        Mlp::Moe(moe) => moe.inter,
    };
    let (ours, theirs) = (&moe.spec, &donor.spec);
    let number = |key: &str, n: usize| format!("{key} {n}");
    if ours.layers.len() != theirs.layers.len() {
        let key = "num_hidden_layers";
        let (ours, theirs) = (ours.layers.len(), theirs.layers.len());
        return differ("another number of layers", number(key, ours), number(key, theirs));
    }
    if ours.hidden != theirs.hidden {
        let key = "hidden_size";
        return differ("another width", number(key, ours.hidden), number(key, theirs.hidden));
    }
    for (layer, experts) in ours.moe_layers() {
        let theirs = width(&theirs.layers[layer].mlp);
        if theirs != experts.inter {
            let key = "intermediate size";
            return differ(
                "MLPs of another width",
                number(key, experts.inter),
                number(key, theirs),
            );
        }
    }
    if ours.activation != theirs.activation {
        let (ours, theirs) = (format!("{:?}", ours.activation), format!("{:?}", theirs.activation));
        return differ("another activation", ours.to_lowercase(), theirs.to_lowercase());
    }
    Ok(())
}

pub(crate) fn no_expert_there(moe: &Moe, donor: &Donor, layer: usize) -> AdaptError {
    let has = |mlp: &Mlp| match mlp {
        Mlp::Dense(_) => "one MLP for all tokens",
        Mlp::Moe(_) => "experts",
    };
    AdaptError::Incompatible {
        what: format!("layer {layer} has experts in one of the two models only"),
        model: moe.source.label.clone(),
        source_label: donor.label.clone(),
        expected: has(&moe.spec.layers[layer].mlp).into(),
        found: has(&donor.spec.layers[layer].mlp).into(),
    }
}

/// The matrices that an expert of the model has.
pub(crate) fn old_matrices(moe: &Moe, layer: usize, expert: usize) -> Result<Matrices, AdaptError> {
    let mlp = &moe.spec.layers[layer].mlp;
    Ok(mlp::matrices(&moe.source, moe.spec.hidden, layer, mlp, expert)?)
}

/// New matrices in the dtypes of the old ones, and from which to which they were rounded.
pub(crate) fn convert(
    old: &Matrices,
    new: Matrices,
    convert: Convert,
) -> Result<(Matrices, Option<[String; 2]>), AdaptError> {
    let mut rounded = None;
    for (old, new) in old.iter().zip(&new) {
        new.expect_shape(old.shape(), "as the model's experts have")?;
        let (from, to) = (new.dtype(), old.dtype());
        if from == to {
            continue;
        }
        if to != Dtype::F32 && convert == Convert::Never {
            let (file, tensor) = new.origin();
            let (expected, found) = (to.to_string(), from.to_string());
            return Err(AdaptError::Dtype { file, tensor, expected, found });
        }
        rounded = Some([from.to_string(), to.to_string()]);
    }
    let mut dtypes = old.iter().map(|w| w.dtype());
    Ok((new.map(|w| Retyped::of(w, dtypes.next().unwrap_or(Dtype::F32))), rounded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_as_runs() {
        assert_eq!(runs(&[]), "");
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), "0..3, 5..6, 7..9");
    }
}
