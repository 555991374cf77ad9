//! How byte-level tokenizers cut text into words before merging: `tokenizer.ggml.pre`.
//!
//! # Source
//! The published `tokenizer.json` of each model; the names are those of llama.cpp's `convert_hf_to_gguf.py`
//! (`get_vocab_base_pre`) and the grouping that of its `llama-vocab.cpp`.

use serde_json::{Value as Json, json};

/// One step of cutting.
enum Step {
    /// Each match stands alone.
    Split(&'static str),
    /// Each digit stands alone.
    Digits,
    /// The words of GPT-2.
    Words,
}

/// A way to cut text.
pub(super) struct Pre {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether text is brought to Unicode's composed form first.
    compose: bool,
    /// Whether a word that is a token as a whole is taken without merging.
    pub ignore_merges: bool,
    /// Whether texts begin with the BOS token when the file does not say.
    pub add_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Every way of cutting that is known, the plain one of GPT-2 first.
const PRES: &[Pre] = &[
    Pre {
        names: &["gpt-2", "phi-2", "default"],
        steps: &[Step::Words],
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["olmo"],
        steps: &[Step::Words],
        compose: true,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact"],
        steps: &[Step::Digits, Step::Words],
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        steps: &[Step::Split(LLAMA3)],
        compose: false,
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["dbrx", "smaug-bpe"],
        steps: &[Step::Split(LLAMA3)],
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        steps: &[Step::Split(QWEN2)],
        compose: true,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["tekken"],
        steps: &[Step::Split(TEKKEN)],
        compose: false,
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["deepseek-coder"],
        steps: &[
            Step::Split(r"[\r\n]"),
            Step::Split(r"\s?\p{L}+"),
            Step::Split(r"\s?\p{P}+"),
            Step::Split("[一-龥ࠀ-一가-퟿]+"),
            Step::Digits,
        ],
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["deepseek-v3"],
        steps: &[
            Step::Split(r"\p{N}{1,3}"),
            Step::Split("[一-龥぀-ゟ゠-ヿ]+"),
            Step::Split(DEEPSEEK3),
        ],
        compose: false,
        ignore_merges: false,
        add_bos: false,
    },
];

impl Pre {
    /// The way of cutting with this name.
    pub(super) fn from_name(name: &str) -> Option<&'static Self> {
        PRES.iter().find(|pre| pre.names.contains(&name))
    }

    /// All names, for messages.
    pub(super) fn known() -> String {
        PRES.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// `normalizer` of `tokenizer.json`.
    pub(super) fn normalizer(&self) -> Json {
        if self.compose { json!({ "type": "NFC" }) } else { Json::Null }
    }

    /// `pre_tokenizer` of `tokenizer.json`.
    pub(super) fn pre_tokenizer(&self) -> Json {
        let words = self.steps.iter().any(|s| matches!(s, Step::Words));
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words
        });
        let mut steps: Vec<Json> = self
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Split(regex) => Some(json!({
                    "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false
                })),
                Step::Digits => Some(json!({ "type": "Digits", "individual_digits": true })),
                Step::Words => None,
            })
            .collect();
        if steps.is_empty() {
            return bytes;
        }
        steps.push(bytes);
        json!({ "type": "Sequence", "pretokenizers": steps })
    }
}

/// What one step of a `pre_tokenizer` does, as `tokenizer.json` tells it.
#[derive(Debug, PartialEq)]
enum Seen<'j> {
    Split(&'j str),
    Digits,
    Words,
    /// Bytes as characters, nothing cut.
    Bytes,
}

/// A recognised way of cutting.
pub(super) struct Recognised {
    /// Its name in GGUF files.
    pub name: &'static str,
    /// What llama.cpp does otherwise, if anything.
    pub note: Option<String>,
}

/// The name of the way in which a byte-level `tokenizer.json` cuts words; `Err` with what it does if nobody has named it.
///
/// * `qwen2`: plain words of GPT-2 stand for those of Qwen2, as transformers reads checkpoints of that family
pub(super) fn recognise(tokenizer: &Json, qwen2: bool) -> Result<Recognised, String> {
    let pre_tokenizer = &tokenizer["pre_tokenizer"];
    let mut seen = Vec::new();
    if !flatten(pre_tokenizer, &mut seen) {
        return Err(shortened(&pre_tokenizer.to_string()));
    }
    if qwen2 && seen == [Seen::Words] {
        return Ok(Recognised { name: "qwen2", note: None });
    }
    let composes = tokenizer["normalizer"]["type"] == "NFC";
    let ignores = tokenizer["model"]["ignore_merges"] == true;
    let fits: Vec<&Pre> = PRES.iter().filter(|pre| pre.does(&seen)).collect();
    let same = |pre: &&&Pre| (pre.compose, pre.ignore_merges) == (composes, ignores);
    let best = fits.iter().find(same).or_else(|| fits.iter().find(|p| p.ignore_merges == ignores));
    match best.or(fits.first()) {
        Some(pre) => {
            let note = (pre.ignore_merges != ignores).then(|| {
                format!(
                    "llama.cpp's `{}` {} whole words without merging, this tokenizer {}",
                    pre.names[0],
                    if ignores { "does not take" } else { "takes" },
                    if ignores { "does" } else { "does not" }
                )
            });
            Ok(Recognised { name: pre.names[0], note })
        }
        None => Err(shortened(&pre_tokenizer.to_string())),
    }
}

/// The steps of a `pre_tokenizer`, one after the other; false if one of them is not known.
fn flatten<'j>(step: &'j Json, seen: &mut Vec<Seen<'j>>) -> bool {
    match step["type"].as_str() {
        Some("Sequence") => match step["pretokenizers"].as_array() {
            Some(steps) => steps.iter().all(|s| flatten(s, seen)),
            None => false,
        },
        Some("Split") if step["behavior"] == "Isolated" && step["invert"] != true => {
            let regex = step["pattern"]["Regex"].as_str();
            regex.map(|r| seen.push(Seen::Split(r))).is_some()
        }
        Some("Digits") if step["individual_digits"] == true => {
            seen.push(Seen::Digits);
            true
        }
        // Older files leave `use_regex` out; it is on by default.
        Some("ByteLevel") if step["add_prefix_space"] != true => {
            seen.push(if step["use_regex"] == false { Seen::Bytes } else { Seen::Words });
            true
        }
        _ => false,
    }
}

/// At most as much as fits in a message.
fn shortened(text: &str) -> String {
    const MOST: usize = 300;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

impl Pre {
    fn does(&self, seen: &[Seen]) -> bool {
        let mut own: Vec<Seen> = self
            .steps
            .iter()
            .map(|step| match step {
                Step::Split(regex) => Seen::Split(regex),
                Step::Digits => Seen::Digits,
                Step::Words => Seen::Words,
            })
            .collect();
        if !own.contains(&Seen::Words) {
            own.push(Seen::Bytes);
        }
        own == seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_plain_one_is_a_single_step() {
        let plain = Pre::from_name("gpt-2").unwrap().pre_tokenizer();
        assert_eq!(plain["type"], "ByteLevel");
        assert_eq!(plain["use_regex"], true);
        let smollm = Pre::from_name("smollm").unwrap().pre_tokenizer();
        assert_eq!(smollm["pretokenizers"][0]["type"], "Digits");
        assert_eq!(smollm["pretokenizers"][1]["use_regex"], true);
        let qwen = Pre::from_name("qwen2").unwrap().pre_tokenizer();
        assert_eq!(qwen["pretokenizers"][1]["use_regex"], false);
    }

    #[test]
    fn every_way_is_recognised_in_its_own_json() {
        for pre in PRES {
            let tokenizer = json!({
                "pre_tokenizer": pre.pre_tokenizer(), "normalizer": pre.normalizer(),
                "model": { "ignore_merges": pre.ignore_merges }
            });
            let found = recognise(&tokenizer, false).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((found.name, found.note), (pre.names[0], None));
        }
    }

    #[test]
    fn what_is_not_known_is_told() {
        for pre_tokenizer in [
            json!({ "type": "Split", "pattern": { "Regex": "[0-9]" }, "behavior": "Isolated", "invert": false }),
            json!({ "type": "ByteLevel", "add_prefix_space": true, "use_regex": true }),
            json!({ "type": "Whitespace" }),
            Json::Null,
        ] {
            let tokenizer = json!({ "pre_tokenizer": pre_tokenizer });
            let Err(what) = recognise(&tokenizer, false) else { panic!("{pre_tokenizer}") };
            assert_eq!(what, pre_tokenizer.to_string());
        }
        let plain = json!({ "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false } });
        assert_eq!(recognise(&plain, false).ok().unwrap().name, "gpt-2");
        assert_eq!(recognise(&plain, true).ok().unwrap().name, "qwen2");
        // Llama 3's words with merges, and not in the composed form: another name.
        let llama = Pre::from_name("llama-bpe").unwrap().pre_tokenizer();
        let tokenizer = json!({ "pre_tokenizer": llama, "model": { "ignore_merges": false } });
        assert_eq!(recognise(&tokenizer, false).ok().unwrap().name, "dbrx");
    }
}
