//! The configuration of a dense merge.

use std::collections::BTreeMap;

use moe_merge_checkpoint::{ConfigJson, Source, WeightRef};
use serde_json::Value;

use super::models::Models;
use super::modules::{Family, Module};
use super::names::HEADS;
use super::slices::PlannedModule;
use crate::recipe::DenseRecipe;
use crate::vocabulary::Vocabulary;

/// What the configuration of the result is made from.
pub(super) struct Parts<'a> {
    pub recipe: &'a DenseRecipe,
    pub models: &'a Models<'a>,
    pub family: &'a Family,
    pub donor: &'a Source,
    pub modules: &'a [PlannedModule<'a>],
    pub vocabulary: Option<&'a Vocabulary>,
    pub tensors: &'a BTreeMap<String, WeightRef>,
}

/// The donor's configuration with the numbers of the result, and what a person has to change in it.
pub(super) fn config(parts: &Parts<'_>) -> (ConfigJson, Vec<String>) {
    let mut config = parts.donor.config.clone();
    let notes = parts.modules.iter().flat_map(|m| layers(parts, m, &mut config)).collect();
    if let Some(dtype) = parts.recipe.out_dtype.or(parts.recipe.dtype) {
        let map = &mut config.0;
        let spelt: Vec<_> =
            ["dtype", "torch_dtype"].into_iter().filter(|k| map.contains_key(*k)).collect();
        for key in if spelt.is_empty() { vec!["torch_dtype"] } else { spelt } {
            map.insert(key.into(), dtype.config_name().into());
        }
    }
    if let Some(vocabulary) = parts.vocabulary {
        let nested = config.at("text_config.vocab_size").is_some();
        if nested {
            config.set_at("text_config.vocab_size", vocabulary.rows.into());
        }
        if !nested || config.get("vocab_size").is_some() {
            config.set_at("vocab_size", vocabulary.rows.into());
        }
        // Numbers of special tokens go with the vocabulary.
        let own = &parts.models.opened[vocabulary.donor].source.config;
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(value) = own.get(key) {
                config.0.insert(key.into(), value.clone());
            }
        }
    }
    tied(&mut config, parts.tensors);
    (config, notes)
}

/// The number of layers of a module, and the kind of each; what is told where the configuration has no place for the number,
/// or names layers by their numbers.
fn layers(parts: &Parts, module: &PlannedModule, config: &mut ConfigJson) -> Vec<String> {
    let Module { name, keys: Some(keys), .. } = &parts.family.modules[module.module] else {
        return Vec::new();
    };
    let layers: usize = module.slices.iter().map(|s| s.layers).sum();
    let mut places: Vec<&String> = keys.iter().filter(|k| config.at(k).is_some()).collect();
    if places.is_empty() {
        places.extend(keys.first());
    }
    let (mut written, mut notes) = (false, Vec::new());
    for key in places {
        written |= config.set_at(key, layers.into());
        let section = key.rsplit_once('.').map_or(String::new(), |(s, _)| format!("{s}."));
        layer_types(parts, module, layers, &format!("{section}layer_types"), config);
        let by_number = |k: &&&str| !module.whole && config.at(&format!("{section}{k}")).is_some();
        notes.extend(BY_NUMBER.iter().filter(by_number).map(|k| {
            format!("`{section}{k}` in `config.json` names layers of `{name}` by their old numbers")
        }));
    }
    let before = parts.family.layers(module.module, parts.donor);
    if !written && layers != before {
        notes.push(format!(
            "`{name}` has {layers} layers instead of {before}, and no known key of `config.json` holds that number: change it there"
        ));
    }
    notes
}

/// Lists of layers by number, which slices do not change.
const BY_NUMBER: &[&str] = &["fullatt_block_indexes", "deepstack_visual_indexes"];

/// The kind of each layer, in the section of the configuration that has its number.
fn layer_types(
    parts: &Parts,
    module: &PlannedModule,
    layers: usize,
    key: &str,
    config: &mut ConfigJson,
) {
    if !config.at(key).is_some_and(Value::is_array) {
        return;
    }
    let mut types = Vec::new();
    for input in module.slices.iter().filter_map(|s| s.inputs.first()) {
        let own = parts.models.opened[input.model].source.config.at(key);
        let own = own.and_then(|t| t.as_array()).and_then(|t| t.get(input.range.clone()));
        types.extend(own.into_iter().flatten().cloned());
    }
    if types.len() == layers {
        config.set_at(key, types.into());
    } else {
        config.remove_at(key);
    }
}

/// Says whether the head is the embedding, where that changed or where loaders take silence for something else than the writer.
fn tied(config: &mut ConfigJson, tensors: &BTreeMap<String, WeightRef>) {
    const KEY: &str = "tie_word_embeddings";
    let inner = format!("text_config.{KEY}");
    let nested = config.at(&inner).and_then(Value::as_bool);
    let head = HEADS.iter().any(|h| tensors.contains_key(*h));
    // T5 takes the key for the scale of what its decoder gives as well: it stays.
    let scales = tensors.contains_key("shared.weight");
    match config.bool(KEY).or(nested) {
        Some(true) if head && !scales => {
            config.set_at(KEY, false.into());
            if nested.is_some() {
                config.set_at(&inner, false.into());
            }
        }
        Some(tied) if nested.is_some() => {
            config.set_at(KEY, tied.into());
        }
        None if config.several_parts() || head => {
            config.set_at(KEY, (!head || scales).into());
        }
        _ => {}
    }
}
