//! Changes to a mixture-of-experts model on disk, each a generation of its folder that can be taken back.
//!
//! ```no_run
//! use moe_merge_adapt::{SwapRequest, rollback, swap};
//! let report = swap(&SwapRequest::new("merged/moe", "rust", "models/better-rust"))?;
//! println!("generation {:?}, {} bytes", report.change.generation, report.change.bytes_written);
//! rollback("merged/moe".as_ref(), None, Some("it was not better"), &Default::default())?;
//! # Ok::<(), moe_merge_adapt::AdaptError>(())
//! ```

#![forbid(unsafe_code)]

mod calibrate;
mod compatibility;
mod diff;
mod donor;
mod edit;
mod effect;
mod error;
mod extract;
pub mod finetune;
mod history;
mod mlp;
mod moe;
mod proposal;
mod report;
mod structure;
mod swap;

pub use calibrate::{Recalibration, Rows};
pub use compatibility::Compatibility;
pub use diff::{ConfigChange, Diff, Group, TensorChange, diff};
pub use donor::Donor;
pub use edit::{AddRequest, DropRequest, Edit, EditReport};
pub use effect::{DomainEffect, Effect, Text, Watched};
pub use error::AdaptError;
pub use extract::{ExtractReport, ExtractRequest, default_output, extract};
pub use history::{Entry, History, RollbackReport, Waiting, history, prune, rollback};
pub use moe::Moe;
pub use proposal::{
    ApproveRequest, Proposal, ProposalReport, approve, discard, proposals, propose,
};
pub use report::{ChangeReport, Forecast, Seconds};
pub use swap::{Convert, Swap, SwapReport, SwapRequest, swap};
