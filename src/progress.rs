//! A progress bar on stderr; silent when piped or told to be quiet.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes read or written.
    Bytes,
    /// Tokens.
    Tokens,
    /// Layers of a model.
    Layers,
    /// Steps of a training.
    Steps,
    /// Numbers in tensors.
    Numbers,
}

/// A bar that shows what is done, what there is, and the time left.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar of `total` units; hidden if `quiet` or stderr is no terminal.
    pub fn new(total: u64, unit: Unit, quiet: bool) -> Self {
        let visible = !quiet && std::io::stderr().is_terminal();
        let target =
            if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let counts = match unit {
            Unit::Bytes => "{decimal_bytes}/{decimal_total_bytes}",
            Unit::Tokens => "{pos}/{len} tokens",
            Unit::Layers => "{pos}/{len} layers",
            Unit::Steps => "{pos}/{len} steps",
            Unit::Numbers => "{human_pos}/{human_len} numbers",
        };
        let template = format!("{{bar:24}} {counts}  {{eta}} left  {{wide_msg}}");
        let style = ProgressStyle::with_template(&template);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar }
    }

    /// Says what is being worked on: a tensor, a file.
    pub fn doing(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// `units` more are done.
    pub fn advance(&self, units: u64) {
        self.bar.inc(units);
    }

    /// `done` of `total` units are done.
    pub fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
