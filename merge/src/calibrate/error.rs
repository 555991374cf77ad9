//! Why a MoE cannot get new routers.

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_model::{ModelError, TextError};
use moe_merge_router::UnknownEstimator;

use crate::error::MergeError;

/// Why a MoE cannot get new routers.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// What merging can meet, too: files, prompts, models.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// No estimator has this name.
    #[error("unknown estimator `{}`", .0.name)]
    Estimator(UnknownEstimator),
    /// Nothing to learn from.
    #[error("there is no text to calibrate with")]
    NoText {
        /// The estimator.
        estimator: &'static str,
    },
    /// A family whose experts cannot be run one by one.
    #[error("experts of a `{family}` cannot write text by themselves")]
    SelfText {
        /// The family.
        family: &'static str,
    },
}

impl From<CheckpointError> for CalibrateError {
    fn from(error: CheckpointError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<ModelError> for CalibrateError {
    fn from(error: ModelError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<TextError> for CalibrateError {
    fn from(error: TextError) -> Self {
        Self::Merge(error.into())
    }
}

impl Explain for CalibrateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Merge(e) => e.kind(),
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Merge(e) => e.fields(),
            Self::Estimator(_) | Self::SelfText { .. } => Vec::new(),
            Self::NoText { estimator } => {
                vec![("expected", format!("text for each expert: `{estimator}` learns from it"))]
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Merge(e) => e.hint(),
            Self::Estimator(e) => Some(e.hint()),
            Self::NoText { .. } => Some(
                "name a file with `--prompts FILE`, or let the experts write with `--self-text N`"
                    .into(),
            ),
            Self::SelfText { .. } => Some("name a file with `--prompts FILE`".into()),
        }
    }
}
