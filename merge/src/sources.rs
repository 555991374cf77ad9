//! Opening what a recipe names: checkpoints, and recipes whose result is computed while it is read.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{Source, located};

use crate::dense;
use crate::error::MergeError;
use crate::recipe::{self, Recipe, RecipeErrors, SourceKind, SourceSpec};

/// Recipes within recipes, at most.
const DEPTH: usize = 16;

/// Opens a source of a recipe; relative paths start from `base_dir`.
///
/// A dense recipe becomes a [`Source`] whose weights are computed by rows when they are read: nothing is written to
/// disk, and memory does not grow with the number of models.
///
/// # Errors
/// [`MergeError::At`] if a model cannot be opened, [`MergeError::Recipe`] if a nested recipe is wrong, names
/// itself, or makes a MoE, [`MergeError::Incompatible`] if its models do not go together.
pub fn open(source: &SourceSpec, base_dir: &Path) -> Result<Source, MergeError> {
    Trail::starting_at(&source.place.file).open(source, base_dir)
}

/// The recipes that are being opened, outermost first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trail {
    files: Vec<PathBuf>,
    depth: usize,
}

impl Trail {
    /// A trail that begins in the recipe `file`.
    pub fn starting_at(file: &Path) -> Self {
        Self { files: file.canonicalize().into_iter().collect(), depth: 0 }
    }

    /// As [`open`], within the recipes of this trail.
    pub fn open(&self, source: &SourceSpec, base_dir: &Path) -> Result<Source, MergeError> {
        let mut opened = match &source.kind {
            SourceKind::Model(model) => {
                Source::open(model, base_dir).map_err(|e| MergeError::from(e).at(&source.place))?
            }
            SourceKind::Inline(recipe) => self.deeper(source)?.recipe(recipe, source, base_dir)?,
            SourceKind::File(file) => {
                let path = located(file, base_dir);
                let trail = self.within_file(source, &path)?;
                let recipe = read(source, &path)?;
                let dir = path.parent().unwrap_or(Path::new(""));
                let mut opened = trail.recipe(&recipe, source, dir)?;
                opened.files.push(path);
                opened
            }
        };
        opened.label = source.to_string();
        Ok(opened)
    }

    fn recipe(
        &self,
        recipe: &Recipe,
        source: &SourceSpec,
        base_dir: &Path,
    ) -> Result<Source, MergeError> {
        match recipe {
            Recipe::Dense(dense) => dense::dense_in(self, dense, base_dir),
            Recipe::Moe(_) => {
                let mut error = source.place.error("a MoE recipe cannot be a source");
                error.expected = Some("a model, or a recipe with `merge_method`".into());
                error.found = Some(format!("`{source}`, a recipe with `experts`"));
                error.hint = Some(
                    "an expert is one MLP per layer, and a MoE has several; build the inner MoE on its own, \
                     or list its experts here"
                        .into(),
                );
                Err(RecipeErrors(vec![error]).into())
            }
        }
    }

    fn deeper(&self, source: &SourceSpec) -> Result<Self, MergeError> {
        if self.depth >= DEPTH {
            let mut error = source.place.error("recipes are nested too deeply");
            error.expected = Some(format!("at most {DEPTH} recipes within each other"));
            return Err(RecipeErrors(vec![error]).into());
        }
        Ok(Self { depth: self.depth + 1, files: self.files.clone() })
    }

    fn within_file(&self, source: &SourceSpec, path: &Path) -> Result<Self, MergeError> {
        let mut trail = self.deeper(source)?;
        let file = path.canonicalize().map_err(|e| {
            let mut error = source.place.error("recipe not found");
            error.found = Some(format!("{}: {e}", path.display()));
            error.hint = Some("a source that ends in `.yaml` is read as a recipe".into());
            RecipeErrors(vec![error])
        })?;
        if trail.files.contains(&file) {
            let mut error = source.place.error("a recipe names itself as a source");
            let shown = trail.files.iter().chain([&file]);
            let shown: Vec<_> = shown
                .map(|f| f.file_name().unwrap_or(f.as_os_str()).to_string_lossy().into_owned())
                .collect();
            error.found = Some(shown.join(" -> "));
            return Err(RecipeErrors(vec![error]).into());
        }
        trail.files.push(file);
        Ok(trail)
    }
}

fn read(source: &SourceSpec, path: &Path) -> Result<Recipe, RecipeErrors> {
    let text = fs_err::read_to_string(path).map_err(|e| {
        let mut error = source.place.error("recipe cannot be read");
        error.found = Some(e.to_string());
        RecipeErrors(vec![error])
    })?;
    recipe::parse_seeded(&text, path, source.seed)
}
