//! Where a model is, as a person writes it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::CheckpointError;

/// Where a model is, as a person writes it: `PATH`, `FILE.gguf`, `org/name[@revision]`, any of them `+ADAPTER[@revision]`.
///
/// The text form splits at `+` and `@`, except where a path that contains them exists as it stands. The object form
/// of a recipe (`{model: …, lora: …}`) needs no splitting.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceRef {
    /// Folder, GGUF file or Hub name.
    pub model: String,
    /// Hub revision of the model.
    pub revision: Option<String>,
    /// PEFT adapter on top: folder or Hub name.
    pub lora: Option<String>,
    /// Hub revision of the adapter.
    pub lora_revision: Option<String>,
}

/// The path that `path` stands for: below `base_dir`, or below the working folder if only that one exists, as recipes
/// written for mergekit expect.
pub fn located(path: impl AsRef<Path>, base_dir: &Path) -> PathBuf {
    let (path, below) = (path.as_ref(), base_dir.join(path.as_ref()));
    if !below.exists() && path.exists() { path.to_owned() } else { below }
}

impl SourceRef {
    /// Reads the text form; paths that contain `+` or `@` are looked for as [`located`] does.
    ///
    /// Of several ways to split at `+`, one whose two sides exist wins over one whose model exists, and that over the
    /// first.
    ///
    /// # Errors
    /// [`CheckpointError::BadReference`] if the model, the adapter or a revision is empty.
    pub fn parse(text: &str, base_dir: &Path) -> Result<Self, CheckpointError> {
        let exists = |part: &str| !part.is_empty() && located(part, base_dir).exists();
        let bad =
            |what: &'static str| CheckpointError::BadReference { text: text.to_owned(), what };
        if text.trim().is_empty() {
            return Err(bad("is empty"));
        }
        // A revision never makes a path that exists into something else.
        let revision = |part: &str| match part.rsplit_once('@') {
            Some((name, revision)) if !exists(part) => (name.to_owned(), Some(revision.to_owned())),
            _ => (part.to_owned(), None),
        };
        let rank =
            |model: &str, lora: &str| match (exists(&revision(model).0), exists(&revision(lora).0))
            {
                (true, true) => 0,
                (true, false) => 1,
                (false, true) => 2,
                (false, false) => 3,
            };
        let split = text
            .match_indices('+')
            .map(|(at, _)| (&text[..at], &text[at + 1..]))
            .min_by_key(|(model, lora)| rank(model, lora));
        let (model, lora) = match split {
            Some((model, lora)) if !exists(text) => (model, Some(lora)),
            _ => (text, None),
        };
        let (model, model_revision) = revision(model);
        let (lora, lora_revision) = lora.map(revision).unzip();
        let lora_revision = lora_revision.flatten();
        if model.is_empty() {
            return Err(bad("names no model"));
        }
        if lora.as_deref() == Some("") {
            return Err(bad("names no adapter after `+`"));
        }
        if model_revision.as_deref() == Some("") || lora_revision.as_deref() == Some("") {
            return Err(bad("names no revision after `@`"));
        }
        Ok(Self { model, revision: model_revision, lora, lora_revision })
    }

    /// The same reference, split anew if its parts do not exist but other parts of its text form do:
    /// it may have been read before it was known which folder it is relative to.
    pub(crate) fn settle(&self, base_dir: &Path) -> Self {
        let exists = |part: &str| located(part, base_dir).exists();
        let whole = self.revision.is_none()
            && exists(&self.model)
            && self.lora.as_deref().is_none_or(|l| self.lora_revision.is_none() && exists(l));
        if whole {
            return self.clone();
        }
        match Self::parse(&self.to_string(), base_dir) {
            Ok(other) if exists(&other.model) => other,
            _ => self.clone(),
        }
    }
}

impl FromStr for SourceRef {
    type Err = CheckpointError;

    /// [`SourceRef::parse`], relative to the working folder.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text, Path::new(""))
    }
}

impl std::fmt::Display for SourceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.model)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        if let Some(lora) = &self.lora {
            write!(f, "+{lora}")?;
        }
        if let Some(revision) = &self.lora_revision {
            write!(f, "@{revision}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str, base: &Path) -> (String, Option<String>, Option<String>, Option<String>) {
        let r = SourceRef::parse(text, base).unwrap();
        assert_eq!(r.to_string(), text);
        (r.model, r.revision, r.lora, r.lora_revision)
    }

    fn s(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn splits_at_plus_and_at() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        assert_eq!(parts("a/b", at), ("a/b".into(), None, None, None));
        assert_eq!(parts("a/b@v1", at), ("a/b".into(), s("v1"), None, None));
        assert_eq!(parts("a/b+c/d", at), ("a/b".into(), None, s("c/d"), None));
        assert_eq!(parts("a/b@r1+c/d@r2", at), ("a/b".into(), s("r1"), s("c/d"), s("r2")));
        assert_eq!(parts("a/b@refs/pr/1", at), ("a/b".into(), s("refs/pr/1"), None, None));
    }

    #[test]
    fn a_path_that_exists_is_not_split() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        for name in ["c++", "me@home", "lora"] {
            std::fs::create_dir(at.join(name)).unwrap();
        }
        assert_eq!(parts("c++", at), ("c++".into(), None, None, None));
        assert_eq!(parts("c+++lora", at), ("c++".into(), None, s("lora"), None));
        assert_eq!(parts("me@home", at), ("me@home".into(), None, None, None));
        assert_eq!(parts("me@home+lora", at), ("me@home".into(), None, s("lora"), None));
        assert_eq!(parts("org/m+c++", at), ("org/m".into(), None, s("c++"), None));
    }

    #[test]
    fn the_recipes_folder_comes_before_the_working_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            located("src", dir.path()),
            Path::new("src"),
            "cargo tests in the crate's folder"
        );
        assert_eq!(located("nowhere", dir.path()), dir.path().join("nowhere"));
        std::fs::create_dir(dir.path().join("src")).unwrap();
        assert_eq!(located("src", dir.path()), dir.path().join("src"));
    }

    #[test]
    fn settles_once_the_folder_is_known() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("c++")).unwrap();
        let early: SourceRef = "c++".parse::<SourceRef>().unwrap_or(SourceRef {
            model: "c".into(),
            revision: None,
            lora: s("+"),
            lora_revision: None,
        });
        assert_eq!(early.settle(dir.path()).model, "c++");
    }

    #[test]
    fn empty_parts_are_refused() {
        for text in ["", " ", "+b", "a+", "a@", "@r", "a+b@", "a+@r"] {
            assert!(SourceRef::parse(text, Path::new("/nowhere")).is_err(), "{text:?}");
        }
    }
}
