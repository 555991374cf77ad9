//! What can be wrong with what was asked.

use std::path::PathBuf;

use moe_merge_checkpoint::{Explain, Kind};

/// What is wrong with what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// Labels and texts are not as many.
    #[error("`--labels` does not fit the texts")]
    Count { texts: usize, labels: usize },
    /// A label that is no expert.
    #[error("no expert is called `{label}`")]
    Unknown { label: String, experts: Vec<String>, named: bool },
    /// One file for two pictures.
    #[error("`--svg` and `--html` name the same file")]
    SameFile { path: PathBuf },
}

impl Explain for RouteError {
    fn kind(&self) -> Kind {
        Kind::Usage
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Count { texts, labels } => vec![
                ("expected", format!("{texts}, one for each text and prompt")),
                ("found", labels.to_string()),
            ],
            Self::Unknown { label, experts, named } => vec![
                (
                    "expected",
                    match named {
                        true => format!("one of {}, or its number", experts.join(", ")),
                        false => format!("a number from 0 to {}", experts.len().saturating_sub(1)),
                    },
                ),
                ("found", label.clone()),
            ],
            Self::SameFile { path } => vec![("file", path.display().to_string())],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Count { .. } => {
                Some("files come before prompts; `-` stands for a text without a label".into())
            }
            Self::Unknown { .. } | Self::SameFile { .. } => None,
        }
    }
}
