//! `align:` in MoE recipes.

use super::moe::MOST;
use super::node::Value;
use super::reader::{Object, Reader, as_bool};
use super::schema;

/// How experts are fitted to the stream that they now live in, with their dense models as teachers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Align {
    /// The way.
    pub method: AlignMethod,
    /// Tokens that each expert writes itself to be fitted on, about.
    pub tokens: usize,
    /// Gradient steps of [`AlignMethod::Distil`].
    pub steps: usize,
}

impl Default for Align {
    fn default() -> Self {
        Self { method: AlignMethod::Refit, tokens: 16_000, steps: 400 }
    }
}

/// A way of fitting experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AlignMethod {
    /// Layer by layer, each to the teacher's stream, the last one to its predictions.
    Refit,
    /// That, and then all layers together to the teacher's predictions, with gradients.
    Distil,
}

/// Every way by its name in recipes.
pub const ALIGN_METHODS: &[(&str, AlignMethod)] =
    &[("refit", AlignMethod::Refit), ("distil", AlignMethod::Distil)];

impl AlignMethod {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        ALIGN_METHODS.iter().find(|(_, m)| *m == self).map_or("refit", |(name, _)| name)
    }
}

impl Reader {
    /// Absent, `false`, a method, or a mapping.
    pub(super) fn align(&mut self, object: &Object) -> Option<Align> {
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
        Some(align)
    }
}
