//! Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Status of the response.
    pub status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// The client's mistake.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
            kind: "invalid_request_error",
            param: None,
            code: None,
        }
    }

    /// The server's trouble.
    pub fn server(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, kind: "server_error", ..Self::invalid(message) }
    }

    /// The same with another status.
    pub fn status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The same with the parameter it is about.
    pub fn param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// The same with a code for programs.
    pub fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// A parameter of another type than it should have.
    pub fn wrong_type(param: &str, expected: &str, found: &Value) -> Self {
        let message = format!(
            "Invalid type for '{param}': expected {expected}, but got {} instead.",
            type_of(found)
        );
        Self::invalid(message).param(param).code("invalid_type")
    }

    /// A parameter that is not done.
    pub fn unsupported(param: &str) -> Self {
        Self::invalid(format!("Unsupported parameter: '{param}' is not supported with this model."))
            .param(param)
            .code("unsupported_parameter")
    }

    /// A value of a parameter that is not done.
    pub fn unsupported_value(param: &str, found: &Value, expected: &str) -> Self {
        let message = format!(
            "Unsupported value: '{param}' does not support {found} with this model. {expected}"
        );
        Self::invalid(message).param(param).code("unsupported_value")
    }

    /// A model that is not served here.
    pub fn unknown_model(name: &str) -> Self {
        let message = format!("The model `{name}` does not exist or you do not have access to it.");
        Self::invalid(message).status(StatusCode::NOT_FOUND).code("model_not_found")
    }

    /// More work than the server takes.
    pub fn overloaded() -> Self {
        let message = "The engine is currently overloaded, please try again later.";
        Self::server(StatusCode::SERVICE_UNAVAILABLE, message).code("overloaded")
    }

    /// The server ends.
    pub fn stopping() -> Self {
        let message = "The server is shutting down, please try again later.";
        Self::server(StatusCode::SERVICE_UNAVAILABLE, message).code("shutting_down")
    }

    /// The body.
    pub fn body(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        let mut response = (self.status, json, self.body().to_string()).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// What a value is, in the words of these messages.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
