//! The tensors of a dense merge: what goes into each, with which parameters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use moe_merge_checkpoint::weight::Retyped;
use moe_merge_checkpoint::{Dtype, OtherTensor, Source, WeightRef};

use super::models::Models;
use super::modules::Family;
use super::names::tied;
use super::slices::{Planned, PlannedInput, check_count};
use crate::error::MergeError;
use crate::experts::filter_names;
use crate::methods::{self, Group, Scope};
use crate::recipe::{DenseRecipe, Place, RecipeErrors};
use crate::vocabulary::{Vocabulary, has_vocabulary_axis};

/// Makes the tensors of the result.
pub(super) struct Merge<'a, 'm> {
    pub recipe: &'a DenseRecipe,
    pub models: &'a Models<'m>,
    pub family: &'a Family,
    pub vocabulary: Option<&'a Vocabulary>,
    pub tensors: BTreeMap<String, WeightRef>,
    /// For methods that look at activations, of each tensor: the weights of the models beside the base, and `alpha`.
    pub fitted: BTreeMap<String, (Vec<f64>, f64)>,
    /// Tensors that are no weights, one of equal ones each.
    pub buffers: Vec<OtherTensor>,
    /// Tensors that not all models have.
    partial: Vec<String>,
}

/// Names of weights and of what is copied beside them.
pub(super) fn names(source: &Source) -> impl Iterator<Item = &String> {
    let buffers = source.other.iter().filter(|o| o.bytes().is_some());
    source.tensors.keys().chain(buffers.map(|o| &o.name))
}

impl<'a, 'm> Merge<'a, 'm> {
    /// With no tensor yet.
    pub fn new(
        recipe: &'a DenseRecipe,
        models: &'a Models<'m>,
        family: &'a Family,
        vocabulary: Option<&'a Vocabulary>,
    ) -> Self {
        let (tensors, fitted) = (BTreeMap::new(), BTreeMap::new());
        let (buffers, partial) = (Vec::new(), Vec::new());
        Self { recipe, models, family, vocabulary, tensors, fitted, buffers, partial }
    }

    /// What is told of tensors that not all models have.
    pub fn partial_note(&self) -> Option<String> {
        let (first, rest) = self.partial.split_first()?;
        let more = match rest.len() {
            0 => String::new(),
            1 => " and one tensor more".into(),
            n => format!(" and {n} tensors more"),
        };
        Some(format!("not all models have `{first}`{more}: merged among those that do"))
    }

    /// The model of an input.
    pub fn source(&self, input: &PlannedInput) -> &Source {
        &self.models.opened[input.model].source
    }

    /// Tensors of the module outside its layers for which `wanted` holds.
    pub fn loose(&mut self, slice: &Planned, wanted: fn(&str) -> bool) -> Result<(), MergeError> {
        let of = |i: &PlannedInput| names(self.source(i)).cloned().collect::<Vec<_>>();
        let all: BTreeSet<_> = slice.inputs.iter().flat_map(of).collect();
        let family = self.family;
        let loose =
            |n: &str| family.holds(slice.module, n) && family.split(slice.module, n).is_none();
        for name in all.into_iter().filter(|n| loose(n) && wanted(n)) {
            let inputs = vec![name.clone(); slice.inputs.len()];
            self.tensor(slice, 0.0, &inputs, name)?;
        }
        Ok(())
    }

    /// Layer `layer` of the slice, as layer `output` of the result.
    pub fn layer(
        &mut self,
        slice: &Planned,
        layer: usize,
        output: usize,
    ) -> Result<(), MergeError> {
        let mut parts = BTreeSet::new(); // text before and after the layer number, and whether the first layer has it for all
        for input in &slice.inputs {
            let (number, source) = (input.range.start + layer, self.source(input));
            for name in names(source) {
                let Some((l, head, tail)) = self.family.split(slice.module, name) else { continue };
                let common = of_first_layer(source, head, tail);
                let wanted = if common { output == 0 } else { l == number };
                if wanted {
                    parts.insert((head.to_owned(), tail.to_owned(), common));
                }
            }
        }
        let t = if slice.layers > 1 { layer as f64 / (slice.layers - 1) as f64 } else { 1.0 };
        for (head, tail, common) in parts {
            let number = |i: &PlannedInput| if common { 0 } else { i.range.start + layer };
            let inputs: Vec<_> =
                slice.inputs.iter().map(|i| format!("{head}{}{tail}", number(i))).collect();
            self.tensor(slice, t, &inputs, format!("{head}{output}{tail}"))?;
        }
        Ok(())
    }

    /// A tensor of one model, the embedding for a head that it does not have, in the rows of the common vocabulary.
    fn input(&self, input: &PlannedInput, name: &str) -> Result<WeightRef, MergeError> {
        let source = self.source(input);
        let weight = tensor_or_tied(source, name).ok_or_else(|| source.missing(name))?;
        let Some(vocabulary) = self.vocabulary else { return Ok(weight.clone()) };
        if !has_vocabulary_axis(name, weight.shape(), vocabulary.rows_of(input.model)) {
            return Ok(weight.clone());
        }
        let mut lenders: Vec<Option<WeightRef>> = Vec::new();
        for (m, opened) in self.models.opened.iter().enumerate() {
            let lender = tensor_or_tied(&opened.source, name);
            lenders.push(lender.cloned());
            let expected = [&[vocabulary.rows_of(m)], &weight.shape()[1..]].concat();
            if let Some(lender) = lender
                && lender.shape() != expected
            {
                return Err(MergeError::Incompatible {
                    what: format!("`{name}` does not fit the vocabulary of its model"),
                    first: source.label.clone(),
                    second: opened.source.label.clone(),
                    expected: format!("{expected:?}"),
                    found: format!("{:?}", lender.shape()),
                    hint: "`vocab_size` is the number of its rows, and rows have one length in all models".into(),
                    recipe: Some(input.place.to_string()),
                });
            }
        }
        Ok(vocabulary.map(input.model, weight.clone(), Arc::new(lenders)))
    }

    /// One tensor of the result.
    pub fn tensor(
        &mut self,
        slice: &Planned,
        t: f64,
        names: &[String],
        output: String,
    ) -> Result<(), MergeError> {
        let method = self.recipe.method;
        if self.buffer(slice, names, &output)? {
            return Ok(());
        }
        let (part, part_names);
        let (slice, names) = match self.present(slice, names)? {
            None => (slice, names),
            Some(found) => {
                (part, part_names) = found;
                self.partial.push(output.clone());
                let base = part.base.is_some();
                let beside = part.inputs.len() - usize::from(base);
                let enough = base == slice.base.is_some()
                    && check_count(method, beside, base, &self.recipe.place).is_ok();
                if let ([only], false) = (&part.inputs[..], enough) {
                    // There is nothing to merge it with.
                    let weight = self.input(only, &part_names[0])?;
                    let stored = self.recipe.out_dtype.or(self.recipe.dtype);
                    let dtype = stored.unwrap_or_else(|| weight.dtype());
                    self.tensors.insert(output, Retyped::of(weight, dtype));
                    return Ok(());
                }
                (&part, &part_names[..])
            }
        };
        let mut inputs: Vec<WeightRef> = Vec::new();
        for (input, name) in slice.inputs.iter().zip(names) {
            let weight = self.input(input, name)?;
            if let Some(first) = inputs.first()
                && first.shape() != weight.shape()
            {
                return Err(self.shapes(slice, input, &output, first, &weight));
            }
            inputs.push(weight);
        }
        let stored = self.recipe.dtype.unwrap_or_else(|| common_dtype(&inputs));
        let dtype = self.recipe.compute.unwrap_or(stored);
        let group = Group {
            base: slice.base,
            own: self.own(slice, t, names)?,
            global: self.global(slice, t, &output)?,
            dtype,
            out_dtype: self.recipe.out_dtype.unwrap_or(stored),
            name: output.clone(),
            seed: self.recipe.seed,
            recipe: self.recipe.place.file.clone(),
            inputs,
        };
        if method.activations.is_some() {
            let weights = group.others().into_iter().map(|m| group.own[m][0]).collect();
            self.fitted.insert(output.clone(), (weights, group.global[0]));
        }
        let weight = methods::merged(method, group).map_err(|reason| {
            let mut error =
                self.recipe.place.error(format!("`{}` cannot be computed", method.name));
            error.found = Some(format!("tensor `{output}`: {reason}"));
            RecipeErrors(vec![error])
        })?;
        self.tensors.insert(output, weight);
        Ok(())
    }

    /// Copies a tensor that is no weight, and says whether it is one. Models without it say nothing about it.
    fn buffer(
        &mut self,
        slice: &Planned,
        names: &[String],
        output: &str,
    ) -> Result<bool, MergeError> {
        let both = || slice.inputs.iter().zip(names);
        let of = |(input, name): (_, &String)| {
            let other = self.source(input).other(name).filter(|o| o.bytes().is_some());
            other.map(|other| (input, other))
        };
        let Some((at, same)) = both().find_map(of) else { return Ok(false) };
        if let Some((_, name)) = both().find(|(i, n)| self.source(i).tensors.contains_key(*n)) {
            // A weight in one model and none in another.
            return Err(self.source(at).missing(name).into());
        }
        for (input, other) in both().filter_map(of) {
            let alike = (&same.dtype, &same.shape) == (&other.dtype, &other.shape);
            if !alike || same.bytes() != other.bytes() {
                return Err(MergeError::Incompatible {
                    what: format!(
                        "`{output}` holds no floating-point numbers, and is not the same in all models"
                    ),
                    first: self.source(at).label.clone(),
                    second: self.source(input).label.clone(),
                    expected: format!("{} {:?}", same.dtype, same.shape),
                    found: match alike {
                        true => "other numbers".into(),
                        false => format!("{} {:?}", other.dtype, other.shape),
                    },
                    hint: "such tensors are copied, not merged: make them equal first".into(),
                    recipe: Some(input.place.to_string()),
                });
            }
        }
        let mut buffer = same.clone();
        output.clone_into(&mut buffer.name);
        self.buffers.push(buffer);
        Ok(true)
    }

    /// The inputs that have a tensor, where not all do, in families of which it is not known what they have to have. A base is
    /// left out only where what the other model has is the result.
    fn present<'s>(
        &self,
        slice: &Planned<'s>,
        names: &[String],
    ) -> Result<Option<(Planned<'s>, Vec<String>)>, MergeError> {
        let (module, layers, levels) = (slice.module, slice.layers, slice.levels);
        let mut part = Planned { module, inputs: Vec::new(), base: None, layers, levels };
        let mut own = Vec::new();
        for (i, (input, name)) in slice.inputs.iter().zip(names).enumerate() {
            let source = self.source(input);
            // Files of tensors have no embedding that could stand for a head.
            let there = match self.models.files {
                true => source.tensors.get(name),
                false => tensor_or_tied(source, name),
            };
            if there.is_some() {
                if slice.base == Some(i) {
                    part.base = Some(part.inputs.len());
                }
                part.inputs.push(input.clone());
                own.push(name.clone());
            } else if slice.base == Some(i) && !COPIES_ALONE.contains(&self.recipe.method.name)
                || self.family.known()
            {
                return Err(source.missing(name).into());
            }
        }
        Ok((own.len() < names.len()).then_some((part, own)))
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
                "the vocabularies differ: `tokenizer: {source: union}` makes a common one".into()
            } else {
                "all models of a merge need the same sizes".into()
            },
            recipe: Some(input.place.to_string()),
        }
    }

    /// Values of the per-model parameters: source, slice, module, recipe, default; the first that is given.
    fn own(
        &self,
        slice: &Planned,
        t: f64,
        names: &[String],
    ) -> Result<Vec<Vec<f64>>, RecipeErrors> {
        let mut all = Vec::new();
        for (i, (input, name)) in slice.inputs.iter().zip(names).enumerate() {
            let [of_slice, of_module, of_recipe] = slice.levels;
            let levels = [input.parameters, of_slice, of_module, of_recipe];
            let known_as = filter_names(name);
            let mut values = Vec::new();
            for p in self.recipe.method.parameters.iter().filter(|p| p.scope == Scope::Model) {
                let given = levels.iter().flatten().find_map(|l| l.get(p.name)?.at(t, &known_as));
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
        let known_as = filter_names(output);
        let parameters = self.recipe.method.parameters.iter();
        parameters
            .filter(|p| p.scope == Scope::Global)
            .map(|p| {
                let levels = slice.levels.iter().flatten();
                let given = levels.into_iter().find_map(|l| l.get(p.name)?.at(t, &known_as));
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

/// Methods between two models, either of which is the result where the other has no such tensor.
const COPIES_ALONE: &[&str] = &["slerp", "arcee_fusion"];

/// Ends of names of tensors that the first layer of a stack holds for all of them, as in t5.
const OF_FIRST_LAYER: &[&str] = &[".layer.0.SelfAttention.relative_attention_bias.weight"];

/// Whether a tensor of a layer is one of these; in umt5 each layer has its own.
fn of_first_layer(source: &Source, head: &str, tail: &str) -> bool {
    OF_FIRST_LAYER.contains(&tail) && !source.tensors.contains_key(&format!("{head}1{tail}"))
}

fn tensor_or_tied<'s>(source: &'s Source, name: &str) -> Option<&'s WeightRef> {
    let tied = || tied(name).iter().find_map(|n| source.tensors.get(*n));
    source.tensors.get(name).or_else(tied)
}

/// The stored dtype if all share it, else f32.
fn common_dtype(inputs: &[WeightRef]) -> Dtype {
    let first = inputs.first().map_or(Dtype::F32, |w| w.dtype());
    if inputs.iter().all(|w| w.dtype() == first) { first } else { Dtype::F32 }
}
