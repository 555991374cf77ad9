//! Gate estimators and the reports that say how good they are. Numbers in, numbers out; no files, no model families.
//!
//! ```
//! use moe_merge_router::{Example, Options, Samples, Sign, estimators};
//! let (code, prose) = ([1.0, 0.0, 0.9, 0.1], [0.0, 1.0, 0.1, 0.9]); // [2 tokens, 2 features] each
//! let examples = vec![
//!     Example { expert: 0, sign: Sign::Positive, inputs: &code },
//!     Example { expert: 1, sign: Sign::Positive, inputs: &prose },
//! ];
//! let samples = Samples { experts: 2, hidden: 2, examples };
//! let fit = estimators::logistic::fit(&samples, &Options::default()).unwrap();
//! assert!(fit.gate.row(0)[0] > fit.gate.row(1)[0]);
//! ```

#![forbid(unsafe_code)]

mod best;
mod eigen;
mod error;
pub mod estimators;
mod features;
mod finish;
mod folds;
mod gate;
mod held_out;
mod lbfgs;
mod moments;
mod new_row;
mod objective;
pub mod refit;
mod registry;
pub mod report;
mod samples;
mod span;
mod symmetric;
pub mod traffic;

pub use best::best_of;
pub use error::{RouterError, UnknownEstimator};
pub use estimators::ExpertPrompts;
pub use gate::Gate;
pub use held_out::HeldOut;
pub use new_row::{RowSamples, fit_row};
pub use registry::{ESTIMATORS, Estimator, Method, find};
pub use samples::{Example, Fit, Options, Samples, Sign, Warning};
