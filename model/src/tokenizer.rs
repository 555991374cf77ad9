//! Text to token ids and back.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde_json::Value;

use moe_merge_checkpoint::{ConfigJson, SideContent, SideFile, Source};

use crate::text_error::TextError;

/// The tokenizer of a model, with the special tokens that its config files name.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    bos_text: Option<String>,
    eos_text: Option<String>,
    eos_ids: Vec<u32>,
}

/// First and last byte, exclusive, of each token in the text.
pub type Spans = Vec<(usize, usize)>;

impl Tokenizer {
    /// The tokenizer of an opened model.
    ///
    /// * beginning of text: `bos_token` of `tokenizer_config.json`, else of `special_tokens_map.json`; where neither
    ///   file exists, `bos_token_id` of `generation_config.json` or `config.json`
    /// * end of text: `eos_token_id` of `generation_config.json`, else of `config.json`, and `eos_token` of the
    ///   tokenizer
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`] without `tokenizer.json`, [`TextError::Tokenizer`] if a file cannot be read as what
    /// it should be or names a special token that the vocabulary lacks.
    pub fn from_source(source: &Source) -> Result<Self, TextError> {
        let Some(file) = source.side_file("tokenizer.json") else {
            let found = match source.side_file("tokenizer.model") {
                Some(_) => "only `tokenizer.model`".to_owned(),
                None => "no tokenizer file".to_owned(),
            };
            return Err(TextError::NoTokenizer { path: source.path.clone(), found });
        };
        let mut json = file.read()?;
        if source.config.model_type() == "qwen2" {
            json = with_qwen2_words(json);
        }
        let mut tokenizer = Self::from_json(&json, &origin(source, file))?;
        tokenizer.read_special_tokens(source)?;
        Ok(tokenizer)
    }

    /// The tokenizer in the text of a `tokenizer.json`, without special tokens; `file` is for messages.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] if it is none.
    pub fn from_json(json: &[u8], file: &Path) -> Result<Self, TextError> {
        let unusable = |found: String| TextError::Tokenizer {
            file: file.to_owned(),
            expected: "a tokenizer as the `tokenizers` library writes it".into(),
            found,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| unusable(e.to_string()))?;
        // Some published files carry the truncation or padding of the run that made them: it would cut texts short.
        inner.with_truncation(None).map_err(|e| unusable(e.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner, bos: None, bos_text: None, eos_text: None, eos_ids: Vec::new() })
    }

    fn read_special_tokens(&mut self, source: &Source) -> Result<(), TextError> {
        let config = json_side_file(source, "tokenizer_config.json")?;
        let map = json_side_file(source, "special_tokens_map.json")?;
        let generation = json_side_file(source, "generation_config.json")?
            .map(|(_, json)| ConfigJson(json))
            .unwrap_or_default();
        let named = |key: &str| {
            [&config, &map]
                .into_iter()
                .flatten()
                .find_map(|(file, json)| Some((file.clone(), token_text(json.get(key)?)?)))
        };
        let id_of = |(file, text): &(PathBuf, String), key: &str| {
            self.inner.token_to_id(text).ok_or_else(|| TextError::Tokenizer {
                file: file.clone(),
                expected: format!("`{key}` to be a token of the vocabulary"),
                found: format!("`{text}`, which is not in `tokenizer.json`"),
            })
        };
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let mut bos_id = bos.as_ref().map(|b| id_of(b, "bos_token")).transpose()?;
        if config.is_none() && map.is_none() {
            let ids = [&generation, &source.config].map(|c| c.token_ids("bos_token_id"));
            bos_id = ids.iter().flatten().copied().next();
        }
        let mut eos_ids = generation.token_ids("eos_token_id");
        if eos_ids.is_empty() {
            eos_ids = source.config.token_ids("eos_token_id");
        }
        let eos_id = eos.as_ref().map(|e| id_of(e, "eos_token")).transpose()?;
        eos_ids.extend(eos_id.filter(|id| !eos_ids.contains(id)));
        self.bos_text = bos.map(|(_, t)| t).or_else(|| self.inner.id_to_token(bos_id?));
        self.eos_text = eos.map(|(_, t)| t).or_else(|| self.inner.id_to_token(*eos_ids.first()?));
        (self.bos, self.eos_ids) = (bos_id, eos_ids);
        Ok(())
    }

    /// Token ids of `text`; special tokens only where their text stands in it.
    ///
    /// # Errors
    /// [`TextError::Tokenize`] if the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_inner(text, false)
    }

    /// Token ids of `text` with the special tokens that the tokenizer puts around a single text by itself: what a
    /// prompt without chat template is for transformers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_inner(text, true)
    }

    fn encode_inner(&self, text: &str, specials: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, specials).map_err(|e| TextError::Tokenize {
            action: "encode this text",
            found: e.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of `text` as [`Tokenizer::encode`] gives them, each with the bytes of the text that it stands for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_spans(&self, text: &str) -> Result<(Vec<u32>, Spans), TextError> {
        let encoding = self.inner.encode(text, false).map_err(|e| TextError::Tokenize {
            action: "encode this text",
            found: e.to_string(),
        })?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of `ids`, special tokens left away; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TextError::Tokenize`] if the decoder of the tokenizer refuses them.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.inner.decode(ids, true).map_err(|e| TextError::Tokenize {
            action: "decode these tokens",
            found: e.to_string(),
        })
    }

    /// A decoder for tokens that come one at a time.
    pub fn stream(&self) -> StreamDecoder<&Self> {
        StreamDecoder::new(self)
    }

    /// The token that begins a text, if the tokenizer has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Text of [`Tokenizer::bos`], for chat templates.
    pub fn bos_text(&self) -> Option<&str> {
        self.bos_text.as_deref()
    }

    /// Text of the token that ends a text, for chat templates.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos_text.as_deref()
    }

    /// Tokens each of which ends a generated text.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Ends texts at other tokens: for tests that have no config files.
    #[cfg(test)]
    pub(crate) fn set_eos_ids(&mut self, ids: Vec<u32>) {
        self.eos_ids = ids;
    }

    /// The text of one token as the vocabulary spells it, if there is such a token.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the largest token id.
    pub fn vocab_len(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// How the vocabulary of `other` differs from this one; `None` if every id means the same text in both.
    pub fn differences(&self, other: &Tokenizer) -> Option<VocabDifference> {
        let by_id = |t: &Tokenizer| -> BTreeMap<u32, String> {
            t.inner.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect()
        };
        let (here, there) = (by_id(self), by_id(other));
        let mut difference =
            VocabDifference { len: (here.len(), there.len()), count: 0, first: Vec::new() };
        let ids = here.keys().chain(there.keys().filter(|id| !here.contains_key(id)));
        let mut differing: Vec<u32> =
            ids.copied().filter(|id| here.get(id) != there.get(id)).collect();
        differing.sort_unstable();
        difference.count = differing.len();
        difference.first = differing
            .iter()
            .take(VocabDifference::SHOWN)
            .map(|id| TokenDifference {
                id: *id,
                here: here.get(id).cloned(),
                there: there.get(id).cloned(),
            })
            .collect();
        (difference.count > 0).then_some(difference)
    }
}

/// How Qwen2 cuts text into words.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// transformers 5 gives every `qwen2` checkpoint the words of Qwen2, whatever `tokenizer.json` says. Published files say the
/// same; one that names the plain byte-level words of GPT-2 instead is read as transformers reads it. Other
/// pre-tokenizers (distilled models with another vocabulary) stay as they are.
fn with_qwen2_words(json: Vec<u8>) -> Vec<u8> {
    let Ok(mut tokenizer) = serde_json::from_slice::<Value>(&json) else { return json };
    let words = &tokenizer["pre_tokenizer"];
    if words["type"] != "ByteLevel" || words["use_regex"] == false {
        return json;
    }
    tokenizer["normalizer"] = serde_json::json!({"type": "NFC"});
    tokenizer["pre_tokenizer"] = serde_json::json!({
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ],
    });
    serde_json::to_vec(&tokenizer).unwrap_or(json)
}

/// The file of a side file, or the model that it was rebuilt from.
pub(crate) fn origin(source: &Source, file: &SideFile) -> PathBuf {
    match &file.content {
        SideContent::File(path) => path.clone(),
        SideContent::Bytes(_) => source.path.clone(),
    }
}

/// Where a JSON object was read, and the object.
pub(crate) type JsonFile = (PathBuf, serde_json::Map<String, Value>);

/// A side file that is a JSON object, with where it came from.
pub(crate) fn json_side_file(source: &Source, name: &str) -> Result<Option<JsonFile>, TextError> {
    let Some(side) = source.side_file(name) else { return Ok(None) };
    let file = origin(source, side);
    let unusable = |found: String| TextError::Tokenizer {
        file: file.clone(),
        expected: format!("`{name}` to be a JSON object"),
        found,
    };
    match serde_json::from_slice(&side.read()?) {
        Ok(Value::Object(map)) => Ok(Some((file, map))),
        Ok(_) => Err(unusable("another JSON value".into())),
        Err(e) => Err(unusable(e.to_string())),
    }
}

/// A special token as config files spell it: its text, or an object with `content`.
pub(crate) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// Ids that mean different things to two tokenizers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabDifference {
    /// Tokens of the one and of the other.
    pub len: (usize, usize),
    /// How many ids differ.
    pub count: usize,
    /// The first few of them, ascending.
    pub first: Vec<TokenDifference>,
}

impl VocabDifference {
    /// Differences that are listed one by one.
    pub const SHOWN: usize = 5;
}

/// One id that means different things to two tokenizers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenDifference {
    /// The id.
    pub id: u32,
    /// Its text in the one tokenizer.
    pub here: Option<String>,
    /// Its text in the other.
    pub there: Option<String>,
}

impl std::fmt::Display for VocabDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens against {}, {} ids differ: ", self.len.0, self.len.1, self.count)?;
        for (i, difference) in self.first.iter().enumerate() {
            let text =
                |t: &Option<String>| t.as_ref().map_or("nothing".into(), |t| format!("{t:?}"));
            let comma = if i > 0 { ", " } else { "" };
            let (here, there) = (text(&difference.here), text(&difference.there));
            write!(f, "{comma}{} is {here} / {there}", difference.id)?;
        }
        if self.count > self.first.len() { f.write_str(", …") } else { Ok(()) }
    }
}

/// Turns tokens that come one at a time into pieces of text, each of them complete characters.
///
/// Some decoders look at neighbours (a leading space, a word joined to the one before), so a piece is the
/// difference of two decoded texts: `decode(ids[prefix..])` less `decode(ids[prefix..read])`.
#[derive(Debug)]
pub struct StreamDecoder<T> {
    tokenizer: T,
    ids: Vec<u32>,
    /// Start of the context that is decoded again with each token.
    prefix: usize,
    /// Tokens whose text has been given out.
    read: usize,
}

impl<T: Deref<Target = Tokenizer>> StreamDecoder<T> {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: T) -> Self {
        Self { tokenizer, ids: Vec::new(), prefix: 0, read: 0 }
    }

    /// The text that `id` completes; empty while a character is still incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids[self.prefix..])?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let piece = self.rest_of(&text)?;
        self.prefix = self.read;
        self.read = self.ids.len();
        Ok(piece)
    }

    /// What was held back, once no more tokens come; an incomplete character is U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String, TextError> {
        let text = self.tokenizer.decode(&self.ids[self.prefix..])?;
        self.rest_of(&text)
    }

    fn rest_of(&self, text: &str) -> Result<String, TextError> {
        let given = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        Ok(text.get(given.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Tokenizer {
        Tokenizer::from_json(json.as_bytes(), Path::new("tokenizer.json")).unwrap()
    }

    fn words(vocab: &str) -> Tokenizer {
        parse(&format!(
            r#"{{"version":"1.0","added_tokens":[],"pre_tokenizer":{{"type":"Whitespace"}},
            "model":{{"type":"WordLevel","unk_token":"?","vocab":{vocab}}}}}"#
        ))
    }

    fn tiny() -> Option<Tokenizer> {
        let path = moe_merge_testkit::shared("models/tiny/base/tokenizer.json")?;
        Some(Tokenizer::from_json(&std::fs::read(&path).unwrap(), &path).unwrap())
    }

    #[test]
    fn equal_vocabularies_do_not_differ() {
        let a = words(r#"{"?":0,"a":1,"b":2}"#);
        assert_eq!(a.differences(&a), None);
        assert_eq!(a.vocab_len(), 3);
        assert_eq!(a.encode("b a c").unwrap(), [2, 1, 0]);
    }

    #[test]
    fn differences_name_ids_and_both_texts() {
        let a = words(r#"{"?":0,"a":1,"b":2}"#);
        let b = words(r#"{"?":0,"b":1,"a":2,"c":3}"#);
        let d = a.differences(&b).unwrap();
        assert_eq!((d.len, d.count), ((3, 4), 3));
        assert_eq!(
            d.to_string(),
            r#"3 tokens against 4, 3 ids differ: 1 is "a" / "b", 2 is "b" / "a", 3 is nothing / "c""#
        );
        let texts: Vec<String> = (0..20).map(|i| format!(r#""w{i}":{i}"#)).collect();
        let many = words(&format!("{{{}}}", texts.join(",")));
        let d = a.differences(&many).unwrap();
        assert_eq!((d.count, d.first.len()), (20, VocabDifference::SHOWN));
        assert!(d.to_string().ends_with(", …"));
    }

    #[test]
    fn truncation_in_the_file_does_not_cut_texts() {
        let t = parse(
            r#"{"version":"1.0","truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0},
            "padding":{"strategy":{"Fixed":8},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"?"},
            "added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},
            "model":{"type":"WordLevel","unk_token":"?","vocab":{"?":0,"a":1}}}"#,
        );
        assert_eq!(t.encode("a a a a").unwrap().len(), 4);
    }

    #[test]
    fn not_a_tokenizer_names_the_file() {
        let error = Tokenizer::from_json(b"{}", Path::new("x/tokenizer.json")).unwrap_err();
        use moe_merge_checkpoint::Explain;
        assert_eq!(error.fields()[0].1, "x/tokenizer.json");
    }

    #[test]
    fn special_tokens_come_from_the_config_files() {
        let Some(path) = moe_merge_testkit::shared("models/tiny/base") else { return };
        let source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
        let t = Tokenizer::from_source(&source).unwrap();
        assert_eq!((t.bos(), t.eos_ids(), t.vocab_len()), (Some(1), &[2][..], 1024));
        assert_eq!((t.bos_text(), t.eos_text()), (Some("<s>"), Some("</s>")));
        let plain = t.encode("The river").unwrap();
        let prompt = t.encode_prompt("The river").unwrap();
        assert_eq!((prompt[0], &prompt[1..]), (1, &plain[..]));
    }

    #[test]
    fn streamed_pieces_are_whole_characters() {
        let Some(t) = tiny() else { return };
        let text = "naïve – 日本語 🦀 end";
        let ids = t.encode(text).unwrap();
        let mut stream = t.stream();
        let mut out = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{fffd}'), "{piece:?}");
            out += &piece;
        }
        assert_eq!(out, text);
        assert_eq!(stream.finish().unwrap(), "");
        // The crab is four bytes, each a token: cut after the second.
        let crab = t.encode("🦀").unwrap();
        assert!(crab.len() > 1, "the tiny vocabulary has no crab");
        let mut stream = t.stream();
        assert_eq!(stream.push(crab[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), t.decode(&crab[..1]).unwrap());
    }

    proptest::proptest! {
        #[test]
        fn streaming_equals_decoding(ids in proptest::collection::vec(3u32..1024, 0..40)) {
            if let Some(t) = tiny() {
                let mut stream = t.stream();
                let mut out = String::new();
                for &id in &ids {
                    out += &stream.push(id).unwrap();
                }
                out += &stream.finish().unwrap();
                proptest::prop_assert_eq!(out, t.decode(&ids).unwrap());
            }
        }
    }
}
