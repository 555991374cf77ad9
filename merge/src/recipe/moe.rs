//! MoE recipes.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use moe_merge_checkpoint::Dtype;
use moe_merge_router::{ESTIMATORS, Estimator, Method as RouterMethod};

use super::align::Align;
use super::dense::{DenseRecipe, Input, MatchExperts, ModelText, ModuleSpec, Parameters};
use super::node::{Node, Value};
use super::prompts::ExpertFile;
use super::reader::{Object, Reader, as_bool};
use super::schema;
use super::setting::Setting;
use super::source::{Place, SourceSpec};
use crate::methods::{self, Base, Method};

/// A MoE recipe.
#[derive(Debug, Clone)]
pub struct MoeRecipe {
    /// Gives embeddings, attention and norms; its hidden states make the gates.
    pub base_model: SourceSpec,
    /// The experts, at least two.
    pub experts: Vec<Expert>,
    /// Experts that every token visits.
    pub shared_experts: Vec<Expert>,
    /// How the gates are made.
    pub gate_mode: GateMode,
    /// Tokens that each expert writes itself as calibration text, 0 for none; absent: where it is needed.
    pub self_text: Option<usize>,
    /// Whether the base's own MLPs are one more expert; absent: not asked for.
    pub generalist: Option<Choice>,
    /// Whether the features of a layer come from the merged model; absent: [`Choice::Auto`].
    pub sequential: Option<Choice>,
    /// Tokens of calibration text per expert that files of prompts may fill.
    pub prompt_tokens: Option<usize>,
    /// Experts that each token visits, `1..=experts`.
    pub experts_per_token: usize,
    /// Dtype of the output; the base's by default.
    pub dtype: Option<Dtype>,
    /// Output families that the recipe allows, in order of preference; empty: the first that fits.
    pub architecture: Vec<Architecture>,
    /// How the tensors outside the MLPs are made.
    pub attention: Attention,
    /// How experts are fitted to the stream that they now live in; absent: they are used as they are.
    pub align: Option<Align>,
    /// Whether the base's tokenizer serves all, whatever the experts were trained with (`tokenizer: base`).
    pub base_tokenizer: bool,
    /// Text files by domain, in the order of the recipe.
    pub evaluation: Vec<(String, PathBuf)>,
    /// Folder to write, as written.
    pub output: Option<PathBuf>,
    /// Seed of noise and of random gates.
    pub seed: u64,
    /// Where the recipe stands.
    pub place: Place,
}

/// Tokens that a recipe can ask for at most.
pub(super) const MOST: u64 = 1 << 30;

/// One expert.
#[derive(Debug, Clone)]
pub struct Expert {
    /// The model whose MLPs are used.
    pub source: SourceSpec,
    /// Its name, where the recipe gives one.
    pub name: Option<String>,
    /// Texts that it should get, as written in the recipe.
    pub positive_prompts: Vec<String>,
    /// Files with more of them.
    pub prompts_files: Vec<ExpertFile>,
    /// Texts that it should not get.
    pub negative_prompts: Vec<String>,
    /// Only in these layers; all by default.
    pub layers: Option<Range<usize>>,
    /// Standard deviation of noise added to its matrices.
    pub noise_scale: f32,
    /// Factor on its down projection.
    pub residual_scale: f32,
    /// Where it stands.
    pub place: Place,
}

impl Expert {
    /// Its name, or the last part of its source.
    pub fn label(&self) -> String {
        let source = || {
            let text = self.source.to_string();
            text.rsplit(['/', '+']).find(|p| !p.is_empty()).unwrap_or(&text).to_owned()
        };
        self.name.clone().unwrap_or_else(source)
    }

    /// Whether there is text that it should get.
    pub fn has_prompts(&self) -> bool {
        !self.positive_prompts.is_empty() || !self.prompts_files.is_empty()
    }
}

/// How gates are made: an estimator of the router crate.
#[derive(Clone, Copy)]
pub struct GateMode(&'static Estimator);

impl GateMode {
    /// The mode called `name` in recipes.
    pub fn named(name: &str) -> Option<Self> {
        moe_merge_router::find(name).ok().map(Self)
    }

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// The estimator.
    pub fn estimator(self) -> &'static Estimator {
        self.0
    }

    /// Whether every expert needs prompts of its own: mergekit's modes that read any.
    pub fn needs_prompts(self) -> bool {
        matches!(self.0.method, RouterMethod::Streams(_) | RouterMethod::Embeddings(_))
    }

    /// Whether it learns from router inputs: then experts without prompts can write text of their own.
    pub fn learned(self) -> bool {
        !self.needs_prompts() && !matches!(self.0.method, RouterMethod::Seed(_))
    }
}

impl PartialEq for GateMode {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for GateMode {}

impl fmt::Debug for GateMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A decision that can be left to the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// Whatever measures better.
    Auto,
    /// Yes.
    Yes,
    /// No.
    No,
}

/// An output family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Mixtral, from llama or mistral.
    Mixtral,
    /// DeepSeek MoE with llama attention, from llama or mistral.
    DeepSeek,
    /// Qwen2-MoE, from llama, mistral or qwen2.
    Qwen2Moe,
    /// Qwen3-MoE, from qwen3.
    Qwen3Moe,
    /// ERNIE 4.5 MoE, from llama or mistral.
    Ernie45Moe,
    /// Granite MoE with shared experts, from llama or mistral.
    GraniteMoeShared,
}

/// Every output family by its name in recipes, in the order in which they are tried.
pub const ARCHITECTURES: &[(&str, Architecture)] = &[
    ("mixtral", Architecture::Mixtral),
    ("deepseek", Architecture::DeepSeek),
    ("qwen2_moe", Architecture::Qwen2Moe),
    ("qwen3_moe", Architecture::Qwen3Moe),
    ("ernie4_5_moe", Architecture::Ernie45Moe),
    ("granitemoeshared", Architecture::GraniteMoeShared),
];

impl Architecture {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        ARCHITECTURES.iter().find(|(_, a)| *a == self).map_or("mixtral", |(name, _)| name)
    }

    /// The families that `text` can mean: one of our names, else every family whose mergekit name
    /// (`Mixtral`, `DeepSeek MoE`, `Qwen MoE`, `Qwen3 MoE`) or own name starts with it, in any case.
    pub fn candidates(text: &str) -> Vec<Self> {
        const MERGEKIT: [(&str, Architecture); 4] = [
            ("mixtral", Architecture::Mixtral),
            ("deepseek moe", Architecture::DeepSeek),
            ("qwen moe", Architecture::Qwen2Moe),
            ("qwen3 moe", Architecture::Qwen3Moe),
        ];
        let text = text.to_lowercase();
        if text.is_empty() {
            return Vec::new();
        }
        let mut found: Vec<_> =
            ARCHITECTURES.iter().filter(|(name, _)| *name == text).map(|(_, a)| *a).collect();
        if found.is_empty() {
            let names = MERGEKIT.iter().chain(ARCHITECTURES);
            for (_, a) in names.filter(|(name, _)| name.starts_with(&text)) {
                if !found.contains(a) {
                    found.push(*a);
                }
            }
        }
        found
    }
}

/// How the tensors outside the MLPs are made.
#[derive(Debug, Clone)]
pub enum Attention {
    /// Taken from the base.
    Base,
    /// A dense merge; only its tensors outside the MLPs are used. `average` is `linear` over all experts.
    Merge(Box<DenseRecipe>),
}

impl Reader {
    pub fn moe(&mut self, node: &Node, path: &str) -> Option<MoeRecipe> {
        let before = self.errors.len();
        let object = self.object(node, path, schema::MOE, "a MoE recipe")?;
        let base_model = self.source_at(&object, "base_model");
        let gate_mode = self.gate_mode(&object);
        let mut experts = self.experts(&object, "experts");
        let mut shared_experts = self.experts(&object, "shared_experts");
        let self_text = self.self_text(&object);
        let generalist = self.choice(&object, "generalist");
        let sequential = self.choice(&object, "sequential");
        let prompt_tokens =
            object.get("prompt_tokens").and_then(|(n, p)| self.integer(n, &p, 1..=MOST));
        self.share_out(&mut experts, &mut shared_experts);
        let top_k = self.top_k(&object);
        let dtype = self.dtype_at(&object, "dtype");
        let architecture = self.architecture(&object);
        let base_tokenizer = match object.get("tokenizer") {
            Some((node, path)) => self.one_of(node, &path, &["base"]).is_some(),
            None => false,
        };
        let labels: Vec<String> = experts.iter().flatten().map(Expert::label).collect();
        let align = self.align(&object, &labels);
        let evaluation = self.evaluation(&object);
        let output = self.output_at(&object);
        let seed = self.seed(&object);
        let identical = object.get("allow_identical_experts");
        let identical = identical.and_then(|(n, p)| self.boolean(n, &p)).unwrap_or(false);
        self.check_experts(&object, &experts, gate_mode, self_text, identical);
        self.check_shared(&object, &shared_experts);
        self.check_names(&experts, &shared_experts);
        let experts: Vec<Expert> = experts.into_iter().flatten().collect();
        let attention = match &base_model {
            Some(base) => self.attention(&object, base, &experts, seed),
            None => None,
        };
        (self.errors.len() == before).then_some(())?;
        Some(MoeRecipe {
            base_model: base_model?,
            experts,
            shared_experts: shared_experts.into_iter().flatten().collect(),
            gate_mode: gate_mode?,
            self_text,
            generalist,
            sequential,
            prompt_tokens: prompt_tokens.map(|n| n as usize),
            experts_per_token: top_k,
            dtype,
            architecture,
            attention: attention?,
            align,
            base_tokenizer,
            evaluation,
            output,
            seed,
            place: self.place(node.at, path),
        })
    }

    fn gate_mode(&mut self, object: &Object) -> Option<GateMode> {
        let (node, path) = match object.get("gate_mode") {
            Some(found) => found,
            None => return GateMode::named("auto"),
        };
        let names: Vec<_> = ESTIMATORS.iter().map(|e| e.name).collect();
        GateMode::named(&self.one_of(node, &path, &names)?)
    }

    /// A number of tokens; `false` is 0.
    pub fn self_text(&mut self, object: &Object) -> Option<usize> {
        let (node, path) = object.get("self_text")?;
        match node.value {
            Value::Bool(false) => Some(0),
            _ => self.integer(node, &path, 0..=MOST).map(|n| n as usize),
        }
    }

    fn choice(&mut self, object: &Object, key: &str) -> Option<Choice> {
        let (node, path) = object.get(key)?;
        match (as_bool(node), &node.value) {
            (Some(true), _) => Some(Choice::Yes),
            (Some(false), _) => Some(Choice::No),
            (None, Value::Text(text)) if text == "auto" => Some(Choice::Auto),
            _ => {
                self.wrong(node, &path, "`true`, `false` or `auto`");
                None
            }
        }
    }

    fn architecture(&mut self, object: &Object) -> Vec<Architecture> {
        let Some((node, path)) = object.get("architecture") else { return Vec::new() };
        let Some(text) = self.text(node, &path) else { return Vec::new() };
        if text == "auto" {
            return Vec::new();
        }
        let found = Architecture::candidates(&text);
        if found.is_empty() {
            let names: Vec<_> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
            self.unknown_name(node, &path, &text, &names);
        }
        found
    }

    /// Experts per token, checked against the number of experts that are written down.
    fn top_k(&mut self, object: &Object) -> usize {
        let experts = match object.get("experts").map(|(n, _)| &n.value) {
            Some(Value::List(items)) => items.len(),
            _ => 0,
        };
        let Some((node, path)) = object.get("experts_per_token") else {
            // One expert is a mistake of its own.
            return 2;
        };
        let most = if experts < 2 { u64::MAX } else { experts as u64 };
        let before = self.errors.len();
        let top_k = self.integer(node, &path, 1..=most);
        if self.errors.len() > before
            && let Some(error) = self.errors.last_mut()
            && matches!(node.value, Value::Integer(_))
        {
            error.what = "`experts_per_token` does not fit the number of experts".into();
            error.hint = Some(format!("the recipe has {experts} experts"));
        }
        top_k.map_or(2, |k| k as usize)
    }

    /// The experts under `key`; `None` for each that has a mistake.
    fn experts(&mut self, object: &Object, key: &str) -> Vec<Option<Expert>> {
        let items = self.items_at(object, key, "a list of experts");
        items.into_iter().map(|(node, path)| self.expert(node, &path)).collect()
    }

    fn expert(&mut self, node: &Node, path: &str) -> Option<Expert> {
        let before = self.errors.len();
        let object = self.object(node, path, schema::EXPERT, "an expert")?;
        let source = self.source_at(&object, "source_model");
        let name = self.text_at(&object, "name");
        if let (Some(name), Some((node, path))) = (&name, object.get("name"))
            && (name.trim().is_empty() || name.chars().any(char::is_control))
        {
            self.wrong(node, &path, "a name of one line");
        }
        let positive_prompts = self.prompts(&object, "positive_prompts");
        let negative_prompts = self.prompts(&object, "negative_prompts");
        let prompts_files = self.prompts_files(&object);
        let layers = self.range_at(&object, "layers");
        let scale = |reader: &mut Self, key: &str, default: f32| match object.get(key) {
            Some((node, path)) => {
                let value = reader.number(node, &path, 0.0).map(|v| v as f32);
                if value.is_some_and(f32::is_infinite) {
                    reader.wrong(node, &path, "a number that fits into 32 bits");
                }
                value.unwrap_or(default)
            }
            None => default,
        };
        let noise_scale = scale(self, "noise_scale", 0.0);
        let residual_scale = scale(self, "residual_scale", 1.0);
        (self.errors.len() == before).then_some(())?;
        Some(Expert {
            source: source?,
            name,
            positive_prompts,
            prompts_files,
            negative_prompts,
            layers,
            noise_scale,
            residual_scale,
            place: self.place(node.at, path),
        })
    }

    pub fn prompts(&mut self, object: &Object, key: &str) -> Vec<String> {
        let mut prompts = Vec::new();
        for (node, path) in self.items_at(object, key, "a list of texts") {
            match self.text(node, &path) {
                Some(text) if text.trim().is_empty() => {
                    let error = self.error(node.at, &path, "a prompt is empty");
                    error.expected = Some("a text with more than blanks".into());
                    error.hint = Some("remove it, or write what the expert should get".into());
                }
                Some(text) => prompts.push(text),
                None => {}
            }
        }
        prompts
    }

    fn check_experts(
        &mut self,
        object: &Object,
        experts: &[Option<Expert>],
        gate_mode: Option<GateMode>,
        self_text: Option<usize>,
        identical: bool,
    ) {
        let Some((node, path)) = object.get("experts") else { return };
        if !matches!(node.value, Value::List(_)) {
            return;
        }
        if experts.len() < 2 {
            let error = self.error(node.at, &path, "a MoE needs at least two experts");
            error.found = Some(format!("{} in the list", experts.len()));
            return;
        }
        if let Some(gate_mode) = gate_mode {
            self.check_prompts(node, &path, experts, gate_mode, self_text);
        }
        let all: Option<Vec<_>> = experts.iter().map(Option::as_ref).collect();
        if let Some(all) = all
            && !identical
            && all.iter().all(|e| e.source.same_as(&all[0].source))
        {
            let error = self.error(node.at, &path, "all experts are the same model");
            error.expected = Some("at least two different models".into());
            error.found = Some(format!("`{}` for all {}", all[0].source, all.len()));
            error.hint = Some(
                "without training such a MoE computes what its expert computes; \
                 `allow_identical_experts: true` builds it all the same"
                    .into(),
            );
        }
    }

    fn check_prompts(
        &mut self,
        node: &Node,
        path: &str,
        experts: &[Option<Expert>],
        gate_mode: GateMode,
        self_text: Option<usize>,
    ) {
        let silent = gate_mode.learned() && self_text == Some(0);
        let without = experts.iter().flatten().filter(|e| !e.has_prompts());
        for expert in without.filter(|_| silent || gate_mode.needs_prompts()) {
            let (what, hint) = if silent {
                let what = "an expert has no prompts, and `self_text: 0` lets it write none";
                (what.to_owned(), "remove `self_text`: then it writes its own text")
            } else {
                let mode = gate_mode.name();
                let what = format!("an expert has no prompts, which `gate_mode: {mode}` needs");
                (what, "a few texts of the kind this expert is for; `gate_mode: auto` needs none")
            };
            let error = self.error(expert.place.at, &expert.place.path, what);
            error.expected = Some("`positive_prompts` or a `prompts_file`".into());
            error.hint = Some(hint.into());
        }
        let all: Option<Vec<_>> = experts.iter().map(Option::as_ref).collect();
        let Some([first, rest @ ..]) = all.as_deref() else { return };
        let same = |e: &Expert| {
            let contents = |e: &Expert| -> Vec<_> {
                let files = e.prompts_files.iter().flat_map(|f| &f.documents);
                files.map(|d| d.content.clone()).collect()
            };
            e.positive_prompts == first.positive_prompts
                && e.negative_prompts == first.negative_prompts
                && contents(e) == contents(first)
        };
        if first.has_prompts() && !rest.is_empty() && rest.iter().all(|e| same(e)) {
            let error = self.error(node.at, path, "all experts have the same prompts");
            error.expected = Some("prompts that tell the experts apart".into());
            error.hint = Some("give each expert texts of its own kind".into());
        }
    }

    fn check_shared(&mut self, object: &Object, shared: &[Option<Expert>]) {
        let Some((node, path)) = object.get("shared_experts") else { return };
        let all: Vec<_> = shared.iter().flatten().collect();
        let with = all.iter().filter(|e| e.has_prompts()).count();
        if with != 0 && with != all.len() {
            let error = self.error(node.at, &path, "only some shared experts have prompts");
            error.expected = Some("prompts for all shared experts, or for none".into());
            error.found = Some(format!("{with} of {} have prompts", all.len()));
        }
        for expert in all.iter().filter(|e| e.layers.is_some()) {
            let place = &expert.place;
            let what = "a shared expert stands in every layer";
            self.error(place.at, &place.path, what).hint = Some("remove `layers`".into());
        }
    }

    fn check_names(&mut self, experts: &[Option<Expert>], shared: &[Option<Expert>]) {
        let mut seen: Vec<(&str, &Place)> = Vec::new();
        for expert in experts.iter().chain(shared).flatten() {
            let Some(name) = expert.name.as_deref() else { continue };
            match seen.iter().find(|(n, _)| *n == name) {
                Some((_, first)) => {
                    let path = format!("{}.name", expert.place.path);
                    let found = format!("`{name}` is also {} (line {})", first.path, first.at.line);
                    self.error(expert.place.at, &path, "two experts have the same name").found =
                        Some(found);
                }
                None => seen.push((name, &expert.place)),
            }
        }
    }

    fn evaluation(&mut self, object: &Object) -> Vec<(String, PathBuf)> {
        let mut files = Vec::new();
        let Some((node, path)) = object.get("evaluation") else { return files };
        let Value::Map(entries) = &node.value else {
            self.wrong(node, &path, "a mapping of domains to text files");
            return files;
        };
        for (key, value) in entries {
            let here = format!("{path}.{}", key.text);
            files.extend(self.existing_file(value, &here).map(|f| (key.text.clone(), f)));
        }
        files
    }

    fn attention(
        &mut self,
        object: &Object,
        base: &SourceSpec,
        experts: &[Expert],
        seed: u64,
    ) -> Option<Attention> {
        let Some((node, path)) = object.get("attention") else { return Some(Attention::Base) };
        let place = self.place(node.at, &path);
        // What the experts' text is to a router, it is to a method that looks at activations.
        let inputs = |method: &'static Method| -> Vec<Input> {
            let text = |e: &Expert| match method.activations {
                Some(_) => ModelText {
                    prompts: e.positive_prompts.clone(),
                    files: e.prompts_files.clone(),
                },
                None => ModelText::default(),
            };
            let input = |e: &Expert| Input {
                source: e.source.clone(),
                layers: None,
                parameters: Parameters::new(),
                text: text(e),
            };
            experts.iter().map(input).collect()
        };
        let recipe = |method, base_model, models, parameters, dtype| {
            Attention::Merge(Box::new(DenseRecipe {
                method,
                base_model,
                modules: vec![ModuleSpec::of_models(models, place.clone())],
                parameters,
                dtype,
                compute: None,
                out_dtype: None,
                tokenizer: None,
                chat_template: None,
                match_experts: MatchExperts::None,
                match_neurons: false,
                self_text: None,
                prompt_tokens: None,
                seed,
                name: Some("attention".into()),
                output: None,
                place: place.clone(),
            }))
        };
        if !matches!(node.value, Value::Map(_)) {
            let name = self.one_of(node, &path, &["base", "average"])?;
            let weights = Parameters::from([("weight", Setting::constant(1.0))]);
            let linear = methods::by_name("linear")?;
            return Some(match name.as_str() {
                "base" => Attention::Base,
                _ => recipe(linear, None, inputs(linear), weights, None),
            });
        }
        let object = self.object(node, &path, schema::ATTENTION, "a dense merge block")?;
        let method = self.method(&object);
        let own = self.source_at(&object, "base_model");
        let mut parameters = self.parameters(&object, method, super::dense::Level::Shared);
        let models = self.models(&object, method);
        let dtype = self.dtype_at(&object, "dtype");
        let method = method?;
        let base_model = match method.base {
            Base::Required => own.or_else(|| Some(base.clone())),
            Base::Optional | Base::Ordinary => own,
        };
        if method.parameters.iter().any(|p| p.name == "weight") && !object.has("models") {
            parameters.entry("weight").or_insert_with(|| Setting::constant(1.0));
        }
        let models = if object.has("models") { models } else { inputs(method) };
        Some(recipe(method, base_model, models, parameters, dtype))
    }
}
