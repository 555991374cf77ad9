//! The text that experts are fitted on.

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::publish::Interrupt;

use crate::documents::{Cutting, Document, Encoder};
use crate::error::MergeError;
use crate::gates::TokenPrompts;
use crate::recipe::Align;
use crate::self_text::Writing;

/// One text of an expert in so many is held out, to tell what was gained.
const HELD_OUT: usize = 8;

/// Where text comes from.
pub(crate) struct Texts<'a> {
    pub align: &'a Align,
    /// Of the base.
    pub encoder: &'a Encoder<'a>,
    /// Names of all experts.
    pub names: &'a [String],
    pub seed: u64,
    pub interrupt: &'a Interrupt,
}

impl Texts<'_> {
    /// Text of one expert: of its data, of its prompts where they are asked for, and what its teacher writes from nothing, until
    /// there is enough. Empty if it has none and can write none.
    ///
    /// * `told`: gets tokens as they are written
    ///
    /// # Errors
    /// Documents that the tokenizer or the chat template refuses; as [`Writing::add`].
    pub fn of(
        &self,
        expert: usize,
        prompts: &TokenPrompts,
        teacher: &Source,
        notes: &mut Vec<String>,
        told: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<u32>>, MergeError> {
        let (align, mut texts) = (self.align, TokenPrompts::default());
        let name = self.names.get(expert).map_or("", String::as_str);
        let theirs = |d: &&Document| {
            let label = d.label.as_ref().map(|l| l.text.as_str());
            label.is_none_or(|l| l == name || !self.names.iter().any(|n| n == l))
        };
        let files = align.data.iter().filter(|(whose, _)| whose == name);
        let documents: Vec<&Document> =
            files.flat_map(|(_, file)| &file.documents).filter(theirs).collect();
        let made = self.encoder.pieces(&documents, Cutting::Budget(align.tokens))?;
        let whose = format!("text to fit expert `{name}` on");
        notes.extend(made.note(&whose, (align.tokens, "tokens")));
        texts.positive.extend(made.tokens);
        if align.prompts {
            let fits = prompts.positive.iter().take_while(|_| texts.tokens() < align.tokens);
            let fits: Vec<_> = fits.cloned().collect();
            texts.positive.extend(fits);
        }
        let tokens = align.tokens.saturating_sub(texts.tokens());
        if align.self_text && tokens > 0 {
            let (tokenizer, seed, interrupt) =
                (self.encoder.tokenizer(), self.seed, self.interrupt);
            let writing = Writing { tokenizer, tokens, seed, interrupt };
            let mut own = TokenPrompts::default();
            writing.add(teacher, expert, &mut own, told)?;
            texts.positive.extend(own.positive);
        }
        if texts.positive.is_empty() {
            texts.positive.clone_from(&prompts.positive);
        }
        Ok(texts.positive)
    }
}

/// Texts to fit on, and texts that are held out; where there are too few, the same.
pub(crate) fn split(texts: &[Vec<u32>]) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let (mut fit, mut held_out) = (Vec::new(), Vec::new());
    for (i, text) in texts.iter().enumerate() {
        let own = if i % HELD_OUT == HELD_OUT - 1 { &mut held_out } else { &mut fit };
        own.push(text.clone());
    }
    if held_out.is_empty() {
        held_out.clone_from(&fit);
    }
    (fit, held_out)
}
