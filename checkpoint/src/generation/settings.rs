//! What the owner of a model folder wants of everybody who changes it: `.moe-merge/settings.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::journal::read_optional;
use crate::error::CheckpointError;

/// Where the settings are, seen from the model folder.
pub const SETTINGS_NAME: &str = ".moe-merge/settings.json";

/// Rules of a model folder. A folder without the file has none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether a change goes live only after it was staged and approved.
    pub approval: Approval,
    /// Evaluation text by domain: files, seen from the model folder.
    pub evaluation: BTreeMap<String, String>,
    /// What a change may do to evaluation text, at most.
    pub thresholds: Thresholds,
}

/// Whether changes have to be approved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Approval {
    /// A change goes live at once.
    #[default]
    None,
    /// It is staged, evaluated, and goes live when it is approved. Going back needs no approval.
    Required,
}

/// Limits; what is not named is not limited.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// Relative rise of perplexity on any domain: 0.02 allows 2 %.
    pub perplexity_rise: Option<f64>,
    /// Share of tokens, mean over layers, whose first choice of an expert may be another one than before.
    pub routing_moved: Option<f64>,
}

impl Settings {
    /// Reads the settings of a folder.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] for a file that says something else than what is described here.
    pub fn load(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(SETTINGS_NAME);
        let Some(bytes) = read_optional(&path)? else { return Ok(Self::default()) };
        // A map first: a list would do for the derived reader.
        let read = serde_json::from_slice::<Map<String, Value>>(&bytes)
            .and_then(|map| serde_json::from_value(Value::Object(map)));
        read.map_err(|e| CheckpointError::Malformed {
            what: "the settings of the model folder cannot be read".into(),
            file: path,
            tensor: None,
            expected: "JSON with `approval` (`none` or `required`), `evaluation` ({domain: file}), `thresholds` \
                       ({`perplexity_rise`, `routing_moved`})"
                .into(),
            found: e.to_string(),
            hint: None,
        })
    }

    /// Refuses a change that nobody approved, where one has to.
    ///
    /// # Errors
    /// [`CheckpointError::ApprovalRequired`].
    pub(super) fn allow(folder: &Path, approved: bool) -> Result<(), CheckpointError> {
        match Self::load(folder)?.approval {
            Approval::Required if !approved => {
                Err(CheckpointError::ApprovalRequired { path: folder.to_owned() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let load = |text: &str| {
            std::fs::create_dir_all(dir.path().join(".moe-merge")).unwrap();
            std::fs::write(dir.path().join(SETTINGS_NAME), text).unwrap();
            Settings::load(dir.path())
        };
        assert_eq!(Settings::load(dir.path()).unwrap(), Settings::default());
        assert_eq!(load("{}").unwrap(), Settings::default());
        let found = load(
            r#"{"approval": "required", "evaluation": {"prose": "eval.txt"}, "thresholds": {"perplexity_rise": 0.1}}"#,
        );
        let found = found.unwrap();
        assert_eq!(
            (found.approval, found.evaluation["prose"].as_str()),
            (Approval::Required, "eval.txt")
        );
        assert_eq!(
            found.thresholds,
            Thresholds { perplexity_rise: Some(0.1), routing_moved: None }
        );
        for wrong in ["", "[]", r#"{"aproval": "required"}"#, r#"{"approval": "yes"}"#] {
            let error = load(wrong).unwrap_err();
            assert!(matches!(error, CheckpointError::Malformed { .. }), "{wrong}");
        }
    }
}
