//! `completions SHELL` and `man`.

use clap::CommandFactory;

use crate::args::Cli;
use crate::exit::Outcome;
use crate::render::{self, Failure};

/// Prints a completion script.
pub fn script(shell: clap_complete::Shell) -> Result<Outcome, Failure> {
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "moe-merge", &mut bytes);
    render::out(&String::from_utf8_lossy(&bytes))?;
    Ok(Outcome::Done)
}

/// Prints the manual page, commands included.
pub fn manual() -> Result<Outcome, Failure> {
    let mut bytes = Vec::new();
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut bytes).map_err(Failure::Output)?;
    for command in command.get_subcommands().filter(|c| c.get_name() != "help") {
        let man = clap_mangen::Man::new(command.clone());
        man.render_synopsis_section(&mut bytes).map_err(Failure::Output)?;
        man.render_description_section(&mut bytes).map_err(Failure::Output)?;
        man.render_options_section(&mut bytes).map_err(Failure::Output)?;
    }
    render::out(&String::from_utf8_lossy(&bytes))?;
    Ok(Outcome::Done)
}
