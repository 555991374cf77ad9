//! What the two OpenAI routes have in common: from tokens to a response.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use axum::http::HeaderValue;
use axum::response::Response;
use tokio::sync::mpsc::unbounded_channel;

use super::GENERATION;
use crate::app::{self, App};
use crate::engine::{Follow, Job, Places, Refused};
use crate::live::Generation;
use crate::openai::body;
use crate::openai::error::ApiError;
use crate::openai::request::Common;
use crate::openai::response::{Choice, Reply, Shape, mistake};
use crate::openai::sse::Events;

/// What a client asked for.
pub struct Asked {
    pub shape: Shape,
    /// The generation that answers.
    pub generation: Arc<Generation>,
    pub common: Common,
    pub prompts: Vec<Vec<u32>>,
    /// Text that each answer begins with; none: they begin with what the model writes.
    pub echoes: Vec<String>,
    /// Tokens of an answer where the client does not say how many; none: as many as can be.
    pub usual: Option<usize>,
}

/// Whether the client means the model that is served.
pub fn expect_model(app: &App, common: &Common) -> Result<(), ApiError> {
    if common.model == app.name { Ok(()) } else { Err(ApiError::unknown_model(&common.model)) }
}

/// Work that takes the processor for longer than others should wait.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(mistake()))
}

/// Has the engine answer, and gives the client what it says.
pub async fn respond(app: &App, asked: Asked) -> Result<Response, ApiError> {
    let (stream, usage) = (asked.common.stream, asked.common.usage);
    let number = HeaderValue::from(asked.generation.number);
    let (mut reply, jobs, mut events) = prepare(app, asked)?;
    app.engine.submit(jobs).map_err(refused)?;
    let mut response = if stream {
        Events::new(reply, events, usage).into_response()
    } else {
        while !reply.is_complete() {
            let (number, event) = events.recv().await.ok_or_else(mistake)?;
            reply.take(number, event)?;
        }
        body::json(&reply.whole())
    };
    response.headers_mut().insert(GENERATION, number);
    Ok(response)
}

/// Why the engine does not take a job, for a client.
pub fn refused(refused: Refused) -> ApiError {
    match refused {
        Refused::Full => ApiError::overloaded(),
        Refused::Stopped => ApiError::stopping(),
    }
}

/// What happens to the answers of a request.
type Happenings = tokio::sync::mpsc::UnboundedReceiver<(usize, crate::engine::Event)>;

fn prepare(app: &App, asked: Asked) -> Result<(Reply, Vec<Job>, Happenings), ApiError> {
    let Asked { shape, generation, common, prompts, echoes, usual } = asked;
    let n = common.n;
    let count = prompts.len() * n;
    if count > app.options.limits.choices {
        let message = format!(
            "Too many answers: {count} were asked for, {} is the most for one request.",
            app.options.limits.choices
        );
        return Err(ApiError::invalid(message).param("n"));
    }
    let began = Instant::now();
    let deadline = began + app.options.limits.answer_time;
    let enough: Arc<[AtomicBool]> = (0..count).map(|_| AtomicBool::new(false)).collect();
    let (out, events) = unbounded_channel();
    let (mut jobs, mut choices, mut prompt_tokens) = (Vec::new(), Vec::new(), 0);
    for (i, prompt) in prompts.into_iter().enumerate() {
        let most = most(app, shape, &generation, &common, prompt.len(), usual)?;
        let new = || Choice::new(&generation, &common.stops, echoes.get(i).cloned());
        choices.extend(std::iter::repeat_with(new).take(n));
        prompt_tokens += prompt.len();
        jobs.push(Job {
            generation: generation.clone(),
            prompt,
            choices: (i * n, n),
            most,
            choosing: common.choosing.clone(),
            end_of_text: common.end_of_text,
            follow: Follow::No,
            out: out.clone(),
            enough: enough.clone(),
            began,
            deadline,
            places: Places::default(),
        });
    }
    let id = app.id(match shape {
        Shape::Completion => "cmpl",
        Shape::Chat => "chatcmpl",
    });
    let (created, model) = (app::now(), common.model);
    let reply = Reply { shape, id, created, model, generation, choices, prompt_tokens, enough };
    Ok((reply, jobs, events))
}

/// Tokens that the answer to a prompt may have.
fn most(
    app: &App,
    shape: Shape,
    generation: &Generation,
    common: &Common,
    prompt: usize,
    usual: Option<usize>,
) -> Result<usize, ApiError> {
    let (param, name) = match shape {
        Shape::Completion => ("prompt", "prompt"),
        Shape::Chat => ("messages", "messages"),
    };
    let limits = &app.options.limits;
    let context = generation.model.spec().max_positions;
    if prompt == 0 {
        let message = format!("Invalid '{param}': it has no tokens, one at least is needed.");
        return Err(ApiError::invalid(message).param(param).code("invalid_value"));
    }
    let too_long = |message: String| {
        Err(ApiError::invalid(message).param(param).code("context_length_exceeded"))
    };
    if prompt >= context {
        return too_long(format!(
            "This model's maximum context length is {context} tokens. However, your {name} resulted in {prompt} \
             tokens. Please reduce the length of the {name}."
        ));
    }
    if prompt > limits.prompt_tokens {
        return too_long(format!(
            "This server accepts {} tokens. However, your {name} resulted in {prompt} tokens. Please reduce the length \
             of the {name}.",
            limits.prompt_tokens
        ));
    }
    let left = context - prompt;
    let Some(most) = common.most else {
        return Ok(usual.unwrap_or(limits.new_tokens).min(limits.new_tokens).min(left));
    };
    if most > limits.new_tokens {
        let message = format!(
            "max_tokens is too large: {most}. This server supports at most {} completion tokens, whereas you provided \
             {most}.",
            limits.new_tokens
        );
        return Err(ApiError::invalid(message).param("max_tokens").code("invalid_value"));
    }
    if most > left {
        return too_long(format!(
            "This model's maximum context length is {context} tokens. However, you requested {} tokens ({prompt} in the \
             {name}, {most} in the completion). Please reduce the length of the {name} or completion.",
            prompt + most
        ));
    }
    Ok(most)
}
