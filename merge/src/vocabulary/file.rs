//! `tokenizer.json` as a list of tokens that can grow.

use std::collections::HashMap;
use std::path::PathBuf;

use moe_merge_checkpoint::{CheckpointError, SideContent, Source};
use serde_json::{Map, Value, json};

/// Numbers of tokens lie below this: a larger one is a mistake, and a list up to it would fill the memory.
const LARGEST: u64 = 1 << 24;

/// The vocabulary of a model, from its `tokenizer.json`.
#[derive(Debug, Clone)]
pub(super) struct TokenizerFile {
    json: Value,
    /// Number of each token.
    ids: HashMap<String, u32>,
    /// Rows of the model's embedding.
    rows: usize,
    changed: bool,
}

impl TokenizerFile {
    /// The tokenizer of `source`, `None` if it has no `tokenizer.json`.
    pub fn read(source: &Source) -> Result<Option<Self>, CheckpointError> {
        let Some(file) = source.side_file("tokenizer.json") else { return Ok(None) };
        let path = match &file.content {
            SideContent::File(path) => path.clone(),
            SideContent::Bytes(_) => source.path.clone(),
        };
        let wrong = |found: String| CheckpointError::Malformed {
            what: "the tokenizer cannot be read".into(),
            file: path.clone(),
            tensor: None,
            expected: "a tokenizer as the `tokenizers` library writes it".into(),
            found,
            hint: None,
        };
        let json: Value =
            serde_json::from_slice(&file.read()?).map_err(|e| wrong(e.to_string()))?;
        let mut ids = HashMap::new();
        let mut add = |text: &str, id: u64| match id < LARGEST {
            true => {
                ids.entry(text.to_owned()).or_insert(id as u32);
                Ok(())
            }
            false => Err(wrong(format!("token `{text}` with the number {id}"))),
        };
        match &json["model"]["vocab"] {
            Value::Object(vocab) => {
                for (text, id) in vocab {
                    add(text, id.as_u64().unwrap_or(u64::MAX))?;
                }
            }
            Value::Array(pieces) => {
                for (id, piece) in pieces.iter().enumerate() {
                    add(piece[0].as_str().unwrap_or_default(), id as u64)?;
                }
            }
            _ => return Err(wrong("no `model.vocab`".into())),
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let text = token["content"].as_str().unwrap_or_default();
            add(text, token["id"].as_u64().unwrap_or(u64::MAX))?;
        }
        let most = ids.values().map(|id| *id as usize + 1).max().unwrap_or(0);
        let rows = rows_of(source).unwrap_or(most);
        Ok(Some(Self { json, ids, rows, changed: false }))
    }

    /// The same tokens over the rows of another model.
    pub fn with_rows_of(mut self, source: &Source) -> Self {
        self.rows = rows_of(source).unwrap_or(self.rows);
        self
    }

    /// Rows of the embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The row of a token, if there is one in the embedding.
    pub fn row(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied().filter(|id| (*id as usize) < self.rows)
    }

    /// Tokens by number; `None` where a number has no token.
    pub fn texts(&self) -> Vec<Option<String>> {
        let count = self.ids.values().map(|id| *id as usize + 1).max().unwrap_or(0);
        let mut texts = vec![None; count];
        for (text, id) in &self.ids {
            // Two texts of one number: the first in the alphabet, whatever the order of the map.
            let place: &mut Option<String> = &mut texts[*id as usize];
            if place.as_ref().is_none_or(|t| t > text) {
                *place = Some(text.clone());
            }
        }
        texts
    }

    /// Whether it is no longer what its file says.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// Leaves out what has no row: entries, added tokens, merge rules that mention them.
    pub fn strip(&mut self) {
        let rows = self.rows as u64;
        let gone: Vec<String> = self
            .ids
            .iter()
            .filter(|(_, id)| u64::from(**id) >= rows)
            .map(|(t, _)| t.clone())
            .collect();
        if gone.is_empty() {
            return;
        }
        self.changed = true;
        self.ids.retain(|_, id| u64::from(*id) < rows);
        match &mut self.json["model"]["vocab"] {
            Value::Object(vocab) => vocab.retain(|_, id| id.as_u64().is_some_and(|id| id < rows)),
            Value::Array(pieces) => pieces.truncate(self.rows),
            _ => {}
        }
        if let Some(added) = self.json["added_tokens"].as_array_mut() {
            added.retain(|t| t["id"].as_u64().is_some_and(|id| id < rows));
        }
        if let Some(merges) = self.json["model"]["merges"].as_array_mut() {
            let parts = |m: &Value| -> Vec<String> {
                match m {
                    Value::String(pair) => pair.split(' ').map(str::to_owned).collect(),
                    Value::Array(pair) => {
                        pair.iter().filter_map(|p| p.as_str().map(str::to_owned)).collect()
                    }
                    _ => Vec::new(),
                }
            };
            merges.retain(|m| {
                let parts = parts(m);
                !parts.iter().chain([&parts.concat()]).any(|p| gone.contains(p))
            });
        }
    }

    /// Appends what another tokenizer has among its plain entries, as ordinary added tokens.
    pub fn add_plain(&mut self, other: &Self) {
        let added = other.added();
        let mut plain: Vec<(&String, u32)> = other
            .ids
            .iter()
            .map(|(text, id)| (text, *id))
            .filter(|(text, id)| (*id as usize) < other.rows && !added.contains_key(text.as_str()))
            .collect();
        plain.sort_by_key(|(text, id)| (*id, text.as_str()));
        plain.into_iter().for_each(|(text, _)| self.add_text(text));
    }

    /// Appends the added tokens of another tokenizer, special ones as such.
    pub fn add_added(&mut self, other: &Self) {
        let added = other.added();
        let mut tokens: Vec<(&str, &Value)> = added.into_iter().collect();
        tokens.sort_by_key(|(text, token)| (token["id"].as_u64(), *text));
        for (text, token) in tokens {
            if other.row(text).is_some() {
                self.add(text, token.clone());
            }
        }
    }

    /// Appends a token, if it is not there.
    pub fn add_text(&mut self, text: &str) {
        let token = json!({
            "id": 0, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false,
        });
        self.add(text, token);
    }

    fn add(&mut self, text: &str, mut token: Value) {
        if self.ids.contains_key(text) {
            return;
        }
        let id = self.ids.values().max().map_or(0, |id| id + 1);
        token["id"] = id.into();
        self.ids.insert(text.to_owned(), id);
        self.changed = true;
        match self.json["added_tokens"].as_array_mut() {
            Some(added) => added.push(token),
            None => self.json["added_tokens"] = json!([token]),
        }
    }

    fn added(&self) -> HashMap<&str, &Value> {
        let tokens = self.json["added_tokens"].as_array().into_iter().flatten();
        tokens.filter_map(|t| Some((t["content"].as_str()?, t))).collect()
    }

    /// The files that say this vocabulary, in place of those of `donor`.
    pub fn files(&self, donor: &Source) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let pretty = |value: &Value| serde_json::to_vec_pretty(value).unwrap_or_default();
        let mut files = vec![("tokenizer.json".to_owned(), pretty(&self.json))];
        if let Some(file) = donor.side_file("tokenizer_config.json") {
            let path = match &file.content {
                SideContent::File(path) => path.clone(),
                SideContent::Bytes(_) => PathBuf::from("tokenizer_config.json"),
            };
            let mut config: Map<String, Value> =
                serde_json::from_slice(&file.read()?).map_err(|e| CheckpointError::Malformed {
                    what: "the tokenizer's configuration cannot be read".into(),
                    file: path,
                    tensor: None,
                    expected: "a JSON object".into(),
                    found: e.to_string(),
                    hint: None,
                })?;
            let mut decoder = Map::new();
            for token in self.json["added_tokens"].as_array().into_iter().flatten() {
                let mut entry = token.clone();
                let id =
                    entry.as_object_mut().and_then(|e| e.shift_remove("id")).unwrap_or_default();
                decoder.insert(id.to_string(), entry);
            }
            if config.contains_key("added_tokens_decoder") {
                config.insert("added_tokens_decoder".into(), decoder.into());
            }
            files.push(("tokenizer_config.json".to_owned(), pretty(&config.into())));
        }
        if donor.side_file("added_tokens.json").is_some() {
            let added: Map<String, Value> = self
                .added()
                .into_iter()
                .map(|(text, t)| (text.to_owned(), t["id"].clone()))
                .collect();
            let mut sorted: Vec<_> = added.into_iter().collect();
            sorted.sort_by(|a, b| a.0.cmp(&b.0));
            let sorted: Map<String, Value> = sorted.into_iter().collect();
            files.push(("added_tokens.json".to_owned(), pretty(&sorted.into())));
        }
        Ok(files)
    }
}

/// Rows of the vocabulary as the configuration says, whose text part may be a section of its own.
fn rows_of(source: &Source) -> Option<usize> {
    let nested = || source.config.at("text_config.vocab_size")?.as_u64().map(|n| n as usize);
    source.config.usize("vocab_size").or_else(nested)
}
