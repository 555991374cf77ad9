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
