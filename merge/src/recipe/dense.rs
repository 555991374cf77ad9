//! Dense merge recipes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use moe_merge_checkpoint::Dtype;

use super::node::{Node, Value};
use super::reader::{Object, Reader, join, nearest};
use super::schema;
use super::setting::Setting;
use super::source::{Place, SourceSpec};
use crate::methods::{self, Method, Scope};

/// Parameter values by name, as one level of a recipe gives them.
pub type Parameters = BTreeMap<&'static str, Setting>;

/// A dense merge recipe.
#[derive(Debug, Clone)]
pub struct DenseRecipe {
    /// The method.
    pub method: &'static Method,
    /// The model that task vectors are taken against; also gives config and tokenizer.
    pub base_model: Option<SourceSpec>,
    /// What is merged.
    pub parts: Parts,
    /// Parameters for everything.
    pub parameters: Parameters,
    /// Dtype of the arithmetic; as stored by default.
    pub dtype: Option<Dtype>,
    /// Dtype of the output; that of the arithmetic by default.
    pub out_dtype: Option<Dtype>,
    /// Whether the recipe names a common tokenizer: then all have to be the same file.
    pub common_tokenizer: bool,
    /// Shown in reports.
    pub name: Option<String>,
    /// Folder to write, as written.
    pub output: Option<PathBuf>,
    /// Where the recipe stands.
    pub place: Place,
}

/// What a dense merge merges.
#[derive(Debug, Clone)]
pub enum Parts {
    /// Whole models.
    Models(Vec<Input>),
    /// Layers, one slice after the other.
    Slices(Vec<Slice>),
}

/// A model with its parameters.
#[derive(Debug, Clone)]
pub struct Input {
    /// The model.
    pub source: SourceSpec,
    /// Its layers; all of them where it stands under `models`.
    pub layers: Option<Range<usize>>,
    /// Its own parameters.
    pub parameters: Parameters,
}

/// An output slice.
#[derive(Debug, Clone)]
pub struct Slice {
    /// The layers that are merged; all ranges have the same length.
    pub sources: Vec<Input>,
    /// Another base for this slice.
    pub base_model: Option<SourceSpec>,
    /// Parameters for this slice.
    pub parameters: Parameters,
    /// Where it stands.
    pub place: Place,
}

impl Reader {
    pub fn dense(&mut self, node: &Node, path: &str) -> Option<DenseRecipe> {
        let before = self.errors.len();
        let object = self.object(node, path, schema::DENSE, "a dense merge recipe")?;
        let method = self.method(&object);
        let base_model = self.source_at(&object, "base_model");
        let parameters = self.parameters(&object, method, Level::Shared);
        let parts = match (object.has("models"), object.has("slices")) {
            (true, false) => Some(Parts::Models(self.models(&object, method))),
            (false, true) => Some(Parts::Slices(self.slices(&object, method))),
            (both, _) => {
                let what = if both {
                    "both `models` and `slices` are given"
                } else {
                    "neither `models` nor `slices` is given"
                };
                self.error(object.at, path, what).expected =
                    Some("exactly one of `models` and `slices`".into());
                None
            }
        };
        let dtype = self.dtype_at(&object, "dtype");
        let out_dtype = self.dtype_at(&object, "out_dtype");
        if let Some((node, path)) = object.get("tokenizer_source") {
            self.one_of(node, &path, &["base", "union"]);
        }
        let name = self.text_at(&object, "name");
        let output = self.output_at(&object);
        if let Some(method) = method
            && method.base == methods::Base::Required
            && base_model.is_none()
            && !object.has("base_model")
            && !matches!(&parts, Some(Parts::Slices(s)) if s.iter().all(|s| s.base_model.is_some()))
        {
            let what = format!("`{}` needs a `base_model`", method.name);
            self.error(object.at, &join(path, "base_model"), what);
        }
        (self.errors.len() == before).then_some(())?;
        Some(DenseRecipe {
            method: method?,
            base_model,
            parts: parts?,
            parameters,
            dtype,
            out_dtype,
            common_tokenizer: object.has("tokenizer_source"),
            name,
            output,
            place: self.place(node.at, path),
        })
    }

    /// The method under `merge_method`.
    pub fn method(&mut self, object: &Object) -> Option<&'static Method> {
        let (node, path) = object.get("merge_method")?;
        let text = self.text(node, &path)?;
        if let Some(method) = methods::by_name(&text) {
            return Some(method);
        }
        let names: Vec<_> = methods::METHODS.iter().map(|m| m.name).collect();
        if methods::LATER.contains(&text.as_str()) {
            let what = format!("`merge_method: {text}` is not available in this version");
            let error = self.error(node.at, &path, what);
            error.expected = Some(format!("one of {}", names.join(", ")));
            return None;
        }
        self.unknown_name(node, &path, &text, &names);
        if let Some(later) = nearest(&text, methods::LATER.iter().copied())
            && let Some(error) = self.errors.last_mut()
            && error.hint.is_none()
        {
            error.hint =
                Some(format!("`{later}` is mergekit's name, not available in this version"));
        }
        None
    }

    pub fn models(&mut self, object: &Object, method: Option<&'static Method>) -> Vec<Input> {
        let items = self.items_at(object, "models", "a list of models");
        if items.is_empty()
            && let Some((node, path)) = object.get("models")
            && matches!(node.value, Value::List(_))
        {
            self.wrong(node, &path, "at least one model");
        }
        let mut models = Vec::new();
        for (node, path) in items {
            let keys = schema::DENSE_MODEL;
            let Some(object) = self.object(node, &path, keys, "a model") else { continue };
            let source = self.source_at(&object, "model");
            let parameters = self.parameters(&object, method, Level::Model);
            models.extend(source.map(|source| Input { source, layers: None, parameters }));
        }
        models
    }

    fn slices(&mut self, object: &Object, method: Option<&'static Method>) -> Vec<Slice> {
        let items = self.items_at(object, "slices", "a list of slices");
        if items.is_empty()
            && let Some((node, path)) = object.get("slices")
            && matches!(node.value, Value::List(_))
        {
            self.wrong(node, &path, "at least one slice");
        }
        let mut slices = Vec::new();
        for (node, path) in items {
            let Some(object) = self.object(node, &path, schema::SLICE, "a slice") else { continue };
            let base_model = self.source_at(&object, "base_model");
            let parameters = self.parameters(&object, method, Level::Shared);
            let mut sources = Vec::new();
            for (node, path) in self.items_at(&object, "sources", "a list of sources") {
                let keys = schema::SLICE_SOURCE;
                let Some(object) = self.object(node, &path, keys, "a source") else { continue };
                let source = self.source_at(&object, "model");
                let layers = self.range_at(&object, "layer_range");
                let parameters = self.parameters(&object, method, Level::Model);
                sources.extend(source.map(|source| Input { source, layers, parameters }));
            }
            let length = |i: &Input| i.layers.as_ref().map(|l| l.len());
            let first = sources.first().and_then(length);
            if let Some(other) = sources.iter().find(|s| length(s) != first && s.layers.is_some())
                && first.is_some()
            {
                let place = other.source.place.clone();
                let what = "the sources of a slice have different numbers of layers";
                let error = self.error(place.at, &path, what);
                error.expected = first.map(|n| format!("{n} layers, as the first source has"));
                error.found = length(other).map(|n| format!("{n} layers"));
            }
            if sources.is_empty() && object.has("sources") {
                self.error(node.at, &join(&path, "sources"), "a slice needs at least one source");
            }
            let place = self.place(node.at, &path);
            slices.push(Slice { sources, base_model, parameters, place });
        }
        slices
    }

    /// The parameters under `parameters`, checked against the method's table.
    pub fn parameters(
        &mut self,
        object: &Object,
        method: Option<&'static Method>,
        level: Level,
    ) -> Parameters {
        let mut found = Parameters::new();
        let (Some((node, path)), Some(method)) = (object.get("parameters"), method) else {
            return found;
        };
        let Value::Map(entries) = &node.value else {
            self.wrong(node, &path, "a mapping of parameter names to values");
            return found;
        };
        let names: Vec<_> = method.parameters.iter().map(|p| p.name).collect();
        for (key, value) in entries {
            let here = join(&path, &key.text);
            let Some(parameter) = method.parameters.iter().find(|p| p.name == key.text) else {
                let text = super::node::shorten(&key.text);
                let what = format!("`{}` has no parameter `{text}`", method.name);
                let error = self.error(key.at, &here, what);
                let list = if names.is_empty() { "none".into() } else { names.join(", ") };
                error.expected = Some(format!("parameters of `{}`: {list}", method.name));
                error.hint = nearest(&key.text, names.iter().copied())
                    .map(|n| format!("did you mean `{n}`?"));
                continue;
            };
            if level == Level::Model && parameter.scope == Scope::Global {
                let what = format!("`{}` holds for all models together", parameter.name);
                self.error(key.at, &here, what).hint =
                    Some("put it under `parameters:` of the slice or of the recipe".into());
                continue;
            }
            if matches!(value.value, Value::Null) {
                continue;
            }
            if let Some(setting) = self.setting(value, &here, parameter.kind) {
                found.insert(parameter.name, setting);
            }
        }
        found
    }
}

/// Where parameters stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Beside one model.
    Model,
    /// For several models.
    Shared,
}
