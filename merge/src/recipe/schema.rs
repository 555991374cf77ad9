//! The keys of a recipe: one table for each kind of mapping. Checks, "did you mean", docs and the JSON schema are all
//! made from these tables.

use moe_merge_router::ESTIMATORS;
use serde_json::{Map, Value, json};

use super::moe::ARCHITECTURES;
use super::tokenizer::CHAT_TEMPLATES;
use crate::methods::METHODS;

/// One key of a mapping.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// What holds without it, in words.
    pub default: Option<&'static str>,
    /// Whether it has to be there.
    pub required: bool,
    /// What its value looks like.
    pub shape: Shape,
    /// Whether this version can do it.
    pub availability: Availability,
}

/// Whether a key can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// Yes.
    Now,
    /// It is known, and refused by this version.
    Later {
        /// `false` is accepted: it asks for nothing.
        unless_false: bool,
        /// What to do instead.
        reason: &'static str,
    },
}

/// What a value looks like.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Text.
    Text,
    /// `true` or `false`.
    Bool,
    /// A whole number from this on.
    Integer(u64),
    /// A number of at least 0.
    Scale,
    /// `true`, `false` or `auto`.
    Choice,
    /// A list of texts.
    Texts,
    /// A text or a list of texts.
    TextOrTexts,
    /// One of the dtype names.
    Dtype,
    /// Where a model is.
    Source,
    /// `[first, end)`.
    Range,
    /// Text of a known set, which may be spelt in other ways too.
    Name(fn() -> Vec<&'static str>),
    /// Parameters of a dense merge method.
    Parameters,
    /// Names to files.
    Files,
    /// A mapping of another table.
    Object(&'static str),
    /// Names to mappings of another table.
    Map(&'static str),
    /// Mappings of another table.
    Objects(&'static str),
    /// A text or a mapping of another table.
    NameOr(&'static [&'static str], &'static str),
    /// Anything: not read by this version.
    Any,
}

const fn key(name: &'static str, shape: Shape, doc: &'static str) -> Key {
    Key { name, doc, default: None, required: false, shape, availability: Availability::Now }
}

impl Key {
    const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    const fn default(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    const fn later(mut self, unless_false: bool, reason: &'static str) -> Self {
        self.availability = Availability::Later { unless_false, reason };
        self
    }
}

fn gate_modes() -> Vec<&'static str> {
    ESTIMATORS.iter().map(|e| e.name).collect()
}

fn architectures() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|(name, _)| *name).collect()
}

fn methods() -> Vec<&'static str> {
    METHODS.iter().map(|m| m.name).collect()
}

/// A MoE recipe.
pub const MOE: &[Key] = &[
    key("base_model", Shape::Source, "the model whose embeddings, attention and norms are kept, and whose hidden states make the gates").required(),
    key("experts", Shape::Objects("expert"), "the models whose MLPs become the experts, at least two").required(),
    key("shared_experts", Shape::Objects("expert"), "experts that every token visits").default("none"),
    key("gate_mode", Shape::Name(gate_modes), "how the gates are made from the prompts").default("auto"),
    key("experts_per_token", Shape::Integer(1), "experts that each token visits").default("2"),
    key("dtype", Shape::Dtype, "dtype of the output").default("as the base model has it"),
    key("architecture", Shape::Name(architectures), "family of the output").default("the first that fits the base model"),
    key("attention", Shape::NameOr(&["base", "average"], "attention"), "how the tensors outside the MLPs are made: taken from the base, the mean of all experts, or a dense merge").default("base"),
    key("tokenizer", Shape::Name(|| vec!["base"]), "`base`: the base's tokenizer and vocabulary serve all, whatever the experts were trained with").default("all vocabularies have to be equal"),
    key("evaluation", Shape::Files, "text files by domain, for perplexity before and after").default("none"),
    key("output", Shape::Text, "folder to write").default("merged/<recipe name>"),
    key("name", Shape::Text, "name of this stage, in a recipe of several documents").default("none"),
    key("seed", Shape::Integer(0), "seed of noise and of random gates").default("0"),
    key("allow_identical_experts", Shape::Bool, "build even though all experts are the same model, which is useless without training").default("false"),
    key("self_text", Shape::Integer(0), "tokens that each expert writes itself as calibration text; 0: none").default("as many as experts without prompts need"),
    key("generalist", Shape::Choice, "the base's own MLPs as one more expert, for tokens whose domain cannot be known yet").default("false"),
    key("sequential", Shape::Choice, "whether a layer's router is fitted to the stream of the merged model, routers before it in place").default("auto"),
    key("prompt_tokens", Shape::Integer(1), "tokens per expert that files of prompts may fill").default("20000"),
    key("align", Shape::NameOr(&["refit", "distil", "joint"], "align"), "fit the experts' MLPs to the attention they now live behind, each with its dense model as teacher: `refit` layer by layer, `distil` with gradients through all layers, `joint` all of them with the routers").default("none: MLPs as they are"),
    key("pad", Shape::Any, "pad experts of different sizes").later(true, "all experts need the base's sizes"),
];

/// One expert of a MoE recipe.
pub const EXPERT: &[Key] = &[
    key("source_model", Shape::Source, "the model whose MLPs are used").required(),
    key("name", Shape::Text, "shown in reports").default("the last part of the source's path"),
    key("positive_prompts", Shape::Texts, "texts that this expert should get").default("none"),
    key("negative_prompts", Shape::Texts, "texts that it should not get").default("none"),
    key(
        "prompts_file",
        Shape::TextOrTexts,
        "more positive prompts, in one file or several: blocks of text divided by blank lines, JSON lines or a JSON \
         list with `text`, `messages` or `prompt`",
    )
    .default("none"),
    key("layers", Shape::Range, "only in these layers; the base's MLP elsewhere")
        .default("all layers"),
    key("noise_scale", Shape::Scale, "standard deviation of noise added to its matrices")
        .default("0"),
    key("residual_scale", Shape::Scale, "factor on its down projection").default("1"),
];

/// A dense merge recipe.
pub const DENSE: &[Key] = &[
    key("merge_method", Shape::Name(methods), "the method").required(),
    key("base_model", Shape::Source, "the model that task vectors are taken against")
        .default("none; the first model gives config and tokenizer"),
    key("models", Shape::Objects("model"), "whole models; exactly one of `models`, `slices` and `modules`")
        .default("none"),
    key("slices", Shape::Objects("slice"), "layers of models, one slice after the other")
        .default("none"),
    key("parameters", Shape::Parameters, "parameters for all models and layers")
        .default("the method's own"),
    key("dtype", Shape::Dtype, "dtype of the arithmetic").default("as the models are stored"),
    key(
        "compute",
        Shape::Dtype,
        "dtype of the arithmetic, models taken as stored: `float32` rounds the result only once",
    )
    .default("`dtype`, rounded after each step as mergekit does"),
    key("out_dtype", Shape::Dtype, "dtype of the output").default("`dtype`"),
    key("tokenizer", Shape::Object("tokenizer"), "the vocabulary of the result")
        .default("that of `base_model`, else of the first model; all need the same number of rows"),
    key(
        "tokenizer_source",
        Shape::Name(|| vec!["base", "union"]),
        "older form of `tokenizer: {source: …}`: union, base, or a model",
    )
    .default("none"),
    key(
        "chat_template",
        Shape::Name(|| CHAT_TEMPLATES.to_vec()),
        "a chat template by name, `auto` for the most frequent one, or Jinja text",
    )
    .default("that of the tokenizer"),
    key("self_text", Shape::Integer(0), "for methods that look at activations: tokens that each model writes itself; 0: none")
        .default("as many as models without text need"),
    key(
        "prompt_tokens",
        Shape::Integer(1),
        "for methods that look at activations: tokens of each model that files of prompts may fill",
    )
    .default("20000"),
    key(
        "match_experts",
        Shape::Name(|| vec!["none", "weights", "activations"]),
        "MoE models: which experts go together, layer by layer, router rows with them; `weights`: those whose weights are most \
         alike; `activations`: those that make the most alike of the same text (all `prompts`, or what the first model writes)",
    )
    .default("none: those of the same number"),
    key(
        "match_neurons",
        Shape::Name(|| vec!["none", "weights"]),
        "which neurons of an MLP go together, after experts were matched: those whose weights are most alike",
    )
    .default("none: those of the same number"),
    key("seed", Shape::Integer(0), "seed of the methods that choose by chance").default("0"),
    key("name", Shape::Text, "shown in reports").default("none"),
    key("output", Shape::Text, "folder to write").default("merged/<recipe name>"),
    key(
        "modules",
        Shape::Map("module"),
        "parts of the models by name, each with `models` or `slices` of its own; others are left out",
    )
    .default("none"),
];

/// A module of the models of a dense merge recipe.
pub const MODULE: &[Key] = &[
    key("models", Shape::Objects("model"), "all its layers; exactly one of `models` and `slices`")
        .default("none"),
    key("slices", Shape::Objects("slice"), "layers of it, one slice after the other")
        .default("none"),
    key("parameters", Shape::Parameters, "parameters for this module").default("the recipe's"),
];

/// A model of a dense merge recipe.
pub const DENSE_MODEL: &[Key] = &[
    key("model", Shape::Source, "the model").required(),
    key("parameters", Shape::Parameters, "parameters for this model").default("the recipe's"),
    key("prompts", Shape::Texts, "text of its kind, for methods that look at activations")
        .default("none: it writes its own"),
    key(
        "prompts_file",
        Shape::TextOrTexts,
        "the same in files: blocks of text divided by blank lines, JSON lines or a JSON list",
    )
    .default("none"),
];

/// An output slice of a dense merge recipe.
pub const SLICE: &[Key] = &[
    key("sources", Shape::Objects("slice_source"), "the layers that are merged").required(),
    key("base_model", Shape::Source, "another base for this slice").default("the recipe's"),
    key("parameters", Shape::Parameters, "parameters for this slice").default("the recipe's"),
    key("residual_weight", Shape::Any, "has no meaning")
        .later(true, "mergekit reads it and does nothing with it; remove it"),
];

/// A source of an output slice.
pub const SLICE_SOURCE: &[Key] = &[
    key("model", Shape::Source, "the model").required(),
    key("layer_range", Shape::Range, "its layers, `[first, end)`").required(),
    key("parameters", Shape::Parameters, "parameters for this source").default("the slice's"),
];

/// A dense merge block under `attention:`.
pub const ATTENTION: &[Key] = &[
    key("merge_method", Shape::Name(methods), "the method").required(),
    key("base_model", Shape::Source, "the model that task vectors are taken against")
        .default("the recipe's `base_model`, for methods that need one"),
    key("models", Shape::Objects("model"), "the models").default("all experts"),
    key("parameters", Shape::Parameters, "parameters for all models and layers")
        .default("the method's own; `weight: 1`"),
    key("dtype", Shape::Dtype, "dtype of the arithmetic").default("as the models are stored"),
];

/// The vocabulary of a dense merge.
pub const TOKENIZER: &[Key] = &[
    key("source", Shape::Any, "`union`, `base`, or a model").default("union"),
    key("tokens", Shape::Map("token"), "tokens whose rows come from elsewhere than the rules say")
        .default("none"),
    key(
        "pad_to_multiple_of",
        Shape::Integer(1),
        "round the number of rows up to a multiple of this",
    )
    .default("no rounding"),
];

/// One token under `tokenizer.tokens`.
pub const TOKEN: &[Key] = &[
    key("source", Shape::Any, "a model that has the token, or where its row is")
        .default("by the rules"),
    key("force", Shape::Bool, "also for models that have the token").default("false"),
];

/// Where the row of a token is.
pub const ROW: &[Key] = &[
    key("kind", Shape::Name(|| vec!["model_token", "zero"]), "the row of a token, or zeros")
        .default("model_token"),
    key("model", Shape::Source, "the model").default("none, for `zero`"),
    key("token", Shape::Text, "the token, by its text").default("none"),
    key("token_id", Shape::Integer(0), "the token, by its number").default("none"),
];

/// How experts are fitted to the base's attention, under `align:`.
pub const ALIGN: &[Key] = &[
    key(
        "method",
        Shape::Name(|| vec!["refit", "distil", "joint"]),
        "`refit`: layer by layer; `distil`: then with gradients through all layers of one expert; `joint`: `refit`, then \
         all experts together behind their routers, which learn too",
    )
    .default("refit"),
    key("tokens", Shape::Integer(1), "tokens that each expert is fitted on, of all kinds")
        .default("16000"),
    key("data", Shape::Files, "files of text by expert, in any form of `prompts_file`")
        .default("none"),
    key("prompts", Shape::Bool, "fit on the expert's prompts, too").default("false"),
    key("self_text", Shape::Bool, "each expert writes what is missing to `tokens` itself")
        .default("true"),
    key("steps", Shape::Integer(1), "gradient steps of `distil` and `joint` at most")
        .default("400"),
    key("rank", Shape::Integer(1), "`distil` and `joint` train factors of this rank (LoRA)")
        .default("none: the matrices themselves"),
    key(
        "stream",
        Shape::Scale,
        "`distil` and `joint`: weight of the squared difference from the teacher's stream, as a share of it, beside the \
         divergence from its predictions",
    )
    .default("0"),
    key("state", Shape::Text, "folder, seen from the recipe, that keeps what is fitted: a build that was stopped goes on")
        .default("none"),
];

/// The object form of a model reference.
pub const SOURCE: &[Key] = &[
    key("model", Shape::Any, "folder, GGUF file or Hub name").required(),
    key("revision", Shape::Text, "Hub revision").default("main"),
    key("lora", Shape::Any, "PEFT adapter on top").default("none"),
    key("lora_revision", Shape::Text, "Hub revision of the adapter").default("main"),
    key("override_architecture", Shape::Any, "another class name")
        .later(false, "the architecture is read from the model's config.json"),
];

/// `{path, revision}` inside the object form.
pub const PATH: &[Key] = &[
    key("path", Shape::Text, "folder, GGUF file or Hub name").required(),
    key("revision", Shape::Text, "Hub revision").default("main"),
];

/// All tables by name.
pub const TABLES: &[(&str, &[Key])] = &[
    ("moe", MOE),
    ("expert", EXPERT),
    ("dense", DENSE),
    ("module", MODULE),
    ("model", DENSE_MODEL),
    ("slice", SLICE),
    ("slice_source", SLICE_SOURCE),
    ("attention", ATTENTION),
    ("tokenizer", TOKENIZER),
    ("token", TOKEN),
    ("row", ROW),
    ("align", ALIGN),
    ("source", SOURCE),
    ("path", PATH),
];

/// The recipe language as a JSON schema (draft 2020-12), for editors.
pub fn json_schema() -> Value {
    let mut definitions = Map::new();
    for (name, keys) in TABLES {
        definitions.insert((*name).to_owned(), object(keys));
    }
    definitions.insert("model_reference".into(), json!({
        "description": "`PATH[@revision][+ADAPTER[@revision]]`, a path to another recipe, an object, or a recipe",
        "anyOf": [
            {"type": "string"},
            {"$ref": "#/$defs/source"},
            {"$ref": "#/$defs/dense"},
        ],
    }));
    let scalar = json!({"type": ["number", "boolean", "string"]});
    let gradient = json!({"anyOf": [scalar, {"type": "array", "items": scalar}]});
    let filtered = json!({
        "type": "object",
        "properties": {"filter": {"type": "string"}, "value": gradient},
        "required": ["value"],
        "additionalProperties": false,
    });
    let value = json!({"anyOf": [gradient, filtered, {"type": "array", "items": filtered}]});
    definitions.insert(
        "parameters".into(),
        json!({
            "type": "object",
            "properties": method_parameters(&value),
            "additionalProperties": false,
        }),
    );
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe-merge recipe",
        "anyOf": [{"$ref": "#/$defs/moe"}, {"$ref": "#/$defs/dense"}],
        "$defs": definitions,
    })
}

/// The parameters of all methods, each described for the methods that have it.
fn method_parameters(value: &Value) -> Map<String, Value> {
    let mut properties = Map::new();
    for method in METHODS {
        for p in method.parameters {
            let entry = properties.entry(p.name).or_insert_with(|| value.clone());
            let line = format!("{}: {}", method.name, p.doc);
            match &mut entry["description"] {
                Value::String(doc) => *doc = format!("{doc}; {line}"),
                other => *other = line.into(),
            }
        }
    }
    properties
}

fn object(keys: &[Key]) -> Value {
    let mut properties = Map::new();
    for key in keys {
        let mut schema = shape(&key.shape);
        let mut doc = key.doc.to_owned();
        if let Some(default) = key.default {
            doc.push_str(&format!(" (default: {default})"));
        }
        if let Availability::Later { .. } = key.availability {
            doc.push_str(" (not supported by this version)");
        }
        schema.insert("description".into(), doc.into());
        properties.insert(key.name.to_owned(), schema.into());
    }
    let required: Vec<_> = keys.iter().filter(|k| k.required).map(|k| k.name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn shape(shape: &Shape) -> Map<String, Value> {
    let reference = |name: &str| json!({"$ref": format!("#/$defs/{name}")});
    let schema = match shape {
        Shape::Text => json!({"type": "string"}),
        Shape::Bool => json!({"type": "boolean"}),
        Shape::Integer(least) => json!({"type": "integer", "minimum": least}),
        Shape::Scale => json!({"type": "number", "minimum": 0}),
        Shape::Choice => json!({"enum": [true, false, "auto"]}),
        Shape::TextOrTexts => json!({"anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
        ]}),
        Shape::Texts => json!({"type": "array", "items": {"type": "string"}}),
        Shape::Dtype => json!({"type": "string", "examples": ["float32", "bfloat16", "float16"]}),
        Shape::Source => json!({"allOf": [reference("model_reference")]}),
        Shape::Range => json!({
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        }),
        Shape::Name(names) => json!({"type": "string", "examples": names()}),
        Shape::Parameters => json!({"allOf": [reference("parameters")]}),
        Shape::Files => json!({"type": "object", "additionalProperties": {"type": "string"}}),
        Shape::Object(name) => json!({"allOf": [reference(name)]}),
        Shape::Map(name) => json!({
            "type": "object",
            "additionalProperties": {"anyOf": [reference(name), {"type": "null"}]},
        }),
        Shape::Objects(name) => json!({"type": "array", "items": reference(name)}),
        Shape::NameOr(names, name) => json!({"anyOf": [{"enum": names}, reference(name)]}),
        Shape::Any => json!({}),
    };
    match schema {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_knows_every_key() {
        let schema = json_schema();
        for (name, keys) in TABLES {
            let object = &schema["$defs"][name];
            for key in *keys {
                let doc = object["properties"][key.name]["description"].as_str().expect(key.name);
                assert!(doc.starts_with(key.doc));
            }
            assert_eq!(object["additionalProperties"], json!(false));
        }
        assert_eq!(schema["$defs"]["moe"]["required"], json!(["base_model", "experts"]));
    }

    #[test]
    fn every_reference_has_a_definition() {
        fn walk<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
            match value {
                Value::Object(map) => {
                    found.extend(map.get("$ref").and_then(|r| r.as_str()));
                    map.values().for_each(|v| walk(v, found));
                }
                Value::Array(items) => items.iter().for_each(|v| walk(v, found)),
                _ => {}
            }
        }
        let schema = json_schema();
        let mut references = Vec::new();
        walk(&schema, &mut references);
        assert!(references.len() > 10);
        for reference in references {
            let name = reference.strip_prefix("#/$defs/").expect("local reference");
            assert!(schema["$defs"].get(name).is_some(), "{reference}");
        }
    }
}
