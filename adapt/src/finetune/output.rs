//! Where the result of a fine-tuning goes: an adapter, the model itself, or a change that waits beside it.

use std::path::Path;

use moe_merge_checkpoint::CheckpointError;
use moe_merge_checkpoint::generation::{Change, NewTensors, commit};
use moe_merge_checkpoint::publish::{Replace, Staging};
use moe_merge_checkpoint::write::Watch;
use serde_json::{Value, json};

use super::adapter::{self, Adapter};
use super::error::FinetuneError;
use super::state::State;
use super::{Finetune, FinetuneReport, Output, Packing, Update, trained};
use crate::moe::Moe;
use crate::proposal::propose;

/// Where the result goes, ready for it.
pub(super) enum Place {
    Adapter(Staging, Packing),
    Model(Option<String>),
    /// Beside the model, where it waits.
    Beside(Option<String>),
}

impl Finetune {
    pub(super) fn place(&self, output: &Output) -> Result<Place, FinetuneError> {
        match output {
            Output::Adapter { dir, packing } => {
                let full = self.options.update == Update::Full;
                adapter::check(full, &self.options.parts, &self.source.path)?;
                Ok(Place::Adapter(Staging::new(dir, Replace::Never)?, *packing))
            }
            Output::Apply { message } if self.changeable() => Ok(Place::Model(message.clone())),
            Output::Stage { message } if self.changeable() => Ok(Place::Beside(message.clone())),
            _ => Err(FinetuneError::NotAFolder { found: self.path.clone() }),
        }
    }

    /// Whether the model is a folder of its own.
    fn changeable(&self) -> bool {
        self.source.path.is_dir() && !self.adapted
    }

    pub(super) fn write(
        &self,
        place: Place,
        state: &State,
        report: &mut FinetuneReport,
    ) -> Result<(), FinetuneError> {
        let watch = Watch { interrupt: &self.options.interrupt, progress: &|_| {} };
        match place {
            Place::Adapter(staging, packing) => {
                let adapter = Adapter {
                    spec: &self.spec,
                    expert: self.number(),
                    factors: &state.best,
                    base: &self.path,
                    packing,
                    dropout: self.options.training.dropout,
                };
                adapter.write(staging.path(), watch)?;
                report.bytes_written = folder_bytes(staging.path())?;
                report.output = staging.publish()?;
            }
            Place::Model(message) => {
                let change = self.change(message.as_deref(), state, report)?;
                let made = commit(&self.source.path, &change, watch)?;
                report.output = self.source.path.clone();
                report.generation = Some(made.number);
                report.bytes_written = made.bytes_written;
                report.warnings.extend(made.notes);
            }
            Place::Beside(message) => {
                let change = self.change(message.as_deref(), state, report)?;
                let moe = Moe::open(&self.path)?;
                let made = propose(&moe, &change, watch.interrupt, watch.progress)?;
                report.output = self.source.path.clone();
                report.staged = Some(made.generation);
                report.bytes_written = made.bytes_written;
                report.warnings.extend(made.warnings);
            }
        }
        Ok(())
    }

    /// The change of the model that was learnt.
    fn change<'c>(
        &self,
        message: Option<&'c str>,
        state: &State,
        report: &FinetuneReport,
    ) -> Result<Change<'c>, FinetuneError> {
        let expert = self.number();
        let tensors = trained::tensors(&self.source, &self.spec, expert, &state.best)?;
        let role = expert.map_or("mlp".into(), |e| format!("expert-{e:02}"));
        let (routers, own) = trained::routers_apart(&self.spec, tensors);
        let mut files = vec![NewTensors { role, tensors: own }];
        if !routers.is_empty() {
            files.push(NewTensors { role: "router".into(), tensors: routers });
        }
        Ok(Change {
            action: "finetune",
            message,
            tensors: files,
            details: self.details(report)?,
            parent: Some(self.generation),
            ..Change::default()
        })
    }

    /// What the journal keeps.
    fn details(&self, report: &FinetuneReport) -> Result<Value, FinetuneError> {
        Ok(json!({
            "expert": self.number(),
            "name": self.expert(),
            "layers": report.layers,
            "update": self.options.update,
            "parts": self.options.parts,
            "route": self.options.route,
            "teacher": self.options.teacher,
            "keep": self.keep(),
            "router_penalty": self.options.router_penalty,
            "training": self.options.training,
            "steps": report.steps,
            "best_step": report.best_step,
            "tokens": report.tokens,
            "loss": report.loss,
            "validation": report.validation,
            "domains": report.domains,
        }))
    }
}

fn folder_bytes(folder: &Path) -> Result<u64, CheckpointError> {
    let failed = |e| CheckpointError::io("listing", folder, e);
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        sum += entry.and_then(|e| e.metadata()).map_err(failed)?.len();
    }
    Ok(sum)
}
