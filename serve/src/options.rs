//! What a server can be told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// How a server runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 for any that is free.
    pub address: SocketAddr,
    /// What clients call the model; by default the last part of its path.
    pub name: Option<String>,
    /// Key that OpenAI routes and the metrics ask for; none: everybody may use them.
    pub api_key: Option<String>,
    /// Token that admin routes ask for; none: there are no admin routes.
    pub admin_token: Option<String>,
    /// Whether new generations on disk are noticed.
    pub watch: Watch,
    /// What no client gets more of.
    pub limits: Limits,
}

/// Whether new generations on disk are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// The folder is looked at every so often.
    Every(Duration),
    /// Only what admin routes do is noticed.
    Off,
}

/// What no client gets more of.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Tokens of a prompt; the context of the model limits it too.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub new_tokens: usize,
    /// Answers of one request: prompts times `n`.
    pub choices: usize,
    /// Sequences that the model works on at a time.
    pub sequences: usize,
    /// Bytes of keys and values at a time; one sequence always has room.
    pub cache_bytes: usize,
    /// Answers that wait for their turn, beside those that are written.
    pub waiting: usize,
    /// Connections.
    pub connections: usize,
    /// Time for the headers of a request, and between two requests of a connection.
    pub header_time: Duration,
    /// Time for the body of a request.
    pub body_time: Duration,
    /// Time that a client may leave what it is sent unread.
    pub write_time: Duration,
    /// Time for an answer from first to last.
    pub answer_time: Duration,
    /// Time that answers get to end when the server stops.
    pub drain_time: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            name: None,
            api_key: None,
            admin_token: None,
            watch: Watch::Every(Duration::from_millis(200)),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 2 << 20,
            prompt_tokens: usize::MAX,
            new_tokens: 4096,
            choices: 64,
            sequences: 32,
            cache_bytes: 2 << 30,
            waiting: 256,
            connections: 1024,
            header_time: Duration::from_secs(30),
            body_time: Duration::from_secs(30),
            write_time: Duration::from_secs(60),
            answer_time: Duration::from_secs(600),
            drain_time: Duration::from_secs(30),
        }
    }
}
