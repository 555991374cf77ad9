//! What can be wrong with router-only training.

use moe_merge_checkpoint::{Explain, Kind};

use super::state::TrainingState;
use crate::error::ModelError;

/// An error about the model, the texts, the options or the course of a training.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// The model cannot be opened or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An option is out of range.
    #[error("training option `{name}` is out of range")]
    Parameter {
        /// Its name.
        name: &'static str,
        /// What it can be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A text cannot be used, or there is none.
    #[error("text {text} cannot be used for training")]
    Text {
        /// Its number, or `none`.
        text: String,
        /// What is expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// No gradient can reach a router.
    #[error("no gradient can reach the routers")]
    NoGradient {
        /// Why.
        why: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// Gates or state do not fit the model, the texts or the options.
    #[error("the training state does not fit: {what}")]
    State {
        /// Which part.
        what: String,
        /// What the model, texts or options ask for.
        expected: String,
        /// What the state holds.
        found: String,
    },
    /// A number that is not finite came up.
    #[error("training stopped at step {step}: {what} is not finite")]
    NotFinite {
        /// The step that failed, counted from 0; the state is as before it.
        step: u64,
        /// What is not finite.
        what: String,
        /// The last good state.
        state: Box<TrainingState>,
    },
}

impl Explain for TrainingError {
    fn kind(&self) -> Kind {
        match self {
            Self::Model(e) => e.kind(),
            Self::NotFinite { .. } => Kind::Input,
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Model(e) => e.fields(),
            Self::Parameter { expected, found, .. }
            | Self::Text { expected, found, .. }
            | Self::State { expected, found, .. } => {
                vec![("expected", expected.clone()), ("found", found.clone())]
            }
            Self::NoGradient { why, .. } => vec![("found", (*why).to_owned())],
            Self::NotFinite { state, .. } => {
                vec![("last good step", state.step.to_string())]
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Model(e) => e.hint(),
            Self::NoGradient { hint, .. } => Some((*hint).to_owned()),
            Self::State { .. } => {
                Some("start again from its gates: a run can only be resumed as it was begun".into())
            }
            Self::NotFinite { .. } => Some(
                "a smaller learning rate may help; `moe-merge verify` finds damaged weights".into(),
            ),
            _ => None,
        }
    }
}
