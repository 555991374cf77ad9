//! Answers piece by piece, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::ApiError;
use super::response::{Reply, mistake};
use crate::engine::Event;

/// The stream of a reply. Whoever drops it tells the engine that nobody waits for the rest.
pub struct Events {
    reply: Reply,
    events: UnboundedReceiver<(usize, Event)>,
    /// Whether the last object tells the number of tokens.
    usage: bool,
    ready: VecDeque<Bytes>,
    done: bool,
}

impl Events {
    /// The stream of `reply`, whose answers come through `events`.
    pub fn new(reply: Reply, events: UnboundedReceiver<(usize, Event)>, usage: bool) -> Self {
        Self { reply, events, usage, ready: VecDeque::new(), done: false }
    }

    /// As a response.
    pub fn into_response(self) -> Response {
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            // Proxies would hold pieces back.
            (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        ];
        (headers, Body::from_stream(self)).into_response()
    }

    fn take(&mut self, number: usize, event: Event) {
        match self.reply.take(number, event) {
            Ok(None) => {}
            Ok(Some(piece)) => {
                for mut chunk in self.reply.chunks(&piece) {
                    if self.usage {
                        // OpenAI's stream says in every object but the last that it does not know yet.
                        chunk["usage"] = Value::Null;
                    }
                    self.send(&chunk);
                }
                if self.reply.is_complete() {
                    if self.usage {
                        self.send(&self.reply.usage_chunk());
                    }
                    self.end();
                }
            }
            Err(e) => self.fail(&e),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.send(&error.body());
        self.end();
    }

    fn send(&mut self, object: &Value) {
        self.ready.push_back(format!("data: {object}\n\n").into());
    }

    fn end(&mut self) {
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.events.close();
        self.done = true;
    }
}

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            if self.done {
                return Poll::Ready(None);
            }
            match ready!(self.events.poll_recv(cx)) {
                Some((number, event)) => self.take(number, event),
                None => self.fail(&mistake()),
            }
        }
    }
}
