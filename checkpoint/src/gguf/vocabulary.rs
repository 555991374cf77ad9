//! The tokenizer of a model as GGUF metadata: the inverse of what reading one rebuilds.
//!
//! # Source
//! llama.cpp `conversion/base.py` (what is written), `src/llama-vocab.cpp` (what is done with it).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde_json::{Map, Value as Json};

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::gguf::key;
use crate::gguf::pre::{self, Pre};
use crate::gguf::tokenizer::{
    BYTE, CONTROL, LONGEST_TOKEN, NO_TOKENIZER, NORMAL, SPACE, SPECIALS, UNKNOWN, UNUSED,
    USER_DEFINED,
};
use crate::gguf::tokenizer_json::{is_byte, merges, normalizers};
use crate::gguf::write::{MetaValue, Metadata};
use crate::source::{SideContent, Source};

/// Metadata of a file without tokenizer: llama.cpp loads it, and takes and gives token ids only.
pub fn no_vocabulary() -> Metadata {
    vec![(key::TOKENIZER.into(), MetaValue::Text(NO_TOKENIZER[0].into()))]
}

/// The tokenizer and chat template of `source`, for an embedding of `rows` tokens.
///
/// * `pre`: llama.cpp's name for the way in which words are cut, where it is not to be found out
/// * `notes`: gets a line for everything that llama.cpp will do otherwise
///
/// # Errors
/// [`CheckpointError::Unsupported`] without `tokenizer.json`, for a kind of tokenizer that llama.cpp does not have, or a way
/// of cutting words that has no known name; [`CheckpointError::Malformed`] if a file makes no sense.
pub fn vocabulary(
    source: &Source,
    rows: usize,
    pre: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<Metadata, CheckpointError> {
    let Some((file, tokenizer)) = json_file(source, "tokenizer.json")? else {
        let found = match source.side_file("tokenizer.model") {
            Some(_) => "the model has `tokenizer.model`, but no `tokenizer.json`",
            None => "the model has no tokenizer",
        };
        return Err(CheckpointError::Unsupported {
            what: found.into(),
            file: source.path.clone(),
            hint: "put `tokenizer.json` beside its weights; `--no-tokenizer` writes a file that takes token ids only"
                .into(),
        });
    };
    let mut writer = Writer { source, file, tokenizer: Json::Object(tokenizer), notes };
    let kind = writer.kind()?;
    writer.note_strips();
    let table = writer.tokens(rows)?;
    let mut out = match kind {
        Kind::ByteLevel => writer.byte_level(&table, pre)?,
        Kind::SentencePiece => writer.sentence_piece(&table)?,
    };
    writer.specials(&table, &mut out)?;
    writer.chat_template(&mut out)?;
    Ok(out)
}

/// Where a JSON object was read, and the object.
type JsonFile = (PathBuf, Map<String, Json>);

/// A side file that is a JSON object.
fn json_file(source: &Source, name: &str) -> Result<Option<JsonFile>, CheckpointError> {
    let Some(side) = source.side_file(name) else { return Ok(None) };
    let file = match &side.content {
        SideContent::File(path) => path.clone(),
        SideContent::Bytes(_) => source.path.clone(),
    };
    let malformed = |found: String| CheckpointError::Malformed {
        what: format!("`{name}` cannot be read"),
        file: file.clone(),
        tensor: None,
        expected: "a JSON object".into(),
        found,
        hint: Some("download or copy the file again".into()),
    };
    match serde_json::from_slice(&side.read()?) {
        Ok(Json::Object(map)) => Ok(Some((file, map))),
        Ok(_) => Err(malformed("another JSON value".into())),
        Err(e) => Err(malformed(e.to_string())),
    }
}

/// The two kinds of tokenizers that llama.cpp and this program share.
enum Kind {
    ByteLevel,
    SentencePiece,
}

/// Tokens by id, as the file lists them.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    /// Ids of what `tokenizer.json` calls its tokens.
    ids: HashMap<String, u32>,
}

struct Writer<'a> {
    source: &'a Source,
    file: PathBuf,
    tokenizer: Json,
    notes: &'a mut Vec<String>,
}

impl Writer<'_> {
    fn malformed(&self, what: &str, expected: &str, found: String) -> CheckpointError {
        CheckpointError::Malformed {
            what: what.into(),
            file: self.file.clone(),
            tensor: None,
            expected: expected.into(),
            found,
            hint: None,
        }
    }

    fn unsupported(&self, what: String, hint: &str) -> CheckpointError {
        CheckpointError::Unsupported { what, file: self.file.clone(), hint: hint.into() }
    }

    fn kind(&self) -> Result<Kind, CheckpointError> {
        let model = &self.tokenizer["model"];
        // Files from before the key `type` are told by their merges.
        let is_bpe =
            model["type"] == "BPE" || (model["type"].is_null() && model["merges"].is_array());
        if !is_bpe {
            let kind = model["type"].as_str().unwrap_or("unknown");
            return Err(self.unsupported(
                format!("tokenizer of type `{kind}` cannot be written as a GGUF file"),
                "known are BPE over bytes (GPT-2, Llama 3, Qwen) and BPE with byte fallback (Llama 2, Gemma)",
            ));
        }
        let mentions = |part: &str, what: &str| self.tokenizer[part].to_string().contains(what);
        if mentions("pre_tokenizer", "\"ByteLevel\"") || mentions("decoder", "\"ByteLevel\"") {
            return Ok(Kind::ByteLevel);
        }
        if model["byte_fallback"] == true
            || mentions("normalizer", SPACE)
            || mentions("pre_tokenizer", "\"Metaspace\"")
        {
            return Ok(Kind::SentencePiece);
        }
        Err(self.unsupported(
            "tokenizer is BPE neither over bytes nor with byte fallback".into(),
            "llama.cpp has no such tokenizer",
        ))
    }

    /// Added tokens may take the spaces beside them along; in GGUF files they cannot say so.
    fn note_strips(&mut self) {
        let added = self.tokenizer["added_tokens"].as_array().into_iter().flatten();
        let strips: Vec<&str> = added
            .filter(|t| ["lstrip", "rstrip", "single_word"].iter().any(|key| t[*key] == true))
            .filter_map(|t| t["content"].as_str())
            .collect();
        if let Some(first) = strips.first() {
            let note = format!(
                "{} added tokens, such as `{first}`, mind the spaces or letters beside them; llama.cpp decides that by its own rules",
                strips.len()
            );
            self.notes.push(note);
        }
    }

    /// All tokens, filled up or cut to `rows`.
    fn tokens(&mut self, rows: usize) -> Result<Tokens, CheckpointError> {
        let id_of = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let mut table = Tokens {
            texts: vec![String::new(); rows],
            kinds: vec![UNUSED as i32; rows],
            ids: HashMap::new(),
        };
        let mut beyond = Vec::new();
        let Some(vocab) = self.tokenizer["model"]["vocab"].as_object() else {
            return Err(self.malformed(
                "tokenizer has no vocabulary",
                "`model.vocab`",
                "none".into(),
            ));
        };
        let fallback = self.tokenizer["model"]["byte_fallback"] == true;
        let unknown = self.tokenizer["model"]["unk_token"].as_str();
        let mut put = |text: &str, id: u32, kind: i64| {
            table.ids.insert(text.to_owned(), id);
            match table.texts.get_mut(id as usize) {
                Some(place) => {
                    *place = text.to_owned();
                    table.kinds[id as usize] = kind as i32;
                }
                None => beyond.push((id, text.to_owned())),
            }
        };
        for (text, id) in vocab {
            let Some(id) = id_of(id) else {
                return Err(self.malformed(
                    "token has no id",
                    "a number",
                    format!("`{text}`: {id}"),
                ));
            };
            let kind = match () {
                () if fallback && is_byte(text) => BYTE,
                () if fallback && Some(text.as_str()) == unknown => UNKNOWN,
                () => NORMAL,
            };
            put(text, id, kind);
        }
        let mut added_ids = HashSet::new();
        for token in self.tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let (Some(id), Some(text)) = (id_of(&token["id"]), token["content"].as_str()) else {
                return Err(self.malformed("added token", "`id` and `content`", token.to_string()));
            };
            added_ids.insert(id);
            let special = token["special"] == true;
            match (special, fallback && Some(text) == unknown) {
                (_, true) => put(text, id, UNKNOWN),
                (true, _) => put(text, id, CONTROL),
                (false, _) => put(text, id, USER_DEFINED),
            }
        }
        if let Some((id, text)) = beyond.iter().find(|(id, _)| !added_ids.contains(id)) {
            let expected = format!("token ids below the {rows} rows of the embedding");
            return Err(self.malformed(
                "tokenizer is larger than the model",
                &expected,
                format!("`{text}`: {id}"),
            ));
        }
        beyond.sort();
        beyond.dedup();
        if !beyond.is_empty() {
            let names: Vec<String> = beyond.iter().map(|(id, t)| format!("{id} `{t}`")).collect();
            self.notes.push(format!(
                "tokens that the embedding has no rows for are left out: {}",
                names.join(", ")
            ));
        }
        for (id, text) in table.texts.iter_mut().enumerate() {
            if table.kinds[id] == UNUSED as i32 {
                *text = format!("[PAD{id}]");
            }
        }
        Ok(table)
    }

    fn byte_level(
        &mut self,
        table: &Tokens,
        pre: Option<&str>,
    ) -> Result<Metadata, CheckpointError> {
        let name = match pre {
            Some(name) => {
                if Pre::from_name(name).is_none() {
                    self.notes.push(format!(
                        "`{name}` is not known to this program; llama.cpp may know it"
                    ));
                }
                name.to_owned()
            }
            None => {
                let qwen2 = self.source.config.model_type() == "qwen2";
                let found = pre::recognise(&self.tokenizer, qwen2).map_err(|what| {
                    let hint = format!(
                        "if you know llama.cpp's name for it, give it as `--pre NAME`; known here: {}",
                        Pre::known()
                    );
                    self.unsupported(
                        format!("no name of llama.cpp is known for the pre-tokenizer {what}"),
                        &hint,
                    )
                })?;
                self.notes.extend(found.note);
                found.name.to_owned()
            }
        };
        let mut lines = Vec::new();
        for (left, right) in merges(&self.tokenizer, &self.file)? {
            if left.contains(' ') || right.contains(' ') {
                return Err(self.malformed(
                    "merge of the tokenizer",
                    "tokens without spaces",
                    format!("`{left}` `{right}`"),
                ));
            }
            lines.push(format!("{left} {right}"));
        }
        Ok(vec![
            (key::TOKENIZER.into(), MetaValue::Text("gpt2".into())),
            (key::PRE.into(), MetaValue::Text(name)),
            (key::TOKENS.into(), MetaValue::Texts(table.texts.clone())),
            (key::TOKEN_TYPES.into(), MetaValue::I32s(table.kinds.clone())),
            (key::MERGES.into(), MetaValue::Texts(lines)),
        ])
    }

    /// Scores instead of merges: the better a token's first merge, the higher its score.
    fn sentence_piece(&mut self, table: &Tokens) -> Result<Metadata, CheckpointError> {
        let merges = merges(&self.tokenizer, &self.file)?;
        let worst = -(merges.len() as f32);
        let mut scores = vec![worst; table.texts.len()];
        let (mut scored, mut last, mut listed) = (HashSet::new(), None, HashSet::new());
        let mut out_of_order = 0usize;
        for (rank, (left, right)) in merges.iter().enumerate() {
            let Some(&id) = table.ids.get(&format!("{left}{right}")) else {
                return Err(self.malformed(
                    "merge of the tokenizer",
                    "tokens that join to a token",
                    format!("`{left}` `{right}`"),
                ));
            };
            listed.insert((*left, *right));
            if scored.insert(id) {
                if let Some(score) = scores.get_mut(id as usize) {
                    *score = -(rank as f32);
                }
            } else if last != Some(id) {
                out_of_order += 1;
            }
            last = Some(id);
        }
        let unlisted = unlisted_pairs(table, &listed);
        if out_of_order + unlisted > 0 {
            self.notes.push(format!(
                "llama.cpp merges any two tokens that join to a token, best token first: {unlisted} such pairs are not in this \
                 tokenizer's list and {out_of_order} are in another order, so some words may be cut otherwise"
            ));
        }
        let texts = table.texts.iter().zip(&table.kinds).map(|(text, kind)| match *kind {
            // llama.cpp looks for these in the text as it is.
            kind if kind == USER_DEFINED as i32 => text.replace(SPACE, " "),
            _ => text.clone(),
        });
        let out = vec![
            (key::TOKENIZER.into(), MetaValue::Text("llama".into())),
            (key::PRE.into(), MetaValue::Text("default".into())),
            (key::TOKENS.into(), MetaValue::Texts(texts.collect())),
            (key::SCORES.into(), MetaValue::F32s(scores)),
            (key::TOKEN_TYPES.into(), MetaValue::I32s(table.kinds.clone())),
            (key::ADD_SPACE_PREFIX.into(), MetaValue::Bool(self.puts_a_space_before())),
        ];
        for step in normalizers(&self.tokenizer["normalizer"]) {
            let kind = step["type"].as_str().unwrap_or("unknown");
            if !matches!(kind, "Prepend" | "Replace") {
                self.notes.push(format!("the tokenizer's normalizer `{kind}` is not carried over"));
            }
        }
        Ok(out)
    }

    fn puts_a_space_before(&self) -> bool {
        let prepends = normalizers(&self.tokenizer["normalizer"])
            .iter()
            .any(|step| step["type"] == "Prepend" && step["prepend"] == SPACE);
        let words = &self.tokenizer["pre_tokenizer"];
        let metaspace = match words["type"].as_str() {
            Some("Metaspace") => Some(words),
            Some("Sequence") => words["pretokenizers"]
                .as_array()
                .and_then(|steps| steps.iter().find(|s| s["type"] == "Metaspace")),
            _ => None,
        };
        prepends
            || metaspace
                .is_some_and(|m| m["prepend_scheme"] != "never" && m["add_prefix_space"] != false)
    }

    /// Ids of special tokens, and which of them stand around a text.
    fn specials(&mut self, table: &Tokens, out: &mut Metadata) -> Result<(), CheckpointError> {
        let config = json_file(self.source, "tokenizer_config.json")?;
        let map = json_file(self.source, "special_tokens_map.json")?;
        let generation = json_file(self.source, "generation_config.json")?;
        let generation = ConfigJson(generation.map(|(_, json)| json).unwrap_or_default());
        let of_model = |key: &str| {
            let ids = [&generation, &self.source.config].map(|c| c.token_ids(key));
            ids.into_iter().find(|ids| !ids.is_empty()).unwrap_or_default()
        };
        let mut found = HashMap::new();
        for (name, key) in SPECIALS {
            let named = [&config, &map].into_iter().flatten().find_map(|(file, json)| {
                let value = json.get(*name)?;
                let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
                Some((file, text))
            });
            let id = match named {
                Some((file, text)) => {
                    Some(*table.ids.get(text).ok_or_else(|| CheckpointError::Malformed {
                        what: format!("`{name}` is no token"),
                        file: file.clone(),
                        tensor: None,
                        expected: "a token of `tokenizer.json`".into(),
                        found: format!("`{text}`"),
                        hint: None,
                    })?)
                }
                None if config.is_none() && map.is_none() || *name == "eos_token" => {
                    of_model(&format!("{name}_id")).first().copied()
                }
                None => None,
            };
            if let Some(id) = id.filter(|id| (*id as usize) < table.texts.len()) {
                found.insert(*name, id);
                out.push((format!("tokenizer.ggml.{key}"), MetaValue::U32(id)));
            }
        }
        let (bos, eos) = (found.get("bos_token").copied(), found.get("eos_token").copied());
        let mut ends = of_model("eos_token_id");
        ends.retain(|id| Some(*id) != eos && (*id as usize) < table.texts.len());
        for (id, key) in ends.iter().zip(FURTHER_ENDS) {
            out.push((key.into(), MetaValue::U32(*id)));
        }
        if ends.len() > FURTHER_ENDS.len() {
            let rest: Vec<&str> = ends[FURTHER_ENDS.len()..]
                .iter()
                .map(|id| table.texts[*id as usize].as_str())
                .collect();
            self.notes.push(format!(
                "GGUF files have no place for more tokens that end a text: `{}`",
                rest.join("`, `")
            ));
        }
        let around = self.around();
        let is = |id: Option<u32>, texts: &[String]| match texts {
            [text] => id.is_some() && table.ids.get(text).copied() == id,
            _ => false,
        };
        let (add_bos, add_eos) = (is(bos, &around.before), is(eos, &around.behind));
        if !add_bos && !around.before.is_empty() || !add_eos && !around.behind.is_empty() {
            self.notes.push(format!(
                "the tokenizer puts `{}` around a text, which llama.cpp cannot",
                [around.before, around.behind].concat().join("`, `")
            ));
        }
        out.push((key::ADD_BOS.into(), MetaValue::Bool(add_bos)));
        out.push((key::ADD_EOS.into(), MetaValue::Bool(add_eos)));
        Ok(())
    }

    /// What `post_processor` puts before and behind a single text.
    fn around(&mut self) -> Around {
        let processor = &self.tokenizer["post_processor"];
        let steps = match processor["type"].as_str() {
            Some("Sequence") => processor["processors"].as_array().cloned().unwrap_or_default(),
            _ => vec![processor.clone()],
        };
        let mut around = Around::default();
        for step in steps {
            match step["type"].as_str() {
                None | Some("ByteLevel") => {}
                Some("TemplateProcessing") => {
                    let mut behind = false;
                    for piece in step["single"].as_array().into_iter().flatten() {
                        match piece["SpecialToken"]["id"].as_str() {
                            Some(text) if behind => around.behind.push(text.to_owned()),
                            Some(text) => around.before.push(text.to_owned()),
                            None => behind = true,
                        }
                    }
                }
                Some(other) => self
                    .notes
                    .push(format!("the tokenizer's post-processor `{other}` is not carried over")),
            }
        }
        around
    }

    /// `tokenizer.chat_template`, and those with names of their own.
    fn chat_template(&self, out: &mut Metadata) -> Result<(), CheckpointError> {
        let text = |text: &str| MetaValue::Text(text.to_owned());
        if let Some(side) = self.source.side_file("chat_template.jinja") {
            let template = String::from_utf8(side.read()?)
                .map_err(|e| self.malformed("`chat_template.jinja`", "UTF-8", e.to_string()))?;
            out.push((key::CHAT_TEMPLATE.into(), MetaValue::Text(template)));
            return Ok(());
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let Some((_, json)) = json_file(self.source, name)? else { continue };
            match json.get("chat_template") {
                Some(Json::String(template)) => {
                    out.push((key::CHAT_TEMPLATE.into(), text(template)));
                    return Ok(());
                }
                Some(Json::Array(named)) => {
                    let mut names = Vec::new();
                    for entry in named {
                        match (entry["name"].as_str(), entry["template"].as_str()) {
                            (Some("default"), Some(template)) => {
                                out.push((key::CHAT_TEMPLATE.into(), text(template)));
                            }
                            (Some(name), Some(template)) => {
                                names.push(name.to_owned());
                                out.push((
                                    format!("{}.{name}", key::CHAT_TEMPLATE),
                                    text(template),
                                ));
                            }
                            _ => {}
                        }
                    }
                    if !names.is_empty() {
                        out.push((key::CHAT_TEMPLATES.into(), MetaValue::Texts(names)));
                    }
                    return Ok(());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Where tokens that end a text beside the usual one go: end of turn, end of message.
const FURTHER_ENDS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

#[derive(Default)]
struct Around {
    before: Vec<String>,
    behind: Vec<String>,
}

/// Pairs of tokens that join to an ordinary token without being in the list of merges.
fn unlisted_pairs(table: &Tokens, listed: &HashSet<(&str, &str)>) -> usize {
    let is_plain = |text: &str| {
        let kind = table.ids.get(text).and_then(|id| table.kinds.get(*id as usize));
        kind == Some(&(NORMAL as i32))
    };
    let plain = table.texts.iter().zip(&table.kinds);
    plain
        .filter(|(text, kind)| **kind == NORMAL as i32 && text.len() <= LONGEST_TOKEN)
        .map(|(text, _)| {
            let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            cuts.filter(|(l, r)| is_plain(l) && is_plain(r) && !listed.contains(&(*l, *r))).count()
        })
        .sum()
}
