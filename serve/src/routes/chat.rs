//! `POST /v1/chat/completions`: answers a conversation.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use moe_merge_checkpoint::Explain;
use moe_merge_model::TextError;
use moe_merge_model::chat::AssistantTurn;

use super::answer::{self, Asked};
use crate::app::App;
use crate::openai::body;
use crate::openai::error::ApiError;
use crate::openai::request::Chat;
use crate::openai::response::Shape;

pub async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(request, &app.options.limits).await?;
    let Chat { common, messages } = Chat::parse(&body)?;
    answer::expect_model(&app, &common)?;
    let generation = app.live.now();
    let encoder = generation.clone();
    let prompt = answer::aside(move || {
        let template = encoder.template.as_ref().as_ref().map_err(refused)?;
        let text = template.render(&messages, AssistantTurn::Open).map_err(|e| refused(&e))?;
        encoder.tokenizer.encode(&text).map_err(|e| refused(&e))
    })
    .await?;
    let (shape, prompts) = (Shape::Chat, vec![prompt]);
    let echoes = Vec::new();
    answer::respond(&app, Asked { shape, generation, common, prompts, echoes, usual: None }).await
}

/// What the template, or the lack of one, says to the client.
fn refused(error: &TextError) -> ApiError {
    let found = error.fields().into_iter().find(|(label, _)| *label == "found");
    let message = match error {
        TextError::NoChatTemplate { .. } => {
            "This model has no chat template: it continues text. Use /v1/completions.".to_owned()
        }
        _ => found.map_or_else(|| error.to_string(), |(_, found)| format!("{error}: {found}")),
    };
    ApiError::invalid(message).param("messages")
}
