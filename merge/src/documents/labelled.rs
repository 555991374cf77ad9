//! One file with the prompts of all experts of a MoE.

use std::path::Path;
use std::sync::Arc;

use moe_merge_checkpoint::{CheckpointError, manifest::Manifest};

use super::{At, Document, DocumentError, Label, PromptFile, extension, read_text};
use crate::error::MergeError;
use crate::recipe::{self, nearest};

/// The prompts of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledPrompts {
    /// Its place among the experts.
    pub expert: usize,
    /// Its name.
    pub label: String,
    /// Text that it should get.
    pub positive: Vec<Document>,
    /// Text that it should not get.
    pub negative: Vec<Document>,
}

/// What an expert without prompts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unprompted {
    /// A mistake.
    Refused,
    /// An expert that writes text of its own, or a generalist.
    Allowed,
}

/// Names of the experts of the MoE in `folder`: those of its manifest, else `0`, `1`, …
///
/// # Errors
/// A manifest that cannot be read.
pub fn expert_names(folder: &Path, experts: usize) -> Result<Vec<String>, CheckpointError> {
    let known = Manifest::load(folder)?.map(|m| m.experts).unwrap_or_default();
    Ok(match known.len() == experts {
        true => known,
        false => (0..experts).map(|e| e.to_string()).collect(),
    })
}

/// Reads the prompts of all `experts`: `.jsonl` or `.json` whose documents say whose they are, `.json` with lists by
/// expert, or YAML with `experts:`, for example the recipe that the MoE was made from.
///
/// * a label is the name of an expert, or its number from 0
/// * the experts of a YAML file that names none of `experts` are taken in order, if there are as many
/// * returns one entry per expert, in order, and notes on what was left out
///
/// # Errors
/// [`MergeError::Documents`] for a file that cannot be used, a document without label, a label that is no expert, an
/// expert without prompts; [`MergeError::Recipe`] for mistakes in YAML.
pub fn read_labelled(
    path: &Path,
    experts: &[String],
    unprompted: Unprompted,
) -> Result<(Vec<LabelledPrompts>, Vec<String>), MergeError> {
    let mut found: Vec<LabelledPrompts> = experts
        .iter()
        .enumerate()
        .map(|(expert, label)| LabelledPrompts {
            expert,
            label: label.clone(),
            positive: Vec::new(),
            negative: Vec::new(),
        })
        .collect();
    let mut notes = Vec::new();
    if matches!(extension(path).as_str(), "yaml" | "yml") {
        yaml(path, experts, &mut found, &mut notes)?;
    } else {
        let file = PromptFile::read(path)?;
        for document in file.documents {
            let expert = owner(path, &document, experts)?;
            found[expert].positive.push(document);
        }
        notes.extend(empty_note(&file.path, file.empty));
    }
    let without: Vec<_> =
        found.iter().filter(|f| f.positive.is_empty()).map(|f| format!("`{}`", f.label)).collect();
    if unprompted == Unprompted::Refused && !without.is_empty() {
        let what = match without.len() {
            1 => format!("expert {} has no prompts", without[0]),
            n => format!("{n} experts have no prompts: {}", without.join(", ")),
        };
        return Err(DocumentError::new(path, At::Nowhere, what)
            .expected(format!("prompts for each of {}", quoted(experts)))
            .into());
    }
    Ok((found, notes))
}

/// Says how many documents hold no text.
pub(crate) fn empty_note(path: &Path, empty: usize) -> Option<String> {
    let shown = path.display();
    (empty > 0).then(|| format!("{shown}: {empty} documents without text left out"))
}

fn yaml(
    path: &Path,
    experts: &[String],
    found: &mut [LabelledPrompts],
    notes: &mut Vec<String>,
) -> Result<(), MergeError> {
    let text = read_text(path)?;
    let file: Arc<Path> = path.into();
    let lists = recipe::prompt_lists(&text, path)?;
    let known = |name: &Option<String>| name.as_ref().is_some_and(|n| experts.contains(n));
    let in_order = lists.len() == experts.len() && !lists.iter().any(|l| known(&l.name));
    for (i, list) in lists.into_iter().enumerate() {
        let expert = match (&list.name, in_order) {
            (_, true) => i,
            (Some(name), false) => {
                find(name, experts).map_err(|e| e.explain(path, list.at, name, experts))?
            }
            (None, false) => {
                return Err(DocumentError::new(
                    path,
                    list.at,
                    "prompts without the name of their expert",
                )
                .expected(format!("`name`: one of {}", quoted(experts)))
                .into());
            }
        };
        let into = &mut found[expert];
        into.positive.extend(list.positive.iter().map(|t| Document::text(t, &file, list.at)));
        into.negative.extend(list.negative.iter().map(|t| Document::text(t, &file, list.at)));
        for file in list.files {
            notes.extend(empty_note(&file.path, file.empty));
            into.positive.extend(file.documents);
        }
    }
    Ok(())
}

/// The expert that a document is for.
fn owner(path: &Path, document: &Document, experts: &[String]) -> Result<usize, DocumentError> {
    match &document.label {
        Some(Label { text, .. }) => {
            find(text, experts).map_err(|e| e.explain(path, document.at, text, experts))
        }
        None => Err(DocumentError::new(
            path,
            document.at,
            "a document does not say which expert it is for",
        )
        .expected(format!("`expert`: one of {}", quoted(experts)))
        .hint(
            "each line of a `.jsonl` file needs `expert`, `label` or `domain`; or write `.json` as \
             `{expert: [texts]}`, or give a recipe",
        )),
    }
}

/// Why a label is no expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoExpert {
    Unknown,
    Ambiguous,
}

/// The expert called `label`, or of that number.
pub(crate) fn find(label: &str, experts: &[String]) -> Result<usize, NoExpert> {
    let mut named = experts.iter().enumerate().filter(|(_, name)| *name == label);
    match (named.next(), named.next()) {
        (Some((expert, _)), None) => Ok(expert),
        (Some(_), Some(_)) => Err(NoExpert::Ambiguous),
        (None, _) => {
            let number = label.parse().ok().filter(|&n: &usize| n < experts.len());
            number.ok_or(NoExpert::Unknown)
        }
    }
}

impl NoExpert {
    fn explain(self, path: &Path, at: At, label: &str, experts: &[String]) -> DocumentError {
        let short: String = label.chars().take(60).collect();
        match self {
            Self::Unknown => {
                let error = DocumentError::new(path, at, format!("no expert is called `{short}`"))
                    .expected(format!("one of {}, or a number from 0", quoted(experts)));
                match nearest(label, experts.iter().map(String::as_str)) {
                    Some(name) => error.hint(format!("did you mean `{name}`?")),
                    None => error,
                }
            }
            Self::Ambiguous => {
                DocumentError::new(path, at, format!("several experts are called `{short}`"))
                    .expected(format!("a number from 0 to {}", experts.len().saturating_sub(1)))
            }
        }
    }
}

/// Names for a message.
fn quoted(names: &[String]) -> String {
    let mut shown: Vec<_> = names.iter().take(12).map(|n| format!("`{n}`")).collect();
    if names.len() > shown.len() {
        shown.push("…".into());
    }
    shown.join(", ")
}
