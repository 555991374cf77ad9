//! What can be typed after the commands that look at routers, make them anew, or fit experts to them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Arguments of `route`.
#[derive(Debug, Args)]
pub struct RouteArgs {
    /// Mixture-of-experts model: folder or Hub name
    pub path: String,
    /// Text files, in UTF-8
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "prompt")]
    pub text: Vec<PathBuf>,
    /// Texts, here on the command line
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    pub prompt: Vec<String>,
    /// The expert that each text belongs to, files before prompts: names or numbers, `-` for none (without this, an
    /// expert's name in the name of a file)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// Picture to write
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Page to write: all figures, and the layers of each token on hover
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Tokens the model sees at once, the beginning-of-text token included (512 by default, or the context if shorter)
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Most tokens of each text to draw (600 in pictures, 120 in the terminal); figures are over all
    #[arg(long, value_name = "N")]
    pub show: Option<usize>,
    /// With `--json`, list every token with its experts and weights
    #[arg(long, requires = "json")]
    pub tokens: bool,
}

/// Arguments of `evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// MoE recipe with `evaluation:` text
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Ways to make routers, each a `gate_mode` of recipes (all by default)
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub estimators: Vec<String>,
    /// Experts of the MoE, by name: `a,b,c`; once for each MoE (all of the recipe by default)
    #[arg(long, value_name = "NAMES")]
    pub experts: Vec<String>,
    /// Experts that each token visits, one MoE for each number (as in the recipe by default)
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub top_k: Vec<usize>,
    /// Prompts of each expert, the first so many, one MoE for each number (all of the recipe by default)
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub prompts: Vec<usize>,
    /// Add `auto` with so many tokens that each expert writes itself
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub self_text: Option<u32>,
    /// Add `auto` without any prompt, from what the experts write themselves
    #[arg(long)]
    pub no_prompts: bool,
    /// Add `auto` with the base as one more expert
    #[arg(long)]
    pub generalist: bool,
    /// Show what is recovered by position in the window
    #[arg(long)]
    pub positions: bool,
    /// Tokens that a model sees at once, the beginning-of-text token included (512 by default, or the context if shorter)
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Tokens of each text, from its beginning (all by default)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: Option<u32>,
}

/// What router training follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Objective {
    /// The predictions of the text's own expert
    Distil,
    /// The next token of the text
    NextToken,
}

/// Arguments of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// MoE folder, also one that another program wrote
    pub path: String,
    /// Text of all experts: `.jsonl` with `expert` and `text` in each line, `.json` as `{expert: [texts]}`, or a recipe
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// How the routers are made: a `gate_mode` of recipes
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub estimator: String,
    /// Tokens of text that each expert writes itself, beside the prompts or instead of them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub self_text: usize,
    /// Most tokens for each expert from the file (20 000 by default)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Option<u32>,
    /// Then train the routers for at most so many steps of 1024 tokens, everything else frozen; one text in six is held
    /// out, and training stops when that gains no more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// What training follows: the expert whose text it is (its predictions), or the text itself
    #[arg(long, value_enum, default_value_t = Objective::Distil, requires = "steps")]
    pub objective: Objective,
    /// Most that a step of training moves a typical router logit
    #[arg(long, value_name = "NATS", default_value_t = 1.0, requires = "steps")]
    pub learning_rate: f64,
    /// Weight of the load-balancing loss in training
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, requires = "steps")]
    pub load_balance: f64,
    /// Weight of the z-loss in training
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, requires = "steps")]
    pub z_loss: f64,
    /// File that keeps the state of the training: if it was stopped, the same command goes on from there
    #[arg(long, value_name = "FILE", requires = "steps")]
    pub state: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Change a copy in this folder, not the model itself
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Let the new routers wait beside the model until they are approved
    #[arg(long, conflicts_with_all = ["out", "dry_run"])]
    pub stage: bool,
    /// Check everything, tell what would be done, write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// How experts are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AlignMethod {
    /// Layer by layer
    Refit,
    /// That, then all layers of each expert together, with gradients
    Distil,
    /// `refit`, then all experts and their routers together, with gradients
    Joint,
}

/// Arguments of `align`.
#[derive(Debug, Args)]
pub struct AlignArgs {
    /// MoE folder, also one that another program wrote
    pub path: String,
    /// An expert, by name or number, and the dense model it comes from; once for each expert
    #[arg(long = "teacher", value_name = "EXPERT=SOURCE", required = true, value_parser = teacher)]
    pub teachers: Vec<(String, String)>,
    /// The model that all were trained from, to tell what share of each expert's gain survives
    #[arg(long, value_name = "SOURCE")]
    pub base: Option<String>,
    /// How experts are fitted
    #[arg(long, value_enum, default_value_t = AlignMethod::Refit)]
    pub method: AlignMethod,
    /// Tokens that each expert is fitted on: of `--data`, then of `--prompts`, then of what its teacher writes
    #[arg(long, value_name = "N", default_value_t = 16_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Text of an expert, as `prompts_file` of a recipe takes it; may be given several times
    #[arg(long, value_name = "EXPERT=FILE", value_parser = expert_file)]
    pub data: Vec<(String, PathBuf)>,
    /// Text of all experts, as `calibrate` takes it: labelled, or the recipe that the model was built with
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Teachers write no text of their own
    #[arg(long)]
    pub no_self_text: bool,
    /// Gradient steps of `distil` and `joint` at most
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// `distil` and `joint` train factors of this rank, not the matrices themselves
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub rank: Option<u32>,
    /// `distil` and `joint`: weight of the difference from the teacher's stream beside that from its predictions
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    pub stream: f64,
    /// Seed of everything random
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Change a copy in this folder, not the model itself
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Folder that keeps experts that are fitted and where training is: a run that was stopped goes on from there
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Let the fitted experts wait beside the model until they are approved
    #[arg(long, conflicts_with_all = ["out", "dry_run"])]
    pub stage: bool,
    /// Check everything, tell what would be done, write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `EXPERT=FILE`.
fn expert_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((expert, file)) if !expert.is_empty() && !file.is_empty() => {
            Ok((expert.to_owned(), file.into()))
        }
        _ => Err("expected EXPERT=FILE, for example `math=lessons.txt`".to_owned()),
    }
}

/// `EXPERT=SOURCE`.
fn teacher(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((expert, source)) if !expert.is_empty() && !source.is_empty() => {
            Ok((expert.to_owned(), source.to_owned()))
        }
        _ => Err("expected EXPERT=SOURCE, for example `math=models/math`".to_owned()),
    }
}
