//! Documents with the tokens that answer: what a model is to learn to say, and what it only reads.

use std::ops::Range;

use moe_merge_model::ChatTemplate;
use moe_merge_model::chat::{AssistantTurn, Message};

use super::encode::{no_template, refused};
use super::{Content, Document, DocumentError, Encoder};
use crate::error::MergeError;

/// A document as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// Its tokens, as [`Encoder::document`] gives them; the completion of a prompt without chat template is followed by
    /// the token that ends a text, where the tokenizer has one.
    pub tokens: Vec<u32>,
    /// Which of them answer: all of a plain text but the beginning-of-text token; of a conversation what the assistant
    /// says, with what ends its turn; of a prompt its completion. A prompt alone is a text.
    pub answers: Vec<bool>,
    /// Whether it may be cut anywhere: plain text.
    pub plain: bool,
}

impl Encoder<'_> {
    /// A document of any length, with the tokens that answer.
    ///
    /// # Errors
    /// As [`Encoder::document`]; [`DocumentError`] for a conversation in which the assistant says nothing, or a
    /// template that writes earlier turns otherwise once later ones are there.
    pub fn answered(&self, document: &Document) -> Result<Answered, MergeError> {
        let messages = match &document.content {
            Content::Text(text) => return self.plain(text),
            Content::Chat(messages) => messages.clone(),
            Content::Exchange { prompt, completion } => {
                let template = self.template()?;
                match (template, completion) {
                    (_, None) => return self.plain(prompt),
                    (None, Some(completion)) => return self.completed(prompt, completion),
                    (Some(_), Some(completion)) => {
                        vec![Message::new("user", prompt), Message::new("assistant", completion)]
                    }
                }
            }
        };
        let template = self.template()?.ok_or_else(|| no_template(document))?;
        let (text, spans) = turns(template, &messages, document)?;
        let (tokens, offsets) = self.tokenizer().encode_spans(&text)?;
        Ok(Answered { answers: covered(&offsets, &spans), tokens, plain: false })
    }

    fn plain(&self, text: &str) -> Result<Answered, MergeError> {
        let tokens = self.text(text)?;
        let lead = usize::from(self.tokenizer().bos().is_some());
        let answers = (0..tokens.len()).map(|i| i >= lead).collect();
        Ok(Answered { tokens, answers, plain: true })
    }

    /// A prompt and its completion for a model without chat template: one text after the other.
    fn completed(&self, prompt: &str, completion: &str) -> Result<Answered, MergeError> {
        let (ids, offsets) = self.tokenizer().encode_spans(&format!("{prompt}{completion}"))?;
        let own = covered(
            &offsets,
            std::slice::from_ref(&(prompt.len()..prompt.len() + completion.len())),
        );
        let bos = self.tokenizer().bos();
        let mut tokens: Vec<u32> = bos.into_iter().chain(ids).collect();
        let mut answers: Vec<bool> = bos.map(|_| false).into_iter().chain(own).collect();
        if let Some(eos) = self.tokenizer().eos_ids().first() {
            tokens.push(*eos);
            answers.push(true);
        }
        Ok(Answered { tokens, answers, plain: false })
    }
}

/// Whether each token begins in one of the spans, or reaches into its start.
fn covered(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<bool> {
    let inside = |(from, to): (usize, usize)| {
        spans.iter().any(|s| from < s.end && to > s.start && from < to)
    };
    offsets.iter().map(|o| inside(*o)).collect()
}

/// The whole conversation, and the bytes of it that the assistant says.
fn turns(
    template: &ChatTemplate,
    messages: &[Message],
    document: &Document,
) -> Result<(String, Vec<Range<usize>>), MergeError> {
    let render = |messages: &[Message], turn| {
        template.render(messages, turn).map_err(|e| refused(document, &e))
    };
    let whole = render(messages, AssistantTurn::Absent)?;
    let mut spans = Vec::new();
    for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        let before = render(&messages[..i], AssistantTurn::Open)?;
        let after = render(&messages[..=i], AssistantTurn::Absent)?;
        if !whole.starts_with(&after) || !after.starts_with(&before) {
            let what = "the chat template writes earlier turns otherwise once later ones are there";
            return Err(DocumentError::new(&document.file, document.at, what)
                .found(format!("the answer in message {i} cannot be told from what is around it"))
                .hint("give each answer a line of its own, with the turns before it")
                .into());
        }
        spans.push(before.len()..after.len());
    }
    if spans.is_empty() {
        let what = "the assistant says nothing in a conversation";
        return Err(DocumentError::new(&document.file, document.at, what)
            .expected("at least one message of `assistant`")
            .into());
    }
    Ok((whole, spans))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_reach_into_an_answer_belong_to_it() {
        let offsets = [(0, 0), (0, 3), (3, 6), (6, 8), (8, 9)];
        assert_eq!(
            covered(&offsets, std::slice::from_ref(&(4..7))),
            [false, false, true, true, false]
        );
        assert_eq!(covered(&offsets, &[0..3, 8..9]), [false, true, false, false, true]);
    }
}
