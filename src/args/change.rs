//! Arguments of the commands that change a model on disk.

use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Which rows of the routers are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rows {
    /// Those of the expert that changes
    New,
    /// All of them
    All,
}

/// What an expert that comes is fitted to.
#[derive(Debug, Args)]
pub struct FitArgs {
    /// Round weights of another dtype to the model's
    #[arg(long)]
    pub convert: bool,
    /// A name for the expert (by default that of the one it replaces, or of its source)
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Fit the routers to text again: the changed expert's rows, or all of them; the text is that of `--prompts`, and of
    /// the recipe in the folder for experts without text there
    #[arg(long, value_enum, value_name = "ROWS", num_args = 0..=1, default_missing_value = "new")]
    pub calibrate: Option<Rows>,
}

/// How a change is measured, and whether it is made.
#[derive(Debug, Args)]
pub struct HowArgs {
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Text of the experts, as `calibrate` takes it, not that of the recipe in the folder: to measure the effect of the
    /// change on, and for `--calibrate`
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Do not measure the effect on text
    #[arg(long)]
    pub no_forecast: bool,
    /// Let the change wait beside the model until it is approved
    #[arg(long, conflicts_with = "dry_run")]
    pub stage: bool,
    /// Check everything, tell what would be done, write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `swap`.
#[derive(Debug, Args)]
pub struct SwapArgs {
    /// MoE folder, also one that another program wrote
    pub path: String,
    /// The expert that goes: a name or a number
    #[arg(long, value_name = "N|NAME")]
    pub expert: String,
    /// Where the new one comes from: a dense model (folder, GGUF file or Hub name, with `+ADAPTER` if wanted), or an
    /// expert of a MoE as `MOE#EXPERT`
    #[arg(long, value_name = "SOURCE")]
    pub with: String,
    /// Only in the layers A to B - 1
    #[arg(long, value_name = "A..B", value_parser = layers)]
    pub layers: Option<Range<usize>>,
    #[command(flatten)]
    pub fit: FitArgs,
    #[command(flatten)]
    pub how: HowArgs,
}

/// Arguments of `add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// MoE folder, also one that another program wrote
    pub path: String,
    /// Where the expert comes from: a dense model (folder, GGUF file or Hub name, with `+ADAPTER` if wanted), or an
    /// expert of a MoE as `MOE#EXPERT`
    #[arg(long, value_name = "SOURCE")]
    pub with: String,
    #[command(flatten)]
    pub fit: FitArgs,
    #[command(flatten)]
    pub how: HowArgs,
}

/// Arguments of `drop`.
#[derive(Debug, Args)]
pub struct DropArgs {
    /// MoE folder, also one that another program wrote
    pub path: String,
    /// The expert that goes: a name or a number
    #[arg(long, value_name = "N|NAME")]
    pub expert: String,
    #[command(flatten)]
    pub how: HowArgs,
}

/// Arguments of `extract`.
#[derive(Debug, Args)]
pub struct ExtractArgs {
    /// MoE folder
    pub path: String,
    /// The expert: a name or a number
    #[arg(long, value_name = "N|NAME")]
    pub expert: String,
    /// Folder to write (by default beside the model, with the expert's name behind its own)
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Replace the folder if it exists
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Model folder
    pub path: PathBuf,
    /// A generation
    #[arg(value_name = "A")]
    pub from: u32,
    /// The generation that it is compared with (by default the one that is live)
    #[arg(value_name = "B")]
    pub to: Option<u32>,
}

/// Arguments of `approve`.
#[derive(Debug, Args)]
pub struct ApproveArgs {
    /// Model folder
    pub path: PathBuf,
    /// The generation that the staged change would become (not needed if only one waits)
    #[arg(value_name = "GENERATION")]
    pub generation: Option<u32>,
    /// Take the staged change back
    #[arg(long)]
    pub reject: bool,
    /// Why, for the journal (by default what was said when it was staged)
    #[arg(short, long, value_name = "TEXT", conflicts_with = "reject")]
    pub message: Option<String>,
}

/// Arguments of `history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Model folder
    pub path: PathBuf,
    /// Forget the files of older generations, which cannot come back then
    #[arg(long)]
    pub prune: bool,
    /// With `--prune`: so many generations before the live one can still come back
    #[arg(long, value_name = "N", default_value_t = 0, requires = "prune")]
    pub keep: usize,
}

/// Arguments of `rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Model folder
    pub path: PathBuf,
    /// The generation to go back to (by default, the last change is taken back)
    #[arg(long, value_name = "GENERATION")]
    pub to: Option<u32>,
    /// Why, for the journal
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
}

/// `A..B`: layers A to B - 1.
pub fn layers(text: &str) -> Result<Range<usize>, String> {
    let wrong = || "expected `A..B` with A < B: the layers A to B - 1".to_owned();
    let (first, end) = text.split_once("..").ok_or_else(wrong)?;
    let number = |part: &str| part.parse::<usize>().map_err(|_| wrong());
    let range = number(first)?..number(end)?;
    if range.is_empty() { Err(wrong()) } else { Ok(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_half_open() {
        assert_eq!(layers("0..4"), Ok(0..4));
        for wrong in ["", "3", "4..4", "5..3", "a..b", "-1..2", "1..", "..3", "1..=3"] {
            assert!(layers(wrong).is_err(), "{wrong}");
        }
    }
}
