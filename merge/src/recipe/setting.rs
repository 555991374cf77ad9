//! Parameter values of dense merges: scalars, gradients over depth, lists with filters.

use super::node::{Node, Value};
use super::reader::{Reader, as_bool, as_number};
use super::schema::Key;

/// What a parameter holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// A number.
    Number,
    /// `true` or `false`, kept as 1 and 0.
    Bool,
}

/// The value of a parameter, as written.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    kind: ParameterKind,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    filter: Option<String>,
    values: Vec<f64>,
}

impl Setting {
    /// The same number everywhere.
    pub fn constant(value: f64) -> Self {
        let entries = vec![Entry { filter: None, values: vec![value] }];
        Self { kind: ParameterKind::Number, entries }
    }

    /// The value for the tensor `name` at depth `t` in `[0, 1]`.
    ///
    /// The first entry whose filter is absent, `*`, or part of `name` decides. Gradients of numbers are interpolated:
    /// `s = t (k - 1)`, `i = trunc(s)`, `(1 - (s - i)) g[i] + (s - i) g[i + 1]`; of truth values, entry `i` is taken.
    pub fn at(&self, t: f64, name: &str) -> Option<f64> {
        let entry = self.entries.iter().find(|e| match e.filter.as_deref() {
            None | Some("*") => true,
            Some(filter) => name.contains(filter),
        })?;
        let values = &entry.values;
        let last = values.len().checked_sub(1)?;
        let s = t.clamp(0.0, 1.0) * last as f64;
        let i = s.trunc() as usize;
        match self.kind {
            ParameterKind::Bool => Some(values[i]),
            ParameterKind::Number => {
                let f = s - i as f64;
                Some((1.0 - f) * values[i] + f * values[last.min(i + 1)])
            }
        }
    }
}

const FILTERED: &[Key] = &[
    Key {
        name: "filter",
        doc: "part of the tensor's name",
        default: Some("every tensor"),
        required: false,
        shape: super::schema::Shape::Text,
        availability: super::schema::Availability::Now,
    },
    Key {
        name: "value",
        doc: "a value or a gradient",
        default: None,
        required: true,
        shape: super::schema::Shape::Any,
        availability: super::schema::Availability::Now,
    },
];

/// What values are accepted.
struct Wanted {
    kind: ParameterKind,
    range: (f64, f64),
}

impl Reader {
    /// A parameter value in any of its forms, every number within `range`.
    pub fn setting(
        &mut self,
        node: &Node,
        path: &str,
        kind: ParameterKind,
        range: (f64, f64),
    ) -> Option<Setting> {
        let kind = &Wanted { kind, range };
        let is_map = |n: &Node| matches!(n.value, Value::Map(_));
        let entries = match &node.value {
            Value::Map(_) => vec![self.filtered(node, path, kind)?],
            Value::List(items) if items.first().is_some_and(is_map) => {
                let mut entries = Vec::new();
                for (i, item) in items.iter().enumerate() {
                    entries.push(self.filtered(item, &format!("{path}[{i}]"), kind));
                }
                entries.into_iter().collect::<Option<Vec<_>>>()?
            }
            _ => vec![Entry { filter: None, values: self.gradient(node, path, kind)? }],
        };
        Some(Setting { kind: kind.kind, entries })
    }

    fn filtered(&mut self, node: &Node, path: &str, kind: &Wanted) -> Option<Entry> {
        let object = self.object(node, path, FILTERED, "a filtered value")?;
        let filter = self.text_at(&object, "filter");
        let (value, path) = object.get("value")?;
        Some(Entry { filter, values: self.gradient(value, &path, kind)? })
    }

    fn gradient(&mut self, node: &Node, path: &str, kind: &Wanted) -> Option<Vec<f64>> {
        match &node.value {
            Value::List(items) => {
                let values: Vec<_> = items
                    .iter()
                    .enumerate()
                    .map(|(i, n)| self.scalar(n, &format!("{path}[{i}]"), kind))
                    .collect();
                values.into_iter().collect()
            }
            _ => Some(vec![self.scalar(node, path, kind)?]),
        }
    }

    fn scalar(&mut self, node: &Node, path: &str, kind: &Wanted) -> Option<f64> {
        match kind.kind {
            ParameterKind::Bool => self.boolean(node, path).map(|v| f64::from(u8::from(v))),
            ParameterKind::Number => {
                let as_flag = || matches!(node.value, Value::Bool(_)).then(|| as_bool(node));
                let value = as_number(node)
                    .or_else(|| as_flag().flatten().map(|v| f64::from(u8::from(v))))
                    .filter(|v| v.is_finite());
                let (least, greatest) = kind.range;
                match value {
                    Some(v) if v < least || v > greatest => {
                        let expected = match greatest.is_finite() {
                            true => format!("a number from {least} to {greatest}"),
                            false => format!("a number, at least {least}"),
                        };
                        self.wrong(node, path, expected);
                        return None;
                    }
                    None => self.wrong(node, path, "a finite number, or a list of them"),
                    Some(_) => {}
                }
                value
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(kind: ParameterKind, entries: &[(Option<&str>, &[f64])]) -> Setting {
        let entries = entries
            .iter()
            .map(|(f, v)| Entry { filter: f.map(str::to_owned), values: v.to_vec() })
            .collect();
        Setting { kind, entries }
    }

    #[test]
    fn gradients_are_interpolated() {
        let g = setting(ParameterKind::Number, &[(None, &[0.0, 0.5, 1.0, 0.0])]);
        let at: Vec<_> =
            [0.0, 1.0 / 3.0, 0.5, 1.0].iter().map(|t| g.at(*t, "x").unwrap()).collect();
        assert_eq!(at, [0.0, 0.5, 0.75, 0.0]);
        let flags = setting(ParameterKind::Bool, &[(None, &[1.0, 0.0])]);
        assert_eq!(flags.at(0.9, "x"), Some(1.0));
        assert_eq!(flags.at(1.0, "x"), Some(0.0));
    }

    #[test]
    fn the_first_matching_filter_decides() {
        let entries: &[(Option<&str>, &[f64])] =
            &[(Some("mlp"), &[1.0]), (Some("mlp.up"), &[2.0]), (Some("*"), &[3.0])];
        let s = setting(ParameterKind::Number, entries);
        assert_eq!(s.at(0.0, "a.mlp.up_proj"), Some(1.0));
        assert_eq!(s.at(0.0, "a.self_attn"), Some(3.0));
        assert_eq!(setting(ParameterKind::Number, &[(Some("mlp"), &[1.0])]).at(0.0, "norm"), None);
        assert_eq!(setting(ParameterKind::Number, &[(None, &[])]).at(0.0, "norm"), None);
    }
}
