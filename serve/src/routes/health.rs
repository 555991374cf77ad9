//! `GET /health`: whether the server takes requests.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use crate::app::App;
use crate::openai::body;
use crate::openai::error::ApiError;

pub async fn show(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if app.stopping.load(Relaxed) {
        return Err(ApiError::stopping());
    }
    let generation = app.live.now();
    Ok(body::json(&json!({
        "status": "ok", "model": app.name, "generation": generation.number,
        "fingerprint": generation.fingerprint,
    })))
}
