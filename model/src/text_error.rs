//! What can be wrong with text, its tokens and what is asked to be done with them.

use std::path::PathBuf;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};

use crate::error::ModelError;

/// Next tokens to logits, for arithmetic that is tested without a model.
pub(crate) type LogitsOf<'a> = dyn FnMut(&[u32]) -> Result<Vec<f32>, TextError> + 'a;

/// An error about a tokenizer, a chat template, a text or a sampling parameter.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// Reading a side file failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The forward pass failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model has no `tokenizer.json`.
    #[error("the model has no tokenizer")]
    NoTokenizer {
        /// The model.
        path: PathBuf,
        /// What it has instead, if anything.
        found: String,
    },
    /// The tokenizer file cannot be used.
    #[error("tokenizer cannot be used")]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What is expected of it.
        expected: String,
        /// What the reader found.
        found: String,
    },
    /// The tokenizer refused a text or ids.
    #[error("the tokenizer cannot {action}")]
    Tokenize {
        /// `encode this text` or `decode these tokens`.
        action: &'static str,
        /// What it said.
        found: String,
    },
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoChatTemplate {
        /// The model.
        path: PathBuf,
        /// Names of templates that it has.
        found: Vec<String>,
    },
    /// The chat template is wrong, or refused the messages.
    #[error("chat template failed")]
    ChatTemplate {
        /// Where it was read.
        file: PathBuf,
        /// Line of the template, if known.
        line: Option<usize>,
        /// What the template engine or the template itself said.
        found: String,
    },
    /// A parameter outside its range.
    #[error("`{name}` is out of range")]
    Parameter {
        /// Its name.
        name: &'static str,
        /// Its range.
        expected: String,
        /// Its value.
        found: String,
    },
    /// The model gave a logit that is no number.
    #[error("the model gave a logit that is not a number")]
    NotANumber {
        /// Token id of the first of them.
        token: usize,
    },
    /// A token id that the model does not have.
    #[error("token id is outside the vocabulary")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Tokens of the model.
        vocab: usize,
    },
    /// There is nothing to work on.
    #[error("text is empty")]
    EmptyText {
        /// Where it came from.
        origin: String,
        /// How many tokens are needed.
        expected: String,
        /// What there is.
        found: String,
    },
    /// More tokens than the model can see at once.
    #[error("{what} is longer than the context of the model")]
    TooLong {
        /// `window` or `prompt`.
        what: &'static str,
        /// Tokens that fit.
        context: usize,
        /// Tokens there are.
        found: usize,
        /// What to do.
        hint: String,
    },
}

impl Explain for TextError {
    fn kind(&self) -> Kind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Model(e) => e.kind(),
            Self::Parameter { .. }
            | Self::UnknownToken { .. }
            | Self::EmptyText { .. }
            | Self::TooLong { .. } => Kind::Usage,
            _ => Kind::Input,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Checkpoint(e) => e.fields(),
            Self::Model(e) => e.fields(),
            Self::NoTokenizer { path, found } => vec![
                ("path", path.display().to_string()),
                ("expected", "`tokenizer.json`".into()),
                ("found", found.clone()),
            ],
            Self::Tokenizer { file, expected, found } => vec![
                ("file", file.display().to_string()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::Tokenize { found, .. } => vec![("found", found.clone())],
            Self::NoChatTemplate { path, found } => vec![
                ("path", path.display().to_string()),
                (
                    "expected",
                    "`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`".into(),
                ),
                (
                    "found",
                    if found.is_empty() {
                        "neither".into()
                    } else {
                        format!("only templates named {}", found.join(", "))
                    },
                ),
            ],
            Self::ChatTemplate { file, line, found } => {
                let mut fields = vec![("file", file.display().to_string())];
                fields.extend(line.map(|l| ("line", l.to_string())));
                fields.push(("found", found.clone()));
                fields
            }
            Self::Parameter { expected, found, .. } => {
                vec![("expected", expected.clone()), ("found", found.clone())]
            }
            Self::NotANumber { token } => vec![("token", token.to_string())],
            Self::UnknownToken { token, vocab } => vec![
                ("expected", format!("0 to {}", vocab.saturating_sub(1))),
                ("found", token.to_string()),
            ],
            Self::EmptyText { origin, expected, found } => vec![
                ("text", origin.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::TooLong { context, found, .. } => vec![
                ("expected", format!("at most {context} tokens")),
                ("found", format!("{found} tokens")),
            ],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(e) => e.hint(),
            Self::Model(e) => e.hint(),
            Self::NoTokenizer { .. } => Some(
                "copy `tokenizer.json` and `tokenizer_config.json` of the base model into the folder; \
                 `AutoTokenizer.from_pretrained(…).save_pretrained(…)` of transformers makes them from `tokenizer.model`"
                    .into(),
            ),
            Self::Tokenizer { .. } => {
                Some("copy the tokenizer files of the base model into the folder again".into())
            }
            Self::NoChatTemplate { .. } => {
                Some("leave `--chat` away: this is a base model, it continues plain text".into())
            }
            Self::NotANumber { .. } => {
                Some("`moe-merge verify` finds the weight that is not finite".into())
            }
            Self::TooLong { hint, .. } => Some(hint.clone()),
            _ => None,
        }
    }
}
