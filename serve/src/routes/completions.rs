//! `POST /v1/completions`: continues texts.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;

use super::answer::{self, Asked};
use crate::app::App;
use crate::live::Generation;
use crate::openai::body;
use crate::openai::error::ApiError;
use crate::openai::request::{Completion, PromptText};
use crate::openai::response::Shape;

/// Tokens of an answer where the client does not say how many: OpenAI's number.
const USUAL: usize = 16;

pub async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(request, &app.options.limits).await?;
    let asked = Completion::parse(&body)?;
    answer::expect_model(&app, &asked.common)?;
    let generation = app.live.now();
    let (common, texts, echo) = (asked.common, asked.prompts, asked.echo);
    let encoder = generation.clone();
    let (prompts, echoes) = answer::aside(move || {
        let mut prompts = Vec::with_capacity(texts.len());
        let mut echoes = Vec::new();
        for text in &texts {
            let tokens = encode(&encoder, text)?;
            if echo {
                echoes.push(echoed(&encoder, text)?);
            }
            prompts.push(tokens);
        }
        Ok((prompts, echoes))
    })
    .await?;
    let shape = Shape::Completion;
    let usual = Some(USUAL);
    answer::respond(&app, Asked { shape, generation, common, prompts, echoes, usual }).await
}

fn encode(generation: &Generation, text: &PromptText) -> Result<Vec<u32>, ApiError> {
    match text {
        PromptText::Text(text) => {
            let encoded = generation.tokenizer.encode_prompt(text);
            encoded.map_err(|e| ApiError::invalid(e.to_string()).param("prompt"))
        }
        PromptText::Tokens(ids) => {
            let vocab = generation.model.spec().vocab;
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                let message = format!(
                    "Invalid 'prompt': token {id} is not in the vocabulary. Expected token ids below {vocab}."
                );
                return Err(ApiError::invalid(message).param("prompt").code("invalid_value"));
            }
            Ok(ids.clone())
        }
    }
}

fn echoed(generation: &Generation, text: &PromptText) -> Result<String, ApiError> {
    match text {
        PromptText::Text(text) => Ok(text.clone()),
        PromptText::Tokens(ids) => generation
            .tokenizer
            .decode(ids)
            .map_err(|e| ApiError::invalid(e.to_string()).param("prompt")),
    }
}
