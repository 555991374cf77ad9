//! What can be wrong with a model.

use std::path::PathBuf;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_kernels::KernelError;
use moe_merge_kernels::cuda::CudaError;

/// An error about a configuration, its weights, or a pass through them.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration asks for something that is not done, or lacks a key.
    #[error("config key `{key}` cannot be used")]
    Config {
        /// `config.json`, or the file that takes its place.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON, or `absent`.
        found: String,
        /// What is understood.
        expected: String,
    },
    /// Weights are missing, misshapen or unreadable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model without MoE layers, where experts or routers were asked for.
    #[error("the model is dense: it has no experts")]
    NoExperts {
        /// The model.
        path: PathBuf,
        /// Its family.
        family: &'static str,
    },
    /// A token cannot visit so many experts.
    #[error("{top_k} experts per token do not fit a model with {experts}")]
    TopK {
        /// Experts per token asked for.
        top_k: usize,
        /// Routed experts of a layer; 0 in a dense model.
        experts: usize,
    },
    /// An expert that is not there; a dense model has none, and of a MoE one has to be named.
    #[error("{}", match expert {
        Some(expert) => format!("the model has no expert {expert}"),
        None => "an expert has to be named".into(),
    })]
    Expert {
        /// Its number from 0, if one was named.
        expert: Option<usize>,
        /// Routed experts of a layer; 0 in a dense model.
        experts: usize,
    },
    /// More tokens than the model or the cache holds.
    #[error("{tokens} tokens do not fit into {what} of {limit}")]
    TooLong {
        /// `the context` or `the cache`.
        what: &'static str,
        /// Tokens there would be.
        tokens: usize,
        /// Tokens there can be.
        limit: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("token {token} is not in the vocabulary")]
    Token {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A router gave NaN or infinity.
    #[error("router of layer {layer} failed: {source}")]
    Router {
        /// The layer.
        layer: usize,
        /// What the kernel says, token counted from the start of the pass.
        #[source]
        source: KernelError,
    },
    /// A kernel refused its sizes: a mistake of this program.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A device is not there, has no room, or fails.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An expert that cannot be fitted to the stream of a model, or a teacher that does not go with it.
    #[error("{what}")]
    Transplant {
        /// What does not fit, in one line.
        what: String,
        /// What would.
        expected: String,
        /// What is there.
        found: String,
    },
    /// What a visitor of a probe stopped with.
    #[error("{0}")]
    Stopped(String),
}

impl Explain for ModelError {
    fn kind(&self) -> Kind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::NoExperts { .. }
            | Self::TopK { .. }
            | Self::Expert { .. }
            | Self::TooLong { .. }
            | Self::Transplant { .. }
            | Self::Token { .. } => Kind::Usage,
            Self::Device(CudaError::NoRoom { .. }) => Kind::NoRoom,
            Self::Device(e) if no_device(e) => Kind::Usage,
            _ => Kind::Input,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Config { file, key, found, expected } => vec![
                ("file", file.display().to_string()),
                ("key", key.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::Checkpoint(e) => e.fields(),
            Self::NoExperts { path, family } => vec![
                ("path", path.display().to_string()),
                ("expected", "a mixture-of-experts model".into()),
                ("found", format!("family `{family}`, no MoE layer")),
            ],
            Self::TopK { top_k, experts } => vec![
                (
                    "expected",
                    match experts {
                        0 => "a mixture-of-experts model".into(),
                        _ => format!("1 to {experts} experts per token"),
                    },
                ),
                ("found", top_k.to_string()),
            ],
            Self::Expert { expert, experts } => vec![
                (
                    "expected",
                    match experts {
                        0 => "no expert: the model is dense".into(),
                        _ => format!("0 to {}", experts - 1),
                    },
                ),
                ("found", expert.map_or("none".into(), |e| e.to_string())),
            ],
            Self::TooLong { tokens, limit, .. } => vec![
                ("expected", format!("at most {limit} tokens")),
                ("found", format!("{tokens} tokens")),
            ],
            Self::Token { token, vocab } => {
                vec![("expected", format!("token ids below {vocab}")), ("found", token.to_string())]
            }
            Self::Transplant { expected, found, .. } => {
                vec![("expected", expected.clone()), ("found", found.clone())]
            }
            _ => Vec::new(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(e) => e.hint(),
            Self::NoExperts { .. } => {
                Some("`moe-merge RECIPE.yaml` builds a MoE from dense models".into())
            }
            Self::TooLong { what: "the context", .. } => {
                Some("shorten the text, or take a smaller window".into())
            }
            Self::Device(CudaError::NoRoom { .. }) => Some(
                "`--cpu-experts N` keeps the experts of N layers on the processor, `--device cpu` everything"
                    .into(),
            ),
            Self::Device(e) if no_device(e) => {
                Some("`--device cpu` runs on the processor, as does `--device auto` here".into())
            }
            Self::Device(_) => Some("`--device cpu` runs on the processor".into()),
            Self::Router { .. } => Some(
                "NaN or infinity came up on the way; `moe-merge verify` finds damaged weights"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// Whether there is no device to use.
pub(crate) fn no_device(e: &CudaError) -> bool {
    matches!(e, CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::TooOld { .. })
}
