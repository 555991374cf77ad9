//! Continuing a text token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::sampler::{Sampler, Sampling};
use crate::text_error::{LogitsOf, TextError};
use crate::tokenizer::Tokenizer;
use crate::{Cache, LogitRows, Model, Steady};

/// What to do with end-of-text tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EndOfText {
    /// They end the text.
    #[default]
    Stop,
    /// They are tokens like others: for timing.
    Ignore,
}

/// How a text is continued.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generation {
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What end-of-text tokens do.
    pub end_of_text: EndOfText,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model wrote this end-of-text token, which is not part of the text.
    EndOfText(u32),
    /// As many tokens as asked for.
    MaxNewTokens,
    /// The context of the model is full.
    ContextEnd,
    /// The receiver of the text asked to stop.
    Asked,
}

impl Stop {
    /// A short name for reports: `end_of_text`, `max_new_tokens`, `context_end`, `asked`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EndOfText(_) => "end_of_text",
            Self::MaxNewTokens => "max_new_tokens",
            Self::ContextEnd => "context_end",
            Self::Asked => "asked",
        }
    }
}

/// A text that was written, and how fast.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The tokens, without the end-of-text token that ended them.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub stop: Stop,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time of the forward pass over the prompt.
    pub prefill: Duration,
    /// Time of the forward passes over single tokens, sampling included.
    pub decode: Duration,
    /// Forward passes over single tokens.
    pub decode_steps: usize,
}

impl Generated {
    /// Prompt tokens per second.
    pub fn prefill_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Tokens per second after the first, which the prompt's pass gives; 0 if there was no further one.
    pub fn decode_tokens_per_second(&self) -> f64 {
        match self.decode_steps {
            0 => 0.0,
            steps => steps as f64 / self.decode.as_secs_f64().max(f64::MIN_POSITIVE),
        }
    }
}

/// Continues `prompt`, giving each piece of text to `on_text` as soon as its characters are complete.
///
/// # Errors
/// [`TextError::EmptyText`] for a prompt without tokens, [`TextError::TooLong`] for one that fills the context,
/// [`TextError::Parameter`] for sampling parameters out of range, and what the forward pass can meet.
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    generation: Generation,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, TextError> {
    let context = model.spec().max_positions;
    let capacity = context.min(prompt.len().saturating_add(generation.max_new_tokens));
    let mut cache = Cache::new(model, capacity);
    // As a server does it: both give the same text.
    let model = Steady::new(model);
    let mut step = |tokens: &[u32]| {
        Ok(match cache.is_empty() {
            true => model.prompt(tokens, &mut cache, LogitRows::Last, None)?,
            false => model.next(tokens, &mut [&mut cache], None)?,
        })
    };
    run(&mut step, tokenizer, prompt, context, generation, on_text)
}

/// [`generate`] for any function that takes the next tokens and gives the logits `[vocab]` after the last of them.
fn run(
    step: &mut LogitsOf,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    context: usize,
    generation: Generation,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, TextError> {
    if prompt.is_empty() {
        return Err(TextError::EmptyText {
            origin: "prompt".into(),
            expected: "at least 1 token".into(),
            found: "0".into(),
        });
    }
    if prompt.len() >= context {
        return Err(TextError::TooLong {
            what: "prompt",
            context: context.saturating_sub(1),
            found: prompt.len(),
            hint: "shorten the prompt: one place must be left for an answer".into(),
        });
    }
    let mut sampler = Sampler::new(generation.sampling)?;
    let mut stream = tokenizer.stream();
    let (mut tokens, mut text) = (Vec::new(), String::new());
    let started = Instant::now();
    let mut logits = step(prompt)?;
    let prefill = started.elapsed();
    let (mut decode, mut decode_steps) = (Duration::ZERO, 0);
    let stop = loop {
        if tokens.len() == generation.max_new_tokens {
            break Stop::MaxNewTokens;
        }
        if prompt.len() + tokens.len() == context {
            break Stop::ContextEnd;
        }
        let token = sampler.next(&logits)?;
        let ends = tokenizer.eos_ids().contains(&token);
        if ends && generation.end_of_text == EndOfText::Stop {
            break Stop::EndOfText(token);
        }
        tokens.push(token);
        let piece = stream.push(token)?;
        text += &piece;
        if !piece.is_empty() && on_text(&piece).is_break() {
            break Stop::Asked;
        }
        let more = tokens.len() < generation.max_new_tokens;
        if more && prompt.len() + tokens.len() < context {
            let started = Instant::now();
            logits = step(&[token])?;
            decode += started.elapsed();
            decode_steps += 1;
        }
    };
    let rest = stream.finish()?;
    if !rest.is_empty() && stop != Stop::Asked {
        text += &rest;
        // It ends here, whatever the receiver says.
        let _ = on_text(&rest);
    }
    let prompt_tokens = prompt.len();
    Ok(Generated { tokens, text, stop, prompt_tokens, prefill, decode, decode_steps })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let json = r#"{"version":"1.0","added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},
            "model":{"type":"WordLevel","unk_token":"?","vocab":{"?":0,"a":1,"b":2,"c":3}}}"#;
        let mut t = Tokenizer::from_json(json.as_bytes(), Path::new("tokenizer.json")).unwrap();
        t.set_eos_ids(vec![3]);
        t
    }

    /// Continues with the numbers after the last token, and counts what it is given.
    fn counting(
        prompt: &[u32],
        max_new_tokens: usize,
        context: usize,
        end_of_text: EndOfText,
    ) -> (Generated, Vec<usize>) {
        let mut given = Vec::new();
        let mut step = |tokens: &[u32]| {
            given.push(tokens.len());
            let mut logits = vec![0.0; 4];
            logits[(tokens[tokens.len() - 1] as usize + 1) % 4] = 1.0;
            Ok(logits)
        };
        let generation = Generation { max_new_tokens, sampling: Sampling::default(), end_of_text };
        let mut go_on = |_: &str| ControlFlow::Continue(());
        let out = run(&mut step, &tokenizer(), prompt, context, generation, &mut go_on).unwrap();
        (out, given)
    }

    #[test]
    fn ends_at_an_end_token_which_is_no_part_of_the_text() {
        let (out, given) = counting(&[0, 0], 9, 99, EndOfText::Stop);
        assert_eq!((out.tokens, out.stop), (vec![1, 2], Stop::EndOfText(3)));
        assert_eq!(out.text, "a b");
        assert_eq!(given, [2, 1, 1]);
    }

    #[test]
    fn ends_at_the_number_asked_for_without_a_wasted_pass() {
        let (out, given) = counting(&[0], 2, 99, EndOfText::Ignore);
        assert_eq!((out.tokens, out.stop, given), (vec![1, 2], Stop::MaxNewTokens, vec![1, 1]));
        let (out, _) = counting(&[0], 6, 99, EndOfText::Ignore);
        assert_eq!(out.tokens, [1, 2, 3, 0, 1, 2]);
        let (out, given) = counting(&[0], 0, 99, EndOfText::Stop);
        assert_eq!((out.tokens.len(), out.stop, given.len()), (0, Stop::MaxNewTokens, 1));
    }

    #[test]
    fn ends_at_the_end_of_the_context() {
        let (out, given) = counting(&[0, 0, 0], 9, 5, EndOfText::Ignore);
        assert_eq!((out.tokens.len(), out.stop, given), (2, Stop::ContextEnd, vec![3, 1]));
    }

    #[test]
    fn prompts_that_cannot_be_continued_are_refused() {
        let generation = Generation {
            max_new_tokens: 1,
            sampling: Sampling::default(),
            end_of_text: EndOfText::Stop,
        };
        let run = |prompt: &[u32]| {
            let mut step = |_: &[u32]| panic!("nothing to compute");
            let mut go_on = |_: &str| ControlFlow::Continue(());
            run(&mut step, &tokenizer(), prompt, 4, generation, &mut go_on).unwrap_err()
        };
        assert!(matches!(run(&[]), TextError::EmptyText { .. }));
        assert!(matches!(run(&[1; 4]), TextError::TooLong { context: 3, found: 4, .. }));
    }

    #[test]
    fn the_receiver_can_stop_it() {
        let mut step = |_: &[u32]| Ok(vec![0.0, 1.0, 0.0, 0.0]);
        let generation = Generation {
            max_new_tokens: 9,
            sampling: Sampling::default(),
            end_of_text: EndOfText::Stop,
        };
        let mut stop = |_: &str| ControlFlow::Break(());
        let out = run(&mut step, &tokenizer(), &[1], 9, generation, &mut stop).unwrap();
        assert_eq!((out.tokens, out.stop), (vec![1], Stop::Asked));
    }
}
