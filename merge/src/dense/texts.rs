//! Text of the kind that a model is good at: what a recipe gives, or what the model writes itself.

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_model::Tokenizer;
use serde::Serialize;

use crate::documents::{Cutting, DEFAULT_PROMPT_TOKENS, Encoder};
use crate::error::MergeError;
use crate::gates::TokenPrompts;
use crate::prompts::inline;
use crate::recipe::{DenseRecipe, ModelText, Place, RecipeErrors};
use crate::self_text::{DEFAULT_TOKENS, Writing};

/// The text of one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TextReport {
    /// The model.
    pub model: String,
    /// Tokens of its text.
    pub tokens: usize,
    /// Of these, tokens that it wrote itself.
    pub written: usize,
}

/// How much text, and how it is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amount {
    self_text: Option<usize>,
    prompt_tokens: usize,
    seed: u64,
}

impl Amount {
    pub fn of(recipe: &DenseRecipe) -> Self {
        Self {
            self_text: recipe.self_text,
            prompt_tokens: recipe.prompt_tokens.unwrap_or(DEFAULT_PROMPT_TOKENS),
            seed: recipe.seed,
        }
    }

    /// Tokens that a model with `text` writes itself.
    pub fn written(&self, text: &ModelText) -> usize {
        match self.self_text {
            Some(tokens) => tokens,
            None if text.is_empty() => DEFAULT_TOKENS,
            None => 0,
        }
    }

    /// Tokens of a model with `text`, at most.
    pub fn most(&self, text: &ModelText) -> usize {
        self.written(text) + if text.is_empty() { 0 } else { self.prompt_tokens }
    }

    /// Token ids of the texts of one model, and of how many tokens they are.
    ///
    /// * `index`: its number, for the seed
    /// * `told`: told of tokens that it writes
    ///
    /// # Errors
    /// [`MergeError`] for text that cannot be used, and where there is none and none can be written; interruption.
    pub fn text(
        &self,
        (source, index): (&Source, usize),
        text: &ModelText,
        place: &Place,
        interrupt: &Interrupt,
        told: &mut dyn FnMut(usize),
    ) -> Result<(Vec<Vec<u32>>, TextReport), MergeError> {
        let encoder = Encoder::new(source)?;
        let mut positive = inline(&encoder, &text.prompts, place, "prompts")?;
        let used: usize = positive.iter().map(Vec::len).sum();
        let documents: Vec<_> = text.files.iter().flat_map(|f| &f.documents).collect();
        let budget = Cutting::Budget(self.prompt_tokens.saturating_sub(used));
        positive.extend(encoder.pieces(&documents, budget)?.tokens);
        let mut prompts = TokenPrompts { positive, negative: Vec::new() };
        let (tokenizer, tokens) = (encoder.tokenizer(), self.written(text));
        let mut written = 0;
        if tokens > 0 {
            let writing = Writing { tokenizer, tokens, seed: self.seed, interrupt };
            written = writing.add(source, index, &mut prompts, told)?.unwrap_or(0);
        }
        let tokens: usize = prompts.positive.iter().map(Vec::len).sum();
        if tokens == 0 {
            let mut error = place.error("a model has no text");
            error.expected = Some("text of its kind".into());
            error.found = Some(match self.self_text {
                Some(0) => "none, and `self_text: 0` lets it write none".into(),
                _ => "a tokenizer without a token that begins or ends a text, from which it could write its own".into(),
            });
            error.hint = Some("give `prompts` or a `prompts_file`".into());
            return Err(RecipeErrors(vec![error]).into());
        }
        let report = TextReport { model: source.label.clone(), tokens, written };
        Ok((prompts.positive, report))
    }
}

/// Refuses a second model whose token ids mean another text than the first one's.
pub(crate) fn same_tokens(first: &Source, second: &Source, whose: &str) -> Result<(), MergeError> {
    let (own, other) = (Tokenizer::from_source(first)?, Tokenizer::from_source(second)?);
    let Some(difference) = own.differences(&other) else { return Ok(()) };
    Err(MergeError::Incompatible {
        what: format!("{whose} runs its models on the same tokens"),
        first: first.label.clone(),
        second: second.label.clone(),
        expected: "the same text for every token id".into(),
        found: difference.to_string(),
        hint: "give the models one vocabulary first, in a recipe of its own".into(),
        recipe: None,
    })
}
