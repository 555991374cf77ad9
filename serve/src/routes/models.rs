//! `GET /v1/models` and `GET /v1/models/NAME`: the one model that is served.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::App;
use crate::openai::body;
use crate::openai::error::ApiError;

pub async fn list(State(app): State<Arc<App>>) -> Response {
    body::json(&json!({"object": "list", "data": [model(&app)]}))
}

pub async fn one(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    if name != app.name {
        return Err(ApiError::unknown_model(&name));
    }
    Ok(body::json(&model(&app)))
}

fn model(app: &App) -> Value {
    let generation = app.live.now();
    let spec = generation.model.spec();
    json!({
        "id": app.name,
        "object": "model",
        "created": generation.created,
        "owned_by": "moe-merge",
        "max_model_len": spec.max_positions,
        "family": spec.family,
        "experts": generation.experts,
        "generation": generation.number,
    })
}
