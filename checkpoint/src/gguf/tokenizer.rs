//! The tokenizer of a GGUF file as the files that Hugging Face models carry.
//!
//! Byte-level vocabularies (`gpt2`) come with their merges and the name of a way to cut words. SentencePiece ones
//! (`llama`) come with scores, of which merges are made: every pair of tokens that joins to a token, best score first.
//!
//! # Source
//! transformers `integrations/gguf/gguf_tokenizer_mapping.py` and `tokenization_utils_base.py::generate_merges`. Differs
//! where llama.cpp and the original tokenizers agree against it: SmolLM's digits are split before words are, and the space
//! that SentencePiece models put before a text also follows a special token.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::gguf::header::Header;
use crate::gguf::key;
use crate::gguf::pre::Pre;
use crate::gguf::value::{List, Value};
use crate::source::{SideContent, SideFile};

/// What SentencePiece writes for a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Longest token that is cut in two at each place in search of merges; real ones are far shorter.
pub(super) const LONGEST_TOKEN: usize = 1024;

/// `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// `tokenizer.ggml.model` of a file without tokenizer.
pub(super) const NO_TOKENIZER: [&str; 2] = ["no_vocab", "none"];

/// Tokenizer files rebuilt from the metadata, and `generation_config.json`.
pub(super) fn side_files(
    header: &Header,
    config: &ConfigJson,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<Vec<SideFile>, CheckpointError> {
    let mut files = vec![file("generation_config.json", &generation_config(header, config))];
    let Some(Value::Text(model)) = header.get(key::TOKENIZER) else {
        notes.push("the GGUF file has no tokenizer".into());
        return Ok(files);
    };
    if NO_TOKENIZER.contains(model) {
        notes.push("the GGUF file has no tokenizer".into());
        return Ok(files);
    }
    let reader = Reader { header, path };
    let vocabulary = reader.vocabulary(notes)?;
    let flags = reader.flags(model);
    let tokenizer = match (header.get("tokenizer.huggingface.json"), *model) {
        (Some(Value::Text(text)), _) => serde_json::from_str(text)
            .map_err(|e| reader.malformed("tokenizer.huggingface.json", "JSON", e.to_string()))?,
        (_, "gpt2") => reader.byte_level(&vocabulary, flags, notes)?,
        (_, "llama") => reader.sentence_piece(&vocabulary, flags, notes)?,
        (_, other) => {
            return Err(CheckpointError::Unsupported {
                what: format!("tokenizer model `{other}` of the GGUF file is not supported"),
                file: path.to_owned(),
                hint: "known: gpt2, llama; or use the safetensors files of this model".into(),
            });
        }
    };
    notes.push("tokenizer rebuilt from GGUF metadata".into());
    files.push(file("tokenizer.json", &tokenizer));
    let config = reader.tokenizer_config(&vocabulary, flags, config, notes);
    files.push(file("tokenizer_config.json", &config));
    Ok(files)
}

fn file(name: &str, content: &Json) -> SideFile {
    // A tree of strings, numbers and lists always has a JSON text.
    let mut bytes = format!("{content:#}").into_bytes();
    bytes.push(b'\n');
    SideFile { name: name.to_owned(), content: SideContent::Bytes(Arc::from(bytes)) }
}

fn generation_config(header: &Header, config: &ConfigJson) -> Json {
    let mut generation = Map::new();
    if let Some(id) = config.get("bos_token_id") {
        generation.insert("bos_token_id".into(), id.clone());
    }
    let id = |key: &str| header.get(&format!("tokenizer.ggml.{key}")).and_then(Value::unsigned);
    let mut ends: Vec<u64> = Vec::new();
    for id in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(id) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    match ends.as_slice() {
        [] => None,
        [id] => generation.insert("eos_token_id".into(), json!(id)),
        ids => generation.insert("eos_token_id".into(), json!(ids)),
    };
    if let Some(id) = config.get("pad_token_id") {
        generation.insert("pad_token_id".into(), id.clone());
    }
    Json::Object(generation)
}

/// The tokens of a file, by id.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    fn kind(&self, id: usize) -> i64 {
        self.kinds.get(id).copied().unwrap_or(NORMAL)
    }

    /// `vocab` of `tokenizer.json`, in the order of ids.
    fn to_json(&self) -> Json {
        let entry = |(id, token): (usize, &String)| {
            (self.ids.get(token) == Some(&(id as u32))).then(|| (token.clone(), json!(id)))
        };
        Json::Object(self.tokens.iter().enumerate().filter_map(entry).collect())
    }

    /// `added_tokens` of `tokenizer.json`: what is found in a text before anything else happens to it.
    fn added(&self, specials: &HashSet<u32>) -> Vec<Json> {
        let one = |(id, token): (usize, &String)| {
            let special =
                specials.contains(&(id as u32)) || matches!(self.kind(id), CONTROL | UNKNOWN);
            let is_added = special || self.kind(id) == USER_DEFINED;
            (is_added && self.ids.get(token) == Some(&(id as u32)) && !token.is_empty()).then(
                || {
                    json!({
                        "id": id, "content": token, "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false, "special": special
                    })
                },
            )
        };
        self.tokens.iter().enumerate().filter_map(one).collect()
    }
}

/// Whether texts get a token before and behind them.
#[derive(Debug, Clone, Copy)]
struct Flags {
    add_bos: bool,
    add_eos: bool,
}

struct Reader<'h, 'p> {
    header: &'h Header<'h>,
    path: &'p Path,
}

impl<'h> Reader<'h, '_> {
    fn malformed(&self, key: &str, expected: &str, found: String) -> CheckpointError {
        CheckpointError::Malformed {
            what: format!("metadata key `{key}` makes no sense"),
            file: self.path.to_owned(),
            tensor: None,
            expected: expected.into(),
            found,
            hint: Some(
                "download the file again, or use the safetensors files of this model".into(),
            ),
        }
    }

    fn list(&self, key: &str) -> Result<Option<List<'h>>, CheckpointError> {
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(*list)),
            Some(other) => Err(self.malformed(key, "a list", other.describe())),
        }
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&'h str>>, CheckpointError> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        let Some(texts) = list.texts() else {
            return Err(self.malformed(key, "a list of texts", "a list of something else".into()));
        };
        let utf8 = |(i, bytes)| {
            std::str::from_utf8(bytes)
                .map_err(|e| self.malformed(key, "UTF-8", format!("entry {i}: {e}")))
        };
        texts.enumerate().map(utf8).collect::<Result<_, _>>().map(Some)
    }

    /// A list with one number for each token, or none at all.
    fn numbers(&self, key: &str, count: usize) -> Result<Vec<f64>, CheckpointError> {
        let Some(list) = self.list(key)? else { return Ok(Vec::new()) };
        let numbers: Vec<f64> = match list.numbers() {
            Some(numbers) => numbers.collect(),
            None => return Err(self.malformed(key, "a list of numbers", "another list".into())),
        };
        if numbers.len() != count {
            let expected = format!("one entry for each of {count} tokens");
            return Err(self.malformed(key, &expected, format!("{} entries", numbers.len())));
        }
        Ok(numbers)
    }

    fn vocabulary(&self, notes: &mut Vec<String>) -> Result<Vocabulary, CheckpointError> {
        let key = key::TOKENS;
        let Some(texts) = self.texts(key)? else {
            return Err(self.malformed(key, "a list of tokens", "nothing".into()));
        };
        let kinds = self.numbers(key::TOKEN_TYPES, texts.len())?;
        let kinds: Vec<i64> = kinds.into_iter().map(|k| k as i64).collect();
        let mut tokens: Vec<String> = texts.into_iter().map(str::to_owned).collect();
        // Converters fill the vocabulary up to the rows of the embedding with such names.
        let is_filler = |id: usize, token: &str| {
            kinds.get(id) == Some(&UNUSED) && token == format!("[PAD{id}]")
        };
        while let Some(last) = tokens.last()
            && is_filler(tokens.len() - 1, last)
        {
            tokens.pop();
        }
        if self.is_gemma() {
            // Gemma's runs of spaces are stored as spaces, and matched as what SentencePiece writes for them.
            for token in tokens.iter_mut().filter(|t| !t.is_empty() && t.bytes().all(|b| b == b' '))
            {
                *token = SPACE.repeat(token.len());
            }
        }
        let (mut ids, mut twice) = (HashMap::with_capacity(tokens.len()), Vec::new());
        for (id, token) in tokens.iter().enumerate() {
            let id = u32::try_from(id)
                .map_err(|_| self.malformed(key, "fewer than 2^32 tokens", id.to_string()))?;
            if ids.contains_key(token) {
                twice.push(format!("{id} `{token}`"));
            } else {
                ids.insert(token.clone(), id);
            }
        }
        if !twice.is_empty() {
            let count = twice.len();
            twice.truncate(5);
            notes.push(format!(
                "{count} tokens are in the vocabulary twice and never produced again: {}",
                twice.join(", ")
            ));
        }
        Ok(Vocabulary { tokens, kinds, ids })
    }

    fn is_gemma(&self) -> bool {
        matches!(self.header.get(key::ARCHITECTURE),
            Some(Value::Text(name)) if name.starts_with("gemma"))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.header.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    fn flags(&self, model: &str) -> Flags {
        let by_default = match self.header.get(key::PRE) {
            Some(Value::Text(name)) if model == "gpt2" => {
                Pre::from_name(name).is_some_and(|pre| pre.add_bos)
            }
            _ => model == "llama",
        };
        Flags {
            add_bos: self.flag(key::ADD_BOS).unwrap_or(by_default),
            add_eos: self.flag(key::ADD_EOS).unwrap_or(false),
        }
    }

    /// The id under `tokenizer.ggml.KEY`, if it is that of a token.
    fn special(&self, key: &str, vocabulary: &Vocabulary) -> Option<u32> {
        let id = self.header.get(&format!("tokenizer.ggml.{key}"))?.unsigned()?;
        u32::try_from(id).ok().filter(|id| (*id as usize) < vocabulary.tokens.len())
    }

    fn specials(&self, vocabulary: &Vocabulary) -> HashSet<u32> {
        SPECIALS.iter().filter_map(|(_, key)| self.special(key, vocabulary)).collect()
    }

    fn byte_level(
        &self,
        vocabulary: &Vocabulary,
        flags: Flags,
        notes: &mut Vec<String>,
    ) -> Result<Json, CheckpointError> {
        let pre = match self.header.get(key::PRE) {
            Some(Value::Text(name)) => Pre::from_name(name).ok_or_else(|| {
                let what = format!("pre-tokenizer `{name}` of the GGUF file is not supported");
                CheckpointError::Unsupported {
                    what,
                    file: self.path.to_owned(),
                    hint: format!("known: {}; or use the safetensors files", Pre::known()),
                }
            })?,
            _ => Pre::from_name("gpt-2")
                .ok_or_else(|| self.malformed("tokenizer.ggml.pre", "a name", "nothing".into()))?,
        };
        if matches!(self.header.get(key::PRE), None | Some(Value::Text("default"))) {
            notes.push("the file does not say how words are cut; taken as in GPT-2".into());
        }
        let key = key::MERGES;
        let Some(merges) = self.merges(vocabulary)? else {
            return Err(self.malformed(key, "a list of merges", "nothing".into()));
        };
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true
        });
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": vocabulary.added(&self.specials(vocabulary)),
            "normalizer": pre.normalizer(),
            "pre_tokenizer": pre.pre_tokenizer(),
            "post_processor": self.template(vocabulary, flags).unwrap_or_else(|| bytes.clone()),
            "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": pre.ignore_merges,
                "vocab": vocabulary.to_json(), "merges": merges
            }
        }))
    }

    /// The merges that the file lists, as pairs of tokens that join to a token.
    fn merges(
        &self,
        vocabulary: &Vocabulary,
    ) -> Result<Option<Vec<[&'h str; 2]>>, CheckpointError> {
        let key = key::MERGES;
        let Some(texts) = self.texts(key)? else { return Ok(None) };
        let mut joined = String::new();
        let mut pair = |(i, merge): (usize, &'h str)| {
            let (left, right) = merge.split_once(' ').unwrap_or((merge, ""));
            joined.clear();
            joined.extend([left, right]);
            let known =
                [left, right, joined.as_str()].iter().all(|t| vocabulary.ids.contains_key(*t));
            if left.is_empty() || right.is_empty() || !known {
                let found = format!("entry {i}: {}", Value::Text(merge).describe());
                return Err(self.malformed(key, "two tokens that join to a token", found));
            }
            Ok([left, right])
        };
        texts.into_iter().enumerate().map(&mut pair).collect::<Result<_, _>>().map(Some)
    }

    fn sentence_piece(
        &self,
        vocabulary: &Vocabulary,
        flags: Flags,
        notes: &mut Vec<String>,
    ) -> Result<Json, CheckpointError> {
        let merges = match self.merges(vocabulary)? {
            Some(merges) => json!(merges),
            None => json!(self.merges_from_scores(vocabulary)?),
        };
        if self.header.get("tokenizer.ggml.precompiled_charsmap").is_some() {
            notes.push("the tokenizer's table of normalised characters is not carried over".into());
        }
        let unknown = self
            .special("unknown_token_id", vocabulary)
            .or_else(|| vocabulary.ids.get("<unk>").copied())
            .map(|id| vocabulary.tokens[id as usize].clone());
        let bytes = (0..vocabulary.tokens.len()).filter(|id| vocabulary.kind(*id) == BYTE).count();
        let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        let prefix = !self.is_gemma() && self.flag(key::ADD_SPACE_PREFIX).unwrap_or(true);
        let normalizer = if prefix {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
            let prepend = json!({ "type": "Prepend", "prepend": SPACE });
            json!({ "type": "Sequence", "normalizers": [prepend, replace] })
        } else {
            replace
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": vocabulary.added(&self.specials(vocabulary)),
            "normalizer": normalizer,
            "pre_tokenizer": null,
            "post_processor": self.template(vocabulary, flags),
            "decoder": { "type": "Sequence", "decoders": decoders },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": bytes == 256, "ignore_merges": false,
                "vocab": vocabulary.to_json(), "merges": merges
            }
        }))
    }

    /// Every pair of tokens that joins to a token, best first: by score, then longer left and right parts.
    fn merges_from_scores(
        &self,
        vocabulary: &Vocabulary,
    ) -> Result<Vec<[String; 2]>, CheckpointError> {
        let key = key::SCORES;
        let listed = self.list(key::TOKENS)?.map_or(0, |list| list.len());
        let scores = self.numbers(key, listed)?;
        if scores.is_empty() {
            return Err(self.malformed(key, "one score for each token", "nothing".into()));
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(self.malformed(key, "numbers", format!("NaN for token {id}")));
        }
        // Gemma's scores do not follow the order in which its tokens were merged; their order in the file does.
        let gemma = self.is_gemma();
        let score = |id: usize| if gemma { -(id as f64) } else { scores[id] };
        let mut found = Vec::new();
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            if !matches!(vocabulary.kind(id), NORMAL | USER_DEFINED) {
                continue;
            }
            if token.len() > LONGEST_TOKEN {
                let expected = format!("tokens of at most {LONGEST_TOKEN} bytes");
                let size = format!("token {id} of {} bytes", token.len());
                return Err(self.malformed("tokenizer.ggml.tokens", &expected, size));
            }
            let mut pairs: Vec<(u32, u32, usize)> = token
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| {
                    let (left, right) = token.split_at(at);
                    Some((*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?, at))
                })
                .collect();
            pairs.sort_unstable();
            found.extend(pairs.into_iter().map(|(_, _, at)| {
                let (left, right) = token.split_at(at);
                let lengths = (left.chars().count(), right.chars().count());
                (score(id), lengths, [left.to_owned(), right.to_owned()])
            }));
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        Ok(found.into_iter().map(|(_, _, pair)| pair).collect())
    }

    /// `post_processor` that puts BOS before and EOS behind a text, as far as the file asks for it.
    fn template(&self, vocabulary: &Vocabulary, flags: Flags) -> Option<Json> {
        let token = |wanted: bool, key: &str| {
            let id = self.special(key, vocabulary).filter(|_| wanted)?;
            Some((vocabulary.tokens[id as usize].clone(), id))
        };
        let bos = token(flags.add_bos, "bos_token_id");
        let eos = token(flags.add_eos, "eos_token_id");
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let around = |sequence: &str, kind: u32| {
            let special = |token: &Option<(String, u32)>| {
                token
                    .as_ref()
                    .map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": kind } }))
            };
            let text = json!({ "Sequence": { "id": sequence, "type_id": kind } });
            [special(&bos), Some(text), special(&eos)].into_iter().flatten().collect::<Vec<_>>()
        };
        let mut tokens = Map::new();
        for (text, id) in bos.iter().chain(&eos) {
            tokens.insert(text.clone(), json!({ "id": text, "ids": [id], "tokens": [text] }));
        }
        let pair: Vec<Json> = around("A", 0).into_iter().chain(around("B", 1)).collect();
        Some(json!({
            "type": "TemplateProcessing", "single": around("A", 0), "pair": pair,
            "special_tokens": tokens
        }))
    }

    fn tokenizer_config(
        &self,
        vocabulary: &Vocabulary,
        flags: Flags,
        model: &ConfigJson,
        notes: &mut Vec<String>,
    ) -> Json {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), json!(flags.add_bos));
        config.insert("add_eos_token".into(), json!(flags.add_eos));
        for (name, key) in SPECIALS {
            match self.special(key, vocabulary) {
                Some(id) => {
                    config.insert((*name).into(), json!(vocabulary.tokens[id as usize]));
                }
                None => {
                    if let Some(value) = self.header.get(&format!("tokenizer.ggml.{key}")) {
                        notes.push(format!("`{key}` is no token: {}", value.describe()));
                    }
                }
            }
        }
        if let Some(Value::Text(template)) = self.header.get(key::CHAT_TEMPLATE) {
            config.insert("chat_template".into(), json!(template));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(length) = model.get("max_position_embeddings") {
            config.insert("model_max_length".into(), length.clone());
        }
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        // 4.x would return token types, too, which its `generate` then refuses.
        config.insert("model_input_names".into(), json!(["input_ids", "attention_mask"]));
        Json::Object(config)
    }
}

/// Names in `tokenizer_config.json`, and keys below `tokenizer.ggml.`.
pub(super) const SPECIALS: &[(&str, &str)] = &[
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("unk_token", "unknown_token_id"),
    ("pad_token", "padding_token_id"),
];
