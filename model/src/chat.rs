//! Chat templates: messages to the text that a model was trained on.

use std::path::PathBuf;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};

use moe_merge_checkpoint::Source;

use crate::text_error::TextError;
use crate::tokenizer::{Tokenizer, json_side_file, origin};

mod json;
mod time;

/// Work that a template may do, in the engine's units: templates come with downloaded models and must not hang us.
/// A conversation of a thousand messages needs about a tenth of it.
const FUEL: u64 = 2_000_000;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, …
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// Whether the rendered text ends with the opening of the assistant's turn (`add_generation_prompt`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AssistantTurn {
    /// The model is to answer.
    Open,
    /// The text ends with the last message.
    Absent,
}

/// The chat template of a model, in the dialect of Jinja that transformers renders.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    file: PathBuf,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// The template of an opened model: `chat_template.jinja`, else `chat_template.json`, else `chat_template` of
    /// `tokenizer_config.json` (a text, or a list of named ones, of which `default` is taken).
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`] if there is none, [`TextError::ChatTemplate`] if it cannot be parsed.
    pub fn from_source(source: &Source, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let (bos, eos) = (tokenizer.bos_text(), tokenizer.eos_text());
        if let Some(side) = source.side_file("chat_template.jinja") {
            let file = origin(source, side);
            let text = String::from_utf8(side.read()?).map_err(|e| TextError::ChatTemplate {
                file: file.clone(),
                line: None,
                found: format!("not UTF-8: {e}"),
            })?;
            return Self::parse(&text, file, bos, eos);
        }
        let mut found = Vec::new();
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let Some((file, json)) = json_side_file(source, name)? else { continue };
            match json.get("chat_template") {
                Some(serde_json::Value::String(text)) => return Self::parse(text, file, bos, eos),
                Some(serde_json::Value::Array(named)) => {
                    for entry in named {
                        let (name, text) = (entry["name"].as_str(), entry["template"].as_str());
                        if let (Some("default"), Some(text)) = (name, text) {
                            return Self::parse(text, file, bos, eos);
                        }
                        found.extend(name.map(|n| format!("`{n}`")));
                    }
                }
                _ => {}
            }
        }
        Err(TextError::NoChatTemplate { path: source.path.clone(), found })
    }

    /// A template from its text; `file` is for messages, `bos` and `eos` become `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`TextError::ChatTemplate`] with the line, if it cannot be parsed.
    pub fn parse(
        text: &str,
        file: PathBuf,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|e| explain(&file, &e))?,
        );
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("strftime_now", time::strftime_now);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned(NAME, without_generation_blocks(text))
            .map_err(|e| explain(&file, &e))?;
        Ok(Self { environment, file, bos: bos.map(Into::into), eos: eos.map(Into::into) })
    }

    /// The text of `messages`.
    ///
    /// # Errors
    /// [`TextError::ChatTemplate`] with what the template says, for example that roles must alternate.
    pub fn render(&self, messages: &[Message], turn: AssistantTurn) -> Result<String, TextError> {
        let messages: Value = messages
            .iter()
            .map(|m| {
                Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])
            })
            .collect();
        let text = |t: &Option<String>| t.clone().map_or(Value::UNDEFINED, Value::from);
        let context = Value::from_pairs([
            ("messages", messages),
            ("add_generation_prompt", Value::from(turn == AssistantTurn::Open)),
            ("bos_token", text(&self.bos)),
            ("eos_token", text(&self.eos)),
        ]);
        let render = || self.environment.get_template(NAME)?.render(context);
        render().map_err(|e| explain(&self.file, &e))
    }
}

/// Name of the one template of an environment; without an ending of HTML, so nothing is escaped.
const NAME: &str = "chat";

fn explain(file: &std::path::Path, error: &Error) -> TextError {
    let found = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    TextError::ChatTemplate { file: file.to_owned(), line: error.line(), found }
}

/// `{% generation %}` blocks mark what the assistant wrote for training masks and render as their content; the
/// engine does not know the tag, so they become blocks that are always taken, with the same whitespace control.
fn without_generation_blocks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        let inner = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match inner {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => inner,
        };
        out += &rest[..start + 2];
        if replacement == inner {
            out += tag;
        } else {
            out += &tag.replace(inner, replacement);
        }
        out += "%}";
        rest = &rest[start + length + 2..];
    }
    out + rest
}

#[cfg(test)]
mod tests;
