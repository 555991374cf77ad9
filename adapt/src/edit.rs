//! One expert more, one less.

use std::path::Path;
use std::time::Instant;

use moe_merge_checkpoint::generation::commit;
use moe_merge_checkpoint::manifest::{FileRecord, SourceRecord};
use moe_merge_checkpoint::weight::Retyped;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Change, Interrupt};
use serde::Serialize;
use serde_json::{Value, json};

use crate::calibrate::Recalibration;
use crate::compatibility::Compatibility;
use crate::donor::Donor;
use crate::effect::Watched;
use crate::error::AdaptError;
use crate::mlp::Matrices;
use crate::moe::Moe;
use crate::proposal::{applied, stage};
use crate::report::{ChangeReport, Forecast};
use crate::structure::{Restructured, Slot, sources};
use crate::swap::{
    Convert, Unwatched, check_sizes, compatibility, convert, no_expert_there, old_matrices,
};

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct AddRequest {
    /// The model's folder.
    pub folder: String,
    /// Where the expert comes from: SOURCE, or `MOE#EXPERT`.
    pub with: String,
    /// Its name; by default that of the source, without folders.
    pub name: Option<String>,
    /// What to do about other dtypes.
    pub convert: Convert,
    /// Whether the routers are fitted to text; otherwise the expert's gate row is the mean of the others.
    pub calibrate: Option<Recalibration>,
    /// Why, for the journal.
    pub message: Option<String>,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct DropRequest {
    /// The model's folder.
    pub folder: String,
    /// The expert that goes: a name or a number.
    pub expert: String,
    /// Why, for the journal.
    pub message: Option<String>,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

/// What adding or dropping an expert does, or did.
#[derive(Debug, Clone, Serialize)]
pub struct EditReport {
    /// `add` or `drop`.
    pub action: &'static str,
    /// What every change reports.
    #[serde(flatten)]
    pub change: ChangeReport,
    /// Names of all experts then.
    pub experts: Vec<String>,
    /// How far source and model are from each other outside the experts.
    pub compatibility: Option<Compatibility>,
    /// Files that went to the store.
    pub removed: Vec<FileRecord>,
}

/// A change of the number of experts that was checked and can be made.
#[derive(Debug)]
pub struct Edit {
    moe: Moe,
    restructured: Restructured,
    /// Names of the experts then, where they have names.
    names: Option<Vec<String>>,
    sources: Option<Vec<SourceRecord>>,
    /// How the routers are made then, if all of them are new.
    gate_mode: Option<String>,
    details: Value,
    message: Option<String>,
    interrupt: Interrupt,
    report: EditReport,
}

impl Edit {
    /// Checks that an expert can be added. It comes last; its gate row is the mean of the others. Nothing is written.
    ///
    /// # Errors
    /// As [`crate::Swap::prepare`]; [`AdaptError::Taken`] if an expert has the name.
    pub fn add(request: AddRequest) -> Result<Self, AdaptError> {
        let clock = Instant::now();
        let moe = Moe::open(&request.folder)?;
        let donor = Donor::open(&request.with, Path::new(""))?;
        check_sizes(&moe, &donor)?;
        let name = request.name.clone().unwrap_or_else(|| donor.short_label());
        if moe.names.contains(&name) {
            let path = moe.source.path.clone();
            return Err(AdaptError::Taken { path, name, known: moe.names });
        }
        let slots: Vec<Slot> = (0..moe.names.len()).map(Slot::Kept).chain([Slot::New]).collect();
        let new = |layer: usize| -> Result<Matrices, AdaptError> {
            let old = old_matrices(&moe, layer, 0)?;
            let new = donor.matrices(layer)?.ok_or_else(|| no_expert_there(&moe, &donor, layer))?;
            Ok(convert(&old, new, request.convert)?.0)
        };
        let restructured = Restructured::of(&moe, &slots, &new)?;
        let compatibility = compatibility(&moe, &donor)?;
        let names: Vec<String> = moe.names.iter().cloned().chain([name.clone()]).collect();
        let details = json!({
            "expert": moe.names.len(), "name": name, "with": donor.short_label(),
            "base_difference": compatibility.difference,
        });
        let unfitted = request.calibrate.is_none().then(|| unfitted(&name));
        let mut change = ChangeReport::new(&moe, moe.names.len(), name);
        change.warnings.extend(donor.source.notes.iter().cloned());
        change.warnings.extend(compatibility.note(&donor.label));
        change.warnings.extend(restructured.notes.clone());
        change.warnings.extend(unfitted);
        change.seconds.prepare = clock.elapsed().as_secs_f64();
        let report = EditReport {
            action: "add",
            change,
            experts: names.clone(),
            compatibility: Some(compatibility),
            removed: Vec::new(),
        };
        let mut edit = Self {
            names: Some(names),
            sources: sources(&moe, &slots, &donor.short_label()),
            restructured,
            gate_mode: None,
            details,
            message: request.message,
            interrupt: request.interrupt,
            report,
            moe,
        };
        if let Some(wanted) = &request.calibrate {
            edit.recalibrate(wanted)?;
        }
        Ok(edit)
    }

    /// Fits the routers of the model as it will be.
    fn recalibrate(&mut self, wanted: &Recalibration) -> Result<(), AdaptError> {
        let clock = Instant::now();
        let after = applied(&self.moe.source, &self.change());
        let (names, expert) = (&self.report.experts, self.report.change.expert);
        let found = wanted.run(&self.moe, &after, names, expert, &self.interrupt, &Unwatched)?;
        let all = self.restructured.tensors.iter_mut().flat_map(|group| &mut group.tensors);
        for (name, weight) in all {
            if let Some((_, new)) = found.tensors.iter().find(|(n, _)| n == name) {
                *weight = Retyped::of(new.clone(), weight.dtype());
            }
        }
        self.report.change.warnings.extend(found.notes);
        self.details["calibrated"] = found.details;
        self.gate_mode = found.gate_mode;
        self.report.change.seconds.calibrate = clock.elapsed().as_secs_f64();
        Ok(())
    }

    /// Checks that an expert can go. Those behind it get the numbers before theirs. Nothing is written.
    ///
    /// # Errors
    /// [`AdaptError::LastExpert`], no such expert, and what opening meets.
    pub fn drop(request: DropRequest) -> Result<Self, AdaptError> {
        let clock = Instant::now();
        let moe = Moe::open(&request.folder)?;
        let expert = moe.expert(&request.expert)?;
        if moe.names.len() == 1 {
            return Err(AdaptError::LastExpert { path: moe.source.path });
        }
        let slots: Vec<Slot> =
            (0..moe.names.len()).filter(|e| *e != expert).map(Slot::Kept).collect();
        let none = |_| Err(AdaptError::LastExpert { path: moe.source.path.clone() });
        let restructured = Restructured::of(&moe, &slots, &none)?;
        let mut names = moe.names.clone();
        let name = names.remove(expert);
        let mut change = ChangeReport::new(&moe, expert, name.clone());
        change.warnings.extend(restructured.notes.clone());
        change.warnings.push(format!(
            "the weights of `{name}` are kept for `rollback`; `moe-merge history {} --prune` removes them from the disk",
            moe.source.path.display()
        ));
        let known = moe.manifest.as_ref().is_some_and(|m| !m.experts.is_empty());
        if !known {
            names = (0..names.len()).map(|e| e.to_string()).collect();
        }
        change.seconds.prepare = clock.elapsed().as_secs_f64();
        let report = EditReport {
            action: "drop",
            change,
            experts: names.clone(),
            compatibility: None,
            removed: Vec::new(),
        };
        Ok(Self {
            names: known.then_some(names),
            sources: sources(&moe, &slots, ""),
            restructured,
            gate_mode: None,
            details: json!({ "expert": expert, "name": name }),
            message: request.message,
            interrupt: request.interrupt,
            report,
            moe,
        })
    }

    /// What will be done.
    pub fn plan(&self) -> &EditReport {
        &self.report
    }

    /// Bytes of the new tensors.
    pub fn bytes(&self) -> u64 {
        let tensors = self.restructured.tensors.iter().flat_map(|group| &group.tensors);
        tensors.map(|(_, w)| w.size_in(w.dtype())).sum()
    }

    /// Measures the effect on text, for the report.
    ///
    /// # Errors
    /// Text that cannot be read; what running the models meets.
    pub fn forecast(&mut self, forecast: &Forecast) -> Result<(), AdaptError> {
        let expert = Some(self.report.change.expert);
        let watched = match self.report.action {
            "add" => Watched { before: None, after: expert },
            _ => Watched { before: expert, after: None },
        };
        let mut report = self.report.change.clone();
        report.forecast(&self.moe, &self.change(), watched, forecast, &self.interrupt)?;
        self.report.change = report;
        Ok(())
    }

    /// Makes the next generation; `progress` is told the bytes just written, from any thread.
    ///
    /// # Errors
    /// As [`commit`]; then the model is as before.
    pub fn run(self, progress: &(dyn Fn(u64) + Sync)) -> Result<EditReport, AdaptError> {
        let clock = Instant::now();
        let watch = Watch { interrupt: &self.interrupt, progress };
        let made = commit(&self.moe.source.path, &self.change(), watch)?;
        let mut report = self.report;
        report.removed.clone_from(&made.removed);
        report.change.made(made, clock);
        Ok(report)
    }

    /// Writes the change beside the model, where it waits for [`crate::approve`].
    ///
    /// # Errors
    /// What writing meets; then nothing is left.
    pub fn stage(self, progress: &(dyn Fn(u64) + Sync)) -> Result<EditReport, AdaptError> {
        let watch = Watch { interrupt: &self.interrupt, progress };
        let staged = stage(&self.moe, &self.change(), self.report.change.effect.clone(), watch)?;
        let mut report = self.report;
        report.change.waits(staged);
        Ok(report)
    }

    fn change(&self) -> Change<'_> {
        let mut details = self.details.clone();
        if let Some(effect) = &self.report.change.effect {
            details["effect"] = json!(effect);
        }
        Change {
            message: self.message.as_deref(),
            details,
            experts: self.names.clone(),
            sources: self.sources.clone(),
            gate_mode: self.gate_mode.clone(),
            ..self.restructured.change(self.report.action, &self.moe)
        }
    }
}

/// What an expert without a gate row of its own should be told about.
fn unfitted(name: &str) -> String {
    format!("the gate row of `{name}` is the mean of the others: `--calibrate` fits it to text")
}
