//! Dense merges: which tensors go together, with which parameters.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, ConfigJson, Dtype, Source, WeightRef};
use serde_json::Value;

use crate::error::MergeError;
use crate::methods::{self, Base, Group, Scope};
use crate::recipe::{
    DenseRecipe, Input, Parameters, Parts, Place, RecipeErrors, SourceKind, SourceSpec,
};
use crate::sources::Trail;

/// The result of a dense merge as a [`Source`]: nothing is computed before it is read. Relative paths start from
/// `base_dir`.
///
/// Config, tokenizer and side files come from `base_model`, else from the first model. Rules: mergekit's, with the
/// differences that the recipe reference names (a model may stand twice in a slice; the base is recognised by its path,
/// not by its spelling; a head that no longer equals the embedding is announced in the config).
///
/// # Errors
/// [`MergeError::Recipe`] for parameters that do not work out, [`MergeError::Incompatible`] for models that do not go
/// together, [`MergeError::Checkpoint`] for models that cannot be opened.
pub fn dense(recipe: &DenseRecipe, base_dir: &Path) -> Result<Source, MergeError> {
    dense_in(&Trail::starting_at(&recipe.place.file), recipe, base_dir)
}

/// As [`dense`], within other recipes.
pub(crate) fn dense_in(
    trail: &Trail,
    recipe: &DenseRecipe,
    base_dir: &Path,
) -> Result<Source, MergeError> {
    let mut models = Models { trail, base_dir, opened: Vec::new() };
    let donor = match (&recipe.base_model, first_source(recipe)) {
        (Some(base), _) => models.open(base)?,
        (None, Some(first)) => models.open(first)?,
        (None, None) => return Err(wrong(&recipe.place, "the recipe names no model").into()),
    };
    let slices = plan(recipe, &mut models)?;
    models.check_families(donor, recipe)?;
    let mut merge = Merge { recipe, models: &models, tensors: BTreeMap::new() };
    let mut offset = 0;
    for (i, slice) in slices.iter().enumerate() {
        if i == 0 {
            merge.loose(slice, |name| !after_layers(name))?;
        }
        for layer in 0..slice.layers {
            merge.layer(slice, layer, offset + layer)?;
        }
        offset += slice.layers;
        if i + 1 == slices.len() {
            merge.loose(slice, after_layers)?;
        }
    }
    let tensors = merge.tensors;
    let donor = &models.opened[donor].source;
    let mut files = Vec::new();
    for file in models.opened.iter().flat_map(|m| &m.source.files) {
        if !files.contains(file) {
            files.push(file.clone());
        }
    }
    Ok(Source {
        label: recipe.name.clone().unwrap_or_else(|| recipe.method.name.to_owned()),
        path: recipe.place.file.clone(),
        config: config(recipe, &models, donor, &slices, &tensors),
        tensors,
        other: match recipe.parts {
            Parts::Models(_) => donor.other.clone(),
            Parts::Slices(_) => Vec::new(),
        },
        files,
        side: donor.side.clone(),
        notes: models.opened.iter().flat_map(|m| m.source.notes.clone()).collect(),
    })
}

fn wrong(place: &Place, what: impl Into<String>) -> RecipeErrors {
    RecipeErrors(vec![place.error(what)])
}

fn first_source(recipe: &DenseRecipe) -> Option<&SourceSpec> {
    match &recipe.parts {
        Parts::Models(models) => models.first().map(|m| &m.source),
        Parts::Slices(slices) => slices.first()?.sources.first().map(|s| &s.source),
    }
}

/// Models that have been opened, each once.
struct Models<'a> {
    trail: &'a Trail,
    base_dir: &'a Path,
    opened: Vec<Opened>,
}

struct Opened {
    identity: String,
    source: Source,
    place: Place,
    layers: usize,
}

impl Models<'_> {
    fn open(&mut self, spec: &SourceSpec) -> Result<usize, MergeError> {
        let identity = self.identity(spec);
        if let Some(found) = self.opened.iter().position(|m| m.identity == identity) {
            return Ok(found);
        }
        let source = self.trail.open(spec, self.base_dir)?;
        let in_names =
            || source.tensors.keys().filter_map(|n| split(n)).map(|(l, _, _)| l + 1).max();
        let layers = source.config.usize("num_hidden_layers").or_else(in_names).unwrap_or(0);
        self.opened.push(Opened { identity, source, place: spec.place.clone(), layers });
        Ok(self.opened.len() - 1)
    }

    /// The same text for the same model, however its path is spelt.
    fn identity(&self, spec: &SourceSpec) -> String {
        let resolved = |path: &Path| {
            self.base_dir.join(path).canonicalize().unwrap_or_else(|_| path.to_owned())
        };
        match &spec.kind {
            SourceKind::Model(m) => {
                let lora = m.lora.as_ref().map(|l| resolved(l.as_ref()));
                let model = resolved(m.model.as_ref());
                format!("{model:?} {:?} {lora:?} {:?}", m.revision, m.lora_revision)
            }
            SourceKind::File(file) => format!("{:?}", resolved(file)),
            SourceKind::Inline(_) => format!("recipe at {}", spec.place),
        }
    }

    fn check_families(&self, donor: usize, recipe: &DenseRecipe) -> Result<(), MergeError> {
        let first = &self.opened[donor];
        let tokenizer =
            |m: &Opened| m.source.side_file("tokenizer.json").map(|f| f.read()).transpose();
        let expected = if recipe.common_tokenizer { tokenizer(first)? } else { None };
        for other in &self.opened {
            let (a, b) = (first.source.config.model_type(), other.source.config.model_type());
            let incompatible = |what: &str, expected: String, found: String, hint: &str| {
                Err(MergeError::Incompatible {
                    what: what.into(),
                    first: first.source.label.clone(),
                    second: other.source.label.clone(),
                    expected,
                    found,
                    hint: hint.into(),
                    recipe: Some(other.place.to_string()),
                })
            };
            if a != b {
                return incompatible(
                    "models of different families cannot be merged",
                    format!("model_type `{a}`"),
                    format!("model_type `{b}`"),
                    "all models of a merge need one architecture",
                );
            }
            if recipe.common_tokenizer && tokenizer(other)? != expected {
                return incompatible(
                    "the tokenizers differ",
                    "the same tokenizer.json in all models".into(),
                    "another tokenizer.json".into(),
                    "building a common vocabulary is not supported by this version; merge models with one tokenizer",
                );
            }
        }
        Ok(())
    }
}

/// An output slice whose models are opened.
struct Planned<'a> {
    inputs: Vec<PlannedInput<'a>>,
    /// Which input the method takes for its base.
    base: Option<usize>,
    layers: usize,
    parameters: Option<&'a Parameters>,
}

struct PlannedInput<'a> {
    model: usize,
    range: Range<usize>,
    parameters: Option<&'a Parameters>,
    place: &'a Place,
}

fn plan<'a>(recipe: &'a DenseRecipe, models: &mut Models) -> Result<Vec<Planned<'a>>, MergeError> {
    match &recipe.parts {
        Parts::Models(inputs) => {
            let mut planned = Vec::new();
            for input in inputs {
                planned.push(planned_input(input, models)?);
            }
            if let Some(base) = &recipe.base_model {
                let model = models.open(base)?;
                if planned.iter().all(|p| p.model != model) {
                    let range = 0..models.opened[model].layers;
                    planned.push(PlannedInput {
                        model,
                        range,
                        parameters: None,
                        place: &base.place,
                    });
                }
            }
            let base = recipe.base_model.as_ref();
            Ok(vec![slice(recipe, models, planned, base, None, &recipe.place)?])
        }
        Parts::Slices(slices) => {
            let mut all = Vec::new();
            for s in slices {
                let mut planned = Vec::new();
                for input in &s.sources {
                    planned.push(planned_input(input, models)?);
                }
                let base = s.base_model.as_ref().or(recipe.base_model.as_ref());
                all.push(slice(recipe, models, planned, base, Some(&s.parameters), &s.place)?);
            }
            Ok(all)
        }
    }
}

fn planned_input<'a>(
    input: &'a Input,
    models: &mut Models,
) -> Result<PlannedInput<'a>, MergeError> {
    let model = models.open(&input.source)?;
    let layers = models.opened[model].layers;
    let range = input.layers.clone().unwrap_or(0..layers);
    if range.end > layers {
        let mut error = input.source.place.error("`layer_range` goes beyond the model's layers");
        error.expected = Some(format!("layers within [0, {layers})"));
        error.found = Some(format!("[{}, {})", range.start, range.end));
        return Err(RecipeErrors(vec![error]).into());
    }
    let parameters = Some(&input.parameters);
    Ok(PlannedInput { model, range, parameters, place: &input.source.place })
}

fn slice<'a>(
    recipe: &DenseRecipe,
    models: &mut Models,
    inputs: Vec<PlannedInput<'a>>,
    base: Option<&SourceSpec>,
    parameters: Option<&'a Parameters>,
    place: &Place,
) -> Result<Planned<'a>, MergeError> {
    let method = recipe.method;
    let (least, most) = method.models;
    if inputs.len() < least || inputs.len() > most {
        let mut error = place.error(format!("`{}` got the wrong number of models", method.name));
        error.expected = Some(match (least, most) {
            (1, 1) => "exactly one model; `base_model` counts as one".into(),
            (a, b) if a == b => format!("exactly {a} models, the base included"),
            (a, _) => format!("at least {a}"),
        });
        error.found = Some(format!("{} models", inputs.len()));
        return Err(RecipeErrors(vec![error]).into());
    }
    let base = match (method.base, base) {
        (Base::Ordinary, _) | (_, None) => None,
        (Base::Required, Some(spec)) => {
            let model = models.open(spec)?;
            let found = inputs.iter().position(|i| i.model == model);
            if found.is_none() {
                let mut error =
                    place.error("the base model is not among the sources of this slice");
                error.expected = Some(format!("`{spec}` as one of the sources"));
                return Err(RecipeErrors(vec![error]).into());
            }
            found
        }
    };
    if method.base == Base::Required && base.is_none() {
        return Err(wrong(place, format!("`{}` needs a `base_model`", method.name)).into());
    }
    let layers = inputs.first().map_or(0, |i| i.range.len());
    if let Some(other) = inputs.iter().find(|i| i.range.len() != layers) {
        let label = |i: &PlannedInput| models.opened[i.model].source.label.clone();
        return Err(MergeError::Incompatible {
            what: "the models have different numbers of layers".into(),
            first: label(&inputs[0]),
            second: label(other),
            expected: format!("{layers} layers"),
            found: format!("{} layers", other.range.len()),
            hint: "choose layers of equal number with `slices` and `layer_range`".into(),
            recipe: Some(other.place.to_string()),
        });
    }
    Ok(Planned { inputs, base, layers, parameters })
}

/// Layer number in a tensor name, with the text before and after it.
fn split(name: &str) -> Option<(usize, &str, &str)> {
    let mut start = 0;
    for part in name.split('.') {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            let end = start + part.len();
            return Some((part.parse().ok()?, &name[..start], &name[end..]));
        }
        start += part.len() + 1;
    }
    None
}

/// Whether a tensor outside the layers stands after them: final norm and head.
fn after_layers(name: &str) -> bool {
    !name.contains("embed") && (name.contains("norm") || name.contains("lm_head"))
}

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

struct Merge<'a, 'm> {
    recipe: &'a DenseRecipe,
    models: &'a Models<'m>,
    tensors: BTreeMap<String, WeightRef>,
}

impl Merge<'_, '_> {
    fn source(&self, input: &PlannedInput) -> &Source {
        &self.models.opened[input.model].source
    }

    /// Tensors outside the layers for which `wanted` holds.
    fn loose(&mut self, slice: &Planned, wanted: fn(&str) -> bool) -> Result<(), MergeError> {
        let of = |i: &PlannedInput| self.source(i).tensors.keys().cloned().collect::<Vec<_>>();
        let names: BTreeSet<_> = slice.inputs.iter().flat_map(of).collect();
        for name in names.into_iter().filter(|n| split(n).is_none() && wanted(n)) {
            let inputs = vec![name.clone(); slice.inputs.len()];
            self.tensor(slice, 0.0, &inputs, name)?;
        }
        Ok(())
    }

    /// Layer `layer` of the slice, as layer `output` of the result.
    fn layer(&mut self, slice: &Planned, layer: usize, output: usize) -> Result<(), MergeError> {
        let mut names = BTreeSet::new(); // text before and after the layer number
        for input in &slice.inputs {
            let number = input.range.start + layer;
            for name in self.source(input).tensors.keys() {
                match split(name) {
                    Some((l, head, tail)) if l == number => {
                        names.insert((head.to_owned(), tail.to_owned()));
                    }
                    _ => {}
                }
            }
        }
        let t = if slice.layers > 1 { layer as f64 / (slice.layers - 1) as f64 } else { 1.0 };
        for (head, tail) in names {
            let inputs: Vec<_> = slice
                .inputs
                .iter()
                .map(|i| format!("{head}{}{tail}", i.range.start + layer))
                .collect();
            self.tensor(slice, t, &inputs, format!("{head}{output}{tail}"))?;
        }
        Ok(())
    }

    fn tensor(
        &mut self,
        slice: &Planned,
        t: f64,
        names: &[String],
        output: String,
    ) -> Result<(), MergeError> {
        let method = self.recipe.method;
        let mut inputs: Vec<WeightRef> = Vec::new();
        for (input, name) in slice.inputs.iter().zip(names) {
            let source = self.source(input);
            let tied = || source.tensors.get(EMBEDDING).filter(|_| name == HEAD);
            let weight = source.tensors.get(name).or_else(tied).ok_or_else(|| {
                let (file, tensor) = (source.path.clone(), name.clone());
                CheckpointError::MissingTensor { file, tensor, nearest: None }
            })?;
            if let Some(first) = inputs.first()
                && first.shape() != weight.shape()
            {
                return Err(self.shapes(slice, input, &output, first, weight));
            }
            inputs.push(weight.clone());
        }
        if method.whole_tensor && output.contains(".experts.") {
            let what = format!("`{}` cannot merge MoE models in this version", method.name);
            let mut error = self.recipe.place.error(what);
            error.found = Some(format!("tensor `{output}`"));
            error.hint = Some("`linear` and `task_arithmetic` merge MoE models".into());
            return Err(RecipeErrors(vec![error]).into());
        }
        let group = Group {
            base: slice.base,
            own: self.own(slice, t, names)?,
            global: self.global(slice, t, &output)?,
            dtype: self.recipe.dtype.unwrap_or_else(|| common_dtype(&inputs)),
            out_dtype: Dtype::F32,
            name: output.clone(),
            recipe: self.recipe.place.file.clone(),
            inputs,
        };
        let group = Group { out_dtype: self.recipe.out_dtype.unwrap_or(group.dtype), ..group };
        let weight = methods::merged(method, group).map_err(|reason| {
            let mut error =
                self.recipe.place.error(format!("`{}` cannot be computed", method.name));
            error.found = Some(format!("tensor `{output}`: {reason}"));
            RecipeErrors(vec![error])
        })?;
        self.tensors.insert(output, weight);
        Ok(())
    }

    fn shapes(
        &self,
        slice: &Planned,
        input: &PlannedInput,
        tensor: &str,
        first: &WeightRef,
        second: &WeightRef,
    ) -> MergeError {
        let vocabulary = tensor.contains("embed_tokens") || tensor.contains("lm_head");
        MergeError::Incompatible {
            what: format!("`{tensor}` has different shapes in the models"),
            first: self.source(&slice.inputs[0]).label.clone(),
            second: self.source(input).label.clone(),
            expected: format!("{:?}", first.shape()),
            found: format!("{:?}", second.shape()),
            hint: if vocabulary {
                "the vocabularies differ; this version merges models with one vocabulary".into()
            } else {
                "all models of a merge need the same sizes".into()
            },
            recipe: Some(input.place.to_string()),
        }
    }

    /// Values of the per-model parameters: source, slice, recipe, default; the first that is given.
    fn own(
        &self,
        slice: &Planned,
        t: f64,
        names: &[String],
    ) -> Result<Vec<Vec<f64>>, RecipeErrors> {
        let mut all = Vec::new();
        for (i, (input, name)) in slice.inputs.iter().zip(names).enumerate() {
            let levels = [input.parameters, slice.parameters, Some(&self.recipe.parameters)];
            let mut values = Vec::new();
            for p in self.recipe.method.parameters.iter().filter(|p| p.scope == Scope::Model) {
                let given = levels.iter().flatten().find_map(|l| l.get(p.name)?.at(t, name));
                match given.or(p.default) {
                    Some(value) => values.push(value),
                    None if slice.base == Some(i) => values.push(f64::NAN),
                    None => return Err(self.missing(input.place, p.name, name)),
                }
            }
            all.push(values);
        }
        Ok(all)
    }

    fn global(&self, slice: &Planned, t: f64, output: &str) -> Result<Vec<f64>, RecipeErrors> {
        let levels = [slice.parameters, Some(&self.recipe.parameters)];
        let parameters = self.recipe.method.parameters.iter();
        parameters
            .filter(|p| p.scope == Scope::Global)
            .map(|p| {
                let given = levels.iter().flatten().find_map(|l| l.get(p.name)?.at(t, output));
                let missing = || self.missing(&self.recipe.place, p.name, output);
                given.or(p.default).ok_or_else(missing)
            })
            .collect()
    }

    fn missing(&self, place: &Place, parameter: &str, tensor: &str) -> RecipeErrors {
        let what = format!("`{}` needs the parameter `{parameter}`", self.recipe.method.name);
        let mut error = place.error(what);
        error.found = Some(format!("no value for tensor `{tensor}`"));
        error.hint = Some(format!(
            "give `{parameter}` under `parameters:`, without a filter at the end of the list"
        ));
        RecipeErrors(vec![error])
    }
}

/// The stored dtype if all share it, else f32.
fn common_dtype(inputs: &[WeightRef]) -> Dtype {
    let first = inputs.first().map_or(Dtype::F32, |w| w.dtype());
    if inputs.iter().all(|w| w.dtype() == first) { first } else { Dtype::F32 }
}

fn config(
    recipe: &DenseRecipe,
    models: &Models,
    donor: &Source,
    slices: &[Planned],
    tensors: &BTreeMap<String, WeightRef>,
) -> ConfigJson {
    let mut config = donor.config.clone();
    let map = &mut config.0;
    let layers: usize = slices.iter().map(|s| s.layers).sum();
    map.insert("num_hidden_layers".into(), layers.into());
    if map.get("layer_types").is_some_and(Value::is_array) {
        let mut types = Vec::new();
        for input in slices.iter().filter_map(|s| s.inputs.first()) {
            let own = models.opened[input.model].source.config.get("layer_types");
            let own = own.and_then(|t| t.as_array()).and_then(|t| t.get(input.range.clone()));
            types.extend(own.into_iter().flatten().cloned());
        }
        if types.len() == layers {
            map.insert("layer_types".into(), types.into());
        } else {
            map.shift_remove("layer_types");
        }
    }
    if let Some(dtype) = recipe.out_dtype.or(recipe.dtype) {
        let spelt: Vec<_> =
            ["dtype", "torch_dtype"].into_iter().filter(|k| map.contains_key(*k)).collect();
        for key in if spelt.is_empty() { vec!["torch_dtype"] } else { spelt } {
            map.insert(key.into(), dtype.config_name().into());
        }
    }
    let tied = map.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
    if tied && tensors.contains_key(HEAD) {
        map.insert("tie_word_embeddings".into(), false.into());
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_the_layer() {
        assert_eq!(split("model.layers.12.mlp.w"), Some((12, "model.layers.", ".mlp.w")));
        assert_eq!(split("h.3"), Some((3, "h.", "")));
        assert_eq!(split("a.layers.0.experts.7.w1"), Some((0, "a.layers.", ".experts.7.w1")));
        assert_eq!(split("model.norm.weight"), None);
        assert_eq!(split(""), None);
    }
}
