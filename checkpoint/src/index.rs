//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::error::CheckpointError;

/// The file's name in a model folder.
pub const NAME: &str = "model.safetensors.index.json";

/// Longest index that is read, in bytes. A model of a million tensors needs about this much.
pub const MAX_INDEX: u64 = 100_000_000;

/// A checked index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// Tensor name to shard, relative to the index; never absolute, never upwards.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// The shards, each once, sorted.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Reads and checks an index with these `bytes`; `path` is for messages.
///
/// # Errors
/// [`CheckpointError::Malformed`] if it is not JSON, has no `weight_map`, names a tensor twice, or names a shard
/// outside its folder.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Index, CheckpointError> {
    let mut problem = Problem::default();
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let index = IndexSeed { problem: &mut problem }
        .deserialize(&mut json)
        .and_then(|index| json.end().map(|()| index))
        .map_err(|e| problem.explain(&e, path))?;
    for (tensor, shard) in &index.weight_map {
        if let Some(found) = unsafe_name(shard) {
            return Err(CheckpointError::Malformed {
                what: "index names a shard outside its folder".into(),
                file: path.to_owned(),
                tensor: Some(tensor.clone()),
                expected: "a file name relative to the index's folder, without `..`".into(),
                found: format!("`{shard}`, {found}"),
                hint: Some("do not use this checkpoint unless you know where it comes from".into()),
            });
        }
    }
    Ok(index)
}

/// Why `shard` may not be opened, if it may not.
pub(crate) fn unsafe_name(shard: &str) -> Option<&'static str> {
    if shard.is_empty() {
        return Some("an empty name");
    }
    if shard.contains(['\0', '\\']) {
        return Some("with a character that no shard's name has");
    }
    Path::new(shard).components().find_map(|part| match part {
        Component::Normal(_) => None,
        Component::ParentDir => Some("which leads upwards"),
        Component::RootDir | Component::Prefix(_) => Some("an absolute path"),
        Component::CurDir => Some("which is no plain name"),
    })
}

#[derive(Default)]
struct Problem {
    what: Option<&'static str>,
    tensor: Option<String>,
    expected: &'static str,
    found: String,
}

impl Problem {
    fn explain(self, error: &serde_json::Error, path: &Path) -> CheckpointError {
        let (what, expected, found) = match self.what {
            Some(what) => (what, self.expected, self.found),
            None if error.is_data() => {
                ("index is not what it should be", EXPECTED, error.to_string())
            }
            None => ("index is not JSON", EXPECTED, error.to_string()),
        };
        CheckpointError::Malformed {
            what: what.into(),
            file: path.to_owned(),
            tensor: self.tensor,
            expected: expected.into(),
            found,
            hint: Some("download or copy the index again".into()),
        }
    }
}

const EXPECTED: &str = "an object with `weight_map`: tensor name to shard name";

struct IndexSeed<'p> {
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for IndexSeed<'_> {
    type Value = Index;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<Index, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed<'_> {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let mut weight_map = None;
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let seed = MapSeed { problem: self.problem };
            if weight_map.replace(map.next_value_seed(seed)?).is_some() {
                self.problem.what = Some("index has two weight maps");
                self.problem.expected = "one `weight_map`";
                self.problem.found = "two".into();
                return Err(de::Error::custom("two weight maps"));
            }
        }
        let Some(weight_map) = weight_map else {
            self.problem.what = Some("index has no weight map");
            self.problem.expected = EXPECTED;
            self.problem.found = "no `weight_map`".into();
            return Err(de::Error::custom("no weight map"));
        };
        Ok(Index { weight_map })
    }
}

struct MapSeed<'p> {
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for MapSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MapSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`weight_map` as an object of shard names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut weight_map = BTreeMap::<String, String>::new();
        while let Some(tensor) = map.next_key::<String>()? {
            self.problem.tensor = Some(tensor.clone());
            let shard = map.next_value::<String>()?;
            if let Some(first) = weight_map.get(&tensor) {
                self.problem.what = Some("index lists a tensor twice");
                self.problem.expected = "each name once";
                self.problem.found = format!("in `{first}` and in `{shard}`");
                return Err(de::Error::custom("twice"));
            }
            weight_map.insert(tensor, shard);
            self.problem.tensor = None;
        }
        Ok(weight_map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_map_and_ignores_the_rest() {
        let json = br#"{"metadata":{"total_size":8},"weight_map":{"b":"2.safetensors","a":"sub/1.safetensors"}}"#;
        let index = parse(json, "i".as_ref()).unwrap();
        assert_eq!(
            index.shards().into_iter().collect::<Vec<_>>(),
            ["2.safetensors", "sub/1.safetensors"]
        );
        assert_eq!(index.weight_map["a"], "sub/1.safetensors");
    }

    #[test]
    fn names_that_lead_elsewhere() {
        for name in ["", "..", "../x", "a/../../x", "/etc/passwd", "./x", "a\\b", "a\0"] {
            assert!(unsafe_name(name).is_some(), "{name:?}");
        }
        for name in ["x", "a/x", "..x", "a..b"] {
            assert_eq!(unsafe_name(name), None, "{name:?}");
        }
    }
}
