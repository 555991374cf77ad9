//! Documents as token ids, cut to what fits.

use std::cell::OnceCell;

use moe_merge_checkpoint::{Explain, Source};
use moe_merge_model::chat::{AssistantTurn, Message};
use moe_merge_model::{ChatTemplate, TextError, Tokenizer};

use super::{Content, Document, DocumentError, LabelledPrompts};
use crate::error::MergeError;
use crate::gates::TokenPrompts;

/// Tokens per expert that calibration text may have where nothing else is asked for (`prompt_tokens`).
pub const DEFAULT_PROMPT_TOKENS: usize = 20_000;

/// The longest piece that a document is cut into, beginning-of-text token included.
pub const PIECE_TOKENS: usize = 512;

/// The least tokens that a piece cut short by the budget is worth.
const LEAST: usize = 8;

/// How documents become prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cutting {
    /// Each is one prompt; longer than the context is a mistake.
    Whole,
    /// In order, until so many tokens are reached; long ones in consecutive pieces.
    Budget(usize),
}

/// Documents as prompts, and what became of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pieces {
    /// Token ids of each piece, beginning with bos where the tokenizer has one.
    pub tokens: Vec<Vec<u32>>,
    /// The document of each piece.
    pub document: Vec<usize>,
    /// Documents there were.
    pub documents: usize,
    /// Documents in several pieces.
    pub split: usize,
    /// Documents whose end did not fit the budget: at most one.
    pub short: usize,
    /// Documents that the budget left no room for.
    pub left_out: usize,
    /// Tokens of the longest piece that is allowed.
    pub piece: usize,
}

impl Pieces {
    /// What was cut or left out, in one line; `None` if all is there.
    ///
    /// * `limit`: the budget in tokens, and the key that sets it
    pub fn note(&self, whose: &str, (budget, key): (usize, &str)) -> Option<String> {
        let mut parts = Vec::new();
        if self.split > 0 {
            let (split, all, piece) = (self.split, self.documents, self.piece);
            parts.push(format!("{split} of {all} documents cut into pieces of {piece} tokens"));
        }
        if self.short > 0 {
            parts.push("1 cut short".to_owned());
        }
        if self.left_out > 0 {
            let all =
                if self.split > 0 { String::new() } else { format!(" of {}", self.documents) };
            parts.push(format!("{}{all} left out", self.left_out));
        }
        let limit = match self.short + self.left_out {
            0 => String::new(),
            _ => format!(": budget of {budget} tokens (`{key}`)"),
        };
        (!parts.is_empty()).then(|| format!("{whose}: {}{limit}", parts.join(", ")))
    }
}

/// Turns documents into tokens as one model reads them.
#[derive(Debug)]
pub struct Encoder<'a> {
    source: &'a Source,
    tokenizer: Tokenizer,
    template: OnceCell<Option<ChatTemplate>>,
    context: usize,
}

impl<'a> Encoder<'a> {
    /// For the model in `source`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_source`].
    pub fn new(source: &'a Source) -> Result<Self, TextError> {
        Ok(Self::with(source, Tokenizer::from_source(source)?))
    }

    /// [`Encoder::new`] with a tokenizer that is open already.
    pub fn with(source: &'a Source, tokenizer: Tokenizer) -> Self {
        let context = source.config.usize("max_position_embeddings").unwrap_or(usize::MAX);
        Self { source, tokenizer, template: OnceCell::new(), context }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens that the model can see at once.
    pub fn context(&self) -> usize {
        self.context
    }

    /// A plain text, after bos where the tokenizer has one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn text(&self, text: &str) -> Result<Vec<u32>, TextError> {
        Ok(self.tokenizer.bos().into_iter().chain(self.tokenizer.encode(text)?).collect())
    }

    /// A document of any length. A rendered conversation has the beginning-of-text tokens that the
    /// template writes, as in use.
    ///
    /// # Errors
    /// [`MergeError::Documents`] if the model has no chat template for a conversation, or its template refuses it;
    /// [`MergeError::Text`] for a template or a tokenizer that cannot be used.
    pub fn document(&self, document: &Document) -> Result<Vec<u32>, MergeError> {
        let (messages, plain) = match &document.content {
            Content::Text(text) => return Ok(self.text(text)?),
            Content::Chat(messages) => (messages.clone(), None),
            Content::Exchange { prompt, completion } => {
                let mut messages = vec![Message::new("user", prompt)];
                messages.extend(completion.iter().map(|c| Message::new("assistant", c)));
                let rest = completion.as_deref().unwrap_or_default();
                (messages, Some(format!("{prompt}{rest}")))
            }
        };
        let Some(template) = self.template()? else {
            return match plain {
                Some(text) => Ok(self.text(&text)?),
                None => Err(no_template(document).into()),
            };
        };
        let turn = match messages.last() {
            Some(last) if last.role == "assistant" => AssistantTurn::Absent,
            _ => AssistantTurn::Open,
        };
        let rendered = template.render(&messages, turn).map_err(|e| refused(document, &e))?;
        Ok(self.tokenizer.encode(&rendered)?)
    }

    /// The chat template, looked for when the first conversation comes.
    pub(super) fn template(&self) -> Result<Option<&ChatTemplate>, TextError> {
        if self.template.get().is_none() {
            let found = match ChatTemplate::from_source(self.source, &self.tokenizer) {
                Ok(template) => Some(template),
                Err(TextError::NoChatTemplate { .. }) => None,
                Err(e) => return Err(e),
            };
            // Nobody else can have set it.
            let _ = self.template.set(found);
        }
        Ok(self.template.get().and_then(Option::as_ref))
    }

    /// Documents as prompts. Their choice under a budget is their order; tokens are counted without bos.
    ///
    /// # Errors
    /// As [`Encoder::document`]; with [`Cutting::Whole`] also for a document longer than the context.
    pub fn pieces(&self, documents: &[&Document], cutting: Cutting) -> Result<Pieces, MergeError> {
        let bos = self.tokenizer.bos();
        let piece = PIECE_TOKENS.min(self.context).max(2);
        let mut made = Pieces { documents: documents.len(), piece, ..Pieces::default() };
        let mut left = match cutting {
            Cutting::Whole => usize::MAX,
            Cutting::Budget(tokens) => tokens,
        };
        for (i, document) in documents.iter().enumerate() {
            if left == 0 {
                made.left_out = documents.len() - i;
                break;
            }
            let ids = self.document(document)?;
            if cutting == Cutting::Whole {
                self.fits(&ids, document)?;
                made.tokens.push(ids);
                made.document.push(i);
                continue;
            }
            let started = bos.is_some_and(|b| ids.first() == Some(&b));
            // A conversation whose template writes no bos keeps its first token as it is.
            let prefix = bos.filter(|_| started);
            let body = &ids[usize::from(started)..];
            let room = piece - usize::from(prefix.is_some());
            made.split += usize::from(body.len() > room);
            let mut rest = body;
            while !rest.is_empty() && left > 0 {
                let take = rest.len().min(room).min(left);
                if take < rest.len().min(room).min(LEAST) {
                    left = 0;
                    break;
                }
                made.tokens.push(prefix.into_iter().chain(rest[..take].iter().copied()).collect());
                made.document.push(i);
                rest = &rest[take..];
                left -= take;
            }
            if rest.len() == body.len() && !body.is_empty() {
                made.left_out = documents.len() - i;
                made.split -= usize::from(body.len() > room);
                break;
            }
            made.short += usize::from(!rest.is_empty());
        }
        Ok(made)
    }

    fn fits(&self, ids: &[u32], document: &Document) -> Result<(), DocumentError> {
        if ids.len() <= self.context {
            return Ok(());
        }
        let what = "a document is longer than the context of the model";
        Err(DocumentError::new(&document.file, document.at, what)
            .expected(format!("at most {} tokens", self.context))
            .found(format!("{} tokens", ids.len()))
            .hint("this gate mode uses prompts whole, as mergekit does: split it"))
    }
}

/// A conversation for a model that cannot have one.
pub(super) fn no_template(document: &Document) -> DocumentError {
    let what = "`messages` need a chat template, and the model has none";
    DocumentError::new(&document.file, document.at, what)
        .hint("give `text`, or `prompt` and `completion`, for a base model")
}

/// A conversation that the model's template does not take.
pub(super) fn refused(document: &Document, error: &TextError) -> DocumentError {
    let said: Vec<_> =
        error.fields().into_iter().map(|(label, v)| format!("{label} {v}")).collect();
    DocumentError::new(&document.file, document.at, "the chat template refuses a conversation")
        .found(said.join(", "))
}

/// The prompts of all experts as tokens; what was cut or left out is told in the notes.
///
/// # Errors
/// As [`Encoder::pieces`].
pub fn encode_labelled(
    encoder: &Encoder<'_>,
    prompts: &[LabelledPrompts],
    cutting: Cutting,
) -> Result<(Vec<TokenPrompts>, Vec<String>), MergeError> {
    let (mut encoded, mut notes) = (Vec::new(), Vec::new());
    for prompts in prompts {
        let mut list =
            |documents: &[Document], whose: String| -> Result<Vec<Vec<u32>>, MergeError> {
                let made = encoder.pieces(&documents.iter().collect::<Vec<_>>(), cutting)?;
                if let Cutting::Budget(budget) = cutting {
                    notes.extend(made.note(&whose, (budget, "prompt_tokens")));
                }
                Ok(made.tokens)
            };
        let positive = list(&prompts.positive, format!("expert `{}`", prompts.label))?;
        let negative = list(&prompts.negative, format!("expert `{}`, negative", prompts.label))?;
        encoded.push(TokenPrompts { positive, negative });
    }
    Ok((encoded, notes))
}
