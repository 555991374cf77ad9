//! YAML as a tree in which every value knows its place.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::error::Location;

/// A value and where it stands. An alias stands where it is used.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub at: Location,
    pub value: Value,
}

/// What a YAML value can be.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A mapping key.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub at: Location,
    pub text: String,
}

/// The longest recipe text that is read, in bytes: prompts in abundance, but no checkpoint given by mistake.
const LONGEST: usize = 16 << 20;

/// A text that is not YAML: what, and where.
pub(super) struct SyntaxError {
    pub at: Location,
    pub message: String,
}

/// Documents of one recipe, at most.
const DOCUMENTS: usize = 64;

/// Reads YAML documents, at least one. Depth, number of values and the work of aliases are bounded.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, SyntaxError> {
    if text.len() > LONGEST {
        let message = format!("longer than {} MiB: this is no recipe", LONGEST >> 20);
        return Err(SyntaxError { at: Location::default(), message });
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 32, max_documents: DOCUMENTS, max_nodes: 200_000 },
        with_snippet: false,
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::PassThrough,
    };
    let documents: Vec<Spanned<Value>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|e| SyntaxError {
            at: e.location().map_or(Location::default(), place),
            message: e.without_snippet().to_string().lines().next().unwrap_or("?").to_owned(),
        })?;
    let mut nodes: Vec<Node> = documents.into_iter().map(Node::from).collect();
    // A separator at the end, or at the beginning, opens no document of its own.
    if nodes.len() > 1 {
        nodes.retain(|n| !matches!(n.value, Value::Null));
    }
    if nodes.is_empty() {
        nodes.push(Node { at: Location::default(), value: Value::Null });
    }
    Ok(nodes)
}

fn place(at: serde_saphyr::Location) -> Location {
    Location { line: at.line() as usize, column: at.column() as usize }
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        Self { at: place(spanned.referenced), value: spanned.value }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Integer(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Integer(v.into()))
    }

    fn visit_i128<E>(self, v: i128) -> Result<Value, E> {
        Ok(Value::Integer(v))
    }

    fn visit_u128<E>(self, v: u128) -> Result<Value, E> {
        Ok(i128::try_from(v).map_or(Value::Number(v as f64), Value::Integer))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Value::Number(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Text(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::Text(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Value>>()? {
            items.push(item.into());
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let value = map.next_value::<Spanned<Value>>()?;
            entries.push((Key { at: place(key.referenced), text: key.value }, value.into()));
        }
        Ok(Value::Map(entries))
    }
}

impl Node {
    /// What it is, for a message.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(v) => format!("`{v}`"),
            Value::Integer(v) => format!("`{v}`"),
            Value::Number(v) => format!("`{v}`"),
            Value::Text(text) => format!("`{}`", shorten(text)),
            Value::List(items) => format!("a list of {}", items.len()),
            Value::Map(entries) => match entries.as_slice() {
                [] => "an empty mapping".into(),
                [(first, _), ..] => format!("a mapping (`{}`, …)", shorten(&first.text)),
            },
        }
    }
}

/// The beginning of a text, in one line.
pub(super) fn shorten(text: &str) -> String {
    let mut short: String =
        text.chars().take(40).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(40).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_place() {
        let Ok(nodes) = parse("a: 1\nb:\n  - x\n  - {c: 2.5}\n") else { panic!("parses") };
        let [Node { value: Value::Map(entries), .. }] = nodes.as_slice() else { panic!("map") };
        assert_eq!((entries[0].1.at.line, entries[0].1.at.column), (1, 4));
        assert_eq!((entries[1].0.at.line, entries[1].0.at.column), (2, 1));
        let Value::List(items) = &entries[1].1.value else { panic!("list") };
        assert_eq!((items[0].at.line, items[0].at.column), (3, 5));
        let Value::Map(inner) = &items[1].value else { panic!("map") };
        assert_eq!((inner[0].1.at.line, inner[0].1.at.column), (4, 9));
    }

    #[test]
    fn broken_text_has_a_place_and_one_line() {
        for (text, line) in [("a: [1, 2\nb: 3", 0), ("a: 1\na: 2\n", 2), ("a: *nothing\n", 1)] {
            let Err(e) = parse(text) else { panic!("{text:?} should not parse") };
            assert!(line == 0 || e.at.line == line, "{text:?}: {:?} {}", e.at, e.message);
            assert!(!e.message.contains('\n'));
        }
    }

    #[test]
    fn bombs_and_depth_are_refused_quickly() {
        let started = std::time::Instant::now();
        assert!(parse(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).is_err());
        let nested: String = (0..2000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
        assert!(parse(&nested).is_err());
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for i in 1..30 {
            let refs = vec![format!("*a{}", i - 1); 9].join(", ");
            bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        assert!(parse(&bomb).is_err());
        assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
    }
}
