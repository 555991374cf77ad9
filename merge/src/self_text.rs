//! Text that experts write themselves.

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_model::spec::Mlp;
use moe_merge_model::{ModelError, Sampling, Spec, Tokenizer, sample_texts, self_text_starts};

use crate::calibrate::alone;
use crate::error::MergeError;
use crate::gates::TokenPrompts;

/// Tokens of one text.
const TEXT_TOKENS: usize = 120;

/// Tokens that an expert without prompts writes where the recipe does not say how many.
pub(crate) const DEFAULT_TOKENS: usize = 5000;

/// How experts write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Writing<'a> {
    pub tokenizer: &'a Tokenizer,
    /// For each expert, about.
    pub tokens: usize,
    pub seed: u64,
    pub interrupt: &'a Interrupt,
}

impl Writing<'_> {
    /// Lets `source` write text of its kind at temperature 1, starting as `prompts` start (or from nothing), and adds it to
    /// them. Returns the tokens written; `None` if the tokenizer has no token to start from.
    ///
    /// # Errors
    /// As [`sample_texts`]; interruption.
    pub fn add(
        &self,
        source: &Source,
        expert: usize,
        prompts: &mut TokenPrompts,
        told: &mut dyn FnMut(usize),
    ) -> Result<Option<usize>, MergeError> {
        let count = self.tokens.div_ceil(TEXT_TOKENS);
        let Some(starts) = self_text_starts(&prompts.positive, self.tokenizer, count) else {
            return Ok(None);
        };
        // A stream for each expert, whatever the others do.
        let seed = self.seed.wrapping_add(expert as u64);
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let mut stopped = None;
        let eos = self.tokenizer.eos_ids();
        let texts = sample_texts(source, &starts, TEXT_TOKENS, sampling, eos, &mut |tokens| {
            told(tokens);
            self.interrupt.check().map_err(|e| {
                stopped = Some(e);
                ModelError::Stopped("no text was written".into())
            })
        });
        stopped.map_or(Ok(()), Err)?;
        let texts = texts?;
        let written = texts.iter().zip(&starts).map(|(t, s)| t.len() - s.len()).sum();
        // A text that ended at once says nothing.
        let own = usize::from(self.tokenizer.bos().is_some());
        prompts.positive.extend(texts.into_iter().filter(|t| t.len() > own));
        Ok(Some(written))
    }
}

/// Text that each expert of `moe`, alone in the model, writes at temperature 1: token ids of each text, beginning-of-text
/// token included, expert after expert. Texts begin as the expert's `prompts` do, or from nothing.
///
/// * `tokens`: for each expert, about
/// * `None` for a dense model, a family that has all experts of a layer in one tensor, or a tokenizer that has no token to
///   start from
///
/// # Errors
/// As [`sample_texts`]; interruption.
pub fn expert_texts(
    moe: &Source,
    prompts: &[TokenPrompts],
    tokenizer: &Tokenizer,
    (tokens, seed): (usize, u64),
    interrupt: &Interrupt,
) -> Result<Option<Vec<Vec<Vec<u32>>>>, MergeError> {
    let spec = Spec::of(moe)?;
    let counts = spec.layers.iter().filter_map(|layer| match &layer.mlp {
        Mlp::Moe(moe) => Some(moe.experts),
        Mlp::Dense(_) => None,
    });
    let writing = Writing { tokenizer, tokens, seed, interrupt };
    let mut all = Vec::new();
    for expert in 0..counts.min().unwrap_or(0) {
        let Some(source) = alone(moe, &spec, expert) else { return Ok(None) };
        let mut own = prompts.get(expert).cloned().unwrap_or_default();
        let known = own.positive.len();
        if writing.add(&source, expert, &mut own, &mut |_| {})?.is_none() {
            return Ok(None);
        }
        all.push(own.positive.split_off(known));
    }
    Ok((!all.is_empty()).then_some(all))
}
