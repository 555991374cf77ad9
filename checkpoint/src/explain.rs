//! What every error of the project can tell a person.

use moe_merge_kernels::{ISA_VARIABLE, KernelError};

/// What kind of thing went wrong; the command line turns it into its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A check said no (exit code 1).
    CheckFailed,
    /// Wrong usage or recipe (2).
    Usage,
    /// Input unreadable or corrupt (3).
    Input,
    /// No room on disk or in memory (4).
    NoRoom,
    /// Stopped by the user (130).
    Interrupted,
}

/// An error that says where, what was expected, what was found, and what to do.
///
/// `Display` is one line: what went wrong. The fields follow it, one a line, in the order given here.
pub trait Explain: std::error::Error {
    /// The exit code it deserves.
    fn kind(&self) -> Kind;

    /// Labelled facts: `file`, `tensor`, `expected`, `found`, `recipe`, …
    fn fields(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// What to do next.
    fn hint(&self) -> Option<String> {
        None
    }
}

impl Explain for KernelError {
    fn kind(&self) -> Kind {
        match self {
            Self::Isa { .. } => Kind::Usage,
            _ => Kind::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Isa { .. } => {
                Some(format!("unset `{ISA_VARIABLE}`, or name one that this processor has"))
            }
            _ => None,
        }
    }
}
