//! Recipes: YAML text to typed values, every mistake with its place.
//!
//! ```
//! use moe_merge_merge::recipe::{self, Recipe};
//! let text = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n  - model: b\n";
//! assert!(matches!(recipe::parse(text, "mix.yaml".as_ref()), Ok(Recipe::Dense(_))));
//! let wrong = recipe::parse("merge_methd: linear\n", "mix.yaml".as_ref()).unwrap_err();
//! assert_eq!(wrong.0[0].hint.as_deref(), Some("did you mean `merge_method`?"));
//! ```

use std::path::Path;

mod align;
mod dense;
mod error;
mod file;
mod moe;
mod node;
mod page;
mod prompts;
mod reader;
mod schema;
mod setting;
mod source;
mod stages;
mod tokenizer;

pub use align::{ALIGN_METHODS, Align, AlignMethod};
pub use dense::{
    DenseRecipe, Input, MatchExperts, ModelText, ModuleSpec, Parameters, Parts, Slice,
};
pub use error::{Location, RecipeError, RecipeErrors};
pub use file::read;
pub use moe::{ARCHITECTURES, Architecture, Attention, Choice, Expert, GateMode, MoeRecipe};
pub use page::page;
pub use prompts::{ExpertFile, PromptList, prompt_lists};
pub use schema::{Availability, Key, Shape, TABLES, json_schema};
pub use setting::{ParameterKind, Setting};
pub use source::{Place, SourceKind, SourceSpec};
pub use tokenizer::{CHAT_TEMPLATES, RowSpec, TokenSpec, TokenizerSpec, VocabularySource};

pub use reader::nearest;

use node::{Node, Value};
use reader::Reader;

/// What a recipe asks for.
#[derive(Debug, Clone)]
pub enum Recipe {
    /// A mixture of experts.
    Moe(MoeRecipe),
    /// A dense merge.
    Dense(DenseRecipe),
}

/// Reads a recipe. A text of several YAML documents is a recipe in stages: a model called like a document's `name` is that
/// document's result, and the document without a name, else the last one, is the recipe. `path` is its file: messages name it, and relative paths start from its folder.
///
/// Files that the recipe names (`prompts_file`, `evaluation`) are looked for and prompts are read; models are not
/// opened.
///
/// # Errors
/// [`RecipeErrors`] with every mistake there is, in the order of the text.
pub fn parse(text: &str, path: &Path) -> Result<Recipe, RecipeErrors> {
    parse_seeded(text, path, None)
}

/// As [`parse`]; `seed` stands instead of the seed of the recipe and of all recipes that it names.
///
/// # Errors
/// As [`parse`].
pub fn parse_seeded(text: &str, path: &Path, seed: Option<u64>) -> Result<Recipe, RecipeErrors> {
    let mut reader = Reader { seed, ..Reader::new(path) };
    let documents = match node::parse(text) {
        Ok(documents) => documents,
        Err(e) => {
            let error = reader.error(e.at, "", "this is no valid YAML");
            if e.message.contains("tab") {
                error.hint = Some("YAML is indented with spaces".into());
            }
            error.found = Some(e.message);
            return Err(RecipeErrors(reader.errors));
        }
    };
    let at = documents[0].at;
    let recipe = stages::last(&mut reader, documents);
    match recipe {
        Some(recipe) if reader.errors.is_empty() => Ok(recipe),
        _ => {
            if reader.errors.is_empty() {
                reader.error(at, "", "the recipe cannot be read");
            }
            reader.errors.sort_by_key(|e| e.at);
            Err(RecipeErrors(reader.errors))
        }
    }
}

/// A recipe, at the top of a file or nested in another one.
fn recipe(reader: &mut Reader, node: &Node, path: &str) -> Option<Recipe> {
    let expected =
        "a MoE recipe with `base_model` and `experts`, or a dense merge with `merge_method`";
    let Value::Map(entries) = &node.value else {
        reader.wrong(node, path, expected);
        if path.is_empty()
            && let Some(error) = reader.errors.last_mut()
        {
            error.what = "this is no recipe".into();
        }
        return None;
    };
    let has = |key: &str| entries.iter().any(|(k, _)| k.text == key);
    match (has("experts"), has("merge_method")) {
        (true, true) => {
            let error = reader.error(node.at, path, "both `experts` and `merge_method` are given");
            error.expected = Some(expected.into());
            error.hint = Some("a dense merge of the other tensors goes under `attention:`".into());
            None
        }
        (true, false) => reader.moe(node, path).map(Recipe::Moe),
        (false, true) => reader.dense(node, path).map(Recipe::Dense),
        (false, false) => {
            // Take the kind of recipe that most keys, or keys almost so named, belong to.
            let score = |keys: &[Key]| {
                let near =
                    |text: &str| reader::nearest(text, keys.iter().map(|k| k.name)).is_some();
                entries.iter().filter(|(k, _)| near(&k.text)).count()
            };
            match (score(schema::MOE), score(schema::DENSE)) {
                (0, 0) => {
                    reader.wrong(node, path, expected);
                    let what = "this is no recipe".to_owned();
                    reader.errors.last_mut().into_iter().for_each(|e| e.what = what.clone());
                    None
                }
                (moe, dense) if moe > dense => reader.moe(node, path).map(Recipe::Moe),
                _ => reader.dense(node, path).map(Recipe::Dense),
            }
        }
    }
}
