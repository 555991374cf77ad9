//! Why an expert cannot be fine-tuned.

use std::path::PathBuf;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_merge::MergeError;
use moe_merge_merge::documents::DocumentError;
use moe_merge_model::expert_training::GradientError;
use moe_merge_model::{ModelError, TextError};

use crate::error::AdaptError;

/// Why an expert cannot be fine-tuned.
#[derive(Debug, thiserror::Error)]
pub enum FinetuneError {
    /// What merging can meet, too: files, text, models.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// What changing a model can meet.
    #[error(transparent)]
    Adapt(#[from] AdaptError),
    /// Something that is no folder of its own cannot be changed.
    #[error("only a model folder can be changed")]
    NotAFolder {
        /// As a person wrote it.
        found: String,
    },
    /// An expert that is not there.
    #[error("there is no such expert")]
    NoExpert {
        /// The model.
        path: PathBuf,
        /// As a person wrote it; empty where none was named.
        found: String,
        /// Names of the experts there are.
        experts: Vec<String>,
    },
    /// An option out of its range.
    #[error("`{name}` cannot be used so")]
    Option {
        /// Its name.
        name: &'static str,
        /// What it can be.
        expected: String,
        /// What it is.
        found: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Data without anything to learn.
    #[error("there is nothing to learn from")]
    NoData {
        /// The files.
        files: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A state of another run.
    #[error("the state belongs to another run")]
    OtherRun {
        /// The state.
        file: PathBuf,
        /// What differs.
        what: String,
        /// What this run says.
        expected: String,
        /// What the state says.
        found: String,
    },
    /// Loss or gradient became NaN or infinite.
    #[error("training came to an end at step {step}: {what} is not finite")]
    Diverged {
        /// The step.
        step: u64,
        /// What is not finite.
        what: String,
        /// Where the last good state is, if a file keeps it.
        state: Option<PathBuf>,
    },
}

impl From<CheckpointError> for FinetuneError {
    fn from(error: CheckpointError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<ModelError> for FinetuneError {
    fn from(error: ModelError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<TextError> for FinetuneError {
    fn from(error: TextError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<DocumentError> for FinetuneError {
    fn from(error: DocumentError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<GradientError> for FinetuneError {
    fn from(error: GradientError) -> Self {
        match error {
            GradientError::Interrupted => CheckpointError::Interrupted.into(),
            GradientError::Model(e) => e.into(),
            GradientError::NotFinite { what } => Self::Diverged { step: 0, what, state: None },
        }
    }
}

impl Explain for FinetuneError {
    fn kind(&self) -> Kind {
        match self {
            Self::Merge(e) => e.kind(),
            Self::Adapt(e) => e.kind(),
            Self::Diverged { .. } => Kind::CheckFailed,
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Merge(e) => e.fields(),
            Self::Adapt(e) => e.fields(),
            Self::NotAFolder { found } => vec![
                (
                    "expected",
                    "a folder with `config.json` and safetensors, without `+ADAPTER`".into(),
                ),
                ("found", format!("`{found}`")),
            ],
            Self::NoExpert { path, found, experts } => vec![
                ("path", path.display().to_string()),
                (
                    "expected",
                    match experts.is_empty() {
                        true => "no `--expert`: the model is dense".into(),
                        false => format!("one of {}", experts.join(", ")),
                    },
                ),
                ("found", if found.is_empty() { "none".into() } else { format!("`{found}`") }),
            ],
            Self::Option { expected, found, .. } => {
                vec![("expected", expected.clone()), ("found", found.clone())]
            }
            Self::NoData { files, expected, found } => vec![
                ("data", files.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::OtherRun { file, what, expected, found } => vec![
                ("file", file.display().to_string()),
                ("key", what.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::Diverged { state, .. } => {
                let kept = |s: &PathBuf| ("last good state", s.display().to_string());
                state.iter().map(kept).collect()
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Merge(e) => e.hint(),
            Self::Adapt(e) => e.hint(),
            Self::Option { hint, .. } => hint.clone(),
            Self::OtherRun { .. } => {
                Some("run the command that began it, or name another file with `--state`".into())
            }
            Self::Diverged { .. } => {
                Some("a smaller `--learning-rate`, or a longer `--warmup`, keeps it finite".into())
            }
            _ => None,
        }
    }
}
