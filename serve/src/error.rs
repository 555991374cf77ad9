//! Why a server does not start.

use std::net::SocketAddr;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_model::{ModelError, TextError};

/// An error at the start of a server, or when another generation is opened.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model cannot be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model cannot run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model cannot read or write text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The system gives no thread.
    #[error("cannot start the server's threads")]
    Threads(#[source] std::io::Error),
}

impl Explain for ServeError {
    fn kind(&self) -> Kind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Model(e) => e.kind(),
            Self::Text(e) => e.kind(),
            Self::Listen { .. } => Kind::Usage,
            Self::Threads(_) => Kind::NoRoom,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Checkpoint(e) => e.fields(),
            Self::Model(e) => e.fields(),
            Self::Text(e) => e.fields(),
            Self::Listen { source, .. } | Self::Threads(source) => {
                vec![("found", source.to_string())]
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(e) => e.hint(),
            Self::Model(e) => e.hint(),
            Self::Text(e) => e.hint(),
            Self::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
                Some("another program listens there; choose another `--port`, or 0 for any".into())
            }
            Self::Listen { .. } => Some("choose another `--host` or `--port`".into()),
            Self::Threads(_) => None,
        }
    }
}
