//! A recipe as a file.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use moe_merge_checkpoint::CheckpointError;

use super::error::{Location, RecipeError, RecipeErrors};
use super::reader::sibling;
use crate::error::MergeError;

/// The text of the recipe at `path`.
///
/// # Errors
/// [`MergeError::Recipe`] if there is no such file (with the nearest name), if it is a folder, or not UTF-8 (with the
/// line); [`MergeError::Checkpoint`] if the system refuses to read it.
pub fn read(path: &Path) -> Result<String, MergeError> {
    let wrong = |what: &str, at, expected: &str, found: String, hint: Option<String>| {
        MergeError::from(RecipeErrors(vec![RecipeError {
            what: what.into(),
            file: path.to_owned(),
            at,
            path: String::new(),
            expected: Some(expected.into()),
            found: Some(found),
            hint,
        }]))
    };
    let nowhere = Location::default();
    if path.is_dir() {
        let hint =
            sibling(&path.join("recipe.yaml"), |n| n.ends_with(".yaml") || n.ends_with(".yml"))
                .map(|name| format!("did you mean `{name}`?"))
                .or_else(|| {
                    let model = path.join("config.json").is_file();
                    model.then(|| {
                        format!("this is a model: `moe-merge inspect {}` shows it", path.display())
                    })
                });
        return Err(wrong(
            "the recipe is a folder",
            nowhere,
            "a YAML file",
            "a folder".into(),
            hint,
        ));
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let hint = sibling(path, |_| true).map(|name| format!("did you mean `{name}`?"));
            let hint = hint.or_else(|| Some("`moe-merge --help` lists the commands".into()));
            return Err(wrong(
                "recipe not found",
                nowhere,
                "a YAML file",
                "no such file".into(),
                hint,
            ));
        }
        Err(e) => return Err(CheckpointError::io("reading the recipe", path, e).into()),
    };
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let start = good.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        let at = Location {
            line: 1 + good.iter().filter(|&&b| b == b'\n').count(),
            column: 1 + String::from_utf8_lossy(&good[start..]).chars().count(),
        };
        let found = format!("byte 0x{:02x}", e.as_bytes()[good.len()]);
        let hint = "save the recipe as UTF-8".to_owned();
        wrong("the recipe is not UTF-8", at, "text in UTF-8", found, Some(hint))
    })
}

#[cfg(test)]
mod tests {
    use moe_merge_checkpoint::Explain;

    use super::*;

    fn said(path: &Path) -> String {
        let error = read(path).unwrap_err();
        format!("{error} {:?} {:?}", error.fields(), error.hint())
    }

    #[test]
    fn what_is_no_recipe_file_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mix.yaml");
        fs::write(&path, "a: 1\nb: é\u{20ac}").unwrap();
        assert_eq!(read(&path).unwrap(), "a: 1\nb: é\u{20ac}");
        let typed = said(&dir.path().join("mx.yaml"));
        assert!(typed.contains("recipe not found") && typed.contains("/mix.yaml`?"), "{typed}");
        assert!(said(dir.path()).contains("the recipe is a folder"));
        fs::write(&path, b"a: 1\nb: \xc3\xa9\xff").unwrap();
        let latin = said(&path);
        assert!(latin.contains("mix.yaml:2:5") && latin.contains("0xff"), "{latin}");
    }
}
