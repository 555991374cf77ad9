//! Why a model cannot be changed as asked.

use std::path::PathBuf;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_merge::MergeError;
use moe_merge_merge::calibrate::CalibrateError;
use moe_merge_model::{ModelError, TextError};

/// Why a model cannot be changed as asked.
#[derive(Debug, thiserror::Error)]
pub enum AdaptError {
    /// What merging can meet, too: files, models, text.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// Routers that cannot be fitted.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// No text to fit a router to.
    #[error("there is no text to fit the routers to")]
    NoText {
        /// The model.
        path: PathBuf,
        /// The expert that has none, if the others have some.
        expert: String,
    },
    /// No expert is called so.
    #[error("no expert is called `{wanted}`")]
    NoExpert {
        /// The model.
        path: String,
        /// As a person wrote it.
        wanted: String,
        /// Names of its experts.
        known: Vec<String>,
    },
    /// Several experts are called so.
    #[error("several experts are called `{wanted}`")]
    Ambiguous {
        /// The model.
        path: String,
        /// As a person wrote it.
        wanted: String,
        /// Experts that the model has.
        experts: usize,
    },
    /// Another expert has the name of the new one.
    #[error("an expert is called `{name}` already")]
    Taken {
        /// The model.
        path: PathBuf,
        /// The name.
        name: String,
        /// Names of its experts.
        known: Vec<String>,
    },
    /// A MoE whose experts are no dense models.
    #[error("an expert of this model is no dense model: {what}")]
    NoDense {
        /// The model.
        path: PathBuf,
        /// Why.
        what: String,
        /// What it has.
        found: String,
    },
    /// No such change waits for approval.
    #[error("no such change waits for approval")]
    NothingStaged {
        /// The model.
        path: PathBuf,
        /// The generation that it would have become.
        wanted: u32,
        /// The generations for which changes wait.
        waiting: Vec<String>,
    },
    /// A staged change breaks limits of the folder's settings.
    #[error("the change breaks the limits of this model")]
    Refused {
        /// The model.
        path: PathBuf,
        /// Which, in words.
        limits: Vec<String>,
    },
    /// The only expert of a model is to go.
    #[error("a model needs at least one expert")]
    LastExpert {
        /// The model.
        path: PathBuf,
    },
    /// A source with several experts, of which none was named.
    #[error("`{source_label}` has several experts, and none is named")]
    WhichExpert {
        /// The source.
        source_label: String,
        /// Names of its experts.
        known: Vec<String>,
    },
    /// A range of layers that the model has not.
    #[error("no such layers")]
    Layers {
        /// The model.
        path: PathBuf,
        /// First, and the one behind the last.
        found: std::ops::Range<usize>,
        /// Layers that the model has.
        layers: usize,
    },
    /// Weights in another dtype than those that they replace.
    #[error("the new weights have another dtype than the model")]
    Dtype {
        /// The file of the new weight.
        file: PathBuf,
        /// Its name there.
        tensor: String,
        /// As the model has it.
        expected: String,
        /// As it is.
        found: String,
    },
    /// Two models that do not go together.
    #[error("{what}")]
    Incompatible {
        /// What does not fit, in one line.
        what: String,
        /// The model that is to be changed.
        model: String,
        /// The source.
        source_label: String,
        /// What the model needs.
        expected: String,
        /// What the source has.
        found: String,
    },
}

impl AdaptError {
    /// Whether somebody else changes the model at the same time: it may work later.
    pub fn is_busy(&self) -> bool {
        use CheckpointError::{Busy, Outdated};
        matches!(self, Self::Merge(MergeError::Checkpoint(Busy { .. } | Outdated { .. })))
    }
}

impl From<CheckpointError> for AdaptError {
    fn from(error: CheckpointError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<ModelError> for AdaptError {
    fn from(error: ModelError) -> Self {
        Self::Merge(error.into())
    }
}

impl From<TextError> for AdaptError {
    fn from(error: TextError) -> Self {
        Self::Merge(error.into())
    }
}

/// Names in backticks.
fn quoted(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

impl Explain for AdaptError {
    fn kind(&self) -> Kind {
        match self {
            Self::Merge(e) => e.kind(),
            Self::Calibrate(e) => e.kind(),
            Self::Refused { .. } => Kind::CheckFailed,
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let show = |p: &PathBuf| p.display().to_string();
        match self {
            Self::Merge(e) => e.fields(),
            Self::Calibrate(e) => e.fields(),
            Self::NoText { path, expert } => vec![
                ("path", show(path)),
                (
                    "expected",
                    match expert.as_str() {
                        "" => "prompts in the folder's recipe, or a file of them".into(),
                        expert => format!("text of `{expert}` and of at least one other expert"),
                    },
                ),
            ],
            Self::NoExpert { path, known, .. } => vec![
                ("path", path.clone()),
                (
                    "expected",
                    format!(
                        "one of {}, or a number from 0 to {}",
                        quoted(known),
                        known.len().saturating_sub(1)
                    ),
                ),
            ],
            Self::Ambiguous { path, experts, .. } => vec![
                ("path", path.clone()),
                ("expected", format!("a number from 0 to {}", experts.saturating_sub(1))),
            ],
            Self::Taken { path, known, .. } => {
                vec![("path", show(path)), ("expected", format!("none of {}", quoted(known)))]
            }
            Self::LastExpert { path } => vec![("path", show(path))],
            Self::NothingStaged { path, wanted, waiting } => vec![
                ("path", show(path)),
                (
                    "expected",
                    match waiting.is_empty() {
                        true => "a change that was staged".into(),
                        false => format!("one of {}", waiting.join(", ")),
                    },
                ),
                ("found", format!("{wanted}")),
            ],
            Self::Refused { path, limits } => {
                vec![("path", show(path)), ("found", limits.join("\n"))]
            }
            Self::NoDense { path, found, .. } => {
                vec![("path", show(path)), ("found", found.clone())]
            }
            Self::WhichExpert { known, .. } => {
                vec![("expected", format!("`SOURCE#EXPERT`, with one of {}", quoted(known)))]
            }
            Self::Layers { path, found, layers } => vec![
                ("path", show(path)),
                ("expected", format!("`A..B` with A < B <= {layers}, the layers A to B - 1")),
                ("found", format!("{}..{}", found.start, found.end)),
            ],
            Self::Dtype { file, tensor, expected, found } => vec![
                ("file", show(file)),
                ("tensor", tensor.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::Incompatible { model, source_label, expected, found, .. } => vec![
                ("model", model.clone()),
                ("source", source_label.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Merge(e) => e.hint(),
            Self::Calibrate(e) => e.hint(),
            Self::NoText { .. } => Some("name a file with `--prompts FILE`".into()),
            Self::NoExpert { wanted, known, .. } => {
                let near = moe_merge_merge::recipe::nearest(
                    wanted,
                    known.iter().map(String::as_str),
                )?;
                Some(format!("did you mean `{near}`?"))
            }
            Self::Taken { .. } => Some("choose another one with `--name NAME`".into()),
            Self::NothingStaged { .. } => {
                Some("`moe-merge swap … --stage` stages one".into())
            }
            Self::Refused { path, .. } => Some(format!(
                "`{}` sets them; `moe-merge approve --reject` takes the change back",
                path.join(".moe-merge/settings.json").display()
            )),
            Self::LastExpert { .. } => {
                Some("`moe-merge extract` gives it as a dense model".into())
            }
            Self::Dtype { .. } => {
                Some("`--convert` rounds the new weights once, to the nearest".into())
            }
            Self::Incompatible { .. } => {
                Some("experts come from models with the sizes of this one; `moe-merge inspect` lists them".into())
            }
            _ => None,
        }
    }
}
