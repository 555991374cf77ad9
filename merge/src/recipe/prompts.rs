//! Files of prompts that a recipe names, and the prompts of a recipe by themselves.

use std::path::{Path, PathBuf};

use super::error::{Location, RecipeErrors};
use super::moe::Expert;
use super::node::{self, Node, Value};
use super::reader::{Object, Reader, nearest};
use super::schema::{self, Availability, Key};
use super::source::Place;
use crate::documents::{At, Document, Label, PromptFile};

/// A file of prompts of one expert.
#[derive(Debug, Clone)]
pub struct ExpertFile {
    /// The file.
    pub path: PathBuf,
    /// Where the recipe names it.
    pub place: Place,
    /// Its documents for this expert, at least one.
    pub documents: Vec<Document>,
    /// Documents without text, which are left out.
    pub empty: usize,
    /// Documents whose label names an expert that does not name this file, so that nobody gets them.
    pub unclaimed: usize,
}

/// The prompts of one expert of a YAML file that may be a recipe.
#[derive(Debug, Clone)]
pub struct PromptList {
    /// The name of the expert: `name`, else the last part of `source_model`.
    pub name: Option<String>,
    /// Where it stands.
    pub at: At,
    /// Text that it should get.
    pub positive: Vec<String>,
    /// Text that it should not get.
    pub negative: Vec<String>,
    /// Files with more text that it should get.
    pub files: Vec<PromptFile>,
}

/// The prompts of the experts in `text`: a recipe, or `experts:` with nothing but names and prompts.
///
/// # Errors
/// [`RecipeErrors`] with every mistake in what concerns prompts; the rest of a recipe is not looked at.
pub fn prompt_lists(text: &str, path: &Path) -> Result<Vec<PromptList>, RecipeErrors> {
    let mut reader = Reader::new(path);
    let mut lists = Vec::new();
    match node::parse(text) {
        Ok(documents) => lists = reader.prompt_lists(&documents[documents.len() - 1]),
        Err(e) => reader.error(e.at, "", "this is no valid YAML").found = Some(e.message),
    }
    if reader.errors.is_empty() { Ok(lists) } else { Err(RecipeErrors(reader.errors)) }
}

/// A table of keys, all of them usable and none needed but `needed`.
fn lenient(keys: &[Key], needed: &str) -> Vec<Key> {
    let one =
        |key: &Key| Key { required: key.name == needed, availability: Availability::Now, ..*key };
    keys.iter().map(one).collect()
}

impl Reader {
    /// The files under `prompts_file`: one path, or a list of them.
    pub fn prompts_files(&mut self, object: &Object) -> Vec<ExpertFile> {
        let Some((node, path)) = object.get("prompts_file") else { return Vec::new() };
        let items: Vec<(&Node, String)> = match &node.value {
            Value::Text(_) => vec![(node, path)],
            Value::List(items) if !items.is_empty() => {
                items.iter().enumerate().map(|(i, n)| (n, format!("{path}[{i}]"))).collect()
            }
            _ => {
                self.wrong(node, &path, "a path, or a list of paths");
                return Vec::new();
            }
        };
        let mut files = Vec::new();
        for (node, path) in items {
            let Some(file) = self.existing_file(node, &path) else { continue };
            let Some(read) = self.prompt_file(node.at, &path, &file) else { continue };
            let PromptFile { path: file, documents, empty } = read;
            let place = self.place(node.at, &path);
            files.push(ExpertFile { path: file, place, documents, empty, unclaimed: 0 });
        }
        files
    }

    /// The documents of `file`, which the recipe names at `path`.
    pub fn prompt_file(&mut self, at: Location, path: &str, file: &Path) -> Option<PromptFile> {
        let reason = match PromptFile::read(file) {
            Ok(read) => return Some(read),
            Err(reason) => reason,
        };
        let found = reason.found.as_ref().map_or(String::new(), |f| format!(": {f}"));
        let error = self.error(at, path, "the file of prompts cannot be used");
        error.found = Some(format!("{}: {reason}{found}", reason.place()));
        error.expected = reason
            .expected
            .or_else(|| Some("text in blocks divided by blank lines, `.jsonl` or `.json`".into()));
        error.hint = reason.hint;
        None
    }

    /// Leaves each expert those documents of its files that are not labelled as another expert's.
    ///
    /// An `expert` or a list by expert has to name one of the recipe; a `label` or `domain` that names none says
    /// nothing: the expert that names the file gets it.
    pub fn share_out(&mut self, routed: &mut [Option<Expert>], shared: &mut [Option<Expert>]) {
        let count = routed.len();
        let all = routed.iter().chain(shared.iter());
        let Some(names) = all.map(|e| e.as_ref().map(Expert::label)).collect::<Option<Vec<_>>>()
        else {
            return;
        };
        let owner = |label: &Label| {
            let named = names.iter().position(|n| *n == label.text);
            let number = || label.text.parse().ok().filter(|&n: &usize| n < count);
            if label.certain { named.or_else(number) } else { named }
        };
        let files = |e: &Option<Expert>| -> Vec<PathBuf> {
            e.iter().flat_map(|e| &e.prompts_files).map(|f| f.path.clone()).collect()
        };
        let named: Vec<_> = routed.iter().chain(shared.iter()).map(files).collect();
        for (i, expert) in routed.iter_mut().chain(shared.iter_mut()).flatten().enumerate() {
            for file in &mut expert.prompts_files {
                let before = file.documents.len();
                let stray = file.documents.iter().find_map(|d| {
                    let label = d.label.as_ref().filter(|l| l.certain && owner(l).is_none())?;
                    Some((d.at, label.text.clone()))
                });
                if let Some((at, label)) = stray {
                    let what = "a document is for an expert that the recipe does not have";
                    let error = self.error(file.place.at, &file.place.path, what);
                    error.expected = Some(format!("one of {}", names.join(", ")));
                    let label = node::shorten(&label);
                    error.found = Some(format!("`{label}` at {}{at}", file.path.display()));
                    error.hint = nearest(&label, names.iter().map(String::as_str))
                        .map(|n| format!("did you mean `{n}`?"));
                    continue;
                }
                let path = &file.path;
                file.documents.retain(|d| {
                    // Two experts may have one label where neither has a name: it does not tell them apart.
                    let theirs = d.label.as_ref().and_then(owner).filter(|&o| names[o] != names[i]);
                    file.unclaimed += usize::from(theirs.is_some_and(|o| !named[o].contains(path)));
                    theirs.is_none()
                });
                if file.documents.is_empty() {
                    let what = "no document of the file is for this expert";
                    let error = self.error(file.place.at, &file.place.path, what);
                    error.expected =
                        Some(format!("documents labelled `{}`, or without label", names[i]));
                    error.found = Some(format!("{before} documents, all labelled for others"));
                }
            }
        }
    }

    fn prompt_lists(&mut self, node: &Node) -> Vec<PromptList> {
        let keys = lenient(schema::MOE, "experts");
        let Some(object) = self.object(node, "", &keys, "a file of prompts") else {
            return Vec::new();
        };
        let keys = lenient(schema::EXPERT, "");
        let mut lists = Vec::new();
        for (node, path) in self.items_at(&object, "experts", "a list of experts") {
            let Some(object) = self.object(node, &path, &keys, "an expert") else { continue };
            let name = self.text_at(&object, "name").or_else(|| {
                let source = self.source_at(&object, "source_model")?.to_string();
                source.rsplit(['/', '+']).find(|p| !p.is_empty()).map(str::to_owned)
            });
            let files = self.prompts_files(&object).into_iter().map(|file| PromptFile {
                path: file.path,
                documents: file.documents,
                empty: file.empty,
            });
            lists.push(PromptList {
                name,
                at: At::Line(node.at.line),
                positive: self.prompts(&object, "positive_prompts"),
                negative: self.prompts(&object, "negative_prompts"),
                files: files.collect(),
            });
        }
        lists
    }
}
