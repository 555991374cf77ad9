//! What can be typed after the commands that run a model or hand it on.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moe_merge_kernels::Exec;

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
