//! How the program ends.

use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use moe_merge_checkpoint::{Interrupt, Kind};

/// How a command that met no error ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did what was asked.
    Done,
    /// A check said no; what it found has been printed.
    CheckFailed,
    /// The user stopped it; what was there by then has been printed.
    Interrupted,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => ExitCode::SUCCESS,
            Outcome::CheckFailed => code(Kind::CheckFailed),
            Outcome::Interrupted => code(Kind::Interrupted),
        }
    }
}

/// The exit code of a kind of error.
pub fn code(kind: Kind) -> ExitCode {
    ExitCode::from(number(kind))
}

const fn number(kind: Kind) -> u8 {
    match kind {
        Kind::CheckFailed => 1,
        Kind::Usage => 2,
        Kind::Input => 3,
        Kind::NoRoom => 4,
        Kind::Interrupted => 130,
    }
}

static INTERRUPT: OnceLock<Interrupt> = OnceLock::new();

/// Whether the running command looks at the interrupt by itself.
static WATCHED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C and a request to terminate end the program with code 130: at once, unless the command has taken
/// [`interrupt`] and ends by itself; a second one ends it in any case.
pub fn on_interrupt() {
    let handler = || {
        let interrupt = INTERRUPT.get_or_init(Interrupt::default);
        if WATCHED.load(Ordering::SeqCst) && interrupt.check().is_ok() {
            interrupt.trigger();
        } else {
            std::process::exit(number(Kind::Interrupted).into());
        }
    };
    // Where no handler can be set, the system's own way of ending the program remains.
    let _ = ctrlc::set_handler(handler);
}

/// The interrupt, for a command that looks at it and cleans up before it ends.
pub fn interrupt() -> &'static Interrupt {
    WATCHED.store(true, Ordering::SeqCst);
    INTERRUPT.get_or_init(Interrupt::default)
}
