//! From tokens to the text that a client gets: whole characters, cut before the first stop text.

use std::sync::Arc;

use moe_merge_model::tokenizer::StreamDecoder;
use moe_merge_model::{TextError, Tokenizer};

/// Whether an answer goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// A stop text was found; nothing comes after what was given.
    Yes,
    /// No stop text so far.
    No,
}

/// The text of one answer.
#[derive(Debug)]
pub struct Writer {
    decoder: Option<StreamDecoder<Arc<Tokenizer>>>,
    stops: Vec<String>,
    /// Text that may be the beginning of a stop text.
    held: String,
}

impl Writer {
    /// At the start of an answer that ends before any of `stops`, none of which is empty.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: Vec<String>) -> Self {
        Self { decoder: Some(StreamDecoder::new(tokenizer)), stops, held: String::new() }
    }

    /// The text that one more token lets out.
    ///
    /// # Errors
    /// [`TextError::Tokenize`] if the decoder of the tokenizer refuses the tokens.
    pub fn push(&mut self, token: u32) -> Result<(String, Stopped), TextError> {
        let Some(decoder) = &mut self.decoder else { return Ok((String::new(), Stopped::Yes)) };
        let piece = decoder.push(token)?;
        Ok(self.let_out(&piece))
    }

    /// What was held back, once no more tokens come.
    ///
    /// # Errors
    /// As [`Writer::push`].
    pub fn finish(&mut self) -> Result<(String, Stopped), TextError> {
        let Some(decoder) = self.decoder.take() else { return Ok((String::new(), Stopped::Yes)) };
        let piece = decoder.finish()?;
        let (mut text, stopped) = self.let_out(&piece);
        if stopped == Stopped::No {
            text += &std::mem::take(&mut self.held);
        }
        Ok((text, stopped))
    }

    fn let_out(&mut self, piece: &str) -> (String, Stopped) {
        if self.stops.is_empty() {
            return (piece.to_owned(), Stopped::No);
        }
        self.held += piece;
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            self.decoder = None;
            return (std::mem::take(&mut self.held), Stopped::Yes);
        }
        let kept = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, rest), Stopped::No)
    }
}

/// Bytes of the longest end of `text` with which `stop` begins.
fn begun(text: &str, stop: &str) -> usize {
    let longest = stop.len().min(text.len());
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn writer(stops: &[&str]) -> Writer {
        let json = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","unk_token":"?","vocab":{"?":0}}}"#;
        let tokenizer = Tokenizer::from_json(json.as_bytes(), Path::new("t")).unwrap();
        Writer::new(Arc::new(tokenizer), stops.iter().map(|s| (*s).to_owned()).collect())
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Stopped) {
        let mut writer = writer(stops);
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stopped) = writer.let_out(piece);
            out.push(text);
            if stopped == Stopped::Yes {
                assert_eq!(writer.finish().unwrap(), (String::new(), Stopped::Yes));
                return (out, Stopped::Yes);
            }
        }
        out.push(writer.finish().unwrap().0);
        (out, Stopped::No)
    }

    #[test]
    fn stops_are_cut_off_wherever_tokens_end() {
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
        assert_eq!(
            run(&["END"], &["aE", "N", "Db"]),
            (vec!["a".into(), "".into(), "".into()], Stopped::Yes)
        );
        assert_eq!(run(&["END"], &["aE", "N", "x"]).0, ["a", "", "ENx", ""]);
        // What may have been a beginning comes at the end.
        assert_eq!(run(&["END"], &["aEN"]), (vec!["a".into(), "EN".into()], Stopped::No));
        // The first in the text wins, not the first in the list.
        assert_eq!(run(&["c", "b"], &["abc"]).0, ["a"]);
        // A beginning inside a beginning.
        assert_eq!(run(&["aab"], &["aa", "ab"]).0, ["", "a"]);
        assert_eq!(run(&["é!"], &["caf", "é", "?"]).0, ["caf", "", "é?", ""]);
    }
}
