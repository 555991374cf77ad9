//! How well a model predicts a text.

use std::time::{Duration, Instant};

use crate::text_error::{LogitsOf, TextError};
use crate::tokenizer::Tokenizer;
use crate::{Cache, LogitRows, Model};

/// Tokens in a window where nothing else is said.
pub const DEFAULT_WINDOW: usize = 512;

/// How a text is cut into pieces that the model sees one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens the model sees at once, the beginning-of-text token included.
    pub window: usize,
    /// Text tokens from the start of a window to the start of the next; as many as a window holds if absent, so
    /// that windows do not overlap. A token that two windows hold is scored in the first.
    pub stride: Option<usize>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { window: DEFAULT_WINDOW, stride: None }
    }
}

/// One window of a text of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// First text token that the model sees.
    pub start: usize,
    /// First text token whose probability counts.
    pub scored: usize,
    /// One past the last text token.
    pub end: usize,
}

impl Windows {
    /// The windows of a text of `len` tokens; `bos` tokens (0 or 1) stand before each.
    fn cut(self, len: usize, bos: usize) -> Result<Vec<Window>, TextError> {
        let content = self.window.saturating_sub(bos);
        if content + bos < 2 || content == 0 {
            return Err(TextError::Parameter {
                name: "window",
                expected: "at least 2 tokens".into(),
                found: self.window.to_string(),
            });
        }
        // Without a token before them, the text tokens at the starts of windows have nothing to be predicted from.
        let blind = 1 - bos;
        let stride = self.stride.unwrap_or(content);
        if stride == 0 || stride > content {
            return Err(TextError::Parameter {
                name: "stride",
                expected: format!("1 to {content}, the text tokens of a window"),
                found: stride.to_string(),
            });
        }
        let (mut windows, mut done) = (Vec::new(), 0);
        for start in (0..len).step_by(stride) {
            let end = len.min(start + content);
            let scored = done.max(start + blind);
            if scored < end {
                windows.push(Window { start, scored, end });
            }
            done = end;
            if end == len {
                break;
            }
        }
        Ok(windows)
    }

    /// Whether a window fits into a context of so many tokens.
    pub(crate) fn check_context(self, context: usize) -> Result<(), TextError> {
        if self.window <= context {
            return Ok(());
        }
        Err(TextError::TooLong {
            what: "window",
            context,
            found: self.window,
            hint: format!("`--window {context}` is the most this model can see at once"),
        })
    }

    /// The windows of a text, which has at least one token to score.
    pub(crate) fn cut_text(
        self,
        len: usize,
        bos: usize,
        origin: &str,
    ) -> Result<Vec<Window>, TextError> {
        let windows = self.cut(len, bos)?;
        if windows.is_empty() {
            return Err(TextError::EmptyText {
                origin: origin.to_owned(),
                expected: format!("at least {} tokens", 2 - bos),
                found: len.to_string(),
            });
        }
        Ok(windows)
    }
}

/// The surprise of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// Tokens that were scored.
    pub tokens: usize,
    /// Sum of `-ln p(token)` over them.
    pub nats: f64,
    /// Tokens that went through the model, context and beginning-of-text tokens included.
    pub computed: usize,
    /// Time it took.
    pub time: Duration,
}

impl Perplexity {
    /// Mean of `-ln p(token)`.
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// `exp(nats per token)`.
    pub fn perplexity(&self) -> f64 {
        self.nats_per_token().exp()
    }
}

/// Perplexity of a model on a text.
///
/// `exp(mean(-ln softmax(logits)[token]))` over the tokens of all windows. Each window begins with the
/// beginning-of-text token if the tokenizer has one; the first token of a window is not scored; a last window that
/// is shorter counts as well. Sums in f64.
///
/// * `origin` names the text in messages
/// * `progress` is told the text tokens done and those there are
///
/// # Errors
/// [`TextError::EmptyText`] if no token can be scored, [`TextError::TooLong`] if a window is longer than the context
/// of the model, [`TextError::Parameter`] for a window or stride out of range.
pub fn perplexity(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &str,
    origin: &str,
    windows: Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, TextError> {
    let tokens = tokenizer.encode(text)?;
    perplexity_of_tokens(model, &tokens, tokenizer.bos(), origin, windows, progress)
}

/// [`perplexity`] of a text whose tokens are known; `bos` stands before each window.
///
/// # Errors
/// As [`perplexity`].
pub fn perplexity_of_tokens(
    model: &Model,
    tokens: &[u32],
    bos: Option<u32>,
    origin: &str,
    windows: Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, TextError> {
    windows.check_context(model.spec().max_positions)?;
    let vocab = model.spec().vocab;
    let mut logits = |window: &[u32]| {
        let mut cache = Cache::new(model, window.len());
        Ok(model.forward(window, &mut cache, LogitRows::All)?)
    };
    score(tokens, bos, windows, vocab, origin, &mut logits, progress)
}

/// The arithmetic of [`perplexity`], for any function from tokens to logits `[tokens, vocab]`.
fn score(
    tokens: &[u32],
    bos: Option<u32>,
    windows: Windows,
    vocab: usize,
    origin: &str,
    logits: &mut LogitsOf,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, TextError> {
    let started = Instant::now();
    let bos_len = usize::from(bos.is_some());
    let windows = windows.cut_text(tokens.len(), bos_len, origin)?;
    let mut sum = Perplexity { tokens: 0, nats: 0.0, computed: 0, time: Duration::ZERO };
    for window in windows {
        let mut seen: Vec<u32> = bos.into_iter().collect();
        // The last token predicts nothing that is in the window.
        seen.extend(&tokens[window.start..window.end - 1]);
        let logits = logits(&seen)?; // [seen, vocab]
        for (i, &token) in tokens.iter().enumerate().take(window.end).skip(window.scored) {
            let row = i - window.start + bos_len - 1;
            let row = &logits[row * vocab..(row + 1) * vocab];
            sum.nats += surprise(row, token)?;
            sum.tokens += 1;
        }
        sum.computed += seen.len();
        progress(window.end, tokens.len());
    }
    sum.time = started.elapsed();
    Ok(sum)
}

/// `-ln softmax(logits)[token]`.
fn surprise(logits: &[f32], token: u32) -> Result<f64, TextError> {
    let Some(&of_token) = logits.get(token as usize) else {
        return Err(TextError::UnknownToken { token, vocab: logits.len() });
    };
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l)) as f64;
    let sum: f64 = logits.iter().map(|&l| (l as f64 - largest).exp()).sum();
    let nats = largest + sum.ln() - of_token as f64;
    if nats.is_nan() {
        let token = logits.iter().position(|l| !l.is_finite()).unwrap_or(0);
        return Err(TextError::NotANumber { token });
    }
    Ok(nats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(windows: Windows, len: usize, bos: usize) -> Vec<(usize, usize, usize)> {
        let cut = windows.cut(len, bos).unwrap();
        cut.into_iter().map(|w| (w.start, w.scored, w.end)).collect()
    }

    #[test]
    fn windows_hold_the_beginning_token() {
        let windows = Windows { window: 4, stride: None };
        assert_eq!(spans(windows, 7, 1), [(0, 0, 3), (3, 3, 6), (6, 6, 7)]);
        // Without it, the first token of each window is not scored, and a last window of one token has none.
        assert_eq!(spans(windows, 9, 0), [(0, 1, 4), (4, 5, 8)]);
    }

    #[test]
    fn overlapping_windows_score_each_token_once() {
        let windows = Windows { window: 5, stride: Some(2) };
        assert_eq!(spans(windows, 8, 1), [(0, 0, 4), (2, 4, 6), (4, 6, 8)]);
        assert_eq!(spans(windows, 7, 0), [(0, 1, 5), (2, 5, 7)]);
    }

    #[test]
    fn windows_out_of_range_are_refused() {
        for (window, stride) in [(1, None), (0, None), (4, Some(0)), (4, Some(4))] {
            let error = Windows { window, stride }.cut(9, 1).unwrap_err();
            assert!(matches!(error, TextError::Parameter { .. }), "{error:?}");
        }
    }

    #[test]
    fn an_indifferent_model_has_the_perplexity_of_its_vocabulary() {
        let mut uniform = |seen: &[u32]| Ok(vec![0.5; seen.len() * 8]);
        let windows = Windows { window: 3, stride: None };
        let p = score(&[1, 2, 3, 4, 5], Some(0), windows, 8, "t", &mut uniform, &mut |_, _| {});
        let p = p.unwrap();
        assert_eq!((p.tokens, p.computed), (5, 5));
        assert!((p.perplexity() - 8.0).abs() < 1e-12);
    }

    #[test]
    fn logits_are_read_at_the_token_before() {
        // Predicts the successor of each token with odds of 3 to 1 in a vocabulary of 2: p = 3/4.
        let mut alternates = |seen: &[u32]| {
            let row = |t: &u32| if *t == 0 { [0.0, 3f32.ln()] } else { [3f32.ln(), 0.0] };
            Ok(seen.iter().flat_map(row).collect())
        };
        let windows = Windows { window: 4, stride: None };
        let p = score(&[0, 1, 0, 1, 0, 1], None, windows, 2, "t", &mut alternates, &mut |_, _| {});
        let p = p.unwrap();
        assert_eq!(p.tokens, 4);
        assert!((p.perplexity() - 4.0 / 3.0).abs() < 1e-6, "{}", p.perplexity());
    }

    #[test]
    fn an_empty_text_says_what_is_needed() {
        let mut never = |_: &[u32]| panic!("nothing to compute");
        let error = score(&[], Some(0), Windows::default(), 2, "a.txt", &mut never, &mut |_, _| {});
        assert!(matches!(error, Err(TextError::EmptyText { origin, .. }) if origin == "a.txt"));
    }

    #[test]
    fn a_nan_logit_is_an_error() {
        assert!(matches!(surprise(&[0.0, f32::NAN], 0), Err(TextError::NotANumber { token: 1 })));
        assert!(matches!(surprise(&[0.0], 1), Err(TextError::UnknownToken { token: 1, vocab: 1 })));
    }
}
