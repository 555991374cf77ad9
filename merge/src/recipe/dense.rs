//! Dense merge recipes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use moe_merge_checkpoint::Dtype;

use super::moe::MOST;
use super::node::{Node, Value};
use super::prompts::ExpertFile;
use super::reader::{Object, Reader, join, nearest};
use super::schema;
use super::setting::Setting;
use super::source::{Place, SourceSpec};
use super::tokenizer::TokenizerSpec;
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
    /// What is merged, by module; a single entry without a name for all modules.
    pub modules: Vec<ModuleSpec>,
    /// Parameters for everything.
    pub parameters: Parameters,
    /// Dtype that the models are rounded to, and of the arithmetic; as stored by default.
    pub dtype: Option<Dtype>,
    /// Dtype of the arithmetic instead: models are taken as they are stored, and only the result is rounded.
    pub compute: Option<Dtype>,
    /// Dtype of the output; `dtype` by default.
    pub out_dtype: Option<Dtype>,
    /// The vocabulary; without one all models need the same number of rows.
    pub tokenizer: Option<Box<TokenizerSpec>>,
    /// A name of [`CHAT_TEMPLATES`](super::CHAT_TEMPLATES), or Jinja text.
    pub chat_template: Option<String>,
    /// Tokens that each model writes itself, 0 for none; absent: where it has no text. For methods that look at activations.
    pub self_text: Option<usize>,
    /// Tokens of each model that files of prompts may fill.
    pub prompt_tokens: Option<usize>,
    /// Whether the experts of MoE models are put into the order of the first model's, and by what.
    pub match_experts: MatchExperts,
    /// Whether the neurons of all MLPs are, by their weights.
    pub match_neurons: bool,
    /// Seed of the random methods.
    pub seed: u64,
    /// Shown in reports.
    pub name: Option<String>,
    /// Folder to write, as written.
    pub output: Option<PathBuf>,
    /// Where the recipe stands.
    pub place: Place,
}

/// How it is found out which experts of MoE models go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MatchExperts {
    /// By their numbers.
    #[default]
    None,
    /// By the correlation of their weights.
    Weights,
    /// By the correlation of what they make of the same text.
    Activations,
}

impl DenseRecipe {
    /// Its models with their parameters, in order; sources of slices too.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        self.modules.iter().flat_map(|m| m.parts.inputs())
    }
}

/// A module of the models, text decoder or vision tower, and how it is merged.
#[derive(Debug, Clone)]
pub struct ModuleSpec {
    /// Its name; `None` for `models` and `slices` of the recipe itself, which are about all modules.
    pub name: Option<String>,
    /// What is merged.
    pub parts: Parts,
    /// Parameters for this module.
    pub parameters: Parameters,
    /// Where it stands.
    pub place: Place,
}

impl ModuleSpec {
    /// `models` of the recipe itself.
    pub fn of_models(models: Vec<Input>, place: Place) -> Self {
        Self { name: None, parts: Parts::Models(models), parameters: Parameters::new(), place }
    }
}

/// What is merged.
#[derive(Debug, Clone)]
pub enum Parts {
    /// Whole models.
    Models(Vec<Input>),
    /// Layers, one slice after the other.
    Slices(Vec<Slice>),
}

impl Parts {
    /// The models, or the sources of all slices.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        let (models, slices) = match self {
            Self::Models(models) => (models.as_slice(), &[][..]),
            Self::Slices(slices) => (&[][..], slices.as_slice()),
        };
        models.iter().chain(slices.iter().flat_map(|s: &Slice| &s.sources))
    }

    fn all_with_base(&self) -> bool {
        matches!(self, Self::Slices(slices) if slices.iter().all(|s| s.base_model.is_some()))
    }
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
    /// Text of its kind, for methods that look at activations.
    pub text: ModelText,
}

/// Text of the kind that a model is good at.
#[derive(Debug, Clone, Default)]
pub struct ModelText {
    /// In the recipe.
    pub prompts: Vec<String>,
    /// In files.
    pub files: Vec<ExpertFile>,
}

impl ModelText {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty() && self.files.is_empty()
    }
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
        let modules = self.modules(&object, method);
        let dtype = self.dtype_at(&object, "dtype");
        let compute = self.dtype_at(&object, "compute");
        let out_dtype = self.dtype_at(&object, "out_dtype");
        let tokenizer = self.tokenizer(&object).map(Box::new);
        let chat_template = self.chat_template(&object);
        let self_text = self.self_text(&object);
        let prompt_tokens =
            object.get("prompt_tokens").and_then(|(n, p)| self.integer(n, &p, 1..=MOST));
        let match_experts = object.get("match_experts").and_then(|(node, path)| {
            match self.one_of(node, &path, &["none", "weights", "activations"])?.as_str() {
                "weights" => Some(MatchExperts::Weights),
                "activations" => Some(MatchExperts::Activations),
                _ => None,
            }
        });
        let match_neurons = match object.get("match_neurons") {
            Some((node, path)) => {
                self.one_of(node, &path, &["none", "weights"]).as_deref() == Some("weights")
            }
            None => false,
        };
        let seed = self.seed(&object);
        let name = self.text_at(&object, "name");
        let output = self.output_at(&object);
        if let Some(method) = method
            && method.base == methods::Base::Required
            && base_model.is_none()
            && !object.has("base_model")
            && (modules.is_empty() || !modules.iter().all(|m| m.parts.all_with_base()))
        {
            let what = format!("`{}` needs a `base_model`", method.name);
            self.error(object.at, &join(path, "base_model"), what);
        }
        if let Some(method) = method {
            let compares = match_experts == Some(MatchExperts::Activations);
            self.check_text(&object, method, &modules, self_text, compares);
        }
        (self.errors.len() == before).then_some(())?;
        Some(DenseRecipe {
            method: method?,
            base_model,
            modules,
            parameters,
            dtype,
            compute,
            out_dtype,
            tokenizer,
            chat_template,
            match_experts: match_experts.unwrap_or_default(),
            match_neurons,
            self_text,
            prompt_tokens: prompt_tokens.map(|n| n as usize),
            seed,
            name,
            output,
            place: self.place(node.at, path),
        })
    }

    /// Text where the method looks at none, or none where it does; what such a method cannot do.
    fn check_text(
        &mut self,
        object: &Object,
        method: &Method,
        modules: &[ModuleSpec],
        self_text: Option<usize>,
        compares: bool,
    ) {
        let models = || modules.iter().flat_map(|m| m.parts.inputs());
        if method.activations.is_none() && compares {
            return;
        }
        if method.activations.is_none() {
            let given = ["self_text", "prompt_tokens"].into_iter().filter_map(|k| object.get(k));
            let mut places: Vec<_> = given.map(|(node, path)| (node.at, path)).collect();
            let with = models().filter(|m| !m.text.is_empty()).map(|m| &m.source.place);
            places.extend(with.map(|p| (p.at, p.path.clone())));
            for (at, path) in places {
                let what = format!("`{}` looks at no text", method.name);
                let error = self.error(at, &path, what);
                error.expected = Some(format!(
                    "a method that does ({}), or `match_experts: activations`",
                    readers().join(", ")
                ));
                error.hint = Some("remove the text, or choose another method".into());
            }
            return;
        }
        if let Some((node, path)) = object.get("tokenizer").or(object.get("tokenizer_source")) {
            let what = format!("`{}` runs its models on the same tokens", method.name);
            self.error(node.at, &path, what).hint =
                Some("give the models one vocabulary first, in a recipe of its own".into());
        }
        let key = match modules {
            [_, _, ..] => Some("modules"),
            [one] if matches!(one.parts, Parts::Slices(_)) => Some("slices"),
            _ => None,
        };
        if let Some(key) = key {
            let what = format!("`{}` runs whole models", method.name);
            let error = self.error(object.at, &join(&object.path, key), what);
            error.expected = Some("`models`".into());
            error.hint =
                Some("merge modules and slices by weights alone, as with `tsv` or `linear`".into());
        }
        for model in models().filter(|m| m.text.is_empty() && self_text == Some(0)) {
            let place = &model.source.place;
            let what = "a model has no text, and `self_text: 0` lets it write none";
            self.error(place.at, &place.path, what).expected =
                Some("`prompts`, a `prompts_file`, or `self_text` left out".into());
        }
    }

    /// The entries of `modules`, or the only one where there is no such key; none after an error.
    fn modules(&mut self, object: &Object, method: Option<&'static Method>) -> Vec<ModuleSpec> {
        let mut modules = Vec::new();
        let Some((node, path)) = object.get("modules") else {
            let place = self.place(object.at, &object.path);
            let (name, parameters) = (None, Parameters::new());
            let parts = self.parts(object, method);
            modules.extend(parts.map(|parts| ModuleSpec { name, parts, parameters, place }));
            return modules;
        };
        if object.has("models") || object.has("slices") {
            let error = self.error(node.at, &path, "`modules` stands beside `models` or `slices`");
            error.expected = Some("exactly one of `models`, `slices` and `modules`".into());
            return modules;
        }
        let Value::Map(entries) = &node.value else {
            self.wrong(node, &path, "a mapping of modules");
            return modules;
        };
        if entries.is_empty() {
            self.wrong(node, &path, "at least one module");
        }
        for (key, value) in entries {
            let path = join(&path, &key.text);
            let keys = schema::MODULE;
            let Some(object) = self.object(value, &path, keys, "a module") else { continue };
            let parameters = self.parameters(&object, method, Level::Shared);
            let Some(parts) = self.parts(&object, method) else { continue };
            let (name, place) = (Some(key.text.clone()), self.place(key.at, &path));
            modules.push(ModuleSpec { name, parts, parameters, place });
        }
        modules
    }

    /// `models` or `slices`, exactly one of them.
    fn parts(&mut self, object: &Object, method: Option<&'static Method>) -> Option<Parts> {
        match (object.has("models"), object.has("slices")) {
            (true, false) => Some(Parts::Models(self.models(object, method))),
            (false, true) => Some(Parts::Slices(self.slices(object, method))),
            (both, _) => {
                let what = if both {
                    "both `models` and `slices` are given"
                } else {
                    "neither `models` nor `slices` is given"
                };
                self.error(object.at, &object.path, what).expected =
                    Some("exactly one of `models` and `slices`".into());
                None
            }
        }
    }

    /// The method under `merge_method`.
    pub fn method(&mut self, object: &Object) -> Option<&'static Method> {
        let (node, path) = object.get("merge_method")?;
        let text = self.text(node, &path)?;
        if let Some(method) = methods::by_name(&text) {
            return Some(method);
        }
        let names: Vec<_> = methods::METHODS.iter().map(|m| m.name).collect();
        self.unknown_name(node, &path, &text, &names);
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
            let text = ModelText {
                prompts: self.prompts(&object, "prompts"),
                files: self.prompts_files(&object),
            };
            models.extend(source.map(|source| Input { source, layers: None, parameters, text }));
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
                let text = ModelText::default();
                sources.extend(source.map(|source| Input { source, layers, parameters, text }));
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
            if let Some(setting) = self.setting(value, &here, parameter.kind, parameter.range) {
                found.insert(parameter.name, setting);
            }
        }
        found
    }
}

/// Methods that look at text.
fn readers() -> Vec<String> {
    let all = methods::METHODS.iter().filter(|m| m.activations.is_some());
    all.map(|m| format!("`{}`", m.name)).collect()
}

/// Where parameters stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Beside one model.
    Model,
    /// For several models.
    Shared,
}
