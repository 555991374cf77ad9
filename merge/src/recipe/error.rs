//! What is wrong with a recipe, and where.

use std::fmt;
use std::path::PathBuf;

use moe_merge_checkpoint::{Explain, Kind};

/// A place in a recipe file; lines and columns count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Location {
    /// Line, 0 if unknown.
    pub line: usize,
    /// Column in characters, 0 if unknown.
    pub column: usize,
}

/// One mistake in a recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct RecipeError {
    /// What is wrong, in one line.
    pub what: String,
    /// The recipe.
    pub file: PathBuf,
    /// Where in it.
    pub at: Location,
    /// Which value: `experts[2].source_model`; empty for the document itself.
    pub path: String,
    /// What was expected.
    pub expected: Option<String>,
    /// What was found.
    pub found: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl RecipeError {
    /// `file:line:column  path`, the place as a person reads it.
    pub fn place(&self) -> String {
        let mut place = self.file.display().to_string();
        if self.at.line > 0 {
            place.push_str(&format!(":{}:{}", self.at.line, self.at.column));
        }
        if !self.path.is_empty() {
            place.push_str("  ");
            place.push_str(&self.path);
        }
        place
    }
}

impl Explain for RecipeError {
    fn kind(&self) -> Kind {
        Kind::Usage
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![("recipe", self.place())];
        fields.extend(self.expected.iter().map(|e| ("expected", e.clone())));
        fields.extend(self.found.iter().map(|f| ("found", f.clone())));
        fields
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }
}

/// All mistakes of one recipe, in the order of the text; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeErrors(pub Vec<RecipeError>);

impl fmt::Display for RecipeErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => one.fmt(f),
            many => write!(f, "the recipe has {} mistakes", many.len()),
        }
    }
}

impl std::error::Error for RecipeErrors {}

impl Explain for RecipeErrors {
    fn kind(&self) -> Kind {
        Kind::Usage
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let [one] = self.0.as_slice() else {
            return self.0.iter().map(|e| ("recipe", e.to_text())).collect();
        };
        one.fields()
    }

    fn hint(&self) -> Option<String> {
        match self.0.as_slice() {
            [one] => one.hint(),
            _ => None,
        }
    }
}

impl RecipeError {
    /// The mistake as one block of text: place, what, expected, found, hint.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n  {}", self.place(), self.what);
        for (label, value) in [("expected", &self.expected), ("found", &self.found)] {
            if let Some(value) = value {
                text.push_str(&format!("\n  {label:<9} {value}"));
            }
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("\n  hint: {hint}"));
        }
        text
    }
}
