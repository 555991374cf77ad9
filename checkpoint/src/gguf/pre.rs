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
}
