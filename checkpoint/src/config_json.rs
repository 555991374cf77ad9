//! `config.json`, in both spellings that transformers has used.

use serde_json::{Map, Value};

use moe_merge_kernels::Dtype;

/// A model configuration, keys in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigJson(pub Map<String, Value>);

impl ConfigJson {
    /// The value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// The value at a path of keys with `.` between them: `text_config.vocab_size`.
    pub fn at(&self, path: &str) -> Option<&Value> {
        let mut keys = path.split('.');
        let first = self.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.get(key)).filter(|v| !v.is_null())
    }

    /// Puts a value at such a path; whether the objects around it are there.
    pub fn set_at(&mut self, path: &str, value: Value) -> bool {
        let Some((map, key)) = self.around(path) else { return false };
        map.insert(key.to_owned(), value);
        true
    }

    /// Takes away the value at such a path.
    pub fn remove_at(&mut self, path: &str) {
        if let Some((map, key)) = self.around(path) {
            map.shift_remove(key);
        }
    }

    /// The object that such a path leads into, if it is there, and the key within it.
    fn around<'p>(&mut self, path: &'p str) -> Option<(&mut Map<String, Value>, &'p str)> {
        let Some((sections, key)) = path.rsplit_once('.') else { return Some((&mut self.0, path)) };
        let mut map = &mut self.0;
        for section in sections.split('.') {
            map = map.get_mut(section)?.as_object_mut()?;
        }
        Some((map, key))
    }

    /// Whether it is that of a model of several parts: text and vision, encoder and decoder.
    pub fn several_parts(&self) -> bool {
        let nested = ["text_config", "vision_config"].into_iter().filter_map(|k| self.get(k));
        self.bool("is_encoder_decoder") == Some(true) || nested.into_iter().any(Value::is_object)
    }

    /// An unsigned integer.
    pub fn usize(&self, key: &str) -> Option<usize> {
        self.get(key)?.as_u64().and_then(|v| usize::try_from(v).ok())
    }

    /// A number.
    pub fn f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// A text.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// `model_type`, or an empty text.
    pub fn model_type(&self) -> &str {
        self.str("model_type").unwrap_or_default()
    }

    /// `dtype` (transformers 5) or `torch_dtype` (4).
    pub fn dtype(&self) -> Option<Dtype> {
        self.str("dtype").or_else(|| self.str("torch_dtype")).and_then(Dtype::from_config_name)
    }

    /// Token ids under `key`, which holds one id or a list of them.
    pub fn token_ids(&self, key: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        match self.get(key) {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_keys() {
        let value = json!({"a": 1, "t": {"b": 2, "n": null, "u": {"c": 3}}});
        let mut config = ConfigJson(value.as_object().unwrap().clone());
        assert_eq!(config.at("t.u.c"), Some(&json!(3)));
        assert!(["a.b", "t.n", "t.x", "x.b", ""].iter().all(|p| config.at(p).is_none()));
        assert!(config.set_at("t.u.d", 4.into()) && config.set_at("e", 5.into()));
        assert!(!config.set_at("a.b", 6.into()) && !config.set_at("x.b", 6.into()));
        config.remove_at("t.b");
        config.remove_at("x.b");
        let expected = json!({"a": 1, "t": {"n": null, "u": {"c": 3, "d": 4}}, "e": 5});
        assert_eq!(Value::Object(config.0), expected);
    }
}
