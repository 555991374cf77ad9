//! The flags of `mergekit-moe` and `mergekit-yaml`, so that a command line of theirs works with the name of this program.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

/// What a flag of mergekit does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// The seed, in place of the recipe's.
    Seed,
    /// The largest shard.
    ShardSize,
    /// Nothing, for this reason, which is shown.
    None(&'static str),
    /// Nothing: it asks for what is done in any case.
    AsAlways,
}

/// A flag of mergekit.
#[derive(Debug, PartialEq, Eq)]
struct Flag {
    name: &'static str,
    /// How its value is called, if it has one.
    value: Option<&'static str>,
    effect: Effect,
}

const fn flag(name: &'static str, effect: Effect) -> Flag {
    Flag { name, value: None, effect }
}

const fn valued(name: &'static str, value: &'static str, effect: Effect) -> Flag {
    Flag { name, value: Some(value), effect }
}

const ON_GPU: Effect =
    Effect::None("weights are merged on the processor; models run on a device if there is one");
const OFFLINE: Effect = Effect::None(
    "models are folders, files, or in the local Hub cache, which `HF_HUB_CACHE` moves",
);
const PRECISE: Effect = Effect::None("weights are read as they are, a layer at a time");
const UNUSED_LORA: Effect =
    Effect::None("adapters are applied while weights are read, in f32, and rounded once");
const CRIMES: Effect = Effect::None("models that do not fit together are refused");
const VOCABULARY: Effect =
    Effect::None("a `tokenizer` block of the recipe makes one vocabulary of several");
const ALWAYS: Effect = Effect::None("it is always written");

/// Every flag of mergekit 0.1.5 beside those that have the same name and meaning here (`--device`, `--num-threads`,
/// `--quiet`, `-v`).
const FLAGS: &[Flag] = &[
    valued("random-seed", "SEED", Effect::Seed),
    valued("out-shard-size", "BYTES", Effect::ShardSize),
    flag("allow-crimes", CRIMES),
    flag("unsafe-truncate-embeddings", VOCABULARY),
    flag("trust-remote-code", Effect::None("no code of a model is ever run")),
    valued("transformers-cache", "DIR", OFFLINE),
    valued("lora-merge-cache", "DIR", UNUSED_LORA),
    valued("lora-merge-dtype", "DTYPE", UNUSED_LORA),
    flag("cuda", ON_GPU),
    flag("low-cpu-memory", ON_GPU),
    flag("read-to-gpu", ON_GPU),
    flag("multi-gpu", ON_GPU),
    flag("gpu-rich", ON_GPU),
    flag("load-in-4bit", PRECISE),
    flag("load-in-8bit", PRECISE),
    flag("lazy-unpickle", Effect::AsAlways),
    flag("async-write", Effect::AsAlways),
    valued("write-threads", "N", Effect::None("`--threads` bounds all threads")),
    flag("copy-tokenizer", Effect::AsAlways),
    flag("no-copy-tokenizer", ALWAYS),
    flag("clone-tensors", Effect::AsAlways),
    flag("write-model-card", Effect::AsAlways),
    flag("no-write-model-card", ALWAYS),
    flag("safe-serialization", Effect::AsAlways),
    flag("no-safe-serialization", Effect::None("only safetensors are written")),
    flag("no-allow-crimes", Effect::AsAlways),
    flag("no-unsafe-truncate-embeddings", Effect::AsAlways),
    flag("no-trust-remote-code", Effect::AsAlways),
    flag("no-cuda", Effect::AsAlways),
    flag("no-low-cpu-memory", Effect::AsAlways),
    flag("no-read-to-gpu", Effect::AsAlways),
    flag("no-multi-gpu", Effect::AsAlways),
    flag("no-lazy-unpickle", Effect::AsAlways),
    flag("no-async-write", Effect::AsAlways),
    flag("no-clone-tensors", Effect::AsAlways),
    flag("no-quiet", Effect::AsAlways),
    flag("i-understand-this-is-not-useful-without-training", Effect::AsAlways),
];

/// What flags of mergekit on the command line ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MergekitArgs {
    /// Seed in place of the recipe's.
    pub seed: Option<u64>,
    /// Bytes of a shard's tensors, at most.
    pub shard_size: Option<u64>,
    /// For each flag without an effect, what a person should know.
    pub notes: Vec<String>,
}

/// `5B`, `500M`, `20k` or a plain number, as mergekit reads it.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 1_000),
        Some((at, 'm' | 'M')) => (&text[..at], 1_000_000),
        Some((at, 'b' | 'B')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(unit))
        .filter(|n| *n > 0)
        .ok_or_else(|| "a number of bytes above 0, with k, M or B behind it if wanted".into())
}

impl Args for MergekitArgs {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, flag| {
            let about: String = match flag.effect {
                Effect::Seed => "Seed, in place of the recipe's `seed`".into(),
                Effect::ShardSize => {
                    "Bytes of a file of weights at most: a number, or 500M, 5B [default: 5B]".into()
                }
                Effect::None(_) | Effect::AsAlways => String::new(),
            };
            let arg = Arg::new(flag.name).long(flag.name).hide(about.is_empty()).help(about);
            let arg = match (flag.value, flag.effect) {
                (None, _) => arg.action(ArgAction::SetTrue),
                (Some(value), Effect::Seed) => {
                    arg.value_name(value).value_parser(clap::value_parser!(u64))
                }
                (Some(value), Effect::ShardSize) => arg.value_name(value).value_parser(size),
                (Some(value), _) => arg.value_name(value),
            };
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for MergekitArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for flag in FLAGS {
            if matches.value_source(flag.name) != Some(ValueSource::CommandLine) {
                continue;
            }
            match flag.effect {
                Effect::Seed => self.seed = matches.get_one(flag.name).copied(),
                Effect::ShardSize => self.shard_size = matches.get_one(flag.name).copied(),
                Effect::None(why) => {
                    self.notes.push(format!("`--{}` has no effect: {why}", flag.name));
                }
                Effect::AsAlways => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn parse(line: &str) -> Result<MergekitArgs, Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.mergekit)
    }

    #[test]
    fn every_flag_is_taken_before_and_behind_the_recipe() {
        for flag in FLAGS {
            let value = match flag.value {
                Some("BYTES") => " 2B",
                Some("SEED" | "N") => " 7",
                Some(_) => " x",
                None => "",
            };
            for line in [
                format!("moe-merge --{}{value} a.yaml out", flag.name),
                format!("moe-merge a.yaml out --{}{value}", flag.name),
            ] {
                let found = parse(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
                match flag.effect {
                    Effect::Seed => assert_eq!(found.seed, Some(7)),
                    Effect::ShardSize => assert_eq!(found.shard_size, Some(2_000_000_000)),
                    Effect::None(_) => assert!(found.notes[0].contains(flag.name), "{found:?}"),
                    Effect::AsAlways => assert_eq!(found, MergekitArgs::default()),
                }
            }
        }
        assert_eq!(parse("moe-merge a.yaml").unwrap(), MergekitArgs::default());
    }

    #[test]
    fn sizes_are_read_as_mergekit_reads_them() {
        assert_eq!(size("5B"), Ok(5_000_000_000));
        assert_eq!(size("20k"), Ok(20_000));
        assert_eq!(size("3M"), Ok(3_000_000));
        assert_eq!(size("77"), Ok(77));
        for wrong in ["", "B", "5GB", "-1", "0", "1.5B", "99999999999999B", "5é"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
