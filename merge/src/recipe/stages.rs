//! Recipes in several documents: each a stage whose result others can name.

use super::node::{Node, Value};
use super::reader::Reader;
use super::source::SourceKind;
use super::{Recipe, recipe};

/// A document of a recipe.
#[derive(Debug)]
pub(super) struct Stage {
    name: Option<String>,
    node: Node,
    state: State,
}

/// How far a stage has been read.
#[derive(Debug)]
enum State {
    Unread,
    /// It is being read: who names it now names himself.
    Reading,
    Wrong,
    Read(Box<Recipe>),
}

/// Reads all documents; returns the recipe that the others serve.
pub(super) fn last(reader: &mut Reader, documents: Vec<Node>) -> Option<Recipe> {
    if let [only] = documents.as_slice() {
        return recipe(reader, only, "");
    }
    let name = |node: &Node| match &node.value {
        Value::Map(entries) => entries.iter().find_map(|(key, value)| match &value.value {
            Value::Text(name) if key.text == "name" => Some(name.clone()),
            _ => None,
        }),
        _ => None,
    };
    let stage = |node: Node| Stage { name: name(&node), node, state: State::Unread };
    reader.stages = documents.into_iter().map(stage).collect();
    let unnamed: Vec<usize> =
        (0..reader.stages.len()).filter(|&i| reader.stages[i].name.is_none()).collect();
    if let [_, second, ..] = unnamed.as_slice() {
        let at = reader.stages[*second].node.at;
        let error = reader.error(at, "name", "two documents have no `name`");
        error.expected = Some("at most one document without a name: the result".into());
    }
    for i in 1..reader.stages.len() {
        let twice = |s: &Stage| s.name.is_some() && s.name == reader.stages[i].name;
        if reader.stages[..i].iter().any(twice) {
            let (at, name) = (reader.stages[i].node.at, reader.stages[i].name.clone());
            let what = format!("two documents have the name `{}`", name.unwrap_or_default());
            reader.error(at, "name", what);
        }
    }
    for i in 0..reader.stages.len() {
        reader.stage(i);
    }
    let result = unnamed.first().copied().unwrap_or(reader.stages.len() - 1);
    match std::mem::replace(&mut reader.stages[result].state, State::Wrong) {
        State::Read(recipe) => Some(*recipe),
        _ => None,
    }
}

impl Reader {
    /// Reads stage `i` if it has not been read.
    fn stage(&mut self, i: usize) {
        if !matches!(self.stages[i].state, State::Unread) {
            return;
        }
        self.stages[i].state = State::Reading;
        let node = self.stages[i].node.clone();
        self.stages[i].state = match recipe(self, &node, "") {
            Some(recipe) => State::Read(Box::new(recipe)),
            None => State::Wrong,
        };
    }

    /// The result of the stage called `name`, if there is such a stage. The inner `None`: it cannot be used, and why has
    /// been recorded.
    pub fn stage_called(
        &mut self,
        node: &Node,
        path: &str,
        name: &str,
    ) -> Option<Option<SourceKind>> {
        let i = self.stages.iter().position(|s| s.name.as_deref() == Some(name))?;
        self.stage(i);
        match &self.stages[i].state {
            State::Read(recipe) => Some(Some(SourceKind::Inline(recipe.clone()))),
            State::Reading => {
                let error = self.error(node.at, path, "a document names itself as a source");
                error.found = Some(format!("`{name}`, in a circle"));
                Some(None)
            }
            // Its mistakes have been recorded where they stand.
            State::Wrong | State::Unread => Some(None),
        }
    }
}
