//! Reading typed values from a tree, with every mistake collected.

use std::path::{Path, PathBuf};

use super::error::{Location, RecipeError};
use super::node::{Node, Value};
use super::schema::{Availability, Key};
use super::stages::Stage;

/// Collects the mistakes of one recipe.
#[derive(Debug)]
pub(super) struct Reader {
    /// The recipe, for messages.
    pub file: PathBuf,
    /// The folder that relative paths start from.
    pub dir: PathBuf,
    /// Mistakes so far.
    pub errors: Vec<RecipeError>,
    /// The documents of a recipe in stages.
    pub stages: Vec<Stage>,
    /// Seed of everything random, whatever the recipe says.
    pub seed: Option<u64>,
}

/// A mapping whose keys have been checked.
#[derive(Debug, Clone)]
pub(super) struct Object<'a> {
    pub at: Location,
    pub path: String,
    entries: Vec<(&'a str, &'a Node)>,
}

impl<'a> Object<'a> {
    /// The value of `key` and its recipe path; null counts as absent.
    pub fn get(&self, key: &str) -> Option<(&'a Node, String)> {
        let (_, node) = self.entries.iter().find(|(k, _)| *k == key)?;
        (!matches!(node.value, Value::Null)).then(|| (*node, join(&self.path, key)))
    }

    /// Whether `key` has a value.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }
}

/// `path.key`, or `key` at the top.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

impl Reader {
    pub fn new(file: &Path) -> Self {
        let dir = file.parent().unwrap_or(Path::new("")).to_owned();
        Self { file: file.to_owned(), dir, errors: Vec::new(), stages: Vec::new(), seed: None }
    }

    /// Records a mistake; the caller fills in what was expected, found, and the hint.
    pub fn error(&mut self, at: Location, path: &str, what: impl Into<String>) -> &mut RecipeError {
        self.errors.push(RecipeError {
            what: what.into(),
            file: self.file.clone(),
            at,
            path: path.to_owned(),
            expected: None,
            found: None,
            hint: None,
        });
        self.errors.last_mut().expect("just pushed")
    }

    /// Records that a value is of another kind than expected.
    pub fn wrong(&mut self, node: &Node, path: &str, expected: impl Into<String>) {
        let found = node.describe();
        let key = path.rsplit('.').next().unwrap_or(path).to_owned();
        let error = self.error(node.at, path, format!("`{key}` has a value that does not fit"));
        error.expected = Some(expected.into());
        error.found = Some(found);
    }

    /// Checks a mapping against its table of keys.
    pub fn object<'a>(
        &mut self,
        node: &'a Node,
        path: &str,
        keys: &[Key],
        what: &str,
    ) -> Option<Object<'a>> {
        let Value::Map(entries) = &node.value else {
            let names: Vec<_> = keys.iter().filter(|k| k.required).map(|k| k.name).collect();
            let with = if names.is_empty() {
                String::new()
            } else {
                format!(" with `{}`", names.join("`, `"))
            };
            self.wrong(node, path, format!("{what}, a mapping{with}"));
            return None;
        };
        let known: Vec<_> = keys.iter().map(|k| k.name).collect();
        for (key, value) in entries {
            let here = join(path, &key.text);
            match keys.iter().find(|k| k.name == key.text) {
                None => {
                    let text = super::node::shorten(&key.text);
                    let error = self.error(key.at, &here, format!("unknown key `{text}`"));
                    let usable = keys.iter().filter(|k| k.availability == Availability::Now);
                    let usable: Vec<_> = usable.map(|k| k.name).collect();
                    error.expected = Some(format!("keys of {what}: {}", usable.join(", ")));
                    error.hint = nearest(&key.text, known.iter().copied())
                        .map(|n| format!("did you mean `{n}`?"));
                }
                Some(Key {
                    availability: Availability::Later { unless_false, reason }, ..
                }) => {
                    let off = matches!(value.value, Value::Null)
                        || *unless_false && matches!(value.value, Value::Bool(false));
                    if !off {
                        let what = format!("`{}` is not supported by this version", key.text);
                        self.error(key.at, &here, what).hint = Some((*reason).to_owned());
                    }
                }
                Some(_) => {}
            }
        }
        let entries: Vec<_> = entries.iter().map(|(k, v)| (k.text.as_str(), v)).collect();
        let object = Object { at: node.at, path: path.to_owned(), entries };
        for key in keys.iter().filter(|k| k.required && !object.has(k.name)) {
            let error =
                self.error(node.at, &join(path, key.name), format!("`{}` is missing", key.name));
            error.expected = Some(key.doc.to_owned());
        }
        Some(object)
    }

    pub fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        match &node.value {
            Value::Text(text) => Some(text.clone()),
            Value::Bool(_) | Value::Integer(_) | Value::Number(_) => {
                self.wrong(node, path, "a text");
                if let Some(error) = self.errors.last_mut() {
                    error.hint = Some("put it in quotes".into());
                }
                None
            }
            _ => {
                self.wrong(node, path, "a text");
                None
            }
        }
    }

    pub fn boolean(&mut self, node: &Node, path: &str) -> Option<bool> {
        match as_bool(node) {
            Some(v) => Some(v),
            None => {
                self.wrong(node, path, "`true` or `false`");
                None
            }
        }
    }

    /// A whole number within `range`.
    pub fn integer(
        &mut self,
        node: &Node,
        path: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Option<u64> {
        if let Value::Integer(v) = node.value
            && let Ok(v) = u64::try_from(v)
            && range.contains(&v)
        {
            return Some(v);
        }
        let expected = match (*range.start(), *range.end()) {
            (from, u64::MAX) => format!("a whole number, at least {from}"),
            (from, to) => format!("a whole number from {from} to {to}"),
        };
        self.wrong(node, path, expected);
        None
    }

    /// A finite number of at least `least`.
    pub fn number(&mut self, node: &Node, path: &str, least: f64) -> Option<f64> {
        match as_number(node) {
            Some(v) if v.is_finite() && v >= least => Some(v),
            _ if least == f64::NEG_INFINITY => {
                self.wrong(node, path, "a finite number");
                None
            }
            _ => {
                self.wrong(node, path, format!("a finite number, at least {least}"));
                None
            }
        }
    }

    pub fn list<'a>(&mut self, node: &'a Node, path: &str, expected: &str) -> Option<&'a [Node]> {
        match &node.value {
            Value::List(items) => Some(items),
            _ => {
                self.wrong(node, path, expected);
                None
            }
        }
    }

    /// One of `names`; a miss is explained with the nearest.
    pub fn one_of(&mut self, node: &Node, path: &str, names: &[&str]) -> Option<String> {
        let text = self.text(node, path)?;
        if names.contains(&text.as_str()) {
            return Some(text);
        }
        self.unknown_name(node, path, &text, names);
        None
    }

    /// Records that `text` is none of `names`.
    pub fn unknown_name(&mut self, node: &Node, path: &str, text: &str, names: &[&str]) {
        let key = path.rsplit('.').next().unwrap_or(path).to_owned();
        let found = node.describe();
        let error = self.error(node.at, path, format!("unknown `{key}`"));
        error.expected = Some(format!("one of {}", names.join(", ")));
        error.found = Some(found);
        error.hint = nearest(text, names.iter().copied()).map(|n| format!("did you mean `{n}`?"));
    }

    /// A file that has to exist, relative to the recipe.
    pub fn existing_file(&mut self, node: &Node, path: &str) -> Option<PathBuf> {
        let text = self.text(node, path)?;
        let file = self.dir.join(&text);
        if file.is_file() {
            return Some(file);
        }
        let is_folder = file.is_dir();
        let near = sibling(&file, |_| true);
        let error =
            self.error(node.at, path, if is_folder { "not a file" } else { "file not found" });
        error.expected = Some("a text file, relative to the recipe".into());
        error.found = Some(match is_folder {
            true => format!("`{}`, a folder", file.display()),
            false => format!("no file at `{}`", file.display()),
        });
        error.hint = near.filter(|_| !is_folder).map(|name| format!("did you mean `{name}`?"));
        None
    }
}

/// The file beside `path` with the nearest name among those that `fits` lets through.
pub(super) fn sibling(path: &Path, fits: impl Fn(&str) -> bool) -> Option<String> {
    let folder = path.parent()?;
    let shown = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = std::fs::read_dir(shown).ok()?.flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| fits(name))
        .collect();
    names.sort();
    let near = nearest(path.file_name()?.to_str()?, names.iter().map(String::as_str))?;
    Some(folder.join(near).display().to_string())
}

/// A number, also as numeric text (`1e-1` is text in YAML 1.1).
pub(super) fn as_number(node: &Node) -> Option<f64> {
    match &node.value {
        Value::Integer(v) => Some(*v as f64),
        Value::Number(v) => Some(*v),
        Value::Text(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A truth value: true/false, 0/1 and the usual words.
pub(super) fn as_bool(node: &Node) -> Option<bool> {
    match &node.value {
        Value::Bool(v) => Some(*v),
        Value::Integer(0) => Some(false),
        Value::Integer(1) => Some(true),
        Value::Text(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" | "t" | "1" => Some(true),
            "false" | "no" | "off" | "n" | "f" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// The name nearest to `text`, if one is near enough to be meant.
pub fn nearest<'n>(text: &str, names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let text: String = text.chars().take(64).collect::<String>().to_lowercase().replace('-', "_");
    let allowed = (text.chars().count() / 3).max(1);
    names
        .into_iter()
        .map(|name| {
            let near = name.len() >= 4 && text.len() >= 4;
            let contained = near && (name.starts_with(&text) || text.starts_with(name));
            let edits = edits(&text, name);
            (if contained { 1 } else { edits }, edits, name)
        })
        .filter(|(distance, ..)| *distance <= allowed)
        .min_by_key(|&(distance, edits, _)| (distance, edits))
        .map(|(.., name)| name)
}

/// Insertions, removals, replacements and swaps of neighbours between two texts.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            rows[i][j] = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                rows[i][j] = rows[i][j].min(rows[i - 2][j - 2] + 1);
            }
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_names() {
        let names = ["hidden", "hidden_avg", "cheap_embed", "random"];
        assert_eq!(nearest("hiden", names), Some("hidden"));
        assert_eq!(nearest("cheap-embed", names), Some("cheap_embed"));
        assert_eq!(nearest("radnom", names), Some("random"));
        assert_eq!(nearest("xyz", names), None);
        assert_eq!(
            nearest("experts_per_tokn", ["experts", "experts_per_token"]),
            Some("experts_per_token")
        );
        assert_eq!(nearest("", names), None);
    }

    #[test]
    fn edit_distance_by_hand() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("ab", "ba"), 1);
        assert_eq!(edits("", "abc"), 3);
    }
}
