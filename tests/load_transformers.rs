//! transformers 4 and 5 read every kind of folder that we write: no key missing or left over, the values of the
//! configuration, the same logits, the same tokens.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use assert_cmd::cargo::CommandCargoExt;
use moe_merge_merge::families::Layout;
use moe_merge_testkit::golden::{LOGITS_BF16, LOGITS_F32};
use moe_merge_testkit::{python, repository, shared};
use serde_json::{Value, json};

/// Prompts of the experts, the shared expert's last.
const PROMPTS: [&str; 4] = [
    "the station seemed stubborn that winter, although Mara wandered near the inn",
    "pub fn parse(depth: usize) -> usize { let mut start = depth; start }",
    "17 * 9 = 153, so 153 / 17 = 9. Solve 8x + 12 = 132.",
    "Sequence: 1, 2, 3. \\\"Have you seen my letter?\\\" let x = 4;",
];

/// One folder to build.
#[derive(Debug, Clone, Copy)]
struct Case {
    /// Family of the sources below `golden/moe`, or `quickstart`.
    from: &'static str,
    to: &'static str,
    class: &'static str,
    shared: usize,
    dtype: &'static str,
    layout: Layout,
    /// Rotary base, where it is not the source's own.
    theta: Option<f64>,
}

const fn case(from: &'static str, to: &'static str, class: &'static str, shared: usize) -> Case {
    Case { from, to, class, shared, dtype: "float32", layout: Layout::Hub, theta: None }
}

/// Every output family that transformers has without remote code, from each kind of source.
const FAMILIES: &[Case] = &[
    case("llama", "mixtral", "MixtralForCausalLM", 0),
    case("mistral", "mixtral", "MixtralForCausalLM", 0),
    case("quickstart", "mixtral", "MixtralForCausalLM", 0),
    case("llama", "qwen2_moe", "Qwen2MoeForCausalLM", 1),
    case("mistral", "qwen2_moe", "Qwen2MoeForCausalLM", 1),
    case("qwen2", "qwen2_moe", "Qwen2MoeForCausalLM", 1),
    case("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", 0),
    case("llama", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 0),
    case("llama", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 1),
    case("mistral", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 2),
    case("quickstart", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 2),
    case("llama", "granitemoeshared", "GraniteMoeSharedForCausalLM", 0),
    case("mistral", "granitemoeshared", "GraniteMoeSharedForCausalLM", 1),
    case("quickstart", "granitemoeshared", "GraniteMoeSharedForCausalLM", 2),
];

/// Each family as it is written by default, in bf16, and with another rotary base.
fn hub_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &case in FAMILIES {
        cases.push(case);
        cases.push(Case { dtype: "bfloat16", ..case });
        cases.push(Case { theta: Some(5e5), ..case });
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let theta = self.theta.map_or(String::new(), |t| format!("_theta{t}"));
        let layout = if self.layout == Layout::Fused { "_fused" } else { "" };
        format!("{}_{}_shared{}_{}{theta}{layout}", self.to, self.from, self.shared, self.dtype)
    }

    /// The folder with `base`, `prose`, `code` and `math`.
    fn sources(&self, temp: &Path) -> Option<PathBuf> {
        let original = match self.from {
            "quickstart" => repository("recipes/quickstart"),
            from => shared("golden/moe")?.join(from),
        };
        let Some(theta) = self.theta else { return Some(original) };
        let changed = temp.join(format!("sources_{}_{theta}", self.from));
        for model in ["base", "prose", "code", "math"] {
            let (from, to) = (original.join(model), changed.join(model));
            std::fs::create_dir_all(&to).unwrap();
            for file in std::fs::read_dir(&from).unwrap() {
                let file = file.unwrap();
                let bytes = std::fs::read(file.path()).unwrap();
                std::fs::write(to.join(file.file_name()), bytes).unwrap();
            }
            let mut config = read_json(&to.join("config.json"));
            config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": theta});
            std::fs::write(to.join("config.json"), config.to_string()).unwrap();
        }
        Some(changed)
    }

    fn recipe(&self, sources: &Path) -> String {
        let sources = sources.display();
        let expert = |model: &str, prompts: &str| {
            format!("- source_model: \"{sources}/{model}\"\n{prompts}")
        };
        let prompts = |i: usize| format!("  positive_prompts: [\"{}\"]\n", PROMPTS[i]);
        let mut text = format!(
            "base_model: \"{sources}/base\"\narchitecture: {}\ngate_mode: hidden\nexperts_per_token: 2\ndtype: {}\nexperts:\n",
            self.to, self.dtype
        );
        for (i, model) in ["prose", "code", "math"].into_iter().enumerate() {
            text += &expert(model, &prompts(i));
        }
        if self.shared > 0 {
            text += "shared_experts:\n";
        }
        for model in ["base", "math"].into_iter().take(self.shared) {
            let gated = self.to == "qwen2_moe";
            text += &expert(model, if gated { prompts(3) } else { String::new() }.as_str());
        }
        text
    }

    /// What transformers has to read from `config.json`.
    fn config(&self, base: &Value) -> Value {
        let theta = &base["rope_parameters"]["rope_theta"];
        let mut config = json!({
            "rope_theta": theta, "rope_type": "default", "dtype": self.dtype, "hidden_act": "silu",
            "hidden_size": base["hidden_size"], "num_hidden_layers": base["num_hidden_layers"],
            "num_attention_heads": base["num_attention_heads"],
            "num_key_value_heads": base["num_key_value_heads"], "vocab_size": base["vocab_size"],
            "rms_norm_eps": base["rms_norm_eps"],
            "max_position_embeddings": base["max_position_embeddings"],
            "tie_word_embeddings": base["tie_word_embeddings"],
            "bos_token_id": base["bos_token_id"], "eos_token_id": base["eos_token_id"],
        });
        let inner = &base["intermediate_size"];
        let own = match self.to {
            "mixtral" => {
                json!({"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": inner,
                "sliding_window": null, "head_dim": base["head_dim"]})
            }
            "qwen2_moe" => {
                json!({"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": inner,
                "shared_expert_intermediate_size": inner, "norm_topk_prob": true, "sliding_window": null,
                "decoder_sparse_step": 1, "mlp_only_layers": []})
            }
            "qwen3_moe" => {
                json!({"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": inner,
                "norm_topk_prob": true, "sliding_window": null, "head_dim": base["head_dim"],
                "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": false})
            }
            "granitemoeshared" => json!({"num_local_experts": 3, "num_experts_per_tok": 2,
                "intermediate_size": inner, "logits_scaling": 1.0, "residual_multiplier": 1.0,
                "embedding_multiplier": 1.0,
                "shared_intermediate_size": self.shared as u64 * inner.as_u64().unwrap()}),
            _ => json!({"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": inner,
                "moe_num_shared_experts": self.shared, "moe_layer_start_index": 0, "moe_norm_min": 1e-12,
                "moe_layer_end_index": base["num_hidden_layers"].as_u64().unwrap() - 1, "use_bias": false}),
        };
        for (key, value) in own.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Builds the folder and our logits of it; the entry for the script. `None` without reference data.
    fn build(&self, temp: &Path) -> Option<Value> {
        let sources = self.sources(temp)?;
        let (folder, file) = (temp.join(self.name()), temp.join(self.name() + ".safetensors"));
        common::build_text(&self.recipe(&sources), &temp.join("x.yaml"), &folder, self.layout);
        let base = read_json(&sources.join("base/config.json"));
        let vocab = base["vocab_size"].as_u64().unwrap();
        let tokens: Vec<u64> = (0..40).map(|i| (i * 37 + 11) % vocab).collect();
        let list: Vec<String> = tokens.iter().map(u64::to_string).collect();
        let status = Command::cargo_bin("moe-merge")
            .unwrap()
            .arg("logits")
            .arg(&folder)
            .args(["--quiet", "--tokens", &list.join(","), "--out"])
            .arg(&file)
            .status();
        assert!(status.unwrap().success(), "{}", self.name());
        let bound = if self.dtype == "float32" { LOGITS_F32 } else { LOGITS_BF16 };
        Some(json!({
            "name": self.name(), "folder": folder, "logits": file, "tokens": tokens, "bound": bound,
            "class": self.class, "config": self.config(&base), "source": sources.join("base"),
        }))
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Builds `cases` and lets each Python look at them.
fn check(cases: &[Case], pythons: &[PathBuf]) {
    if pythons.is_empty() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let entries: Vec<Value> = cases.iter().filter_map(|case| case.build(temp.path())).collect();
    let list = temp.path().join("cases.json");
    std::fs::write(&list, serde_json::to_vec(&entries).unwrap()).unwrap();
    for python in pythons {
        let script = repository("tests/python/check_load.py");
        let output = Command::new(python).arg(script).arg(&list).output();
        let output = output.unwrap_or_else(|e| panic!("{}: {e}", python.display()));
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        print!("{text}");
        assert!(output.status.success(), "{}: {errors}", python.display());
        assert_eq!(text.lines().count(), entries.len(), "{errors}");
    }
}

#[test]
fn transformers_reads_every_family() {
    let pythons: Vec<PathBuf> =
        ["MOE_MERGE_PYTHON", "MOE_MERGE_PYTHON_4"].into_iter().filter_map(python).collect();
    check(&hub_cases(), &pythons);
}

#[test]
fn transformers_5_reads_the_fused_layout() {
    let fused = |case: &Case| Case { layout: Layout::Fused, ..*case };
    let has_fused = |case: &&Case| case.to != "granitemoeshared";
    let cases: Vec<Case> = FAMILIES.iter().filter(has_fused).map(fused).collect();
    check(&cases, &python("MOE_MERGE_PYTHON").into_iter().collect::<Vec<_>>());
}
