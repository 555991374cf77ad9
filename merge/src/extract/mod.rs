//! The difference of two checkpoints as a PEFT adapter.
//!
//! Each changed matrix becomes the best product of two factors of a given rank, by singular values; what has no such form
//! (norms, routers, by default embedding and head) is stored as it is in the tuned model.

mod adapter;
mod factor;
mod filter;
mod pairs;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Replace, Source, Staging};
use rayon::prelude::*;
use serde::Serialize;

use crate::error::MergeError;
use factor::Change;
pub use filter::Filter;
use pairs::{Form, Pair, Pairs};

/// How the factors of experts are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// One pair for each matrix of each expert, under its name in the checkpoint.
    #[default]
    Modules,
    /// One pair for each of the two parameters that hold all experts of a layer (`target_parameters`): what transformers 5
    /// has in memory. Gate and up are decomposed together.
    Fused,
}

/// Where the singular values go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Their square roots into both factors.
    #[default]
    Both,
    /// All of them into `A`.
    A,
}

/// What is wanted of an adapter.
#[derive(Debug, Clone)]
pub struct ExtractOptions {
    /// Largest rank.
    pub rank: NonZeroUsize,
    /// Singular values at or below this are left out.
    pub threshold: f64,
    /// Of each change, stop at this share of its energy (the sum of squares), `0..=1`.
    pub energy: Option<f64>,
    /// One expert alone, by name or number.
    pub expert: Option<String>,
    /// Factors for embedding and head too.
    pub embed_lora: bool,
    /// Leave out what cannot be decomposed.
    pub skip_undecomposable: bool,
    /// Which modules.
    pub filter: Filter,
    /// Where the singular values go.
    pub scale: Scale,
    /// How experts are laid out.
    pub packing: Packing,
    /// Dtype of the factors.
    pub dtype: Dtype,
    /// `base_model_name_or_path` of the adapter.
    pub base_name: String,
}

/// A module with factors.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractedModule {
    /// Its name in the base.
    pub module: String,
    /// Its rank.
    pub rank: usize,
    /// Share of the change's energy (the sum of squares) that the factors keep.
    pub energy_kept: f64,
    /// Length of the change over length of the base's weight.
    pub relative_change: f64,
}

/// What was extracted.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractReport {
    /// The adapter's folder.
    pub output: PathBuf,
    /// Largest rank, `r` of the adapter.
    pub rank: usize,
    /// Share of the energy of all decomposed changes that the factors keep.
    pub energy_kept: f64,
    /// Modules with factors.
    pub modules: Vec<ExtractedModule>,
    /// Modules stored as they are in the tuned model.
    pub saved: Vec<String>,
    /// Changed modules that were left out.
    pub left_out: Vec<String>,
    /// Modules that are the same in both models.
    pub unchanged: usize,
    /// Bytes of the adapter's weights.
    pub bytes: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// The work of an extraction, known before it begins.
#[derive(Debug)]
pub struct Extraction {
    pairs: Pairs,
    files: Vec<PathBuf>,
    options: ExtractOptions,
}

/// A module with what became of it.
struct Done {
    pair: Pair,
    change: Change,
}

impl Extraction {
    /// Finds what has to be compared; nothing is read but headers.
    ///
    /// # Errors
    /// [`MergeError::Incompatible`] for models that cannot be compared, [`MergeError::Argument`] for an expert or a filter
    /// that finds nothing, [`MergeError::Checkpoint`] for tensors that are missing or have another shape.
    pub fn prepare(
        base: &Source,
        tuned: &Source,
        options: ExtractOptions,
    ) -> Result<Self, MergeError> {
        let share = |s: &f64| (0.0..=1.0).contains(s);
        let (name, expected, found) = match (options.threshold, options.energy) {
            (t, _) if !(t.is_finite() && t >= 0.0) => ("--threshold", "a number from 0", t),
            (_, Some(s)) if !share(&s) => ("--energy", "a share from 0 to 1", s),
            _ => {
                base.computable()?;
                tuned.computable()?;
                let pairs = pairs::pairs(base, tuned, &options)?;
                let files = base.files.iter().chain(&tuned.files).cloned().collect();
                return Ok(Self { pairs, files, options });
            }
        };
        Err(MergeError::Argument {
            what: format!("`{name}` is out of range"),
            name: name.into(),
            expected: expected.into(),
            found: found.to_string(),
            hint: None,
        })
    }

    /// Numbers to compare, what [`Watch::progress`] counts.
    pub fn numbers(&self) -> u64 {
        self.pairs.list.iter().map(|p| p.base.len() as u64).sum()
    }

    /// Decomposes the changes and writes the adapter to `out`. Memory: the adapter, and one difference for each thread.
    ///
    /// # Errors
    /// [`MergeError`]: models that do not differ, numbers that are not finite, no room, an interruption; then there is no
    /// output.
    pub fn run(
        self,
        out: &Path,
        replace: Replace,
        watch: Watch<'_>,
    ) -> Result<ExtractReport, MergeError> {
        let clock = Instant::now();
        let staging = Staging::new(out, replace)?;
        staging.protect(&self.files)?;
        let options = &self.options;
        let failed = AtomicBool::new(false);
        let one = |pair: Pair| -> Result<Done, MergeError> {
            watch.interrupt.check()?;
            if failed.load(Ordering::Relaxed) {
                return Err(moe_merge_checkpoint::CheckpointError::Interrupted.into());
            }
            let change = factor::change(&pair, options).inspect_err(|_| {
                failed.store(true, Ordering::Relaxed);
            })?;
            pair.base.release();
            pair.tuned.release();
            (watch.progress)(pair.base.len() as u64);
            Ok(Done { pair, change })
        };
        let done: Vec<Result<Done, MergeError>> =
            self.pairs.list.into_par_iter().map(one).collect();
        let done = first_error(done)?;
        let mut report = report(&done, out, options);
        report.warnings.extend(self.pairs.notes);
        if report.modules.is_empty() && report.saved.is_empty() {
            return Err(nothing(options, &report));
        }
        let silent = |_| {};
        let watch = Watch { progress: &silent, ..watch };
        let adapter = adapter::Adapter::new(done, self.pairs.tied, options);
        (report.bytes, report.rank) = adapter.write(&staging, watch)?;
        staging.publish()?;
        report.seconds = clock.elapsed().as_secs_f64();
        Ok(report)
    }
}

/// All results, or the error that stopped the others.
fn first_error<T>(results: Vec<Result<T, MergeError>>) -> Result<Vec<T>, MergeError> {
    use moe_merge_checkpoint::CheckpointError::Interrupted;
    let stopped = |e: &MergeError| matches!(e, MergeError::Checkpoint(Interrupted));
    let (mut all, mut error) = (Vec::new(), None);
    for result in results {
        match result {
            Ok(value) => all.push(value),
            Err(e) if error.as_ref().is_none_or(stopped) => error = Some(e),
            Err(_) => {}
        }
    }
    error.map_or(Ok(all), Err)
}

fn nothing(options: &ExtractOptions, report: &ExtractReport) -> MergeError {
    MergeError::Argument {
        what: "there is nothing to put into an adapter".into(),
        name: "BASE TUNED".into(),
        expected: "a tensor that differs, above `--threshold`".into(),
        found: match report.left_out.len() {
            0 => format!("{} modules, all the same in both models", report.unchanged),
            n => format!("{n} changed modules, all left out (threshold {})", options.threshold),
        },
        hint: None,
    }
}

fn report(done: &[Done], out: &Path, options: &ExtractOptions) -> ExtractReport {
    let mut report = ExtractReport {
        output: out.to_owned(),
        rank: 0,
        energy_kept: 1.0,
        modules: Vec::new(),
        saved: Vec::new(),
        left_out: Vec::new(),
        unchanged: 0,
        bytes: 0,
        seconds: 0.0,
        warnings: Vec::new(),
    };
    let (mut all, mut all_kept) = (0.0, 0.0);
    for Done { pair, change } in done {
        let module = pair.module.clone();
        match change {
            Change::None => report.unchanged += 1,
            Change::Whole if options.skip_undecomposable => report.left_out.push(module),
            Change::Whole => report.saved.push(module),
            Change::Factors { factors, kept, energy, base } => {
                all += energy;
                all_kept += kept;
                if factors.rank == 0 {
                    report.left_out.push(module);
                    continue;
                }
                report.modules.push(ExtractedModule {
                    module,
                    rank: factors.rank,
                    energy_kept: (kept / energy).min(1.0),
                    relative_change: (energy / base.max(f64::MIN_POSITIVE)).sqrt(),
                });
            }
        }
    }
    if all > 0.0 {
        report.energy_kept = (all_kept / all).min(1.0);
    }
    report
}

impl Done {
    /// Whether only the bias changed.
    fn only_bias(&self) -> bool {
        self.pair.bias.is_some()
            && self.pair.form == Form::Linear
            && !matches!(&self.change, Change::Factors { factors, .. } if factors.rank > 0)
    }
}
