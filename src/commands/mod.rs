//! One file for each command.

mod build;
mod calibrate;
mod completions;
mod generate;
mod inspect;
mod logits;
mod perplexity;
mod verify;

use moe_merge_checkpoint::Source;

use crate::args::{Command, Common};
use crate::exit::Outcome;
use crate::render::{self, Failure};

pub use build::run as build;

/// Runs a command.
///
/// # Errors
/// What it met, to be shown to the user.
pub fn run(command: &Command, common: &Common) -> Result<Outcome, Failure> {
    match command {
        Command::Inspect(args) => inspect::run(args, common),
        Command::Verify(args) => verify::run(args, common),
        Command::Logits(args) => logits::run(args, common),
        Command::Perplexity(args) => perplexity::run(args, common),
        Command::Generate(args) => generate::run(args, common),
        Command::Calibrate(args) => calibrate::run(args, common),
        Command::Completions { shell } => completions::script(*shell),
        Command::Man => completions::manual(),
    }
}

/// Opens the model that was named on the command line, and tells what should be known about it.
fn open(path: &str, common: &Common) -> Result<Source, Failure> {
    let source = Source::open(&path.parse()?, std::path::Path::new("."))?;
    if !common.quiet && !common.json {
        source.notes.iter().for_each(|n| render::note(n));
    }
    Ok(source)
}
