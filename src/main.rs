//! The command line.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit;
mod picture;
mod progress;
mod render;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use moe_merge_kernels::{Isa, calm_candle};

use crate::args::Cli;

fn main() -> ExitCode {
    calm_candle();
    let cli = Cli::parse();
    exit::on_interrupt();
    log_to_stderr(cli.common.verbose);
    if let Err(error) = Isa::from_environment() {
        return render::failure(&error.into());
    }
    if let Some(threads) = cli.common.threads {
        // It fails only where a pool exists already, which nothing before this makes.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
    }
    run(&cli)
}

fn run(cli: &Cli) -> ExitCode {
    let outcome = match (&cli.command, &cli.build) {
        (Some(command), _) => commands::run(command, &cli.common),
        (None, Some(recipe)) => commands::build(recipe, &cli.mergekit, &cli.common),
        (None, None) => {
            let _ = Cli::command().print_help();
            return exit::code(moe_merge_checkpoint::Kind::Usage);
        }
    };
    match outcome {
        Ok(outcome) => outcome.into(),
        Err(failure) => render::failure(&failure),
    }
}

/// Shows what the libraries log: nothing by default, `RUST_LOG` overrides.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "off",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
