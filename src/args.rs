//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod change;
mod finetune;
mod mergekit;
mod merging;
mod routing;
mod running;

pub use change::{
    AddArgs, ApproveArgs, DiffArgs, DropArgs, ExtractArgs, HistoryArgs, RollbackArgs, Rows,
    SwapArgs,
};
pub use finetune::{FinetuneArgs, Optimiser, Packing, Route, Schedule, Target};
pub use mergekit::MergekitArgs;
pub use merging::*;
pub use routing::*;
pub use running::*;

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
    /// What mergekit's flags ask of it.
    #[command(flatten)]
    pub mergekit: MergekitArgs,
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
    #[arg(short = 'j', long, visible_alias = "num-threads", global = true, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
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
