//! The modules of a model: parts whose layers are numbered each for itself, as text decoder and vision tower.

use std::collections::{BTreeMap, BTreeSet};

use moe_merge_checkpoint::{ConfigJson, Source};
use serde_json::Value;

use super::names::split;
use crate::recipe::{DenseRecipe, ModuleSpec, Parts, RecipeErrors, nearest};

/// A module as the table below has it: name, how names of its tensors begin, and the keys of `config.json` for the number of its
/// layers (`None`: it has no layers, `[]`: there is no key). A beginning of `""` takes what no other module takes.
type Row = (&'static str, &'static [&'static str], Option<&'static [&'static str]>);

const TEXT: Row = ("text_decoder", &[""], Some(&["text_config.num_hidden_layers"]));
const QWEN_TEXT: Row =
    ("text_decoder", &[""], Some(&["num_hidden_layers", "text_config.num_hidden_layers"]));
const PROJECTOR: Row =
    ("multi_modal_projector", &["multi_modal_projector.", "model.multi_modal_projector."], None);
const TOWER: Row = (
    "vision_tower",
    &["vision_tower.", "model.vision_tower."],
    Some(&["vision_config.num_hidden_layers"]),
);
const QWEN_TOWER: Row =
    ("vision_tower", &["visual.", "model.visual."], Some(&["vision_config.depth"]));
const MERGER: Row = ("multi_modal_projector", &["visual.merger.", "model.visual.merger."], None);
/// The mergers of `qwen3_vl` behind several vision blocks: numbered, one after the other.
const MERGERS: Row = (
    "multi_modal_projector",
    &[
        "visual.merger.",
        "model.visual.merger.",
        "visual.deepstack_merger_list.",
        "model.visual.deepstack_merger_list.",
    ],
    Some(&[]),
);

/// Families of several modules, with the names that mergekit gives these.
const FAMILIES: &[(&str, &[Row])] = &[
    ("gemma3", &[TEXT, PROJECTOR, TOWER]),
    (
        "llama4",
        &[
            TEXT,
            PROJECTOR,
            (
                "vision_model",
                &["vision_model.", "model.vision_model."],
                Some(&["vision_config.num_hidden_layers"]),
            ),
        ],
    ),
    ("mistral3", &[TEXT, PROJECTOR, TOWER]),
    ("qwen2_5_vl", &[QWEN_TEXT, MERGER, QWEN_TOWER]),
    ("qwen2_vl", &[QWEN_TEXT, MERGER, QWEN_TOWER]),
    ("qwen3_vl", &[QWEN_TEXT, MERGERS, QWEN_TOWER]),
    ("qwen3_vl_moe", &[QWEN_TEXT, MERGERS, QWEN_TOWER]),
    (
        "t5",
        &[
            ("decoder", &["decoder."], Some(&["num_decoder_layers"])),
            ("encoder", &["encoder."], Some(&["num_layers", "num_hidden_layers"])),
            ("shared", &[""], None),
        ],
    ),
    (
        "whisper",
        &[
            ("decoder", &[""], Some(&["decoder_layers"])),
            ("encoder", &["model.encoder."], Some(&["encoder_layers"])),
        ],
    ),
];

/// The module of a model that has only one, and of what stands outside of all layers in families that are not in the table.
const DEFAULT: &str = "default";

/// A module of a family.
#[derive(Debug, Clone)]
pub(super) struct Module {
    /// As recipes call it.
    pub name: String,
    starts: Vec<String>,
    /// Keys of the configuration for the number of its layers, `.` between the keys of nested objects; `None` without layers.
    pub keys: Option<Vec<String>>,
}

/// The modules of the models of a merge.
#[derive(Debug)]
pub(super) struct Family {
    model_type: String,
    pub modules: Vec<Module>,
}

impl Family {
    /// The modules of models with tensors called `names`, and of the configuration `config`.
    ///
    /// Families that are not in the table: a module for each beginning that stands before a layer's number, and
    /// `default` for the rest; `default` alone where there is at most one such beginning.
    pub fn of(config: &ConfigJson, names: &BTreeSet<&str>) -> Self {
        let model_type = config.model_type().to_owned();
        let known = FAMILIES.iter().find(|(name, _)| *name == model_type);
        let modules = match known {
            Some((_, rows)) => rows.iter().map(Module::known).collect(),
            None => inferred(config, names),
        };
        let mut family = Self { model_type, modules };
        let used: BTreeSet<usize> = names.iter().map(|n| family.owner(n)).collect();
        let mut index = 0..;
        family.modules.retain(|_| index.next().is_some_and(|i| used.contains(&i)));
        if family.modules.is_empty() {
            family.modules.push(Module::alone());
        }
        family
    }

    /// Whether it is known which tensors a model of the family has to have.
    pub fn known(&self) -> bool {
        let runs =
            moe_merge_model::FAMILIES.iter().any(|f| f.model_types.contains(&&*self.model_type));
        runs || FAMILIES.iter().any(|(name, _)| *name == self.model_type)
    }

    /// Files of tensors, which have no layers, whatever their names look like.
    pub fn of_files() -> Self {
        let module = Module { keys: None, ..Module::alone() };
        Self { model_type: String::new(), modules: vec![module] }
    }

    /// The module that a tensor belongs to: the one with the longest beginning of its name.
    fn owner(&self, tensor: &str) -> usize {
        let longest = |m: &Module| {
            let fitting = m.starts.iter().filter(|s| tensor.starts_with(s.as_str()));
            fitting.map(|s| s.len() + 1).max().unwrap_or(0)
        };
        let all = self.modules.iter().enumerate();
        all.rev().max_by_key(|(_, m)| longest(m)).map_or(0, |(i, _)| i)
    }

    /// Whether a tensor belongs to a module.
    pub fn holds(&self, module: usize, tensor: &str) -> bool {
        self.modules.len() == 1 || self.owner(tensor) == module
    }

    /// As [`split`], for a tensor of that module.
    pub fn split<'n>(&self, module: usize, tensor: &'n str) -> Option<(usize, &'n str, &'n str)> {
        self.modules[module].keys.as_ref()?;
        split(tensor).filter(|_| self.holds(module, tensor))
    }

    /// Layers that a module has in a model: as the configuration says, else as the names of the tensors do.
    pub fn layers(&self, module: usize, source: &Source) -> usize {
        let Some(keys) = &self.modules[module].keys else { return 0 };
        let counted = || {
            let numbers = source.tensors.keys().filter_map(|n| self.split(module, n));
            numbers.map(|(l, _, _)| l + 1).max().unwrap_or(0)
        };
        let number = |key: &String| source.config.at(key).and_then(Value::as_u64);
        keys.iter().find_map(number).map_or_else(counted, |n| n as usize)
    }

    /// Refuses several modules, for methods that run their models.
    pub fn alone(&self, recipe: &DenseRecipe) -> Result<(), RecipeErrors> {
        if self.modules.len() == 1 {
            return Ok(());
        }
        let what = format!("`{}` runs its models, which have several modules", recipe.method.name);
        let mut error = recipe.place.error(what);
        error.expected = Some("models of text alone".into());
        error.found = Some(format!("{} with {}", self.called(), self.list()));
        error.hint = Some("merge them by weights alone, as with `tsv` or `linear`".into());
        Err(RecipeErrors(vec![error]))
    }

    /// The family in a message.
    fn called(&self) -> String {
        match self.model_type.as_str() {
            "" => "models without a `model_type`".into(),
            family => format!("`{family}`"),
        }
    }

    /// Its modules in a message.
    fn list(&self) -> String {
        self.modules.iter().map(|m| format!("`{}`", m.name)).collect::<Vec<_>>().join(", ")
    }

    /// The modules that an entry of a recipe is about.
    ///
    /// # Errors
    /// A name that no module has; `slices` where they could mean layers of several modules.
    pub fn meant(&self, spec: &ModuleSpec) -> Result<Vec<usize>, RecipeErrors> {
        let names: Vec<&str> = self.modules.iter().map(|m| m.name.as_str()).collect();
        let (whose, list) = (self.called(), self.list());
        let Some(name) = &spec.name else {
            if matches!(spec.parts, Parts::Slices(_)) && self.modules.len() > 1 {
                let mut error = spec.place.error("`slices` does not say which module it is about");
                error.expected = Some(format!("`modules`, with those that are wanted of {list}"));
                error.found = Some(format!("{whose} with {} modules", self.modules.len()));
                error.hint = Some(format!(
                    "write `modules: {{{}: {{slices: …}}, {}: {{models: …}}, …}}`",
                    names[0], names[1]
                ));
                return Err(RecipeErrors(vec![error]));
            }
            return Ok((0..self.modules.len()).collect());
        };
        if let Some(module) = names.iter().position(|n| n == name) {
            return Ok(vec![module]);
        }
        let mut error = spec.place.error(format!("{whose} has no module `{name}`"));
        error.expected = Some(match names.as_slice() {
            [only] => format!("`{only}`, the only module there is"),
            _ => format!("one of {list}"),
        });
        error.hint = nearest(name, names.iter().copied()).map(|n| format!("did you mean `{n}`?"));
        Err(RecipeErrors(vec![error]))
    }
}

impl Module {
    fn known((name, starts, keys): &Row) -> Self {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        Self { name: (*name).to_owned(), starts: owned(starts), keys: keys.map(owned) }
    }

    /// The module of a model that has only one.
    fn alone() -> Self {
        Self::known(&(DEFAULT, &[""], Some(&["num_hidden_layers"])))
    }
}

/// # Source
/// mergekit `architecture/auto.py`. Differs: the number of layers is written to the configuration where a key holds it.
fn inferred(config: &ConfigJson, names: &BTreeSet<&str>) -> Vec<Module> {
    let mut stacks: BTreeMap<&str, usize> = BTreeMap::new(); // layers by the text before their number
    for (layer, head, _) in names.iter().filter_map(|n| split(n)) {
        let layers = stacks.entry(head).or_default();
        *layers = (*layers).max(layer + 1);
    }
    if stacks.len() < 2 {
        return vec![Module::alone()];
    }
    let mut modules: Vec<Module> = stacks
        .iter()
        .map(|(head, layers)| {
            let name = match head.trim_end_matches('.') {
                "" => DEFAULT,
                name => name,
            };
            let keys = layer_key(config, name, *layers).into_iter().collect();
            Module { name: name.to_owned(), starts: vec![(*head).to_owned()], keys: Some(keys) }
        })
        .collect();
    if modules.iter().all(|m| m.name != DEFAULT) {
        modules.push(Module::known(&(DEFAULT, &[""], None)));
    }
    modules
}

/// Where configurations keep the number of layers.
const LAYER_KEYS: &[&str] = &[
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "encoder_layers",
    "num_encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
];

/// The only key of a configuration that holds the number of layers of a module; of several, the one that shares a word with the
/// module's name.
fn layer_key(config: &ConfigJson, module: &str, layers: usize) -> Option<String> {
    let nested = config.0.iter().filter(|(_, v)| v.is_object()).map(|(k, _)| format!("{k}."));
    let paths = std::iter::once(String::new()).chain(nested);
    let keys = paths.flat_map(|p| LAYER_KEYS.iter().map(move |k| format!("{p}{k}")));
    let holds = |k: &String| config.at(k).and_then(Value::as_u64) == Some(layers as u64);
    let mut keys: Vec<String> = keys.filter(holds).collect();
    if keys.len() > 1 {
        let shared = |k: &String| {
            let words = k.split(['.', '_']).filter(|w| w.len() > 3 && *w != "layers");
            words.into_iter().any(|w| module.contains(w))
        };
        keys.retain(shared);
    }
    keys.pop().filter(|_| keys.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: Value) -> ConfigJson {
        ConfigJson(value.as_object().unwrap().clone())
    }

    fn owners(model_type: &str, names: &[&str]) -> Vec<String> {
        let set = names.iter().copied().collect();
        let family = Family::of(&config(json!({"model_type": model_type})), &set);
        names.iter().map(|n| family.modules[family.owner(n)].name.clone()).collect()
    }

    #[test]
    fn tensors_in_old_and_new_spelling() {
        for (family, names) in [
            (
                "gemma3",
                ["language_model.model.norm.w", "multi_modal_projector.x", "vision_tower.y"],
            ),
            ("mistral3", ["lm_head.w", "model.multi_modal_projector.x", "model.vision_tower.y"]),
            ("qwen2_vl", ["model.layers.0.w", "visual.merger.mlp.0.w", "visual.blocks.0.w"]),
            (
                "qwen3_vl",
                ["lm_head.w", "model.visual.deepstack_merger_list.0.w", "model.visual.pos"],
            ),
        ] {
            let expected = ["text_decoder", "multi_modal_projector", "vision_tower"];
            assert_eq!(owners(family, &names), expected, "{family}");
        }
        let t5 = ["shared.weight", "encoder.block.0.w", "decoder.block.0.w", "lm_head.weight"];
        assert_eq!(owners("t5", &t5), ["shared", "encoder", "decoder", "shared"]);
        let whisper = ["proj_out.weight", "model.encoder.layers.0.w", "model.decoder.layers.0.w"];
        assert_eq!(owners("whisper", &whisper), ["decoder", "encoder", "decoder"]);
    }

    #[test]
    fn unknown_families_by_what_stands_before_the_number() {
        assert_eq!(owners("x", &["h.0.w", "h.1.w", "norm"]), ["default"; 3]);
        assert_eq!(owners("x", &["a", "b"]), ["default"; 2]);
        assert_eq!(owners("x", &["0.w", "a.0.w", "n"]), ["default", "a", "default"]);
        let names = ["encoder.layers.0.w", "encoder.norm", "decoder.layers.0.w"];
        assert_eq!(owners("x", &names), ["encoder.layers", "default", "decoder.layers"]);
    }

    #[test]
    fn the_key_that_holds_the_number_of_layers() {
        let own =
            config(json!({"num_hidden_layers": 4, "vision_config": {"num_hidden_layers": 6}}));
        assert_eq!(layer_key(&own, "model.layers", 4).as_deref(), Some("num_hidden_layers"));
        let vision = Some("vision_config.num_hidden_layers");
        assert_eq!(layer_key(&own, "vision.layers", 6).as_deref(), vision);
        assert_eq!(layer_key(&own, "model.layers", 5), None);
        let bart =
            config(json!({"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2}));
        assert_eq!(layer_key(&bart, "model.encoder.layers", 2).as_deref(), Some("encoder_layers"));
        assert_eq!(layer_key(&bart, "model.layers", 2), None);
    }
}
