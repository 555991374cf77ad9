//! What tokens of different tokenizers have in common: the text they stand for.

use std::collections::{BTreeMap, HashMap};

use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::Tokenizer;
use serde_json::{Map, Value};

use crate::error::MergeError;

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Key {
    /// Text; a token that begins a word begins with a space.
    Text(Vec<u8>),
    /// One byte, in vocabularies that have such tokens beside text.
    Byte(u8),
    /// A special token with a part to play: `bos_token`, …
    Role(&'static str),
    /// Another special token.
    Special(String),
}

/// The parts that special tokens play, in the order in which a token with several gets its name.
const ROLES: &[&str] =
    &["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// How a vocabulary spells bytes and spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// Each byte as a character of its own (GPT-2).
    Bytes,
    /// `▁` for spaces, `<0x0A>` for bytes without text (SentencePiece).
    Blocks,
}

/// The tokens of a model.
#[derive(Debug)]
pub(super) struct Keys {
    /// By id; ids without a token are absent.
    pub by_id: BTreeMap<u32, Key>,
    /// The lowest id of each key.
    pub ids: HashMap<Key, u32>,
}

impl Keys {
    /// Of the tokenizer of `source`, ids below `rows`.
    pub fn of(source: &Source, tokenizer: &Tokenizer, rows: usize) -> Result<Self, MergeError> {
        let json = object(source, "tokenizer.json")?;
        let spelling =
            match spells_bytes(json.get("decoder")) || spells_bytes(json.get("pre_tokenizer")) {
                true => Spelling::Bytes,
                false => Spelling::Blocks,
            };
        let added = added(&json);
        let roles = roles(source)?;
        let mut keys = Self { by_id: BTreeMap::new(), ids: HashMap::new() };
        for id in 0..tokenizer.vocab_len().min(rows) as u32 {
            let Some(text) = tokenizer.token_text(id) else { continue };
            let key = match (roles.get(&text), added.get(&id)) {
                (Some(role), Some(_)) => Key::Role(role),
                (_, Some(true)) => Key::Special(text),
                (_, Some(false)) => Key::Text(text.into_bytes()),
                (_, None) => spelling.key(&text),
            };
            keys.ids.entry(key.clone()).or_insert(id);
            keys.by_id.insert(id, key);
        }
        Ok(keys)
    }

    /// The id of `key` here. With `bytes`, a byte and the character that is this byte are the same.
    pub fn find(&self, key: &Key, bytes: bool) -> Option<u32> {
        let twin = || match key {
            Key::Byte(byte) if bytes => self.ids.get(&Key::Text(vec![*byte])),
            Key::Text(text) if bytes && text.len() == 1 => self.ids.get(&Key::Byte(text[0])),
            _ => None,
        };
        self.ids.get(key).or_else(twin).copied()
    }
}

impl Spelling {
    fn key(self, text: &str) -> Key {
        match self {
            Self::Bytes => match text.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => Key::Text(bytes),
                None => Key::Text(text.as_bytes().to_vec()),
            },
            Self::Blocks => match hex(text) {
                Some(byte) => Key::Byte(byte),
                None => Key::Text(text.replace('\u{2581}', " ").into_bytes()),
            },
        }
    }
}

/// `<0x0A>`
fn hex(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 characters are themselves, the other 68
/// bytes are the characters from U+0100 on, in order.
fn byte_of(c: char) -> Option<u8> {
    let plain = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(c);
    match code {
        0..=0xff if plain(code) => u8::try_from(code).ok(),
        0x100..=0x143 => (0..=255u8).filter(|b| !plain(u32::from(*b))).nth(code as usize - 0x100),
        _ => None,
    }
}

/// Whether a part of a tokenizer, or a part within it, is byte-level.
fn spells_bytes(part: Option<&Value>) -> bool {
    match part {
        Some(Value::Object(map)) => {
            map.get("type").and_then(Value::as_str) == Some("ByteLevel")
                || map.values().any(|v| {
                    matches!(v, Value::Object(_) | Value::Array(_)) && spells_bytes(Some(v))
                })
        }
        Some(Value::Array(list)) => list.iter().any(|v| spells_bytes(Some(v))),
        _ => false,
    }
}

/// Tokens that were added to a vocabulary, and whether they are special.
fn added(json: &Map<String, Value>) -> HashMap<u32, bool> {
    let list = json.get("added_tokens").and_then(Value::as_array);
    let entry = |token: &Value| {
        let id = u32::try_from(token.get("id")?.as_u64()?).ok()?;
        Some((id, token.get("special").and_then(Value::as_bool).unwrap_or(false)))
    };
    list.into_iter().flatten().filter_map(entry).collect()
}

/// Texts of special tokens with the parts they play.
fn roles(source: &Source) -> Result<HashMap<String, &'static str>, MergeError> {
    let mut found = HashMap::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        if source.side_file(file).is_none() {
            continue;
        }
        let json = object(source, file)?;
        for role in ROLES {
            let value = json.get(*role);
            let text = value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
            if let Some(text) = text {
                found.entry(text.to_owned()).or_insert(*role);
            }
        }
    }
    Ok(found)
}

fn object(source: &Source, name: &str) -> Result<Map<String, Value>, MergeError> {
    let malformed = |found: String| {
        MergeError::from(CheckpointError::Malformed {
            what: format!("`{name}` is no JSON object"),
            file: source.path.join(name),
            tensor: None,
            expected: "a JSON object".into(),
            found,
            hint: None,
        })
    };
    let Some(file) = source.side_file(name) else {
        return Err(malformed("no such file".into()));
    };
    match serde_json::from_slice(&file.read()?) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(malformed("another kind of value".into())),
        Err(e) => Err(malformed(e.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_mean_the_same() {
        let text = |t: &str| Key::Text(t.as_bytes().to_vec());
        assert_eq!(Spelling::Bytes.key("Ġthe"), text(" the"));
        assert_eq!(Spelling::Blocks.key("▁the"), text(" the"));
        assert_eq!(Spelling::Bytes.key("ĊĊ"), text("\n\n"));
        assert_eq!(Spelling::Bytes.key("Ã¼"), text("ü"));
        assert_eq!(Spelling::Blocks.key("ü"), text("ü"));
        assert_eq!(Spelling::Blocks.key("<0x0A>"), Key::Byte(10));
        assert_eq!(Spelling::Blocks.key("<0xZZ>"), text("<0xZZ>"));
        // Half a character is no text, but it is the same half everywhere.
        assert_eq!(Spelling::Bytes.key("Ã"), Key::Text(vec![0xc3]));
        // Characters outside of the alphabet.
        assert_eq!(Spelling::Bytes.key("日"), text("日"));
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<u8> = (0..0x200u32).filter_map(|c| byte_of(char::from_u32(c)?)).collect();
        assert_eq!(seen.len(), 256);
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('A')), (Some(32), Some(10), Some(65)));
    }

    #[test]
    fn bytes_match_characters_only_when_asked() {
        let ids = HashMap::from([(Key::Text(b"A".to_vec()), 3), (Key::Byte(10), 4)]);
        let keys = Keys { by_id: BTreeMap::new(), ids };
        assert_eq!(keys.find(&Key::Byte(65), false), None);
        assert_eq!(keys.find(&Key::Byte(65), true), Some(3));
        assert_eq!(keys.find(&Key::Text(b"\n".to_vec()), true), Some(4));
        assert_eq!(keys.find(&Key::Text(b"A".to_vec()), false), Some(3));
    }
}
