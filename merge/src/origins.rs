//! Which line of a recipe a source comes from, for errors that are found when the recipe is long read.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{Explain, Source};

use crate::error::MergeError;
use crate::recipe::{Place, SourceSpec};

/// Opened sources and where the recipe names them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origins {
    sources: Vec<Origin>,
}

#[derive(Debug, Clone)]
struct Origin {
    label: String,
    path: PathBuf,
    files: Vec<PathBuf>,
    place: Place,
}

impl Origins {
    /// Adds a source. The one that breaks a rule is looked for in this order.
    pub fn add(&mut self, spec: &SourceSpec, source: &Source) {
        self.sources.push(Origin {
            label: source.label.clone(),
            path: source.path.clone(),
            files: source.files.clone(),
            place: spec.place.clone(),
        });
    }

    /// `error` with the place of the source that it concerns, where that can be told.
    pub fn locate(&self, error: MergeError) -> MergeError {
        match self.place(&error) {
            Some(place) => error.at(place),
            None => error,
        }
    }

    fn place(&self, error: &MergeError) -> Option<&Place> {
        let fields = error.fields();
        let value = |label| fields.iter().find(|(l, _)| *l == label).map(|(_, v)| v.as_str());
        let by_label = |label: &str| self.sources.iter().find(|o| o.label == label);
        let by_file = |file: &str| {
            let is = |path: &PathBuf| path.display().to_string() == file;
            let beside = |o: &&Origin| Path::new(file).parent().is_some_and(|p| p == o.path);
            let named = self.sources.iter().find(|o| o.files.iter().any(is) || is(&o.path));
            named.or_else(|| self.sources.iter().find(beside))
        };
        let blamed = ["second", "first", "source"].into_iter().filter_map(value).find_map(by_label);
        let found = blamed.or_else(|| by_file(value("file")?));
        found.map(|o| &o.place)
    }
}
