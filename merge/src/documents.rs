//! Example text in files: one expert's, or that of all experts of a MoE in one file.
//!
//! | file | documents |
//! |---|---|
//! | `.jsonl` | one a line, each with `text`, `messages`, or `prompt` and perhaps `completion` |
//! | `.json` | the same in a list, or lists of texts by expert |
//! | `.yaml` | `experts:` with `positive_prompts`, `negative_prompts`, `prompts_file`: a recipe, for all experts |
//! | any other | text: blocks divided by blank lines |
//!
//! A line or item may say under `expert`, `label` or `domain` whose it is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::{Explain, Kind};
use moe_merge_model::chat::Message;
use serde_json::Value;

mod encode;
mod labelled;
mod lesson;

pub use encode::{Cutting, DEFAULT_PROMPT_TOKENS, Encoder, PIECE_TOKENS, Pieces, encode_labelled};
pub(crate) use labelled::empty_note;
pub use labelled::{LabelledPrompts, Unprompted, expert_names, read_labelled};
pub use lesson::Answered;

/// The largest file of prompts that is read, in bytes: far more than any router needs.
const LONGEST: u64 = 256 << 20;

/// One example text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// What it says.
    pub content: Content,
    /// Its file.
    pub file: Arc<Path>,
    /// Where in its file.
    pub at: At,
    /// Whose it is, where the file says so.
    pub label: Option<Label>,
}

impl Document {
    /// Plain text that stands somewhere in `file`.
    pub fn text(text: &str, file: &Arc<Path>, at: At) -> Self {
        let content = Content::Text(text.to_owned());
        Self { content, file: Arc::clone(file), at, label: None }
    }
}

/// What a document says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// A conversation, rendered by the model's chat template.
    Chat(Vec<Message>),
    /// A question and perhaps its answer: a conversation for a model with a chat template, otherwise one text after
    /// the other.
    Exchange {
        /// The question.
        prompt: String,
        /// The answer.
        completion: Option<String>,
    },
}

/// A place in a file of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum At {
    /// Not known.
    #[default]
    Nowhere,
    /// A line, from 1.
    Line(usize),
    /// An item of a list, from 0.
    Item(usize),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => Ok(()),
            Self::Line(line) => write!(f, ":{line}"),
            Self::Item(item) => write!(f, "[{item}]"),
        }
    }
}

/// Whose a document is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Name or number of an expert, as written.
    pub text: String,
    /// Whether it can only mean an expert (`expert`, a list by expert); `label` and `domain` may mean other things in
    /// a file that was made for another purpose.
    pub certain: bool,
}

/// The documents of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptFile {
    /// The file.
    pub path: PathBuf,
    /// What is in it, at least one, in its order.
    pub documents: Vec<Document>,
    /// Documents without any text, which are left out.
    pub empty: usize,
}

/// A file of prompts that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct DocumentError {
    /// What is wrong, in one line.
    pub what: String,
    /// The file.
    pub file: PathBuf,
    /// Where in it.
    pub at: At,
    /// What was expected.
    pub expected: Option<String>,
    /// What was found.
    pub found: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// [`Kind::Input`] for a file that cannot be read, [`Kind::Usage`] for what stands in it.
    pub kind: Kind,
}

impl DocumentError {
    fn new(file: &Path, at: At, what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            file: file.to_owned(),
            at,
            expected: None,
            found: None,
            hint: None,
            kind: Kind::Usage,
        }
    }

    fn expected(mut self, expected: impl Into<String>) -> Self {
        self.expected = Some(expected.into());
        self
    }

    fn found(mut self, found: impl Into<String>) -> Self {
        self.found = Some(found.into());
        self
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// `file:line`.
    pub fn place(&self) -> String {
        format!("{}{}", self.file.display(), self.at)
    }
}

impl Explain for DocumentError {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![("prompts", self.place())];
        fields.extend(self.expected.iter().map(|e| ("expected", e.clone())));
        fields.extend(self.found.iter().map(|f| ("found", f.clone())));
        fields
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }
}

impl PromptFile {
    /// Reads a file of text, `.jsonl` or `.json`.
    ///
    /// Of several keys in one line `text` is taken before `messages`, and that before `prompt`; other keys are the
    /// file's own affair.
    ///
    /// # Errors
    /// [`DocumentError`]: a file that is none, is not UTF-8, is too large or holds no text; a line without any of the
    /// keys, with its number.
    pub fn read(path: &Path) -> Result<Self, DocumentError> {
        let text = read_text(path)?;
        let file: Arc<Path> = path.into();
        let (documents, empty) = match extension(path).as_str() {
            "jsonl" => json_lines(&file, &text)?,
            "json" => json(&file, &text)?,
            "yaml" | "yml" => {
                return Err(DocumentError::new(path, At::Nowhere, "a YAML file is no text")
                    .expected("text in blocks divided by blank lines, `.jsonl` or `.json`")
                    .hint("a recipe holds the prompts of several experts"));
            }
            _ => (blocks(&file, &text), 0),
        };
        if documents.is_empty() {
            return Err(DocumentError::new(path, At::Nowhere, "the file holds no text")
                .expected("at least one document")
                .found(if empty == 0 { "none".into() } else { format!("{empty}, all empty") }));
        }
        Ok(Self { path: path.to_owned(), documents, empty })
    }
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// The text of a file of at most [`LONGEST`] bytes, without the mark that some editors put first.
fn read_text(path: &Path) -> Result<String, DocumentError> {
    let unreadable = |e: std::io::Error| {
        let mut error =
            DocumentError::new(path, At::Nowhere, "prompts cannot be read").found(e.to_string());
        error.kind = Kind::Input;
        error
    };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > LONGEST {
        return Err(DocumentError::new(path, At::Nowhere, "the file of prompts is too large")
            .expected(format!("at most {} MiB", LONGEST >> 20))
            .found(format!("{} MiB", size >> 20))
            .hint("a router needs some ten thousand tokens of each kind: cut the file"));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..valid].iter().filter(|&&b| b == b'\n').count();
        DocumentError::new(path, At::Line(line), "the file of prompts is not UTF-8")
            .expected("text in UTF-8")
            .found(e.as_bytes().get(valid).map_or("?".into(), |b| format!("byte 0x{b:02x}")))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// Blocks of lines with anything but blanks.
fn blocks(file: &Arc<Path>, text: &str) -> Vec<Document> {
    let mut documents: Vec<Document> = Vec::new();
    let mut open = false;
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            open = false;
            continue;
        }
        match documents.last_mut() {
            Some(Document { content: Content::Text(block), .. }) if open => {
                block.push('\n');
                block.push_str(line);
            }
            _ => documents.push(Document::text(line, file, At::Line(i + 1))),
        }
        open = true;
    }
    documents
}

fn json_lines(path: &Arc<Path>, text: &str) -> Result<(Vec<Document>, usize), DocumentError> {
    let (mut documents, mut empty) = (Vec::new(), 0);
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        match json_line(path, i + 1, line)? {
            Some(document) => documents.push(document),
            None => empty += 1,
        }
    }
    Ok((documents, empty))
}

/// One line of a `.jsonl` file, counted from 1; `None` if it holds no text.
///
/// # Errors
/// [`DocumentError`] if it is no document.
pub fn json_line(
    path: &Arc<Path>,
    line: usize,
    text: &str,
) -> Result<Option<Document>, DocumentError> {
    let at = At::Line(line);
    let value = serde_json::from_str(text).map_err(|e| {
        DocumentError::new(path, at, "a line is not JSON").expected(EXPECTED).found(e.to_string())
    })?;
    document(path, at, &value, None)
}

/// What a line has to be.
const EXPECTED: &str = "an object with `text`, `messages` (a list of `role` and `content`) or `prompt` (and perhaps \
                        `completion` or `response`)";

/// A list of documents, or an object of lists by expert.
fn json(path: &Arc<Path>, text: &str) -> Result<(Vec<Document>, usize), DocumentError> {
    let value: Value = serde_json::from_str(text).map_err(|e| {
        DocumentError::new(path, At::Line(e.line()), "the file is not JSON").found(e.to_string())
    })?;
    let (mut documents, mut empty) = (Vec::new(), 0);
    let mut list = |items: &[Value], label: Option<&str>| {
        for (i, item) in items.iter().enumerate() {
            match document(path, At::Item(i), item, label)? {
                Some(document) => documents.push(document),
                None => empty += 1,
            }
        }
        Ok(())
    };
    match &value {
        Value::Array(items) => list(items, None)?,
        Value::Object(map) => {
            for (name, items) in map {
                let Value::Array(items) = items else {
                    return Err(DocumentError::new(
                        path,
                        At::Nowhere,
                        format!("`{name}` holds no list of texts"),
                    )
                    .expected("a list of documents, or an object `{expert: [texts]}`")
                    .found(kind(items)));
                };
                list(items, Some(name))?;
            }
        }
        other => {
            return Err(DocumentError::new(path, At::Nowhere, "the file holds no list of texts")
                .expected("a list of documents, or an object `{expert: [texts]}`")
                .found(kind(other)));
        }
    }
    Ok((documents, empty))
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "a truth value".into(),
        Value::Number(_) => "a number".into(),
        Value::String(_) => "a text".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(map) => {
            let keys: Vec<_> = map.keys().take(6).map(|k| format!("`{k}`")).collect();
            if keys.is_empty() {
                "{}".into()
            } else {
                format!("an object with {}", keys.join(", "))
            }
        }
    }
}

/// One line or item; `None` if it holds no text.
fn document(
    path: &Arc<Path>,
    at: At,
    value: &Value,
    list: Option<&str>,
) -> Result<Option<Document>, DocumentError> {
    let wrong = |what: &str, found: &Value| {
        DocumentError::new(path, at, what).expected(EXPECTED).found(kind(found))
    };
    let label = match list {
        Some(name) => Some(Label { text: name.to_owned(), certain: true }),
        None => label(path, at, value)?,
    };
    let content = match value {
        Value::String(text) if at_item(at) => Content::Text(text.clone()),
        Value::Object(map) => {
            let given = |key: &str| map.get(key).filter(|v| !v.is_null());
            if let Some(text) = given("text") {
                let text = text.as_str().ok_or_else(|| wrong("`text` is no text", text))?;
                Content::Text(text.to_owned())
            } else if let Some(list) = given("messages") {
                Content::Chat(messages(list).map_err(|what| wrong(&what, list))?)
            } else if let Some(prompt) = given("prompt") {
                let completion = given("completion").or_else(|| given("response"));
                exchange(prompt, completion).map_err(|what| wrong(&what, value))?
            } else {
                return Err(wrong("a line is no document", value));
            }
        }
        other => return Err(wrong("a line is no document", other)),
    };
    let blank = match &content {
        Content::Text(text) => text.trim().is_empty(),
        Content::Chat(messages) => messages.iter().all(|m| m.content.trim().is_empty()),
        Content::Exchange { prompt, completion } => {
            let rest = completion.as_deref().unwrap_or_default();
            prompt.trim().is_empty() && rest.trim().is_empty()
        }
    };
    Ok((!blank).then_some(Document { content, file: Arc::clone(path), at, label }))
}

/// Whether bare texts are allowed: in lists, not in lines.
fn at_item(at: At) -> bool {
    matches!(at, At::Item(_))
}

fn label(path: &Path, at: At, value: &Value) -> Result<Option<Label>, DocumentError> {
    for key in ["expert", "label", "domain"] {
        let text = match value.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(number)) => number.to_string(),
            // Something else under `label` or `domain` is the file's own affair.
            Some(_) if key != "expert" => continue,
            Some(other) => {
                return Err(DocumentError::new(path, at, "`expert` names no expert")
                    .expected("the name or the number of an expert")
                    .found(kind(other)));
            }
        };
        return Ok(Some(Label { text, certain: key == "expert" }));
    }
    Ok(None)
}

/// A conversation as OpenAI's and transformers' formats write it.
fn messages(list: &Value) -> Result<Vec<Message>, String> {
    let items = list.as_array().ok_or("`messages` is no list")?;
    if items.is_empty() {
        return Err("`messages` is empty".into());
    }
    let one = |(i, item): (usize, &Value)| {
        let role = item.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| format!("message {i} has no `role`"))?;
        let content = item.get("content").and_then(message_text);
        let content = content.ok_or_else(|| format!("message {i} has no text under `content`"))?;
        Ok(Message::new(role, &content))
    };
    items.iter().enumerate().map(one).collect()
}

/// A text, or a list of parts that are all texts.
fn message_text(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let part = |p: &Value| {
                (p.get("type")?.as_str()? == "text")
                    .then(|| p.get("text")?.as_str())?
                    .map(str::to_owned)
            };
            parts.iter().map(part).collect::<Option<Vec<_>>>().map(|p| p.concat())
        }
        _ => None,
    }
}

/// `prompt` and `completion`, as texts or as lists of messages.
fn exchange(prompt: &Value, completion: Option<&Value>) -> Result<Content, String> {
    if prompt.is_array() {
        let mut all = messages(prompt).map_err(|e| e.replace("`messages`", "`prompt`"))?;
        match completion {
            None => {}
            Some(Value::String(text)) => all.push(Message::new("assistant", text)),
            Some(list) => {
                all.extend(messages(list).map_err(|e| e.replace("`messages`", "`completion`"))?);
            }
        }
        return Ok(Content::Chat(all));
    }
    let text = |value: &Value, key: &str| {
        value.as_str().map(str::to_owned).ok_or_else(|| format!("`{key}` is no text"))
    };
    Ok(Content::Exchange {
        prompt: text(prompt, "prompt")?,
        completion: completion.map(|c| text(c, "completion")).transpose()?,
    })
}

#[cfg(test)]
mod tests;
