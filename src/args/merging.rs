//! What can be typed after the commands that merge or take apart without a MoE recipe.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Layout;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FloatDtype {
    /// 32 bits
    #[value(alias = "f32")]
    Float32,
    /// 16 bits with the range of 32
    #[value(alias = "bf16")]
    Bfloat16,
    /// 16 bits, IEEE
    #[value(alias = "f16")]
    Float16,
}

/// How the factors of experts are laid out in an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterPacking {
    /// A pair for each matrix of an expert: vLLM, transformers 4, and this program
    Modules,
    /// A pair for all experts of a layer: transformers 5
    Fused,
}

/// Arguments of `extract-lora`.
#[derive(Debug, Args)]
pub struct ExtractLoraArgs {
    /// Model that the adapter will be put on
    pub base: String,
    /// Model that the two together come near to
    pub tuned: String,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Largest rank of the factors
    #[arg(long, visible_alias = "max-rank", value_name = "R", default_value = "32")]
    pub rank: std::num::NonZeroUsize,
    /// Leave out singular values at or below this
    #[arg(long, visible_alias = "sv-epsilon", value_name = "S", default_value_t = 0.0)]
    pub threshold: f64,
    /// Stop at the rank that keeps this share of a change's sum of squares, for example 0.9
    #[arg(long, value_name = "SHARE")]
    pub energy: Option<f64>,
    /// Only this expert of a MoE, by name or number; one of the two models may be dense, its MLPs then count as the expert
    #[arg(long, value_name = "N")]
    pub expert: Option<String>,
    /// Only modules that this regular expression finds; several times for more
    #[arg(long, visible_alias = "include-regex", value_name = "REGEX")]
    pub include: Vec<String>,
    /// No modules that this regular expression finds; several times for more
    #[arg(long, visible_alias = "exclude-regex", value_name = "REGEX")]
    pub exclude: Vec<String>,
    /// Factors for embedding and head too, which are stored whole without this
    #[arg(long)]
    pub embed_lora: bool,
    /// Leave out what has no factors (norms, routers, embeddings), which is stored whole without this
    #[arg(long)]
    pub skip_undecomposable: bool,
    /// Put singular values into A alone, not their square roots into both factors
    #[arg(long)]
    pub no_distribute_scale: bool,
    /// How experts are laid out
    #[arg(long, value_enum, default_value_t = AdapterPacking::Modules)]
    pub packing: AdapterPacking,
    /// How factors are stored
    #[arg(long, value_enum, default_value_t = FloatDtype::Float32)]
    pub dtype: FloatDtype,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `layershuffle`.
#[derive(Debug, Args)]
pub struct LayershuffleArgs {
    /// Models: folders, GGUF files or Hub names, with `+ADAPTER` if wanted
    #[arg(required = true, value_name = "MODEL")]
    pub models: Vec<String>,
    /// How often each model is drawn, one number for each, with commas between them (alike by default)
    #[arg(long, value_name = "W", value_delimiter = ',')]
    pub weights: Vec<f64>,
    /// Any layers in any order: of each model its weight times the first model's number of layers
    #[arg(long)]
    pub full_random: bool,
    /// Folder to write (without it, the recipe is printed)
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// How numbers are stored (as in the models by default)
    #[arg(long, value_enum)]
    pub dtype: Option<FloatDtype>,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `merge-tensors`.
#[derive(Debug, Args)]
pub struct MergeTensorsArgs {
    /// Recipe with `merge_method` and `models`
    pub recipe: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Leave out names that not all files have
    #[arg(short = 'i', long, conflicts_with = "union")]
    pub skip_missing: bool,
    /// Merge names that not all files have among those that have them
    #[arg(short = 'u', long)]
    pub union: bool,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `shrink`.
#[derive(Debug, Args)]
pub struct ShrinkArgs {
    /// Mixture-of-experts model: folder or Hub name
    pub path: String,
    /// Experts that are left in each layer
    #[arg(long, value_name = "N")]
    pub experts: usize,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Text that shows how much each expert is used (without it all count the same)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Then fit the routers anew, as `calibrate` does, to about so many tokens of text that each of the experts that are left
    /// writes itself: a second generation of the folder
    #[arg(
        long,
        value_name = "TOKENS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "5000",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub calibrate: Option<u32>,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}

/// How rows for tokens that a model does not have are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RowMethod {
    /// The sum of few shared rows that comes nearest to the donor's row (orthogonal matching pursuit), of own rows
    Omp,
    /// The mean of the rows of the pieces that the model's tokenizer cuts the token into
    Subword,
    /// The mean of all rows
    Mean,
    /// Zeros
    Zero,
}

/// Arguments of `tokensurgeon`.
#[derive(Debug, Args)]
pub struct TokensurgeonArgs {
    /// Model whose weights are kept
    pub model: String,
    /// Model whose vocabulary it gets
    pub donor: String,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How rows for tokens that the model does not have are made
    #[arg(long, visible_alias = "approximation-method", value_enum, default_value_t = RowMethod::Omp)]
    pub method: RowMethod,
    /// Rows in a sum, at most
    #[arg(short, long, value_name = "K", default_value_t = 64)]
    pub k: usize,
    /// Take `<0x41>` of one vocabulary for `A` of the other
    #[arg(long)]
    pub byte_match: bool,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `upcycle`.
#[derive(Debug, Args)]
pub struct UpcycleArgs {
    /// Dense model: folder, GGUF file or Hub name, with `+ADAPTER` if wanted
    pub path: String,
    /// Experts in each layer
    #[arg(long, value_name = "E")]
    pub experts: usize,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Experts that each token visits
    #[arg(long, value_name = "K", default_value_t = 2)]
    pub top_k: usize,
    /// Noise on each copy, as a share of the standard deviation of the matrix it is added to
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub noise: f64,
    /// Share of each copy's neurons that are drawn anew, for example 0.5
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub reinit: f64,
    /// Leave the first expert as it is
    #[arg(long)]
    pub keep_first: bool,
    /// Standard deviation of the routers' numbers (`initializer_range` of the model by default)
    #[arg(long, value_name = "S")]
    pub router_scale: Option<f64>,
    /// Family of the output (the first that fits by default)
    #[arg(long, value_name = "NAME")]
    pub architecture: Option<String>,
    /// How numbers are stored (as in the model by default)
    #[arg(long, value_enum)]
    pub dtype: Option<FloatDtype>,
    /// How the tensors of experts are laid out
    #[arg(long, value_enum, default_value_t = Layout::Hub)]
    pub layout: Layout,
    /// Seed of everything drawn
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}
