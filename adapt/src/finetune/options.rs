//! What a person asks for.

use std::ops::Range;
use std::path::PathBuf;

use moe_merge_checkpoint::Interrupt;
use moe_merge_kernels::Exec;
use moe_merge_model::expert_training::{Part, Route};
use moe_merge_model::spec::MoeMlp;
use moe_merge_model::{Placement, Spec};
use serde::{Deserialize, Serialize};

use super::adapter::Packing;
use super::error::FinetuneError;
use super::train::Training;

/// What is learnt beside each weight.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// A product of two factors, `scale B A`.
    LowRank {
        /// Rows of `A`.
        rank: usize,
        /// `scale` is `alpha / rank`.
        alpha: f64,
        /// `scale` is `alpha / √rank` (arXiv 2312.03732).
        rslora: bool,
    },
    /// Any update.
    Full,
}

impl Update {
    /// Factor on the product.
    pub fn scale(self) -> f32 {
        match self {
            Self::LowRank { rank, alpha, rslora: true } => (alpha / (rank as f64).sqrt()) as f32,
            Self::LowRank { rank, alpha, .. } => (alpha / rank as f64) as f32,
            Self::Full => 1.0,
        }
    }
}

/// Where the result goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A PEFT adapter.
    Adapter {
        /// Its folder.
        dir: PathBuf,
        /// Its layout.
        packing: Packing,
    },
    /// The model itself: its next generation.
    Apply {
        /// Why, for the journal.
        message: Option<String>,
    },
    /// The same, to wait beside the model until [`crate::approve`] makes it live.
    Stage {
        /// Why, for the journal.
        message: Option<String>,
    },
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct FinetuneOptions {
    /// Name or number of the expert; none for a dense model.
    pub expert: Option<String>,
    /// Files of text.
    pub data: Vec<PathBuf>,
    /// Text to look at while training; without it, a share of the data.
    pub validation: Option<PathBuf>,
    /// The share of documents that is held out where no file is named.
    pub hold_out: f64,
    /// Tokens of held-out text that are looked at, at most.
    pub validation_tokens: usize,
    /// Domains to compare before and after: names and files. Without them, the prompts that the MoE was built with.
    pub evaluation: Vec<(String, PathBuf)>,
    /// Tokens of each domain at most.
    pub evaluation_tokens: usize,
    /// What is learnt.
    pub update: Update,
    /// Beside which projections; with [`Part::Router`], the expert's row of the router is trained too.
    pub parts: Vec<Part>,
    /// In which layers; in all of them without it.
    pub layers: Option<Range<usize>>,
    /// Where the products of frozen weights run.
    pub placement: Placement,
    /// Whether a model that has no room there runs on the processor.
    pub fall_back: bool,
    /// Which tokens visit the expert in training.
    pub route: Route,
    /// The model whose predictions are learnt on the data; without one, the tokens of the data themselves.
    pub teacher: Option<String>,
    /// Tokens of a sequence at most; 512 or the context, if that is shorter.
    pub window: Option<usize>,
    /// How activations and gradients enter products with 16-bit weights in training.
    pub exec: Exec,
    /// Weight of what pulls the model back, on text of the domains it knows, to what it said before; 0: nothing does.
    /// Without a number 30 for an expert whose model has such text, else 0.
    pub keep: Option<f64>,
    /// That text; without it, the prompts that the MoE was built with, and what its experts write themselves.
    pub keep_data: Vec<PathBuf>,
    /// Tokens that each expert writes for it, about.
    pub keep_text: usize,
    /// Weight of what keeps a trained row of a router from drawing tokens of other domains
    /// ([`moe_merge_model::expert_training::Drawn::add`]); 0: nothing does.
    pub router_penalty: f64,
    /// How it is learnt.
    pub training: Training,
    /// Where the state is kept; without it beside the adapter.
    pub state: Option<PathBuf>,
    /// Whether to go on from a state that is there.
    pub resume: bool,
    /// One line of JSON for each step.
    pub log: Option<PathBuf>,
    /// Picture of the losses.
    pub plot: Option<PathBuf>,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

impl Default for FinetuneOptions {
    fn default() -> Self {
        Self {
            expert: None,
            data: Vec::new(),
            validation: None,
            hold_out: 0.05,
            validation_tokens: 16_384,
            evaluation: Vec::new(),
            evaluation_tokens: 4096,
            update: Update::LowRank { rank: 8, alpha: 16.0, rslora: false },
            parts: Part::ALL.into(),
            layers: None,
            placement: Placement::cpu(),
            fall_back: false,
            route: Route::Natural,
            teacher: None,
            window: None,
            exec: Exec::fast(),
            keep: None,
            keep_data: Vec::new(),
            keep_text: 10_000,
            router_penalty: 100.0,
            training: Training::default(),
            state: None,
            resume: false,
            log: None,
            plot: None,
            interrupt: Interrupt::default(),
        }
    }
}

/// What holds the other domains of a MoE where they are, where nothing else is said: on the tiny models of the reference data
/// it is the least under which they move by less than a percent while an expert learns what no model has seen.
pub(super) const KEEP: f64 = 30.0;

/// Tokens of a sequence where nothing else is said.
const WINDOW: usize = 512;

impl FinetuneOptions {
    /// Whether every number is within its range.
    pub(super) fn check(&self) -> Result<(), FinetuneError> {
        let t = &self.training;
        let finite = |v: f64| v.is_finite() && v >= 0.0;
        let low_rank = self.update != Update::Full;
        let keep = self.keep.unwrap_or(KEEP);
        let checks: [(&'static str, bool, &str, String); 13] = [
            ("--data", !self.data.is_empty(), "at least one file", "none".into()),
            ("--targets", !self.parts.is_empty(), "one of gate, up, down", "none".into()),
            (
                "--learning-rate",
                finite(t.learning_rate) && t.learning_rate > 0.0,
                "more than 0",
                t.learning_rate.to_string(),
            ),
            ("--dropout", (0.0..1.0).contains(&t.dropout), "0 to below 1", t.dropout.to_string()),
            (
                "--dropout",
                t.dropout == 0.0 || low_rank,
                "factors of low rank to train: no `--full`",
                t.dropout.to_string(),
            ),
            ("--keep", finite(keep), "0 or more", keep.to_string()),
            (
                "--router-penalty",
                finite(self.router_penalty),
                "0 or more",
                self.router_penalty.to_string(),
            ),
            ("--clip", finite(t.clip), "0 or more", t.clip.to_string()),
            ("--batch-tokens", t.batch_tokens > 1, "at least 2", t.batch_tokens.to_string()),
            ("--accumulate", t.accumulate > 0, "at least 1", t.accumulate.to_string()),
            (
                "--epochs",
                t.steps.unwrap_or(t.epochs) > 0,
                "at least 1 step",
                t.steps.unwrap_or(t.epochs).to_string(),
            ),
            (
                "--hold-out",
                (0.0..=0.5).contains(&self.hold_out),
                "0 to 0.5",
                self.hold_out.to_string(),
            ),
            (
                "--eval-tokens",
                self.evaluation_tokens > 1 && self.validation_tokens > 1,
                "at least 2",
                self.evaluation_tokens.min(self.validation_tokens).to_string(),
            ),
        ];
        for (name, fine, expected, found) in checks {
            if !fine {
                return Err(option(name, expected, found));
            }
        }
        if self.parts.contains(&Part::Router) && self.route != Route::Natural {
            let expected = "`--route natural`, where the router is asked";
            let found = format!("`--route {}`", self.route.name());
            return Err(option("--train-router", expected, found));
        }
        match self.update {
            Update::LowRank { rank, .. } if rank == 0 || rank > 4096 => {
                Err(option("--rank", "1 to 4096", rank.to_string()))
            }
            Update::LowRank { alpha, .. } if !alpha.is_finite() || alpha == 0.0 => {
                Err(option("--alpha", "a number other than 0", alpha.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// Tokens of a sequence.
    pub(super) fn window_of(&self, context: usize) -> Result<usize, FinetuneError> {
        let window = self.window.unwrap_or(WINDOW.min(context));
        if (2..=context).contains(&window) {
            return Ok(window);
        }
        let expected = format!("2 to {context}, what the model can see at once");
        Err(option("--window", &expected, window.to_string()))
    }

    /// Whether a router, where it is to learn, has anything to learn from: an expert that always has weight 1 gives it no
    /// gradient.
    pub(super) fn check_router(&self, spec: &Spec) -> Result<(), FinetuneError> {
        let learns = |m: &MoeMlp| m.router.top_k > 1 || !m.router.renormalise;
        if !self.parts.contains(&Part::Router) || spec.moe_layers().any(|(_, m)| learns(m)) {
            return Ok(());
        }
        let expected = "a MoE with at least two experts per token";
        Err(option("--train-router", expected, "one expert per token, with weight 1".into()))
    }

    /// The layers that may get factors.
    pub(super) fn layers_of(&self, spec: &Spec) -> Result<Range<usize>, FinetuneError> {
        let all = 0..spec.layers.len();
        match &self.layers {
            None => Ok(all),
            Some(some) if some.start < some.end && some.end <= all.end => Ok(some.clone()),
            Some(some) => {
                let expected = format!("A..B with 0 <= A < B <= {}", all.end);
                Err(option("--layers", &expected, format!("{}..{}", some.start, some.end)))
            }
        }
    }
}

fn option(name: &'static str, expected: &str, found: String) -> FinetuneError {
    FinetuneError::Option { name, expected: expected.into(), found, hint: None }
}
