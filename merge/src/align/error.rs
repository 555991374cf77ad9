//! Why experts of a MoE cannot be fitted.

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_model::ModelError;

use crate::error::MergeError;

/// Why experts of a MoE cannot be fitted.
#[derive(Debug, thiserror::Error)]
pub enum AlignError {
    /// What merging can meet, too: files, models, text.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// A family that has all experts of a layer in one tensor.
    #[error("experts of a `{family}` lie in one tensor and cannot be replaced one by one")]
    Stacked {
        /// The family.
        family: &'static str,
    },
    /// No expert of this name.
    #[error("there is no expert `{name}`")]
    Expert {
        /// As a person wrote it.
        name: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// One expert with two teachers.
    #[error("expert `{name}` has two teachers")]
    Twice {
        /// Its name.
        name: String,
    },
    /// A teacher that cannot begin a text, and no other text.
    #[error("there is no text to fit expert `{name}` on")]
    Silent {
        /// The expert.
        name: String,
        /// Its teacher.
        teacher: String,
    },
    /// Everything together, but not all of it.
    #[error("`joint` needs the dense model of every expert")]
    Untaught {
        /// Experts without a teacher.
        names: Vec<String>,
    },
    /// Options that exclude each other.
    #[error("`{name}` has no meaning here")]
    Option {
        /// The option.
        name: &'static str,
        /// What it needs.
        expected: &'static str,
    },
}

impl From<CheckpointError> for AlignError {
    fn from(error: CheckpointError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<ModelError> for AlignError {
    fn from(error: ModelError) -> Self {
        Self::Merge(error.into())
    }
}

impl Explain for AlignError {
    fn kind(&self) -> Kind {
        match self {
            Self::Merge(e) => e.kind(),
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Merge(e) => e.fields(),
            Self::Expert { known, .. } => vec![(
                "expected",
                format!("one of `{}`, or a number below {}", known.join("`, `"), known.len()),
            )],
            Self::Stacked { .. } | Self::Twice { .. } => Vec::new(),
            Self::Silent { teacher, .. } => vec![
                ("teacher", teacher.clone()),
                (
                    "expected",
                    "text of its own, or a tokenizer with a token that begins or ends a text"
                        .into(),
                ),
            ],
            Self::Untaught { names } => {
                vec![("found", format!("no teacher of `{}`", names.join("`, `")))]
            }
            Self::Option { expected, .. } => vec![("expected", (*expected).to_owned())],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Merge(e) => e.hint(),
            Self::Stacked { .. } => {
                Some("`align: refit` in the recipe fits them while the model is built".into())
            }
            Self::Twice { .. } => Some("name it once".into()),
            Self::Silent { .. } => Some("`--data EXPERT=FILE` names text".into()),
            Self::Untaught { .. } => {
                Some("routers would forget the text of those that are left out: name them with `--teacher`".into())
            }
            Self::Expert { .. } | Self::Option { .. } => None,
        }
    }
}
