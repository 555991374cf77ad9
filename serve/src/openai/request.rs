//! Requests: JSON to what is to be done, every parameter checked.

use std::hash::{BuildHasher, Hasher, RandomState};

use moe_merge_model::Sampling;
use moe_merge_model::chat::Message;
use moe_merge_model::generate::EndOfText;
use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use crate::engine::Choosing;

/// What both kinds of requests have.
#[derive(Debug)]
pub struct Common {
    /// What the client calls the model.
    pub model: String,
    /// Tokens of an answer at most, if the client says so.
    pub most: Option<usize>,
    /// Answers for each prompt.
    pub n: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// How tokens are chosen.
    pub choosing: Choosing,
    /// What tokens do that end a text.
    pub end_of_text: EndOfText,
    /// Whether the answer comes piece by piece.
    pub stream: bool,
    /// Whether its last piece tells the number of tokens.
    pub usage: bool,
}

/// `/v1/completions`.
#[derive(Debug)]
pub struct Completion {
    /// What both kinds of requests have.
    pub common: Common,
    /// The prompts, one at least.
    pub prompts: Vec<PromptText>,
    /// Whether an answer begins with its prompt.
    pub echo: bool,
}

/// A prompt as clients give it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptText {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// `/v1/chat/completions`.
#[derive(Debug)]
pub struct Chat {
    /// What both kinds of requests have.
    pub common: Common,
    /// The conversation, one message at least.
    pub messages: Vec<Message>,
}

/// Parameters about the client, its bill and its caches.
const IGNORED: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// Most answers for a prompt, and most texts that end one.
const MOST_N: i64 = 128;
const MOST_STOPS: usize = 16;

/// Most tokens whose probabilities are told.
const MOST_LOGPROBS: i64 = 20;

impl Completion {
    /// Reads a request.
    ///
    /// # Errors
    /// [`ApiError`] for what is missing, of the wrong type, out of range, unknown, or not done.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut common = Common::take(&mut fields)?;
        common.most = fields.integer("max_tokens", 0, i64::MAX)?.map(|n| n as usize);
        common.choosing.logprobs =
            fields.integer("logprobs", 0, MOST_LOGPROBS)?.map(|n| n as usize);
        let prompts = prompts(fields.need("prompt")?)?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        if echo && common.choosing.logprobs.is_some() {
            let message = "'logprobs' of an echoed prompt are not supported with this model.";
            return Err(ApiError::invalid(message).param("logprobs").code("unsupported_parameter"));
        }
        let n = common.n as i64;
        if let Some(best_of) = fields.integer("best_of", 1, MOST_N)?.filter(|b| *b != n) {
            let expected = "Only the value of 'n' is supported.";
            return Err(ApiError::unsupported_value("best_of", &best_of.into(), expected));
        }
        fields.refuse(&["suffix"])?;
        fields.finish()?;
        Ok(Self { common, prompts, echo })
    }
}

impl Chat {
    /// Reads a request.
    ///
    /// # Errors
    /// As [`Completion::parse`].
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut common = Common::take(&mut fields)?;
        let old = fields.integer("max_tokens", 1, i64::MAX)?;
        let new = fields.integer("max_completion_tokens", 1, i64::MAX)?;
        common.most = new.or(old).map(|n| n as usize);
        let told = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)?;
        if top.is_some() && !told {
            let message =
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.";
            return Err(ApiError::invalid(message).param("top_logprobs"));
        }
        common.choosing.logprobs = told.then_some(top.unwrap_or(0) as usize);
        let messages = messages(fields.need("messages")?)?;
        if let Some(format) = fields.take("response_format").filter(|f| f["type"] != "text") {
            let expected = "Only {\"type\":\"text\"} is supported.";
            return Err(ApiError::unsupported_value("response_format", &format, expected));
        }
        let plain = |m: &Value| *m == serde_json::json!(["text"]);
        if let Some(modalities) = fields.take("modalities").filter(|m| !plain(m)) {
            let expected = "Only [\"text\"] is supported.";
            return Err(ApiError::unsupported_value("modalities", &modalities, expected));
        }
        for name in ["tool_choice", "function_call"] {
            let none = |v: &Value| v == "none" || v == "auto";
            if fields.take(name).is_some_and(|v| !none(&v)) {
                return Err(ApiError::unsupported(name));
            }
        }
        let refused =
            ["tools", "functions", "audio", "prediction", "reasoning_effort", "web_search_options"];
        fields.refuse(&refused)?;
        fields.finish()?;
        Ok(Self { common, messages })
    }
}

impl Common {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let Some(model) = fields.text("model")? else {
            return Err(ApiError::invalid("you must provide a model parameter"));
        };
        let temperature = fields.decimal("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32;
        let top_p = fields.decimal("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32;
        // As OpenAI reads it, nothing but the likeliest token is left at 0.
        let top_p = top_p.max(f32::MIN_POSITIVE);
        let top_k = fields.integer("top_k", -1, i64::MAX)?.unwrap_or(0).max(0) as usize;
        let seed = fields.integer("seed", i64::MIN, i64::MAX)?.map_or_else(any_seed, |s| s as u64);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let usage = stream_options(fields, stream)?;
        let choosing = Choosing {
            sampling: Sampling { temperature, top_k, top_p, seed },
            bias: logit_bias(fields)?,
            presence: fields.decimal("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
            frequency: fields.decimal("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
            logprobs: None,
        };
        let end_of_text = match fields.flag("ignore_eos")? {
            Some(true) => EndOfText::Ignore,
            _ => EndOfText::Stop,
        };
        let n = fields.integer("n", 1, MOST_N)?.unwrap_or(1) as usize;
        let stops = stops(fields)?;
        fields.ignore(IGNORED);
        Ok(Self { model, most: None, n, stops, choosing, end_of_text, stream, usage })
    }
}

/// A seed that nobody can tell beforehand.
fn any_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
        return Err(ApiError::invalid(message).param("stream_options"));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let usage = options.flag("include_usage")?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.finish()?;
    Ok(usage)
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(found) = fields.take("logit_bias") else { return Ok(Vec::new()) };
    let Value::Object(map) = found else {
        return Err(ApiError::wrong_type("logit_bias", "an object", &found));
    };
    map.into_iter()
        .map(|(token, bias)| {
            let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
            match (token.parse(), bias) {
                (Ok(token), Some(bias)) => Ok((token, bias as f32)),
                _ => {
                    let message = format!(
                        "Invalid 'logit_bias': expected token ids with values from -100 to 100, but got '{token}'."
                    );
                    Err(ApiError::invalid(message).param("logit_bias").code("invalid_value"))
                }
            }
        })
        .collect()
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let wrong =
        |found: &Value| ApiError::wrong_type("stop", "a string or an array of strings", found);
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) => {
            let text = |v: Value| match v {
                Value::String(stop) => Ok(stop),
                found => Err(wrong(&found)),
            };
            list.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(found) => return Err(wrong(&found)),
    };
    if stops.len() > MOST_STOPS {
        let message = format!(
            "Invalid 'stop': array too long. Expected an array with maximum length {MOST_STOPS}, but got an array with \
             length {} instead.",
            stops.len()
        );
        return Err(ApiError::invalid(message).param("stop").code("array_above_max_length"));
    }
    Ok(stops.into_iter().filter(|stop| !stop.is_empty()).collect())
}

/// A text, some texts, token ids, or some lists of token ids.
fn prompts(found: Value) -> Result<Vec<PromptText>, ApiError> {
    const EXPECTED: &str =
        "a string, an array of strings, an array of integers or an array of arrays of integers";
    let wrong = |found: &Value| ApiError::wrong_type("prompt", EXPECTED, found);
    let list = match found {
        Value::String(text) => return Ok(vec![PromptText::Text(text)]),
        Value::Array(list) => list,
        found => return Err(wrong(&found)),
    };
    let empty = || {
        let message = "Invalid 'prompt': empty array. Expected an array with minimum length 1, but got an empty array \
                       instead.";
        ApiError::invalid(message).param("prompt").code("empty_array")
    };
    let ids = |list: &[Value]| -> Result<PromptText, ApiError> {
        let id =
            |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(v));
        if list.is_empty() {
            return Err(empty());
        }
        Ok(PromptText::Tokens(list.iter().map(id).collect::<Result<_, _>>()?))
    };
    match list.first() {
        None => Err(empty()),
        Some(Value::Number(_)) => Ok(vec![ids(&list)?]),
        Some(_) => list
            .into_iter()
            .map(|entry| match entry {
                Value::String(text) => Ok(PromptText::Text(text)),
                Value::Array(list) => ids(&list),
                found => Err(wrong(&found)),
            })
            .collect(),
    }
}

fn messages(found: Value) -> Result<Vec<Message>, ApiError> {
    let list = match found {
        Value::Array(list) => list,
        found => return Err(ApiError::wrong_type("messages", "an array of objects", &found)),
    };
    if list.is_empty() {
        let message = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array \
                       instead.";
        return Err(ApiError::invalid(message).param("messages").code("empty_array"));
    }
    let one = |(i, entry)| message(entry, &format!("messages[{i}]"));
    list.into_iter().enumerate().map(one).collect()
}

fn message(entry: Value, path: &str) -> Result<Message, ApiError> {
    let mut fields = Fields::of(entry, path)?;
    let at = fields.path("role");
    let role = match fields.need("role")? {
        Value::String(role) => role,
        found => return Err(ApiError::wrong_type(&at, "a string", &found)),
    };
    let role = match role.as_str() {
        // Templates know the older name.
        "developer" => "system",
        "system" | "user" | "assistant" => &role,
        "tool" | "function" => return Err(ApiError::unsupported(&at)),
        other => {
            let message = format!(
                "Invalid value: '{other}'. Supported values are: 'system', 'assistant', 'user', and 'developer'."
            );
            return Err(ApiError::invalid(message).param(at).code("invalid_value"));
        }
    };
    fields.refuse(&["tool_calls", "function_call", "audio", "refusal"])?;
    fields.ignore(&["name"]);
    let at = fields.path("content");
    let content = match fields.need("content")? {
        Value::String(text) => text,
        Value::Array(parts) => {
            let part = |(i, part)| text_part(part, &format!("{at}[{i}]"));
            parts.into_iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?.concat()
        }
        found => return Err(ApiError::wrong_type(&at, "a string or an array of objects", &found)),
    };
    fields.finish()?;
    Ok(Message::new(role, &content))
}

fn text_part(part: Value, path: &str) -> Result<String, ApiError> {
    let mut fields = Fields::of(part, path)?;
    let at = fields.path("type");
    match fields.need("type")? {
        kind if kind == "text" => {}
        kind => return Err(ApiError::unsupported_value(&at, &kind, "Only \"text\" is supported.")),
    }
    let at = fields.path("text");
    match fields.need("text")? {
        Value::String(text) => fields.finish().map(|()| text),
        found => Err(ApiError::wrong_type(&at, "a string", &found)),
    }
}

#[cfg(test)]
mod tests;
