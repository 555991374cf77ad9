//! What a person sees: errors, facts in aligned columns, numbers with units.

use std::io::{IsTerminal, Write};

use moe_merge_checkpoint::{CheckpointError, Explain};

use crate::exit;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// Something to explain to the user.
    Explained(Box<dyn Explain + Send + Sync>),
    /// Standard output cannot be written.
    Output(std::io::Error),
}

impl<E: Explain + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Explained(Box::new(error))
    }
}

/// Tells about a failure on stderr and gives the exit code. A reader that went away is no failure.
pub fn failure(failure: &Failure) -> std::process::ExitCode {
    match failure {
        Failure::Explained(error) => {
            let text = explain(error.as_ref(), Paint::for_stderr());
            // Nothing is left to be done when stderr itself is gone.
            let _ = std::io::stderr().write_all(text.as_bytes());
            exit::code(error.kind())
        }
        Failure::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
            std::process::ExitCode::SUCCESS
        }
        Failure::Output(e) => {
            let error = CheckpointError::io(
                "writing",
                std::path::Path::new("standard output"),
                std::io::Error::new(e.kind(), e.to_string()),
            );
            let _ = std::io::stderr().write_all(explain(&error, Paint::for_stderr()).as_bytes());
            exit::code(error.kind())
        }
    }
}

/// Whether text is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// With terminal colours.
    Colour,
    /// Plain.
    Plain,
}

impl Paint {
    /// Colours if stderr is a terminal and `NO_COLOR` is not set.
    pub fn for_stderr() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        if std::io::stderr().is_terminal() && !refused { Self::Colour } else { Self::Plain }
    }

    /// Colours if stdout is a terminal and `NO_COLOR` is not set.
    pub fn for_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        if std::io::stdout().is_terminal() && !refused { Self::Colour } else { Self::Plain }
    }

    fn label(self, text: &str, colour: u8) -> String {
        match self {
            Self::Colour => format!("\u{1b}[1;{colour}m{text}\u{1b}[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

const RED: u8 = 31;
const CYAN: u8 = 36;
const YELLOW: u8 = 33;

/// An error as text: `error:` and what went wrong, its fields aligned, then `hint:`.
pub fn explain(error: &dyn Explain, paint: Paint) -> String {
    let mut text = format!("{}: {error}\n", paint.label("error", RED));
    text += &aligned(&error.fields());
    if let Some(hint) = error.hint() {
        text += &format!("{}: {hint}\n", paint.label("hint", CYAN));
    }
    text
}

/// A warning or a note on stderr.
pub fn note(text: &str) {
    let label = Paint::for_stderr().label("note", YELLOW);
    let _ = writeln!(std::io::stderr(), "{label}: {text}");
}

/// Labels and values in two columns, indented by two; further lines of a value stand below its first.
pub fn aligned(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (label, value) in fields {
        let mut lines = value.lines();
        text += &format!("  {label:width$}  {}\n", lines.next().unwrap_or_default());
        for line in lines {
            text += &format!("  {:width$}  {line}\n", "");
        }
    }
    text
}

/// Bytes in the unit that a person reads: `2.4 MB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} bytes");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A count with a space between thousands: `1 224 192`.
pub fn count(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Writes text to stdout.
///
/// # Errors
/// [`Failure::Output`].
pub fn out(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes one JSON document to stdout.
///
/// # Errors
/// [`Failure::Output`].
pub fn json(document: &serde_json::Value) -> Result<(), Failure> {
    out(&format!("{document:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_as_the_style_guide_shows() {
        let error = CheckpointError::Shape {
            file: "bio/model.safetensors".into(),
            tensor: "model.norm.weight".into(),
            expected: "[8] (hidden_size)".into(),
            found: vec![9],
        };
        let text = "error: tensor has the wrong shape\n  file      bio/model.safetensors\n  tensor    model.norm.weight\n  expected  [8] (hidden_size)\n  found     [9]\n";
        assert_eq!(explain(&error, Paint::Plain), text);
        assert!(explain(&error, Paint::Colour).starts_with("\u{1b}[1;31merror\u{1b}[0m: tensor"));
        let error = CheckpointError::OutputExists { path: "out".into() };
        assert!(explain(&error, Paint::Plain).contains("\nhint: `--force` replaces it"));
    }

    #[test]
    fn numbers_have_units() {
        let cases = [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB")];
        for (n, text) in cases.into_iter().chain([(999_950, "1.0 MB"), (2_446_432, "2.4 MB")]) {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(
            (count(7), count(1234), count(1_224_192)),
            ("7".into(), "1 234".into(), "1 224 192".into())
        );
    }

    #[test]
    fn values_of_several_lines_stay_in_their_column() {
        let text = aligned(&[("a", "1\n2".into()), ("bcd", "3".into())]);
        assert_eq!(text, "  a    1\n       2\n  bcd  3\n");
    }
}
