//! `/admin/…`: generations, loads, and where the tokens of a prompt go. Only with the admin token.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use moe_merge_checkpoint::{Explain, JournalLine, Kind, generation};
use moe_merge_model::Sampling;
use moe_merge_model::generate::EndOfText;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::answer;
use crate::app::App;
use crate::engine::{Choosing, Event, Follow, Job, LayerVisits, Places};
use crate::live::Generation;
use crate::openai::body;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::response::{failed, mistake};
use crate::watcher;

/// Most tokens that are written after a prompt whose way is shown.
const MOST_NEW: i64 = 256;

/// Asks for the token.
pub async fn token(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match &app.options.admin_token {
        Some(token) if super::is_bearer(&request, token) => Ok(next.run(request).await),
        _ => Err(super::refused(&request, "admin token")),
    }
}

/// `GET /admin/status`: what the page shows and renews every second.
pub async fn status(State(app): State<Arc<App>>) -> Response {
    let live = app.live.now();
    let spec = live.model.spec();
    let layers = live.routers.layers.iter().map(|load| {
        json!({
            "layer": load.layer,
            "tokens": load.tokens.load(Relaxed),
            "experts": load.experts.iter().map(|e| e.load(Relaxed)).collect::<Vec<_>>(),
            "entropy": load.mean_entropy(),
        })
    });
    let in_memory = app.live.in_memory();
    body::json(&json!({
        "version": 1,
        "model": app.name,
        "family": spec.family,
        "generation": live.number,
        "fingerprint": live.fingerprint,
        "since": live.created,
        "in_memory": in_memory.iter().map(|g| g.number).collect::<Vec<_>>(),
        "experts": live.experts,
        "experts_per_token": spec.moe_layers().next().map(|(_, moe)| moe.router.top_k),
        "layers": layers.collect::<Vec<_>>(),
        "running": app.metrics.running.load(Relaxed),
        "waiting": app.metrics.waiting.load(Relaxed),
        "prompt_tokens": app.metrics.prompt_tokens.load(Relaxed),
        "new_tokens": app.metrics.new_tokens.load(Relaxed),
    }))
}

/// `GET /admin/generations`: the journal of the model, first to last.
pub async fn generations(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let document = answer::aside(move || {
        let lines = generation::history(&app.live.path).map_err(|e| explained(&e))?;
        let live = app.live.now().number;
        let listed: Vec<Value> = lines.iter().map(|line| listed(line, live)).collect();
        Ok(json!({"version": 1, "live": live, "generations": listed}))
    });
    Ok(body::json(&document.await?))
}

fn listed(line: &JournalLine, live: u32) -> Value {
    json!({
        "generation": line.generation,
        "live": line.generation == live,
        "action": line.action,
        "parent": line.parent,
        "message": line.message,
        "time": line.time,
        "user": line.user,
        "tensors": line.tensors.len(),
        "bytes": line.added.iter().map(|file| file.size).sum::<u64>(),
        "manifest": line.manifest,
        "details": line.details,
    })
}

/// `POST /admin/refresh`: looks at the disk now, and makes what is there the live generation.
pub async fn refresh(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    Ok(body::json(&answer::aside(move || go_live(&app)).await?))
}

/// Makes the generation on disk the live one, and says which that is.
pub fn go_live(app: &App) -> Result<Value, ApiError> {
    watcher::refresh(&app.live, &app.metrics)
        .map_err(|e| ApiError::invalid(e).code("not_opened"))?;
    let live = app.live.now();
    Ok(json!({"version": 1, "generation": live.number, "fingerprint": live.fingerprint}))
}

/// `POST /admin/route`: the experts that each token of a prompt, and of what is written after it, visits.
pub async fn route(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let bytes = body::read(request, &app.options.limits).await?;
    let mut fields = Fields::parse(&bytes)?;
    let text = match fields.need("prompt")? {
        Value::String(text) => text,
        found => return Err(ApiError::wrong_type("prompt", "a string", &found)),
    };
    let most = fields.integer("max_tokens", 0, MOST_NEW)?.unwrap_or(0) as usize;
    fields.finish()?;
    let generation = app.live.now();
    let encoder = generation.clone();
    let prompt = answer::aside(move || {
        let encoded = encoder.tokenizer.encode_prompt(&text);
        encoded.map_err(|e| ApiError::invalid(e.to_string()).param("prompt"))
    })
    .await?;
    let context = generation.model.spec().max_positions;
    if prompt.is_empty() || prompt.len() >= context.min(app.options.limits.prompt_tokens) {
        let message = format!("Invalid 'prompt': expected 1 to {} tokens.", context - 1);
        return Err(ApiError::invalid(message).param("prompt").code("invalid_value"));
    }
    let (written, visits) = follow(&app, &generation, &prompt, most).await?;
    Ok(body::json(&document(&generation, &prompt, &written, &visits)))
}

/// Has the engine read a prompt and write after it; returns the tokens it wrote, and which experts all of them visited.
async fn follow(
    app: &App,
    generation: &Arc<Generation>,
    prompt: &[u32],
    most: usize,
) -> Result<(Vec<u32>, Vec<LayerVisits>), ApiError> {
    let (out, mut events) = unbounded_channel();
    let began = Instant::now();
    app.engine
        .submit(vec![Job {
            generation: generation.clone(),
            prompt: prompt.to_vec(),
            choices: (0, 1),
            most,
            choosing: Choosing {
                sampling: Sampling::default(),
                bias: Vec::new(),
                presence: 0.0,
                frequency: 0.0,
                logprobs: None,
            },
            end_of_text: EndOfText::Stop,
            follow: Follow::Tokens,
            out,
            enough: [AtomicBool::new(false)].into(),
            began,
            deadline: began + app.options.limits.answer_time,
            places: Places::default(),
        }])
        .map_err(answer::refused)?;
    let mut written = Vec::new();
    loop {
        match events.recv().await.ok_or_else(mistake)?.1 {
            Event::Token(token, _) => written.push(token),
            Event::End(_, visits) => return Ok((written, visits)),
            Event::Failed(failure) => return Err(failed(&failure)),
        }
    }
}

fn document(
    generation: &Generation,
    prompt: &[u32],
    written: &[u32],
    visits: &[LayerVisits],
) -> Value {
    let text = |id: u32| {
        let alone = generation.tokenizer.decode(&[id]).unwrap_or_default();
        match alone.is_empty() || alone.contains('\u{fffd}') {
            true => generation.tokenizer.token_text(id).unwrap_or_default(),
            false => alone,
        }
    };
    let token = |id: &u32, written: bool| json!({"id": id, "text": text(*id), "written": written});
    let tokens = prompt.iter().map(|id| token(id, false));
    let tokens = tokens.chain(written.iter().map(|id| token(id, true)));
    let layers = visits.iter().map(|layer| {
        let ids: Vec<&[u32]> = layer.ids.chunks_exact(layer.top_k).collect();
        let weights: Vec<&[f32]> = layer.weights.chunks_exact(layer.top_k).collect();
        json!({"layer": layer.layer, "experts": ids, "weights": weights})
    });
    json!({
        "version": 1,
        "generation": generation.number,
        "experts": generation.experts,
        "text": generation.tokenizer.decode(written).unwrap_or_default(),
        "tokens": tokens.collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
    })
}

/// An error of the libraries, for whoever administers the server.
pub fn explained(error: &(impl Explain + ?Sized)) -> ApiError {
    let fields = error.fields().into_iter().map(|(label, value)| format!("; {label}: {value}"));
    let hint = error.hint().map(|hint| format!("; hint: {hint}"));
    let message = format!("{error}{}{}", fields.collect::<String>(), hint.unwrap_or_default());
    let error = match error.kind() {
        Kind::NoRoom => ApiError::server(axum::http::StatusCode::INSUFFICIENT_STORAGE, message),
        _ => ApiError::invalid(message),
    };
    error.code("refused")
}
