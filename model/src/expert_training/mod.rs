//! Loss and gradients for low-rank factors beside the MLPs of one expert, or of a dense model; everything else is frozen.
//!
//! A batch is sequences of any length, one after the other in one matrix: nothing is padded, and no sequence sees another.
//! The activations of as many layers as fit into half a gigabyte are kept for the walk back; of the others only the input and
//! what the routed experts gave, and they are computed again (gradient checkpointing). The walk ends at the first layer that
//! has factors. Logits exist for some hundred tokens at a time. Memory: those activations, two streams of one batch for each
//! other layer, and the activations of one layer.
//!
//! ```no_run
//! use moe_merge_checkpoint::Source;
//! use moe_merge_model::expert_training::*;
//!
//! let source = Source::open(&"models/moe".parse()?, ".".as_ref())?;
//! let trainee = Trainee::open(&source, Some(2), Route::Natural)?;
//! let plan = FactorPlan { kind: FactorKind::LowRank(8), scale: 2.0, parts: Part::ALL.into(), layers: 0..6, seed: 0 };
//! let factors = trainee.factors(&plan);
//! let lesson = Lesson { tokens: vec![1, 5, 7], scored: vec![false, true, true] };
//! let found = trainee.gradient(&factors, &[&lesson], &Goal::NextToken, 0.5, &mut || false)?;
//! println!("{} nats over {} tokens", found.nats, found.scored);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

pub use moe_merge_kernels::Dropout;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;

mod damping;
mod drawn;
mod factors;
pub mod optimise;
#[cfg(test)]
mod tests;
mod trainee;

pub use damping::Damping;
pub use drawn::Drawn;
pub use trainee::{Goal, Trainee};

/// A projection of a gated MLP, or the row of its router that is one expert's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// `[inter, hidden]`, through the activation.
    Gate,
    /// `[inter, hidden]`.
    Up,
    /// `[hidden, inter]`.
    Down,
    /// The expert's row of the router, `[1, hidden]`: how much it draws tokens.
    Router,
}

impl Part {
    /// The projections.
    pub const ALL: [Part; 3] = [Part::Gate, Part::Up, Part::Down];

    /// Its name: `gate`, `up`, `down`, `router`.
    pub fn name(self) -> &'static str {
        ["gate", "up", "down", "router"][self as usize]
    }
}

/// Which tokens visit the expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// Those that the router sends there, with the router's weights.
    Natural,
    /// All, and no other expert, with the weight of a router that is certain.
    Forced,
    /// All, among the experts that the router chooses, with the router's weights: where it is not chosen by itself, it takes
    /// the place of the last one. What the model would compute if its routers sent every token there.
    Always,
}

impl Route {
    /// Its name: `natural`, `forced`, `always`.
    pub fn name(self) -> &'static str {
        ["natural", "forced", "always"][self as usize]
    }
}

/// Factors beside one weight `[output, input]`: `w + scale b a`.
#[derive(Debug, Clone, PartialEq)]
pub struct FactorPair {
    /// Rows of `a`, columns of `b`.
    pub rank: usize,
    /// Columns of the weight.
    pub input: usize,
    /// Rows of the weight.
    pub output: usize,
    /// `[rank, input]`.
    pub a: Vec<f32>,
    /// `[output, rank]`.
    pub b: Vec<f32>,
    /// Which of the two are trained.
    pub trained: TrainedFactors,
}

/// Which factors of a pair are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainedFactors {
    /// Both: a low-rank update.
    Both,
    /// `a`; `b` is the identity (of a router: a number that sets how fast it learns), and `a` any update.
    A,
    /// `b`; `a` is the identity, and `b` any update.
    B,
}

/// Factors beside some projections of some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// Factor on each product; `alpha / rank`.
    pub scale: f32,
    /// By layer and projection.
    pub pairs: BTreeMap<(usize, Part), FactorPair>,
    /// What the next passes leave out of the inputs of `a`, the same in each of them; none outside of training. Every layer
    /// and projection has a key of its own, made from this one.
    pub dropout: Option<Dropout>,
}

/// Gradients of the factors, `[a, b]`; empty for one that is not trained.
pub type FactorGradients = BTreeMap<(usize, Part), [Vec<f32>; 2]>;

/// What kind of update factors make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactorKind {
    /// Of this rank.
    LowRank(usize),
    /// Any update: one factor is the identity, and stays so.
    Full,
}

/// Which factors to make.
#[derive(Debug, Clone, PartialEq)]
pub struct FactorPlan {
    /// Their kind.
    pub kind: FactorKind,
    /// See [`Factors::scale`].
    pub scale: f32,
    /// Beside which projections.
    pub parts: Vec<Part>,
    /// In which layers.
    pub layers: Range<usize>,
    /// Seed of the first values of `a`.
    pub seed: u64,
}

/// A sequence to learn from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lesson {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether the prediction of each token counts; that of the first one never does.
    pub scored: Vec<bool>,
}

impl Lesson {
    /// Tokens whose prediction counts.
    pub fn scored(&self) -> usize {
        self.places().count()
    }

    /// Places of the tokens whose prediction counts.
    fn places(&self) -> impl Iterator<Item = usize> {
        let scored = self.scored.iter().take(self.tokens.len()).enumerate();
        scored.skip(1).filter(|(_, s)| **s).map(|(at, _)| at)
    }
}

/// Loss of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchLoss {
    /// Losses of the tokens that count, in the order of the lessons, in nats.
    pub nats: Vec<f64>,
    /// For each MoE layer: tokens that visited the expert.
    pub visits: BTreeMap<usize, usize>,
    /// Tokens of the batch.
    pub tokens: usize,
}

/// Loss of a batch and its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchGradient {
    /// Sum of the losses of the tokens that count, in nats.
    pub nats: f64,
    /// Tokens that count.
    pub scored: usize,
    /// Of the weighted sum.
    pub factors: FactorGradients,
    /// For each MoE layer with factors: tokens that visited the expert.
    pub visits: BTreeMap<usize, usize>,
    /// Tokens of the batch.
    pub tokens: usize,
}

/// Why there is no gradient.
#[derive(Debug, thiserror::Error)]
pub enum GradientError {
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A number that has to be finite is not.
    #[error("{what} is not finite")]
    NotFinite {
        /// Which one.
        what: String,
    },
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<candle_core::Error> for GradientError {
    fn from(error: candle_core::Error) -> Self {
        Self::Model(error.into())
    }
}
