//! What `finetune` takes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Accuracy;

/// A projection of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// `gate_proj`, `w1`
    Gate,
    /// `up_proj`, `w3`
    Up,
    /// `down_proj`, `w2`
    Down,
}

/// Which tokens train an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Route {
    /// Those that the router sends there
    Natural,
    /// All tokens of the data, with weight 1: no other expert takes part
    Forced,
    /// All tokens of the data, with the router's weights: where the router does not choose the expert, it takes the place of
    /// the last one chosen
    Always,
}

/// How a gradient becomes a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Optimiser {
    /// Adam with decoupled weight decay
    Adamw,
    /// Plain gradient descent
    Sgd,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Schedule {
    /// Half a cosine, to 0
    Cosine,
    /// A straight line, to 0
    Linear,
    /// Not at all
    Constant,
}

/// How the factors of an expert are laid out in an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Packing {
    /// One pair for each projection: vLLM, transformers 4, `PATH+ADAPTER`
    Modules,
    /// One pair for all experts of a layer (`target_parameters`): transformers 5
    Fused,
}

/// Layers `A..B`, the first one included, the last one not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers(pub usize, pub usize);

impl std::str::FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected `A..B`, for example `0..12`, found `{text}`");
        let (from, to) = text.split_once("..").ok_or_else(wrong)?;
        let number = |part: &str| part.trim().parse().map_err(|_| wrong());
        Ok(Self(number(from)?, number(to)?))
    }
}

/// A name and a file: `NAME=FILE`, or `FILE` alone for its own name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedFile(pub String, pub PathBuf);

impl std::str::FromStr for NamedFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((name, file)) = text.split_once('=')
            && !name.is_empty()
            && !name.contains('/')
        {
            return Ok(Self(name.to_owned(), file.into()));
        }
        let file = PathBuf::from(text);
        let stem = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self(stem.strip_prefix("eval_").unwrap_or(&stem).to_owned(), file))
    }
}

/// Arguments of `finetune`.
#[derive(Debug, Args)]
pub struct FinetuneArgs {
    /// Model folder: a MoE, or a dense model whose adapter is to become an expert
    pub path: String,
    /// The expert, by name or number (of a MoE; a dense model has none)
    #[arg(long, value_name = "NAME")]
    pub expert: Option<String>,
    /// Text: `.jsonl` or `.parquet` with `text`, `messages`, or `prompt` and `completion` in each line or row; any other file
    /// is plain text
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// Learn what this model predicts on the data, not the data themselves: a folder, GGUF file or Hub name, also
    /// `+ADAPTER`, with the model's vocabulary
    #[arg(long, value_name = "SOURCE")]
    pub teacher: Option<String>,
    /// Folder to write: a PEFT adapter
    #[arg(long, value_name = "DIR", required_unless_present = "apply")]
    pub out: Option<PathBuf>,
    /// Merge what was learnt into the model: a new generation of its folder, the old one is kept
    #[arg(long, conflicts_with = "out")]
    pub apply: bool,
    /// Let it wait beside the model until `approve` makes it live
    #[arg(long, requires = "apply")]
    pub stage: bool,
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT", requires = "apply")]
    pub message: Option<String>,
    /// Layout of the adapter
    #[arg(long, value_enum, default_value_t = Packing::Modules)]
    pub packing: Packing,
    /// Rank of the factors
    #[arg(long, value_name = "R", default_value_t = 8)]
    pub rank: usize,
    /// Their product is scaled by ALPHA / R (twice the rank by default)
    #[arg(long, value_name = "ALPHA")]
    pub alpha: Option<f64>,
    /// Scale by ALPHA / √R instead
    #[arg(long)]
    pub rslora: bool,
    /// Share of what enters A that each batch leaves out, in training alone
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub dropout: f64,
    /// Train the projections themselves, not factors of low rank
    #[arg(long, conflicts_with_all = ["rank", "alpha", "rslora", "dropout", "out"])]
    pub full: bool,
    /// Projections to train
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Target::Gate, Target::Up, Target::Down])]
    pub targets: Vec<Target>,
    /// Layers to train, `A..B` (all by default)
    #[arg(long, value_name = "A..B")]
    pub layers: Option<Layers>,
    /// Which tokens train the expert
    #[arg(long, value_enum, default_value_t = Route::Natural)]
    pub route: Route,
    /// Train the expert's row of the router too, so that it draws the tokens of the data
    #[arg(long, conflicts_with = "out")]
    pub train_router: bool,
    /// Weight of the penalty on drawing tokens of other domains, on the prompts that the model was built with (or
    /// `--keep-data`) [default: 100]
    #[arg(long, value_name = "WEIGHT", requires = "train_router")]
    pub router_penalty: Option<f64>,
    /// Rounds through the data
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "steps")]
    pub epochs: u64,
    /// Steps, whatever the rounds
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Largest learning rate
    #[arg(long, alias = "lr", value_name = "RATE", default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// How it falls
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    pub schedule: Schedule,
    /// Steps in which it rises
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup: u64,
    /// How a gradient becomes a step
    #[arg(long, value_enum, default_value_t = Optimiser::Adamw)]
    pub optimiser: Optimiser,
    /// Share of each factor that a step at learning rate 1 takes away (AdamW)
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Longest gradient; 0 for any
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub clip: f64,
    /// Tokens of a batch at most; sequences are packed without padding
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub batch_tokens: usize,
    /// Batches of a step
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,
    /// Tokens of a sequence at most (512 by default, or the context if shorter)
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Text to look at while training (by default, a share of the data)
    #[arg(long, value_name = "FILE", conflicts_with = "hold_out")]
    pub validation: Option<PathBuf>,
    /// Share of the data that is held out
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    pub hold_out: f64,
    /// Steps between two looks at held-out text (a tenth of all by default)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub evaluate_every: u64,
    /// Looks without gain after which training stops; the best factors are kept in any case
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub patience: u64,
    /// How activations and gradients enter products with 16-bit weights
    #[arg(long, value_enum, default_value_t = Accuracy::Fast)]
    pub accuracy: Accuracy,
    /// Pull towards what the model said before, on the prompts that it was built with and on what its experts write: holds
    /// the other domains where they are; less of it learns more, 0 is fastest [default: 30 for an expert]
    #[arg(long, value_name = "WEIGHT")]
    pub keep: Option<f64>,
    /// Tokens that each expert writes for `--keep`
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub keep_text: usize,
    /// Text on which the model is to stay as it was, instead
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub keep_data: Vec<PathBuf>,
    /// Domains to compare before and after: `NAME=FILE` (by default the prompts that the MoE was built with)
    #[arg(long = "eval", value_name = "NAME=FILE", num_args = 1..)]
    pub evaluation: Vec<NamedFile>,
    /// Tokens of each domain
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub eval_tokens: usize,
    /// File that keeps the state of the training (by default beside the adapter)
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Go on from the state that an earlier run has left
    #[arg(long)]
    pub resume: bool,
    /// File with one line of JSON for each step
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Picture of the losses
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}
