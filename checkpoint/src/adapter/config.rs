//! `adapter_config.json`: what PEFT says about an adapter, and what of it cannot be applied.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::error::CheckpointError;

/// Keys that are understood, or that have no effect on the merged weights.
const KNOWN_KEYS: &[&str] = &[
    "alora_invocation_string",
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
];

/// Variants whose update is not `s·B·A`, with the reason; the key refuses the adapter when it is set.
const VARIANTS: &[(&str, &str)] = &[
    ("layer_replication", "the adapter repeats layers of its base (`layer_replication`)"),
    ("alora_invocation_tokens", "an activated LoRA acts only after its invocation tokens"),
    ("alora_invocation_string", "an activated LoRA acts only after its invocation tokens"),
    ("arrow_config", "an Arrow adapter is chosen per token"),
    ("kasa_config", "a KaSA adapter is trained on a truncated base weight"),
    ("monteclora_config", "a Monteclora adapter samples its factors"),
    ("use_bdlora", "a block-diagonal LoRA stores its factors in blocks"),
    ("use_qalora", "a QALoRA adapter pools its inputs in groups"),
];

/// Initialisations that take part of the base weight away; true for the prefix of the name.
const DECOMPOSITIONS: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Rows that an adapter replaces, by module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TokenIndices {
    /// Of the input embedding.
    Embedding(Vec<usize>),
    /// Of the modules whose name ends in the key.
    ByModule(BTreeMap<String, Vec<usize>>),
}

/// A checked `adapter_config.json`.
#[derive(Debug, Clone)]
pub(super) struct AdapterConfig {
    pub file: PathBuf,
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
    pub dora: bool,
    pub fan_in_fan_out: bool,
    pub lora_bias: bool,
    pub bias: String,
    pub target_modules: Vec<String>,
    pub target_parameters: Vec<String>,
    pub modules_to_save: Vec<String>,
    pub base_model: Option<String>,
    pub task_type: Option<String>,
    pub peft_version: Option<String>,
    pub token_indices: Option<TokenIndices>,
    /// Keys that are set and not understood.
    pub unknown: Vec<String>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

impl AdapterConfig {
    /// Reads and checks the file of `dir`.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let file = dir.join("adapter_config.json");
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::NotFound {
                    path: file,
                    hint: "a PEFT adapter is a folder with `adapter_config.json` and \
                           `adapter_model.safetensors`"
                        .into(),
                });
            }
            Err(e) => return Err(CheckpointError::io("reading", &file, e)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Fields { map, file }.check(),
            Ok(other) => Err(Fields { map: Map::new(), file }.not_json(&other.to_string())),
            Err(e) => Err(Fields { map: Map::new(), file }.not_json(&e.to_string())),
        }
    }

    /// Rank that the configuration gives to the module (or parameter) `name`.
    ///
    /// The first key `K` in file order with `^(.*\.)?(K)$` wins, as PEFT does it (`get_pattern_key`).
    pub fn rank_of(&self, name: &str) -> Result<usize, CheckpointError> {
        Ok(self.first_match(&self.rank_pattern, name)?.unwrap_or(self.rank))
    }

    /// `s = alpha / r`, or `alpha / √r` for rslora.
    pub fn scale(&self, name: &str, rank: usize) -> Result<f32, CheckpointError> {
        let alpha = self.first_match(&self.alpha_pattern, name)?.unwrap_or(self.alpha);
        let rank = rank as f64;
        Ok((alpha / if self.rslora { rank.sqrt() } else { rank }) as f32)
    }

    fn first_match<T: Copy>(
        &self,
        pattern: &[(Regex, T)],
        name: &str,
    ) -> Result<Option<T>, CheckpointError> {
        for (key, value) in pattern {
            // Backtracking has a limit, so that no pattern can keep us busy for ever.
            let matches = key.is_match(name).map_err(|e| CheckpointError::Malformed {
                what: "pattern of the adapter configuration cannot be matched".into(),
                file: self.file.clone(),
                tensor: Some(name.to_owned()),
                expected: "a regular expression that matches without endless backtracking".into(),
                found: format!("`{}`: {e}", key.as_str()),
                hint: None,
            })?;
            if matches {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Whether PEFT before 0.20 wrote it, whose packed experts are the other way round; `None` if it does not say.
    pub fn old_packing(&self) -> Option<bool> {
        let mut parts = self.peft_version.as_deref()?.split('.');
        let major: u32 = parts.next()?.parse().ok()?;
        let minor: u32 = parts.next()?.parse().ok()?;
        Some((major, minor) < (0, 20))
    }
}

/// The file's keys, for reading them with messages.
struct Fields {
    map: Map<String, Value>,
    file: PathBuf,
}

impl Fields {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn not_json(&self, found: &str) -> CheckpointError {
        CheckpointError::Malformed {
            what: "adapter configuration is not a JSON object".into(),
            file: self.file.clone(),
            tensor: None,
            expected: "a JSON object as PEFT writes it".into(),
            found: found.chars().take(200).collect(),
            hint: Some("save the adapter again with PEFT's `save_pretrained`".into()),
        }
    }

    fn wrong(&self, key: &str, expected: &str) -> CheckpointError {
        let found = self.map.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string);
        CheckpointError::Malformed {
            what: format!("`{key}` of the adapter configuration is not what it should be"),
            file: self.file.clone(),
            tensor: None,
            expected: expected.to_owned(),
            found: found.chars().take(200).collect(),
            hint: None,
        }
    }

    fn unsupported(&self, what: String, hint: &str) -> CheckpointError {
        CheckpointError::Unsupported { what, file: self.file.clone(), hint: hint.to_owned() }
    }

    fn flag(&self, key: &str) -> Result<bool, CheckpointError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<String>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// One text or a list of them.
    fn texts(&self, key: &str) -> Result<Vec<String>, CheckpointError> {
        let wrong = || self.wrong(key, "a text or a list of texts");
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(Value::Array(list)) => {
                list.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
            }
            Some(_) => Err(wrong()),
        }
    }

    fn pattern<T>(
        &self,
        key: &str,
        value: impl Fn(&Value) -> Option<T>,
        expected: &str,
    ) -> Result<Vec<(Regex, T)>, CheckpointError> {
        let map = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(self.wrong(key, expected)),
        };
        map.iter()
            .map(|(name, v)| {
                let regex = Regex::new(&format!(r"^(.*\.)?({name})$")).map_err(|e| {
                    CheckpointError::Malformed {
                        what: format!("a key of `{key}` is not a regular expression"),
                        file: self.file.clone(),
                        tensor: None,
                        expected: "a regular expression for module names".into(),
                        found: format!("`{name}`: {e}"),
                        hint: None,
                    }
                })?;
                Ok((regex, value(v).ok_or_else(|| self.wrong(key, expected))?))
            })
            .collect()
    }

    fn token_indices(&self) -> Result<Option<TokenIndices>, CheckpointError> {
        let key = "trainable_token_indices";
        let wrong = || self.wrong(key, "a list of token ids, or one for each module");
        let list = |v: &Value| -> Option<Vec<usize>> {
            v.as_array()?.iter().map(|i| usize::try_from(i.as_u64()?).ok()).collect()
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(name, v)| Ok((name.clone(), list(v).ok_or_else(wrong)?)))
                .collect::<Result<_, _>>()
                .map(|map| Some(TokenIndices::ByModule(map))),
            Some(v) => Ok(Some(TokenIndices::Embedding(list(v).ok_or_else(wrong)?))),
        }
    }

    fn refuse_what_is_no_plain_lora(&self) -> Result<(), CheckpointError> {
        let kind = self.text("peft_type")?.unwrap_or_default();
        if kind != "LORA" {
            let what = format!("adapter is of PEFT type `{kind}`, only `LORA` can be applied");
            let hint = "merge it into its base with PEFT (`merge_and_unload`) and use the result \
                        as the model";
            return Err(self.unsupported(what, hint));
        }
        for (key, why) in VARIANTS {
            let set = match self.get(key) {
                None | Some(Value::Bool(false)) => false,
                Some(Value::Array(list)) => !list.is_empty(),
                Some(Value::Object(map)) => !map.is_empty(),
                Some(_) => true,
            };
            if set {
                return Err(self.unsupported(
                    format!("adapter cannot be added to the weights: {why}"),
                    "only LoRA whose update is `s·B·A` on unchanged layers can be merged",
                ));
            }
        }
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(name)) => self.check_initialisation(&name.to_lowercase()),
            Some(_) => Err(self.wrong("init_lora_weights", "true, false or a name")),
        }
    }

    fn check_initialisation(&self, name: &str) -> Result<(), CheckpointError> {
        if DECOMPOSITIONS.iter().any(|prefix| name.starts_with(prefix)) {
            return Err(self.unsupported(
                format!("adapter was initialised by `{name}`, which changed the base weights"),
                "convert it: `save_pretrained(…, path_initial_model_for_weight_conversion=…)` in \
                 PEFT writes a plain LoRA for the original base",
            ));
        }
        if ["gaussian", "eva", "orthogonal", "mica"].contains(&name) {
            return Ok(());
        }
        Err(self.unsupported(
            format!("initialisation `{name}` is not known, so the base weights it needs are not"),
            "known are true, false, gaussian, eva, orthogonal and mica",
        ))
    }

    fn check(self) -> Result<AdapterConfig, CheckpointError> {
        self.refuse_what_is_no_plain_lora()?;
        let positive =
            |v: &Value| v.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|&r| r > 0);
        let finite = |v: &Value| v.as_f64().filter(|a| a.is_finite());
        let rank = self.get("r").and_then(positive);
        let alpha = self.get("lora_alpha").and_then(finite);
        let bias = self.text("bias")?.unwrap_or_else(|| "none".into());
        if !["none", "all", "lora_only"].contains(&bias.as_str()) {
            return Err(self.wrong("bias", "`none`, `all` or `lora_only`"));
        }
        let idle = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        let unknown = self
            .map
            .iter()
            .filter(|(key, value)| !KNOWN_KEYS.contains(&key.as_str()) && !idle(value))
            .map(|(key, _)| key.clone())
            .collect();
        Ok(AdapterConfig {
            rank: rank.ok_or_else(|| self.wrong("r", "a rank above 0"))?,
            alpha: alpha.ok_or_else(|| self.wrong("lora_alpha", "a number"))?,
            rslora: self.flag("use_rslora")?,
            dora: self.flag("use_dora")?,
            fan_in_fan_out: self.flag("fan_in_fan_out")?,
            lora_bias: self.flag("lora_bias")?,
            bias,
            target_modules: self.texts("target_modules")?,
            target_parameters: self.texts("target_parameters")?,
            modules_to_save: self.texts("modules_to_save")?,
            base_model: self.text("base_model_name_or_path")?,
            task_type: self.text("task_type")?,
            peft_version: self.text("peft_version")?,
            token_indices: self.token_indices()?,
            rank_pattern: self.pattern("rank_pattern", positive, "ranks above 0 by module name")?,
            alpha_pattern: self.pattern("alpha_pattern", finite, "numbers by module name")?,
            unknown,
            file: self.file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<AdapterConfig, CheckpointError> {
        let Ok(Value::Object(map)) = serde_json::from_str(json) else { panic!("test JSON") };
        Fields { map, file: "adapter_config.json".into() }.check()
    }

    #[test]
    fn patterns_match_in_file_order_and_apart() {
        let config = parse(
            r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16,
                "rank_pattern": {"layers\\.1\\..*": 2, "o_proj": 4, "q_(?!x)proj": 16},
                "alpha_pattern": {"o_proj": 3}}"#,
        )
        .unwrap();
        assert_eq!(config.rank_of("model.layers.1.self_attn.o_proj").unwrap(), 2);
        assert_eq!(config.rank_of("model.layers.0.self_attn.o_proj").unwrap(), 4);
        // A key matches whole components only.
        assert_eq!(config.rank_of("model.layers.0.self_attn.go_proj").unwrap(), 8);
        assert_eq!(config.rank_of("q_proj").unwrap(), 16);
        assert_eq!(config.scale("model.layers.0.self_attn.o_proj", 4).unwrap(), 0.75);
        // Rank from its pattern, alpha from the default: 16 / 2.
        assert_eq!(config.scale("model.layers.1.mlp.up_proj", 2).unwrap(), 8.0);
    }

    #[test]
    fn a_pattern_that_backtracks_for_ever_is_an_error() {
        let config = parse(
            r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": {"(?=a)(a|a)*\\1b": 3}}"#,
        )
        .unwrap();
        assert!(config.scale(&"a".repeat(60), 1).is_err());
    }

    #[test]
    fn rslora_divides_by_the_root() {
        let config =
            parse(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 2, "use_rslora": true}"#);
        assert_eq!(config.unwrap().scale("x", 16).unwrap(), 0.5);
    }

    #[test]
    fn packing_follows_the_version() {
        let version = |v: &str| {
            let json = format!(
                r#"{{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "peft_version": "{v}"}}"#
            );
            parse(&json).unwrap().old_packing()
        };
        assert_eq!(version("0.18.1"), Some(true));
        assert_eq!(version("0.19.0"), Some(true));
        assert_eq!(version("0.20.0"), Some(false));
        assert_eq!(version("1.2"), Some(false));
        assert_eq!(version("main"), None);
    }

    #[test]
    fn unknown_keys_that_are_set_are_kept() {
        let config = parse(
            r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "new_thing": {"x": 1}, "off": null}"#,
        );
        assert_eq!(config.unwrap().unknown, ["new_thing"]);
    }
}
