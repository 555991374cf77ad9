//! The models of a dense merge, each opened once.

use std::path::Path;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{Source, located};

use super::modules::Family;
use super::texts::{Amount, same_tokens};
use crate::error::MergeError;
use crate::experts::MoeInputs;
use crate::recipe::{DenseRecipe, ModelText, Parts, Place, Recipe, SourceKind, SourceSpec};
use crate::sources::Trail;

/// Models that have been opened, each once.
pub(super) struct Models<'a> {
    pub trail: &'a Trail,
    pub base_dir: &'a Path,
    /// What they are opened for.
    pub recipe: &'a DenseRecipe,
    pub opened: Vec<Opened>,
    /// What is done to MoE models.
    pub experts: MoeInputs,
    /// Whether sources are files of tensors, not models.
    pub files: bool,
}

/// One of them.
pub(super) struct Opened {
    identity: String,
    pub source: Source,
    place: Place,
}

impl Models<'_> {
    /// Opens `spec` if it is not open; returns its place.
    pub fn open(&mut self, spec: &SourceSpec) -> Result<usize, MergeError> {
        let identity = self.identity(spec);
        if let Some(found) = self.opened.iter().position(|m| m.identity == identity) {
            return Ok(found);
        }
        let source = match (&spec.kind, self.files) {
            (SourceKind::Model(model), true) => {
                Source::open_tensors(&located(&model.model, self.base_dir))
                    .map_err(|e| MergeError::from(e).at(&spec.place))?
            }
            _ => self.trail.open(spec, self.base_dir)?,
        };
        source.computable().map_err(|e| MergeError::from(e).at(&spec.place))?;
        let texts = |first: &Source, other: &Source| all_texts(self.recipe, first, other);
        let source = self.experts.take(source, &texts).map_err(|e| e.at(&spec.place))?;
        self.opened.push(Opened { identity, source, place: spec.place.clone() });
        Ok(self.opened.len() - 1)
    }

    /// Opens all models that are merged, in the order of the recipe.
    pub fn open_all(&mut self) -> Result<(), MergeError> {
        let recipe = self.recipe;
        for module in &recipe.modules {
            match &module.parts {
                Parts::Models(inputs) => {
                    for spec in inputs.iter().map(|i| &i.source).chain(&recipe.base_model) {
                        self.open(spec)?;
                    }
                }
                Parts::Slices(slices) => {
                    for slice in slices {
                        let sources = slice.sources.iter().map(|i| &i.source);
                        for spec in sources.chain(&slice.base_model) {
                            self.open(spec)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The modules that the models have; `donor` gives the configuration.
    pub fn family(&self, donor: usize) -> Family {
        let names = self.opened.iter().flat_map(|m| m.source.tensors.keys().map(String::as_str));
        Family::of(&self.opened[donor].source.config, &names.collect())
    }

    /// The same text for the same model, however its path is spelt.
    fn identity(&self, spec: &SourceSpec) -> String {
        let resolved = |path: &Path| {
            located(path, self.base_dir).canonicalize().unwrap_or_else(|_| path.to_owned())
        };
        match &spec.kind {
            SourceKind::Model(m) => {
                let lora = m.lora.as_ref().map(|l| resolved(l.as_ref()));
                let model = resolved(m.model.as_ref());
                format!("{model:?} {:?} {lora:?} {:?}", m.revision, m.lora_revision)
            }
            SourceKind::File(file) => format!("{:?}", resolved(file)),
            // A stage is one model, wherever it is named.
            SourceKind::Inline(recipe) => match recipe.as_ref() {
                Recipe::Dense(dense) => format!("recipe at {}", dense.place),
                Recipe::Moe(_) => format!("recipe at {}", spec.place),
            },
        }
    }

    pub fn check_families(&self, donor: usize) -> Result<(), MergeError> {
        let first = &self.opened[donor];
        for other in &self.opened {
            let (a, b) = (first.source.config.model_type(), other.source.config.model_type());
            if a != b {
                return Err(MergeError::Incompatible {
                    what: "models of different families cannot be merged".into(),
                    first: first.source.label.clone(),
                    second: other.source.label.clone(),
                    expected: format!("model_type `{a}`"),
                    found: format!("model_type `{b}`"),
                    hint: "all models of a merge need one architecture".into(),
                    recipe: Some(other.place.to_string()),
                });
            }
        }
        Ok(())
    }

    /// The opened model that `spec` means.
    pub fn find(&self, spec: &SourceSpec) -> Option<usize> {
        let identity = self.identity(spec);
        self.opened.iter().position(|m| m.identity == identity)
    }
}

/// The text of all models of a recipe, or what the first writes, as tokens of the first.
fn all_texts(
    recipe: &DenseRecipe,
    first: &Source,
    other: &Source,
) -> Result<Vec<Vec<u32>>, MergeError> {
    same_tokens(first, other, "`match_experts: activations`")?;
    let mut text = ModelText::default();
    for input in recipe.inputs() {
        text.prompts.extend(input.text.prompts.iter().cloned());
        text.files.extend(input.text.files.iter().cloned());
    }
    let amount = Amount::of(recipe);
    let (place, interrupt) = (&recipe.place, Interrupt::default());
    Ok(amount.text((first, 0), &text, place, &interrupt, &mut |_| {})?.0)
}
