//! Where a model comes from, as a recipe says it.

use std::fmt;
use std::path::PathBuf;

use moe_merge_checkpoint::SourceRef;

use super::Recipe;
use super::error::{Location, RecipeError};
use super::node::{Node, Value};
use super::reader::{Object, Reader};
use super::schema;

/// A place in a recipe, kept for errors that are found later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The recipe.
    pub file: PathBuf,
    /// Line and column.
    pub at: Location,
    /// Which value: `experts[2].source_model`.
    pub path: String,
}

impl Place {
    /// A mistake at this place.
    pub fn error(&self, what: impl Into<String>) -> RecipeError {
        RecipeError {
            what: what.into(),
            file: self.file.clone(),
            at: self.at,
            path: self.path.clone(),
            expected: None,
            found: None,
            hint: None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error("").place())
    }
}

/// A model named in a recipe.
#[derive(Debug, Clone)]
pub struct SourceSpec {
    /// What it is.
    pub kind: SourceKind,
    /// Where it is named.
    pub place: Place,
    /// Seed for a recipe that it names, instead of that recipe's own.
    pub seed: Option<u64>,
}

/// What a source can be.
#[derive(Debug, Clone)]
pub enum SourceKind {
    /// A checkpoint, perhaps with an adapter on top.
    Model(SourceRef),
    /// A recipe written in place.
    Inline(Box<Recipe>),
    /// A recipe of its own, as written: relative to the recipe that names it.
    File(PathBuf),
}

impl SourceSpec {
    /// Whether both name the same model in the same words.
    pub fn same_as(&self, other: &SourceSpec) -> bool {
        match (&self.kind, &other.kind) {
            (SourceKind::Model(a), SourceKind::Model(b)) => a == b,
            (SourceKind::File(a), SourceKind::File(b)) => a == b,
            _ => false,
        }
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            SourceKind::Model(source) => source.fmt(f),
            SourceKind::File(path) => path.display().fmt(f),
            SourceKind::Inline(recipe) => match recipe.as_ref() {
                Recipe::Dense(dense) => {
                    write!(f, "{}", dense.name.as_deref().unwrap_or(dense.method.name))
                }
                Recipe::Moe(_) => f.write_str("nested MoE recipe"),
            },
        }
    }
}

impl Reader {
    pub fn place(&self, at: Location, path: &str) -> Place {
        Place { file: self.file.clone(), at, path: path.to_owned() }
    }

    /// A model reference in any of its forms.
    pub fn source(&mut self, node: &Node, path: &str) -> Option<SourceSpec> {
        let kind = match &node.value {
            Value::Map(entries) => {
                let has = |key: &str| entries.iter().any(|(k, _)| k.text == key);
                let recipe = ["merge_method", "experts", "models", "slices"].into_iter().any(has);
                if recipe {
                    SourceKind::Inline(Box::new(super::recipe(self, node, path)?))
                } else {
                    SourceKind::Model(self.source_object(node, path)?)
                }
            }
            Value::Text(text) => self.source_text(node, path, text)?,
            _ => {
                self.wrong(
                    node,
                    path,
                    "a model: a path, `{model: …, lora: …}`, or a nested recipe",
                );
                return None;
            }
        };
        Some(SourceSpec { kind, place: self.place(node.at, path), seed: self.seed })
    }

    fn source_text(&mut self, node: &Node, path: &str, text: &str) -> Option<SourceKind> {
        if text.trim().is_empty() || text.contains('\0') {
            self.wrong(node, path, "a path or a Hub name");
            return None;
        }
        if let Some(stage) = self.stage_called(node, path, text) {
            return stage;
        }
        let lower = text.to_ascii_lowercase();
        if lower.ends_with(".yaml") || lower.ends_with(".yml") {
            return Some(SourceKind::File(PathBuf::from(text)));
        }
        let whole =
            SourceRef { model: text.to_owned(), revision: None, lora: None, lora_revision: None };
        // A folder whose name holds `+` or `@` is that folder, also relative to the recipe.
        if self.dir.join(text).exists() {
            return Some(SourceKind::Model(whole));
        }
        let source: SourceRef = match text.parse() {
            Ok(source) => source,
            Err(e) => {
                let error = self.error(node.at, path, "this is no model reference");
                error.found = Some(e.to_string());
                return None;
            }
        };
        let parts = [Some(&source.model), source.revision.as_ref(), source.lora.as_ref()];
        if parts.into_iter().flatten().any(|p| p.is_empty()) {
            self.wrong(node, path, "`PATH[@revision][+ADAPTER[@revision]]` without empty parts");
            return None;
        }
        Some(SourceKind::Model(source))
    }

    fn source_object(&mut self, node: &Node, path: &str) -> Option<SourceRef> {
        let object = self.object(node, path, schema::SOURCE, "a model reference")?;
        let (model, inner) = self.path_part(&object, "model")?;
        let revision = self.text_at(&object, "revision").or(inner);
        let (lora, inner) = match object.has("lora") {
            true => {
                let (lora, inner) = self.path_part(&object, "lora")?;
                (Some(lora), inner)
            }
            false => (None, None),
        };
        let lora_revision = self.text_at(&object, "lora_revision").or(inner);
        Some(SourceRef { model, revision, lora, lora_revision })
    }

    /// `PATH` or `{path: PATH, revision: …}` under `key`.
    fn path_part(&mut self, object: &Object, key: &str) -> Option<(String, Option<String>)> {
        let (node, path) = object.get(key)?;
        let (name, revision) = match node.value {
            Value::Map(_) => {
                let object = self.object(node, &path, schema::PATH, "a path")?;
                (self.text_at(&object, "path")?, self.text_at(&object, "revision"))
            }
            _ => (self.text(node, &path)?, None),
        };
        if name.trim().is_empty() {
            self.wrong(node, &path, "a path or a Hub name");
            return None;
        }
        Some((name, revision))
    }

    /// The text under `key`, if there is one.
    pub fn text_at(&mut self, object: &Object, key: &str) -> Option<String> {
        let (node, path) = object.get(key)?;
        self.text(node, &path)
    }

    /// The source under `key`, if there is one.
    pub fn source_at(&mut self, object: &Object, key: &str) -> Option<SourceSpec> {
        let (node, path) = object.get(key)?;
        self.source(node, &path)
    }

    /// `[first, end)` under `key`.
    pub fn range_at(&mut self, object: &Object, key: &str) -> Option<std::ops::Range<usize>> {
        let (node, path) = object.get(key)?;
        let expected = "`[first, end]`: two whole numbers, the second one larger and not included";
        let items = self.list(node, &path, expected)?;
        let bounds: Vec<usize> = items
            .iter()
            .filter_map(|n| match n.value {
                Value::Integer(v) => usize::try_from(v).ok().filter(|v| *v < 1 << 20),
                _ => None,
            })
            .collect();
        match (bounds.as_slice(), items.len()) {
            (&[first, end], 2) if first < end => Some(first..end),
            _ => {
                let shown: Vec<_> = items.iter().take(4).map(Node::describe).collect();
                let error = self.error(node.at, &path, format!("`{key}` is no range of layers"));
                error.expected = Some(expected.to_owned());
                error.found = Some(format!("[{}]", shown.join(", ").replace('`', "")));
                None
            }
        }
    }

    /// The dtype under `key`, if there is one.
    pub fn dtype_at(&mut self, object: &Object, key: &str) -> Option<moe_merge_checkpoint::Dtype> {
        let (node, path) = object.get(key)?;
        let text = self.text(node, &path)?;
        let dtype = moe_merge_checkpoint::Dtype::from_config_name(&text);
        if dtype.is_none() {
            self.unknown_name(node, &path, &text, &["float32", "bfloat16", "float16"]);
        }
        dtype
    }

    /// The seed of a recipe, 0 by default.
    pub fn seed(&mut self, object: &Object) -> u64 {
        let written = object.get("seed").and_then(|(n, p)| self.integer(n, &p, 0..=u64::MAX));
        self.seed.or(written).unwrap_or(0)
    }

    /// The items under `key`, each with its recipe path.
    pub fn items_at<'a>(
        &mut self,
        object: &Object<'a>,
        key: &str,
        expected: &str,
    ) -> Vec<(&'a Node, String)> {
        let Some((node, path)) = object.get(key) else { return Vec::new() };
        let items = self.list(node, &path, expected).unwrap_or_default();
        items.iter().enumerate().map(|(i, n)| (n, format!("{path}[{i}]"))).collect()
    }

    /// The folder to write, if the recipe names one.
    pub fn output_at(&mut self, object: &Object) -> Option<PathBuf> {
        let (node, path) = object.get("output")?;
        let text = self.text(node, &path)?;
        if text.trim().is_empty() {
            self.wrong(node, &path, "a folder");
            return None;
        }
        Some(PathBuf::from(text))
    }
}
