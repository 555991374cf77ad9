//! Responses: what happens to the answers of a request, as OpenAI's objects.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use axum::http::StatusCode;
use moe_merge_model::Tokenizer;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use crate::engine::{Event, Failure, Finish, Logprobs};
use crate::live::Generation;
use crate::text::{Stopped, Writer};

/// Which kind of request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// The answers of a request on their way.
#[derive(Debug)]
pub struct Reply {
    /// Which kind of request is answered.
    pub shape: Shape,
    /// Its id.
    pub id: String,
    /// When it came, in seconds since 1970.
    pub created: u64,
    /// What the client calls the model.
    pub model: String,
    /// The generation that answers.
    pub generation: Arc<Generation>,
    /// The answers.
    pub choices: Vec<Choice>,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// For every answer whether its reader has enough: the engine looks at it.
    pub enough: Arc<[AtomicBool]>,
}

/// One answer on its way.
#[derive(Debug)]
pub struct Choice {
    writer: Writer,
    /// Its text so far; an echoed prompt is its beginning.
    text: String,
    /// Its tokens so far.
    tokens: usize,
    told: Told,
    finish: Option<&'static str>,
}

/// Probabilities of tokens, as the shape has them.
#[derive(Debug, Default)]
struct Told {
    /// For chats.
    content: Vec<Value>,
    /// For completions.
    tokens: Vec<String>,
    logprobs: Vec<f32>,
    top: Vec<Value>,
    offsets: Vec<usize>,
}

/// What an event adds to an answer.
#[derive(Debug)]
pub struct Piece {
    number: usize,
    /// Whether it is the first of its answer.
    first: bool,
    text: String,
    logprobs: Value,
    finish: Option<&'static str>,
}

impl Choice {
    /// At its start. An echoed prompt is given out with the first piece.
    pub fn new(generation: &Generation, stops: &[String], echo: Option<String>) -> Self {
        Self {
            writer: Writer::new(generation.tokenizer.clone(), stops.to_vec()),
            text: echo.unwrap_or_default(),
            tokens: 0,
            told: Told::default(),
            finish: None,
        }
    }
}

impl Reply {
    /// Whether all answers are complete.
    pub fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Takes what happened to an answer; what comes after its end is nothing.
    ///
    /// # Errors
    /// [`ApiError`] if it cannot be completed.
    pub fn take(&mut self, number: usize, event: Event) -> Result<Option<Piece>, ApiError> {
        let shape = self.shape;
        let tokenizer = self.generation.tokenizer.clone();
        let Some(choice) = self.choices.get_mut(number).filter(|c| c.finish.is_none()) else {
            return Ok(None);
        };
        let first = choice.tokens == 0;
        let mut logprobs = Value::Null;
        let refused = |e| failed(&Failure::Model(format!("{e}")));
        let (text, finish) = match event {
            Event::Token(token, told) => {
                choice.tokens += 1;
                let (text, stopped) = choice.writer.push(token).map_err(refused)?;
                if let Some(told) = told {
                    let offset = choice.text.chars().count();
                    let one = Told::of(&tokenizer, token, &told, offset);
                    logprobs = one.json(shape);
                    choice.told.append(one);
                }
                (text, (stopped == Stopped::Yes).then_some("stop"))
            }
            Event::End(finish, _) => {
                let (text, stopped) = choice.writer.finish().map_err(refused)?;
                let finish = match finish {
                    Finish::Length if stopped == Stopped::No => "length",
                    _ => "stop",
                };
                (text, Some(finish))
            }
            Event::Failed(failure) => return Err(failed(&failure)),
        };
        if finish.is_some() {
            self.enough[number].store(true, Relaxed);
        }
        let echoed = if first { choice.text.clone() } else { String::new() };
        choice.text += &text;
        choice.finish = finish;
        Ok(Some(Piece { number, first, text: echoed + &text, logprobs, finish }))
    }

    /// All answers in one object.
    pub fn whole(&self) -> Value {
        let choices = self.choices.iter().enumerate().map(|(index, choice)| {
            let logprobs = match choice.told.is_empty() {
                true => Value::Null,
                false => choice.told.json(self.shape),
            };
            let finish = choice.finish;
            match self.shape {
                Shape::Completion => json!({
                    "text": choice.text, "index": index, "logprobs": logprobs, "finish_reason": finish,
                }),
                Shape::Chat => json!({
                    "index": index,
                    "message": {
                        "role": "assistant", "content": choice.text, "refusal": null,
                        "annotations": [],
                    },
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }),
            }
        });
        let mut object = self.head(match self.shape {
            Shape::Completion => "text_completion",
            Shape::Chat => "chat.completion",
        });
        object.insert("choices".into(), choices.collect());
        object.insert("usage".into(), self.usage());
        Value::Object(object)
    }

    /// The objects of a stream that a piece makes.
    pub fn chunks(&self, piece: &Piece) -> Vec<Value> {
        let Piece { number, first, text, logprobs, finish } = piece;
        let chunk = |choice: Value| {
            let mut object = self.chunk_head();
            object.insert("choices".into(), json!([choice]));
            Value::Object(object)
        };
        let mut chunks = Vec::new();
        let mut delta = |delta: Value, logprobs: &Value, finish: &Option<&str>| {
            chunks.push(chunk(json!({
                "index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish,
            })));
        };
        match self.shape {
            Shape::Completion => {
                if !text.is_empty() || !logprobs.is_null() || finish.is_some() {
                    chunks.push(chunk(json!({
                        "text": text, "index": number, "logprobs": logprobs, "finish_reason": finish,
                    })));
                }
            }
            Shape::Chat => {
                if *first {
                    let role = json!({"role": "assistant", "content": "", "refusal": null});
                    delta(role, &Value::Null, &None);
                }
                if !text.is_empty() || !logprobs.is_null() {
                    delta(json!({"content": text}), logprobs, &None);
                }
                if finish.is_some() {
                    delta(json!({}), &Value::Null, finish);
                }
            }
        }
        chunks
    }

    /// The last object of a stream whose client asked for the number of tokens.
    pub fn usage_chunk(&self) -> Value {
        let mut object = self.chunk_head();
        object.insert("choices".into(), json!([]));
        object.insert("usage".into(), self.usage());
        Value::Object(object)
    }

    fn chunk_head(&self) -> Map<String, Value> {
        self.head(match self.shape {
            Shape::Completion => "text_completion",
            Shape::Chat => "chat.completion.chunk",
        })
    }

    fn head(&self, object: &str) -> Map<String, Value> {
        let head = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.generation.fingerprint,
        });
        match head {
            Value::Object(head) => head,
            _ => Map::new(),
        }
    }

    fn usage(&self) -> Value {
        let (prompt, new) =
            (self.prompt_tokens, self.choices.iter().map(|c| c.tokens).sum::<usize>());
        json!({"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new})
    }
}

impl Told {
    fn of(tokenizer: &Tokenizer, token: u32, told: &Logprobs, offset: usize) -> Self {
        let entry = |id: u32, logprob: f32| {
            let text = text_of(tokenizer, id);
            json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
        };
        let mut content = entry(token, told.chosen);
        content["top_logprobs"] = told.top.iter().map(|(id, l)| entry(*id, *l)).collect();
        let top = told.top.iter().map(|(id, l)| (text_of(tokenizer, *id), json!(l)));
        Self {
            content: vec![content],
            tokens: vec![text_of(tokenizer, token)],
            logprobs: vec![told.chosen],
            top: vec![Value::Object(top.collect())],
            offsets: vec![offset],
        }
    }

    fn append(&mut self, mut more: Self) {
        self.content.append(&mut more.content);
        self.tokens.append(&mut more.tokens);
        self.logprobs.append(&mut more.logprobs);
        self.top.append(&mut more.top);
        self.offsets.append(&mut more.offsets);
    }

    fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    fn json(&self, shape: Shape) -> Value {
        match shape {
            Shape::Chat => json!({"content": self.content, "refusal": null}),
            Shape::Completion => json!({
                "tokens": self.tokens, "token_logprobs": self.logprobs, "top_logprobs": self.top,
                "text_offset": self.offsets,
            }),
        }
    }
}

/// A token as text by itself: special ones as the vocabulary spells them.
fn text_of(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.decode(&[id]) {
        Ok(text) if !text.is_empty() => text,
        _ => tokenizer.token_text(id).unwrap_or_default(),
    }
}

/// Why an answer cannot be completed, for its client.
pub fn failed(failure: &Failure) -> ApiError {
    match failure {
        Failure::Late => {
            let message = "The answer took longer than the server allows.";
            ApiError::server(StatusCode::GATEWAY_TIMEOUT, message).code("timeout")
        }
        Failure::Model(e) => {
            let message = format!("The model failed: {e}");
            ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, message)
        }
        Failure::Mistake => mistake(),
    }
}

/// A mistake of this program.
pub fn mistake() -> ApiError {
    let message = "The server had an error while processing your request. Sorry about that!";
    ApiError::server(StatusCode::INTERNAL_SERVER_ERROR, message)
}
