//! What a kernel refuses.

use crate::exec::Isa;

/// A kernel was called with sizes or values that it cannot work on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A slice does not have the length that the sizes ask for.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Length that the sizes ask for, in elements (bytes for byte slices).
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// top-k is zero or larger than the number of experts.
    #[error("top_k is {top_k}, but there are {experts} experts")]
    TopK {
        /// Experts per token asked for.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// A router logit is NaN or infinite.
    #[error("router logit of token {token}, expert {expert} is not finite")]
    NotFinite {
        /// Row of the logits.
        token: usize,
        /// Column of the logits.
        expert: usize,
    },
    /// An iteration did not end: its numbers are not finite.
    #[error("{what} cannot be found: the numbers are not finite")]
    Diverged {
        /// What was looked for.
        what: &'static str,
    },
    /// An instruction set that does not exist, or that this processor does not have.
    #[error(
        "instruction set `{name}` {}; this processor has {}",
        if *.known { "is not one of this processor" } else { "does not exist" },
        .usable.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
    )]
    Isa {
        /// The name asked for.
        name: String,
        /// Whether there is one of this name.
        known: bool,
        /// Those that this processor has.
        usable: Vec<Isa>,
    },
}

impl KernelError {
    /// Compares a length with what the sizes ask for.
    pub(crate) fn check(
        what: &'static str,
        expected: usize,
        found: usize,
    ) -> Result<(), KernelError> {
        if expected == found { Ok(()) } else { Err(KernelError::Length { what, expected, found }) }
    }
}
