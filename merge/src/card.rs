//! The model card.

use std::collections::BTreeSet;
use std::path::Path;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::{ConfigJson, Source};

use crate::write::Provenance;

/// Whose recipe language a recipe is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// Has keys that only this program knows.
    #[default]
    Own,
    /// mergekit-moe reads it too.
    MergekitMoe,
    /// mergekit-yaml reads it too.
    MergekitYaml,
}

impl Dialect {
    /// Under which name other tools look for the recipe in the output.
    pub fn file_name(self) -> Option<&'static str> {
        match self {
            Self::Own => None,
            Self::MergekitMoe => Some("mergekit_moe_config.yml"),
            Self::MergekitYaml => Some("mergekit_config.yml"),
        }
    }
}

/// The Hub name of a source: known when it was read from a Hub cache, whose folders are called `models--ORG--NAME`.
pub fn hub_id(source: &Source) -> Option<String> {
    source.path.components().find_map(|part| {
        let (org, name) = part.as_os_str().to_str()?.strip_prefix("models--")?.split_once("--")?;
        Some(format!("{org}/{name}"))
    })
}

/// A source without the folders of this machine: its Hub name, or the last part of each path in its label.
pub fn public_label(source: &Source) -> String {
    if let Some(id) = hub_id(source) {
        return match source.label.split_once('+') {
            Some((_, adapter)) => format!("{id}+{}", last_part(adapter)),
            None => id,
        };
    }
    source.label.split('+').map(last_part).collect::<Vec<_>>().join("+")
}

fn last_part(path: &str) -> String {
    Path::new(path)
        .file_name()
        .map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// `README.md` of an output: YAML header as the Hub reads it, sources with hashes, the recipe.
pub fn card(title: &str, base: &Source, provenance: &Provenance, manifest: &Manifest) -> String {
    let mut text = String::from("---\n");
    let ids: BTreeSet<String> = manifest
        .sources
        .iter()
        .filter(|s| s.label.contains('/'))
        .map(|s| s.label.split('+').next().unwrap_or_default().to_owned())
        .chain(hub_id(base))
        .collect();
    if !ids.is_empty() {
        text.push_str("base_model:\n");
        for id in &ids {
            text.push_str(&format!("- {id}\n"));
        }
        text.push_str("base_model_relation: merge\n");
    }
    if let Some(license) = &provenance.license {
        text.push_str(&format!("license: {license}\n"));
    }
    text.push_str("library_name: transformers\n");
    // What models of several parts do, the Hub knows from their configuration.
    if !base.config.several_parts() {
        text.push_str("pipeline_tag: text-generation\n");
    }
    text.push_str("tags:\n");
    let moe: &[&str] = if manifest.experts.is_empty() { &[] } else { &["moe", "frankenmoe"] };
    for tag in moe.iter().chain(&["merge", "moe-merge"]) {
        text.push_str(&format!("- {tag}\n"));
    }
    text.push_str(&format!("---\n\n# {}\n\n", provenance.name));
    text.push_str(&format!("A {title}, built by moe-merge {}.\n", manifest.tool_version));
    sources(&mut text, manifest);
    if let Some(mode) = &manifest.gate_mode {
        text.push_str(&format!(
            "\n## Routers\n\nMade with `gate_mode: {mode}`, seed {}.\n",
            manifest.seed
        ));
    }
    if !provenance.report.is_empty() {
        text.push('\n');
        provenance.report.iter().for_each(|line| text.push_str(&format!("{line}\n")));
    }
    usage(&mut text, &manifest.family, &base.config);
    if let Some(recipe) = &provenance.recipe {
        let fence = "`".repeat(longest_run_of_backticks(recipe).max(2) + 1);
        text.push_str(&format!("\n## Recipe\n\n{fence}yaml\n{}\n{fence}\n", recipe.trim_end()));
    }
    text
}

fn sources(text: &mut String, manifest: &Manifest) {
    text.push_str("\n## Sources\n\n| role | source | file | BLAKE3 |\n|---|---|---|---|\n");
    for source in &manifest.sources {
        let role = source
            .role
            .strip_prefix("expert ")
            .and_then(|i| i.parse::<usize>().ok())
            .and_then(|i| manifest.experts.get(i))
            .map_or_else(|| source.role.clone(), |name| format!("{} `{name}`", source.role));
        for file in &source.files {
            let hash = &file.blake3[..16.min(file.blake3.len())];
            text.push_str(&format!(
                "| {role} | `{}` | `{}` | `{hash}…` |\n",
                source.label, file.name
            ));
        }
    }
}

fn usage(text: &mut String, family: &str, config: &ConfigJson) {
    let own = config.get("architectures").and_then(|a| a.get(0)?.as_str());
    let class = own.filter(|_| config.several_parts()).unwrap_or("AutoModelForCausalLM");
    text.push_str(&format!(
        "\n## Use\n\n```python\nfrom transformers import {class}, AutoTokenizer\n\n"
    ));
    text.push_str("tokenizer = AutoTokenizer.from_pretrained(\"PATH\")\n");
    let remote = if family == "deepseek" { ", trust_remote_code=True" } else { "" };
    text.push_str(&format!("model = {class}.from_pretrained(\"PATH\"{remote})\n```\n"));
}

/// Longest run of backticks, so that a fence can be longer.
fn longest_run_of_backticks(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use moe_merge_checkpoint::manifest::{FileRecord, SourceRecord};

    use super::*;

    fn source(label: &str, path: &str) -> Source {
        Source {
            label: label.into(),
            path: PathBuf::from(path),
            config: Default::default(),
            tensors: Default::default(),
            other: Vec::new(),
            files: Vec::new(),
            side: Vec::new(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn labels_hold_no_folder_of_this_machine() {
        let local = source("/home/me/models/base+../adapters/rust", "/home/me/models/base");
        assert_eq!(public_label(&local), "base+rust");
        assert_eq!(hub_id(&local), None);
        let hub = source("org/name@main", "/cache/hub/models--org--name/snapshots/abc");
        assert_eq!(public_label(&hub), "org/name");
    }

    #[test]
    fn a_model_of_several_parts_is_loaded_by_its_own_class() {
        let used = |config: serde_json::Value| {
            let mut text = String::new();
            usage(&mut text, "", &ConfigJson(config.as_object().unwrap().clone()));
            text
        };
        let class = "T5ForConditionalGeneration";
        let own = used(serde_json::json!({"is_encoder_decoder": true, "architectures": [class]}));
        assert!(own.contains(&format!("import {class}, Auto")) && own.contains("= T5For"), "{own}");
        let text = used(serde_json::json!({"architectures": ["LlamaForCausalLM"]}));
        assert!(text.contains("= AutoModelForCausalLM.from"), "{text}");
    }

    #[test]
    fn a_card_names_hub_models_experts_and_recipe() {
        let base = source("org/name", "/cache/models--org--name/snapshots/abc");
        let file = FileRecord { name: "m.safetensors".into(), size: 1, blake3: "ab".repeat(32) };
        let record = |role: &str, label: &str| SourceRecord {
            role: role.into(),
            label: label.into(),
            files: vec![file.clone()],
        };
        let manifest = Manifest {
            version: 1,
            tool_version: "1.2.3".into(),
            generation: 0,
            family: "mixtral".into(),
            experts: vec!["prose".into()],
            gate_mode: Some("hidden".into()),
            align: None,
            seed: 3,
            recipe_blake3: None,
            sources: vec![record("base", "org/name"), record("expert 0", "local+rust")],
            files: Vec::new(),
        };
        let provenance = Provenance {
            name: "mine".into(),
            recipe: Some("a: |\n  ```\n".into()),
            ..Provenance::default()
        };
        let text = card("mixtral of 1 experts", &base, &provenance, &manifest);
        assert!(
            text.starts_with("---\nbase_model:\n- org/name\nbase_model_relation: merge\n"),
            "{text}"
        );
        assert!(text.contains(
            "| expert 0 `prose` | `local+rust` | `m.safetensors` | `abababababababab…` |"
        ));
        assert!(text.contains("````yaml\na: |\n  ```\n````"));
        assert!(!text.contains("/cache"));
    }
}
