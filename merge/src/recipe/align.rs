//! `align:` in MoE recipes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::moe::MOST;
use super::node::{Node, Value};
use super::reader::{Object, Reader, as_bool};
use super::schema;
use crate::documents::PromptFile;

/// How experts are fitted to the stream that they now live in, with their dense models as teachers.
#[derive(Debug, Clone, PartialEq)]
pub struct Align {
    /// The way.
    pub method: AlignMethod,
    /// Tokens that each expert is fitted on, about: of `data` first, then of the prompts, then of what it writes.
    pub tokens: usize,
    /// Text by expert.
    pub data: Vec<(String, PromptFile)>,
    /// Whether the expert's prompts are used, too.
    pub prompts: bool,
    /// Whether it writes what is missing to `tokens`.
    pub self_text: bool,
    /// Gradient steps at most.
    pub steps: usize,
    /// Rank of what gradients change; the matrices themselves without it.
    pub rank: Option<usize>,
    /// Weight of what is lacking to the teacher's stream, beside the divergence from its predictions.
    pub stream: f64,
    /// Folder that keeps what is fitted, so that a run that was stopped goes on.
    pub state: Option<PathBuf>,
}

impl Default for Align {
    fn default() -> Self {
        Self {
            method: AlignMethod::Refit,
            tokens: 16_000,
            data: Vec::new(),
            prompts: false,
            self_text: true,
            steps: 400,
            rank: None,
            stream: 0.0,
            state: None,
        }
    }
}

/// A way of fitting experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlignMethod {
    /// Layer by layer, each to the teacher's stream, the last one to its predictions.
    Refit,
    /// That, and then all layers of each expert together to the teacher's predictions, with gradients.
    Distil,
    /// [`AlignMethod::Refit`], and then all experts and routers together, behind the routers, each on the text of its teacher.
    Joint,
}

/// Every way by its name in recipes.
pub const ALIGN_METHODS: &[(&str, AlignMethod)] = &[
    ("refit", AlignMethod::Refit),
    ("distil", AlignMethod::Distil),
    ("joint", AlignMethod::Joint),
];

/// Largest rank that can be asked for.
const LARGEST_RANK: u64 = 4096;

impl AlignMethod {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        ALIGN_METHODS.iter().find(|(_, m)| *m == self).map_or("refit", |(name, _)| name)
    }
}

impl Reader {
    /// Absent, `false`, a method, or a mapping.
    ///
    /// * `experts`: their names
    pub(super) fn align(&mut self, object: &Object, experts: &[String]) -> Option<Align> {
        let (node, path) = object.get("align")?;
        let mut align = Align::default();
        if as_bool(node) == Some(false) {
            return None;
        }
        let names: Vec<_> = ALIGN_METHODS.iter().map(|(name, _)| *name).collect();
        let method = |name: String| ALIGN_METHODS.iter().find(|(n, _)| *n == name).map(|m| m.1);
        if !matches!(node.value, Value::Map(_)) {
            align.method = self.one_of(node, &path, &names).and_then(method)?;
            return Some(align);
        }
        let object = self.object(node, &path, schema::ALIGN, "`align`")?;
        if let Some((node, path)) = object.get("method") {
            align.method = self.one_of(node, &path, &names).and_then(method)?;
        }
        for (key, value) in [("tokens", &mut align.tokens), ("steps", &mut align.steps)] {
            if let Some((node, path)) = object.get(key) {
                *value = self.integer(node, &path, 1..=MOST)? as usize;
            }
        }
        for (key, value) in [("prompts", &mut align.prompts), ("self_text", &mut align.self_text)] {
            if let Some((node, path)) = object.get(key) {
                *value = self.boolean(node, &path)?;
            }
        }
        if let Some((node, path)) = object.get("rank") {
            align.rank = Some(self.integer(node, &path, 1..=LARGEST_RANK)? as usize);
        }
        if let Some((node, path)) = object.get("stream") {
            align.stream = self.number(node, &path, 0.0)?;
        }
        if let Some((node, path)) = object.get("state") {
            let folder = self.text(node, &path)?;
            align.state = Some(self.dir.join(folder));
        }
        if let Some((node, path)) = object.get("data") {
            align.data = self.align_data(node, &path, experts)?;
        }
        self.check_align(&object, &align);
        Some(align)
    }

    /// What has no meaning with the rest.
    fn check_align(&mut self, object: &Object, align: &Align) {
        for key in ["rank", "stream"] {
            if let (Some((node, path)), AlignMethod::Refit) = (object.get(key), align.method) {
                let error = self.error(node.at, &path, format!("`refit` has no `{key}`"));
                error.expected = Some("`method: distil` or `method: joint` beside it".into());
            }
        }
        if let (Some((node, path)), true) =
            (object.get("self_text"), !align.self_text && !align.prompts && align.data.is_empty())
        {
            let error = self.error(node.at, &path, "there is no text to fit experts on");
            error.expected = Some("`data` or `prompts: true` where experts write none".into());
        }
    }

    /// A mapping of experts to files.
    fn align_data(
        &mut self,
        node: &Node,
        path: &str,
        experts: &[String],
    ) -> Option<Vec<(String, PromptFile)>> {
        let Value::Map(entries) = &node.value else {
            self.wrong(node, path, "a mapping of experts to files of text");
            return None;
        };
        let mut all = Vec::new();
        for (key, value) in entries {
            let here = format!("{path}.{}", key.text);
            if !experts.contains(&key.text) {
                let names: Vec<&str> = experts.iter().map(String::as_str).collect();
                self.unknown_name(value, &here, &key.text, &names);
                continue;
            }
            let file = self.existing_file(value, &here)?;
            all.extend(self.prompt_file(value.at, &here, &file).map(|f| (key.text.clone(), f)));
        }
        Some(all)
    }
}
