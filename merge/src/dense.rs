//! Dense merges: which tensors go together, with which parameters.

use std::collections::BTreeSet;
use std::path::Path;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{SideContent, SideFile, Source, layout};

use crate::error::MergeError;
use crate::experts::{ExpertMatch, MoeInputs};
use crate::recipe::{
    DenseRecipe, Input, Place, RecipeErrors, RowSpec, SourceSpec, TokenizerSpec, VocabularySource,
};
use crate::sources::Trail;
use crate::vocabulary::{Members, Vocabulary, with_template};

mod config;
mod fit;
mod models;
mod modules;
mod names;
mod raw;
mod slices;
mod tensors;
mod texts;

pub(crate) use fit::{Fitting, Watched};
pub use raw::{Missing, raw, write_tensors};

use models::Models;
use modules::{Family, Module};
use names::after_layers;
use slices::{PlannedModule, plan};
use tensors::Merge;
pub use texts::TextReport;

/// The result of a dense merge as a [`Source`]: nothing is computed before it is read, unless the method looks at activations.
/// Relative paths start from `base_dir`.
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

/// A dense merge before its weights are fitted, if its method fits any.
#[derive(Debug)]
pub(crate) struct Opened {
    pub source: Source,
    /// How the experts of MoE models were matched.
    pub matched: Vec<ExpertMatch>,
    pub fitting: Option<Fitting>,
}

/// As [`dense`], with what is still to be computed.
///
/// # Errors
/// As [`dense`].
pub(crate) fn open_dense(recipe: &DenseRecipe, base_dir: &Path) -> Result<Opened, MergeError> {
    merge_in(&Trail::starting_at(&recipe.place.file), recipe, base_dir)
}

/// As [`dense`], within other recipes.
pub(crate) fn dense_in(
    trail: &Trail,
    recipe: &DenseRecipe,
    base_dir: &Path,
) -> Result<Source, MergeError> {
    let Opened { mut source, fitting, .. } = merge_in(trail, recipe, base_dir)?;
    if let Some(fitting) = fitting {
        let watched = Watched { observer: &fit::Unwatched, interrupt: &Interrupt::default() };
        fitting.run(&mut source, &std::env::temp_dir().join(recipe.method.name), watched)?;
    }
    Ok(source)
}

fn merge_in(trail: &Trail, recipe: &DenseRecipe, base_dir: &Path) -> Result<Opened, MergeError> {
    let fuse = recipe.method.whole_tensor;
    let experts = MoeInputs::new(recipe.match_experts, recipe.match_neurons, fuse);
    let mut models = Models { trail, base_dir, recipe, opened: Vec::new(), experts, files: false };
    let donor = match (&recipe.base_model, recipe.inputs().next()) {
        (Some(base), _) => models.open(base)?,
        (None, Some(first)) => models.open(&first.source)?,
        (None, None) => return Err(wrong(&recipe.place, "the recipe names no model").into()),
    };
    models.open_all()?;
    models.check_families(donor)?;
    let family = models.family(donor);
    if recipe.method.activations.is_some() {
        family.alone(recipe)?;
    }
    let modules = plan(recipe, &family, &mut models)?;
    let vocabulary = match &recipe.tokenizer {
        Some(spec) => Some(common_vocabulary(spec, recipe, &mut models)?),
        None => None,
    };
    models.check_families(donor)?;
    let matches = std::mem::take(&mut models.experts.matches);
    let (models, family, vocabulary) = (&models, &family, vocabulary.as_ref());
    let mut merge = Merge::new(recipe, models, family, vocabulary);
    for PlannedModule { slices, .. } in &modules {
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
    }
    let partial = merge.partial_note();
    let Merge { mut tensors, fitted, buffers, .. } = merge;
    let fitting = Fitting::new(recipe, members(recipe, models, &modules), fitted)?;
    let donor = &models.opened[donor].source;
    if fuse {
        tensors = layout::canonical(tensors, &donor.config)?;
    }
    let mut files = Vec::new();
    for file in models.opened.iter().flat_map(|m| &m.source.files) {
        if !files.contains(file) {
            files.push(file.clone());
        }
    }
    let (config, changes) = config::config(&config::Parts {
        recipe,
        models,
        family,
        donor,
        modules: &modules,
        vocabulary,
        tensors: &tensors,
    });
    let notes = models.opened.iter().flat_map(|m| m.source.notes.clone());
    let notes = notes.chain(matches.iter().map(ExpertMatch::note)).chain(partial);
    let source = Source {
        label: recipe.name.clone().unwrap_or_else(|| recipe.method.name.to_owned()),
        path: recipe.place.file.clone(),
        config,
        tensors,
        other: buffers,
        files,
        side: side_files(recipe, models, donor, vocabulary)?,
        notes: notes.chain(left_out(models, family, &modules)).chain(changes).collect(),
    };
    Ok(Opened { source, matched: matches, fitting })
}

/// What is told of modules, and of layers of whole modules, that are not in the result.
fn left_out(models: &Models, family: &Family, planned: &[PlannedModule]) -> Vec<String> {
    let names: BTreeSet<&String> =
        models.opened.iter().flat_map(|m| m.source.tensors.keys()).collect();
    let mut notes = Vec::new();
    for (i, Module { name, .. }) in family.modules.iter().enumerate() {
        let own = names.iter().filter(|n| family.holds(i, n));
        let Some(planned) = planned.iter().find(|p| p.module == i) else {
            let tensors = own.count();
            notes.push(format!(
                "the recipe does not name the module `{name}`: its {tensors} tensors are left out"
            ));
            continue;
        };
        let layers = planned.slices.iter().map(|s| s.layers).sum();
        let beyond = |n: &&&String| family.split(i, n).is_some_and(|(l, ..)| l >= layers);
        let mut beyond = own.filter(beyond).peekable();
        if let (true, Some(first)) = (planned.whole, beyond.peek()) {
            notes.push(format!(
                "`config.json` counts {layers} layers: tensors of layers beyond them are left out, `{first}` first"
            ));
        }
    }
    notes
}

/// The models of a recipe that are merged, its base left out, in order.
fn members<'r>(
    recipe: &'r DenseRecipe,
    models: &Models,
    modules: &[PlannedModule],
) -> Vec<(Source, &'r Input)> {
    let Some(slice) = modules.first().and_then(|m| m.slices.first()) else { return Vec::new() };
    let all = recipe.inputs().zip(&slice.inputs).enumerate();
    all.filter(|(i, _)| Some(*i) != slice.base)
        .map(|(_, (input, planned))| (models.opened[planned.model].source.clone(), input))
        .collect()
}

/// The vocabulary that `spec` asks for; opens the models that lend rows to it.
fn common_vocabulary(
    spec: &TokenizerSpec,
    recipe: &DenseRecipe,
    models: &mut Models,
) -> Result<Vocabulary, MergeError> {
    let count = models.opened.len();
    if let VocabularySource::Model(model) = &spec.source {
        models.open(model)?;
    }
    for token in &spec.tokens {
        if let Some(RowSpec::Model(m) | RowSpec::Token(m, _) | RowSpec::Id(m, _)) = &token.source {
            models.open(m)?;
        }
    }
    // The base is opened first, then the others in recipe order.
    let base = recipe.base_model.as_ref().map(|_| 0);
    let sources: Vec<&Source> = models.opened.iter().map(|m| &m.source).collect();
    let find = |spec: &SourceSpec| models.find(spec);
    Vocabulary::new(spec, &Members { sources: &sources, count, base, find: &find })
}

/// Files of a tokenizer, which go with the vocabulary.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

fn side_files(
    recipe: &DenseRecipe,
    models: &Models,
    donor: &Source,
    vocabulary: Option<&Vocabulary>,
) -> Result<Vec<SideFile>, MergeError> {
    let mut side = donor.side.clone();
    if let Some(vocabulary) = vocabulary {
        let tokenizer = |f: &&SideFile| TOKENIZER_FILES.contains(&f.name.as_str());
        side.retain(|f| !tokenizer(&f));
        let from = &models.opened[vocabulary.donor].source;
        side.extend(from.side.iter().filter(tokenizer).cloned());
        for (name, bytes) in &vocabulary.files {
            side.retain(|f| f.name != *name);
            let content = SideContent::Bytes(bytes.as_slice().into());
            side.push(SideFile { name: name.clone(), content });
        }
    }
    if let Some(wanted) = &recipe.chat_template {
        let sources: Vec<&Source> = models.opened.iter().map(|m| &m.source).collect();
        with_template(wanted, &sources, &mut side)?;
    }
    Ok(side)
}

fn wrong(place: &Place, what: impl Into<String>) -> RecipeErrors {
    RecipeErrors(vec![place.error(what)])
}
