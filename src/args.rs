//! What can be typed.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use moe_merge_kernels::Exec;

mod change;
mod finetune;
mod merging;

pub use change::{
    AddArgs, ApproveArgs, DiffArgs, DropArgs, ExtractArgs, HistoryArgs, RollbackArgs, Rows,
    SwapArgs,
};
pub use finetune::{FinetuneArgs, Optimiser, Packing, Route, Schedule, Target};
pub use merging::*;

/// Merge fine-tuned checkpoints of one base into a mixture-of-experts model.
#[derive(Debug, Parser)]
#[command(name = "moe-merge", version, about, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(arg_required_else_help = true)]
#[command(
    after_help = "SOURCE and PATH: a folder, a `.gguf` file, or `org/name[@revision]` in the local Hub cache, \
any of them `+ADAPTER`.\nA recipe that is called like a command is written `./inspect`.\n\
Exit codes: 0 done, 1 a check said no, 2 wrong usage or recipe, 3 input unreadable or corrupt, 4 no room, 130 interrupted."
)]
pub struct Cli {
    /// What to build, when no command is named.
    #[command(flatten)]
    pub build: Option<BuildArgs>,
    /// Options of every command.
    #[command(flatten)]
    pub common: Common,
    /// The command, if one is named.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Print one JSON document, with a `version` field, on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Threads to use (one for each core by default)
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Where models run: the products of their weights on a CUDA device, if there is one, or on the processor
    #[arg(long, global = true, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// On a device: experts of the first N layers stay on the processor, for models that do not fit
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    pub cpu_experts: usize,
    /// No progress bar, no notes
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Tell more on stderr; twice for details
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
}

/// Where models run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// A CUDA device if one is found, else the processor
    Auto,
    /// The processor
    Cpu,
    /// A CUDA device
    Cuda,
}

/// The main job: builds what a recipe says.
#[derive(Debug, Clone, Args)]
pub struct BuildArgs {
    /// Recipe: what goes in and what comes out
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Folder to write, as `mergekit-moe` takes it
    #[arg(value_name = "OUT_PATH", conflicts_with = "out")]
    pub out_path: Option<PathBuf>,
    /// Folder to write (without it, `output:` of the recipe, else `merged/<recipe name>`)
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
    /// Start anew where a run that was killed has left the output unfinished, instead of going on from there
    #[arg(long)]
    pub no_resume: bool,
    /// Print the plan with its peak memory and disk; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How the tensors of experts are laid out
    #[arg(long, value_enum, default_value_t = Layout::Hub)]
    pub layout: Layout,
}

impl BuildArgs {
    /// The folder that was named, in either way.
    pub fn output(&self) -> Option<&PathBuf> {
        self.out.as_ref().or(self.out_path.as_ref())
    }
}

/// How the tensors of experts are laid out in an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// One tensor for each expert: what every program loads
    Hub,
    /// All experts in one tensor: the own layout of transformers 5
    Fused,
}

/// A command beside the main job.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what a model is made of: family, layout, experts, tensors, dtypes, bytes, provenance
    Inspect(PathArgs),
    /// Check that every tensor is there, has its shape, is finite, and that files are as the manifest says
    Verify(PathArgs),
    /// Write the logits and hidden states of given tokens, for parity checks
    Logits(LogitsArgs),
    /// Measure how well a model predicts texts
    Perplexity(PerplexityArgs),
    /// Continue a text, or answer a message
    Generate(GenerateArgs),
    /// Show which experts each token of a text visits, in every MoE layer
    Route(RouteArgs),
    /// Compare ways to make the routers of a recipe, with the perplexity of base, experts and oracle; writes nothing
    Evaluate(EvaluateArgs),
    /// Compute the routers of a MoE anew: a new generation of its folder, the old one is kept
    Calibrate(CalibrateArgs),
    /// Replace one expert of a MoE with another: a new generation of its folder, the old one is kept
    Swap(SwapArgs),
    /// Give a MoE one expert more: a new generation of its folder, the old one is kept
    Add(AddArgs),
    /// Take an expert out of a MoE: a new generation of its folder, the old one is kept
    Drop(DropArgs),
    /// Write an expert of a MoE as a dense model
    Extract(ExtractArgs),
    /// Make a staged change of a model live, if it keeps within the limits of the folder's settings
    Approve(ApproveArgs),
    /// List the generations of a model folder
    History(HistoryArgs),
    /// Show what differs between two generations of a model folder, and by how much
    Diff(DiffArgs),
    /// Go back to an earlier generation: a new one with its files, nothing is lost
    Rollback(RollbackArgs),
    /// Answer OpenAI's clients over HTTP, with the generation that is live when they ask
    Serve(ServeArgs),
    /// Train one expert of a MoE, or the MLPs of a dense model, on text: a PEFT adapter, or a new generation of the folder
    Finetune(Box<FinetuneArgs>),
    /// Fit experts of a MoE to the attention they have there, each with the dense model it comes from as teacher; a new
    /// generation, nothing else changes
    Align(AlignArgs),
    /// Write a model as one file for other programs: GGUF, for llama.cpp and Ollama
    Export(ExportArgs),
    /// Write the difference of two models as a LoRA adapter: the whole model, or one expert of a MoE
    ExtractLora(ExtractLoraArgs),
    /// Write a model whose layers are drawn by chance from several, or print it as a recipe
    Layershuffle(LayershuffleArgs),
    /// Merge files of tensors that are no models, by a dense recipe whose `model`s are `.safetensors` files
    MergeTensors(MergeTensorsArgs),
    /// Merge experts of a MoE with each other until so many are left in each layer
    Shrink(ShrinkArgs),
    /// Give a model the vocabulary of another one: rows of tokens it has stay, the others are made from them
    Tokensurgeon(TokensurgeonArgs),
    /// Write a dense model as a MoE of copies of itself, to be trained
    Upcycle(UpcycleArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

/// A model.
#[derive(Debug, Args)]
pub struct PathArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
}

/// Arguments of `logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// Token ids, with commas between them
    #[arg(long, value_name = "IDS", required = true, value_delimiter = ',')]
    pub tokens: Vec<u32>,
    /// File to write: `logits [tokens, vocab]` and `hidden_i [tokens, hidden]`, f32
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
    /// How exactly experts are chosen and weighted
    #[arg(long, value_enum, default_value_t = RouterPrecision::F32)]
    pub router_precision: RouterPrecision,
}

/// How exactly experts are chosen and weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RouterPrecision {
    /// In 32 bits
    F32,
    /// Rounded where transformers rounds when it runs the model in bf16: a token between two experts goes the same way
    LikeHf,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,
    /// Port to listen on; 0 for any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// What clients call the model (the last part of its path by default)
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Key that clients have to send, as `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY", env = "MOE_MERGE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Token for the admin routes (by default one is made up and shown on loopback, and there are no admin routes
    /// elsewhere)
    #[arg(long, value_name = "TOKEN", env = "MOE_MERGE_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// No admin routes, not on loopback either
    #[arg(long, conflicts_with = "token")]
    pub no_admin: bool,
    /// Serve the generation of now only, whatever comes to be on disk
    #[arg(long)]
    pub no_watch: bool,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_new_tokens: usize,
    /// Most tokens of a prompt (the context of the model by default)
    #[arg(long, value_name = "N")]
    pub max_prompt_tokens: Option<usize>,
    /// Answers that are written at the same time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: u16,
    /// Answers that may wait for their turn; more are refused with status 503
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue: usize,
    /// Memory for keys and values of answers under way, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub cache: usize,
    /// Seconds that an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// How activations enter products with 16-bit weights
    #[arg(long, value_enum, default_value_t = Accuracy::Fast)]
    pub accuracy: Accuracy,
    /// Experts that each token visits (by default as many as the model's configuration says)
    #[arg(long, value_name = "N")]
    pub experts_per_token: Option<usize>,
}

/// How the matrices of a GGUF file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GgufDtype {
    /// 32 bits
    F32,
    /// 16 bits, IEEE
    F16,
    /// 16 bits with the range of 32
    Bf16,
    /// 8.5 bits: blocks of 32 numbers with a scale
    #[value(name = "q8_0")]
    Q8_0,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub gguf: PathBuf,
    /// How matrices are stored (as they are in the model by default); vectors, norms and routers always in f32
    #[arg(long, value_enum)]
    pub dtype: Option<GgufDtype>,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
    /// llama.cpp's name for the way in which the tokenizer cuts words, where it is not found out
    #[arg(long, value_name = "NAME")]
    pub pre: Option<String>,
    /// Leave the tokenizer out: programs can then give and take token ids only
    #[arg(long, conflicts_with = "pre")]
    pub no_tokenizer: bool,
}

/// How activations enter products with 16-bit weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accuracy {
    /// As 32-bit numbers
    Exact,
    /// Rounded to bf16 with bf16 weights where the processor multiplies them at once
    Fast,
}

impl Accuracy {
    /// Products so.
    pub fn exec(self) -> Exec {
        match self {
            Self::Exact => Exec::default(),
            Self::Fast => Exec::fast(),
        }
    }
}

/// Arguments of `perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// Text files, in UTF-8
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Tokens the model sees at once, the beginning-of-text token included (512 by default, or the context if shorter)
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Text tokens from window to window (by default windows do not overlap)
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// How activations enter products with 16-bit weights
    #[arg(long, value_enum, default_value_t = Accuracy::Exact)]
    pub accuracy: Accuracy,
    /// Experts that each token visits (by default as many as the model's configuration says)
    #[arg(long, value_name = "N")]
    pub experts_per_token: Option<usize>,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// Text to continue; with `--chat`, the message to answer
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Most tokens to write
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Randomness; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Choose among the likeliest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among this many of the likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Seed of the random choices
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Apply the chat template of the model
    #[arg(long)]
    pub chat: bool,
    /// Go on after end-of-text tokens, for timing
    #[arg(long)]
    pub ignore_eos: bool,
    /// How activations enter products with 16-bit weights
    #[arg(long, value_enum, default_value_t = Accuracy::Fast)]
    pub accuracy: Accuracy,
    /// Experts that each token visits (by default as many as the model's configuration says)
    #[arg(long, value_name = "N")]
    pub experts_per_token: Option<usize>,
}

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
    /// That, then all layers together, with gradients
    Distil,
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
    /// Tokens that each teacher writes to fit its expert on
    #[arg(long, value_name = "N", default_value_t = 16_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Gradient steps of `distil`
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Seed of everything random
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Change a copy in this folder, not the model itself
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_recipe_needs_no_command_word() {
        let cli = parse("moe-merge a.yaml --out o --force --threads 2 -q --layout fused").unwrap();
        let build = cli.build.unwrap();
        assert_eq!(build.recipe, PathBuf::from("a.yaml"));
        assert_eq!(build.output(), Some(&PathBuf::from("o")));
        assert!(build.force && !build.dry_run && build.layout == Layout::Fused);
        assert!(cli.command.is_none() && cli.common.quiet && cli.common.threads == Some(2));
        let build = parse("moe-merge config.yml out/").unwrap().build.unwrap();
        assert_eq!(build.output(), Some(&PathBuf::from("out/")));
        assert!(parse("moe-merge config.yml out/ --out other").is_err());
    }

    #[test]
    fn a_recipe_called_like_a_command_still_works() {
        let build = parse("moe-merge ./inspect").unwrap().build.unwrap();
        assert_eq!(build.recipe, PathBuf::from("./inspect"));
        let cli = parse("moe-merge inspect models/base --json").unwrap();
        assert!(cli.build.is_none() && cli.common.json);
        assert!(
            matches!(cli.command, Some(Command::Inspect(PathArgs { path })) if path == "models/base")
        );
    }

    #[test]
    fn devices_are_found_unless_named() {
        let common = |line: &str| parse(line).unwrap().common;
        let found = common("moe-merge inspect m");
        assert_eq!((found.device, found.cpu_experts), (Device::Auto, 0));
        let found = common("moe-merge --device cuda inspect m --cpu-experts 3");
        assert_eq!((found.device, found.cpu_experts), (Device::Cuda, 3));
        assert!(parse("moe-merge inspect m --device gpu").is_err());
    }

    #[test]
    fn token_ids_are_numbers() {
        let cli = parse("moe-merge logits m --tokens 1,5,7 --out x.safetensors").unwrap();
        assert!(
            matches!(cli.command, Some(Command::Logits(LogitsArgs { tokens, .. })) if tokens == [1, 5, 7])
        );
        assert!(parse("moe-merge logits m --tokens 1,x --out x.safetensors").is_err());
        assert!(parse("moe-merge inspect m --threads 0").is_err());
    }
}
