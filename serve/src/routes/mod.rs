//! The list of routes, and what happens around all of them.

mod admin;
mod answer;
mod change;
mod chat;
mod completions;
mod health;
mod metrics;
mod models;
mod page;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::app::App;
use crate::openai::error::ApiError;
use crate::openai::response::mistake;

/// Header with the number of the generation that answers.
pub const GENERATION: HeaderName = HeaderName::from_static("x-moe-merge-generation");

/// All routes.
pub fn all(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{name}", get(models::one))
        .route("/metrics", get(metrics::show))
        .route_layer(from_fn_with_state(app.clone(), api_key));
    let admin = Router::new()
        .route("/admin/status", get(admin::status))
        .route("/admin/generations", get(admin::generations))
        .route("/admin/refresh", post(admin::refresh))
        .route("/admin/route", post(admin::route))
        .route("/admin/swap", post(change::swap))
        .route("/admin/rollback", post(change::rollback))
        .route_layer(from_fn_with_state(app.clone(), admin::token));
    // Where there is no token, there are no admin routes.
    let admin = if app.options.admin_token.is_some() { admin } else { Router::new() };
    Router::new()
        .merge(open)
        .merge(admin)
        .route("/", get(page::show))
        .route("/health", get(health::show))
        .method_not_allowed_fallback(not_allowed)
        .fallback(not_found)
        .layer(CatchPanicLayer::custom(|_| mistake().into_response()))
        .layer(from_fn_with_state(app.clone(), around))
        .with_state(app)
}

/// Counts requests and gives each an id.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = route_of(&request);
    let mut response = match app.stopping.load(Relaxed) {
        true if route != "/health" => ApiError::stopping().into_response(),
        _ => next.run(request).await,
    };
    app.metrics.answered(route, response.status().as_u16());
    if let Ok(id) = HeaderValue::from_str(&app.id("req")) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    response
}

/// A route as it is listed above: clients must not make up label values.
fn route_of(request: &Request) -> &'static str {
    const ROUTES: [&str; 6] =
        ["/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/health", "/"];
    let path = request.uri().path();
    ROUTES.into_iter().find(|route| *route == path).unwrap_or_else(|| {
        if path.starts_with("/v1/models/") {
            "/v1/models/{name}"
        } else if path.starts_with("/admin/") {
            "/admin"
        } else {
            "other"
        }
    })
}

/// Asks for the key, if there is one.
async fn api_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match &app.options.api_key {
        Some(key) if !is_bearer(&request, key) => Err(refused(&request, "API key")),
        _ => Ok(next.run(request).await),
    }
}

fn refused(request: &Request, what: &str) -> ApiError {
    let given = request.headers().contains_key(header::AUTHORIZATION);
    let message = match given {
        true => format!("Incorrect {what} provided."),
        false => format!(
            "You didn't provide an {what}. You need to provide it in an Authorization header using Bearer auth (i.e. \
             Authorization: Bearer YOUR_KEY)."
        ),
    };
    ApiError::invalid(message).status(StatusCode::UNAUTHORIZED).code("invalid_api_key")
}

/// Whether a request carries `secret`. How long that takes says nothing about where they differ.
fn is_bearer(request: &Request, secret: &str) -> bool {
    let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let given = given.and_then(|given| {
        let (scheme, token) = given.split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
    });
    let Some(given) = given else { return false };
    let different = given.iter().zip(secret.as_bytes()).fold(0, |d, (a, b)| d | (a ^ b));
    given.len() == secret.len() && different == 0
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("Invalid URL ({} {})", request.method(), request.uri().path());
    ApiError::invalid(message).status(StatusCode::NOT_FOUND)
}

async fn not_allowed(request: Request) -> ApiError {
    let message = format!("Not allowed to {} on {}", request.method(), request.uri().path());
    ApiError::invalid(message).status(StatusCode::METHOD_NOT_ALLOWED).code("method_not_allowed")
}
