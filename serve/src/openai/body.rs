//! Bodies of requests and responses.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;

use super::error::ApiError;
use crate::options::Limits;

/// The body of a request that says it is JSON.
///
/// # Errors
/// [`ApiError`] for another type (415), one that is too large (413) or too slow (408), and a broken one.
pub async fn read(request: Request, limits: &Limits) -> Result<Bytes, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let essence = kind.and_then(|kind| kind.to_str().ok()?.split(';').next());
    if !essence.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        let found = kind.map_or_else(|| "none".into(), |k| String::from_utf8_lossy(k.as_bytes()));
        let message = format!(
            "Unsupported Content-Type: expected 'application/json', but got {found} instead."
        );
        return Err(ApiError::invalid(message).status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
    }
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > limits.body_bytes) {
        return Err(too_large(limits.body_bytes));
    }
    collect(request.into_body(), limits.body_bytes, limits.body_time).await
}

async fn collect(body: Body, most: usize, time: Duration) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(time, Limited::new(body, most).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large(most)),
        Ok(Err(e)) => Err(ApiError::invalid(format!("The body of your request is broken: {e}"))),
        Err(_) => {
            let message = "The body of your request did not come in time.";
            Err(ApiError::invalid(message).status(StatusCode::REQUEST_TIMEOUT))
        }
    }
}

fn too_large(most: usize) -> ApiError {
    let message = format!("The body of your request is too large: {most} bytes are accepted.");
    ApiError::invalid(message).status(StatusCode::PAYLOAD_TOO_LARGE).code("request_too_large")
}

/// A JSON document as a response.
pub fn json(value: &Value) -> Response {
    let json = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (json, value.to_string()).into_response()
}
