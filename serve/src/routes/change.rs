//! `POST /admin/swap` and `POST /admin/rollback`: changes of the model, each a generation that is live at once.

use std::ops::Range;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use moe_merge_adapt::{AdaptError, Convert, SwapRequest};
use serde_json::{Value, json};

use super::admin::{explained, go_live};
use super::answer::aside;
use crate::app::App;
use crate::openai::body;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

/// Another expert in the place of one: `{"expert", "with", "layers", "convert", "name", "message"}`.
pub async fn swap(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let bytes = body::read(request, &app.options.limits).await?;
    let mut fields = Fields::parse(&bytes)?;
    let expert = match fields.need("expert")? {
        Value::String(name) => name,
        Value::Number(number) => number.to_string(),
        found => return Err(ApiError::wrong_type("expert", "a string or an integer", &found)),
    };
    let with = match fields.need("with")? {
        Value::String(source) => source,
        found => return Err(ApiError::wrong_type("with", "a string", &found)),
    };
    let folder = app.live.path.display().to_string();
    let mut asked = SwapRequest::new(&folder, &expert, &with);
    asked.layers = layers(&mut fields)?;
    if fields.flag("convert")? == Some(true) {
        asked.convert = Convert::Yes;
    }
    asked.name = fields.text("name")?;
    asked.message = fields.text("message")?;
    fields.finish()?;
    let document = aside(move || {
        let report = moe_merge_adapt::swap(&asked).map_err(|e| refused(&e))?;
        changed(&app, &report)
    });
    Ok(body::json(&document.await?))
}

/// Back to an earlier generation: `{"to", "message"}`, both may be missing.
pub async fn rollback(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let bytes = body::read(request, &app.options.limits).await?;
    let mut fields = Fields::parse(&bytes)?;
    let to = fields.integer("to", 0, u32::MAX.into())?.map(|to| to as u32);
    let message = fields.text("message")?;
    fields.finish()?;
    let document = aside(move || {
        let interrupt = Default::default();
        let report = moe_merge_adapt::rollback(&app.live.path, to, message.as_deref(), &interrupt)
            .map_err(|e| refused(&e))?;
        changed(&app, &report)
    });
    Ok(body::json(&document.await?))
}

/// Two numbers, the first layer and the one after the last.
fn layers(fields: &mut Fields) -> Result<Option<Range<usize>>, ApiError> {
    let Some(found) = fields.take("layers") else { return Ok(None) };
    let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    match found.as_array().map(|list| list.iter().map(number).collect::<Vec<_>>()).as_deref() {
        Some([Some(from), Some(to)]) => Ok(Some(*from..*to)),
        _ => Err(ApiError::wrong_type("layers", "an array of two integers", &found)),
    }
}

/// Makes what was written live, and says so with the report.
fn changed(app: &App, report: &impl serde::Serialize) -> Result<Value, ApiError> {
    let mut document = go_live(app)?;
    document["report"] = serde_json::to_value(report).unwrap_or_else(|_| json!(null));
    Ok(document)
}

/// What a change met. Whoever changes the model at the same time may be done soon.
fn refused(error: &AdaptError) -> ApiError {
    match error.is_busy() {
        true => explained(error).status(StatusCode::CONFLICT).code("busy"),
        false => explained(error),
    }
}
