//! The parameters of a request, taken one by one; what is left at the end is unknown.

use serde_json::{Map, Value};

use super::error::ApiError;

/// The parameters of an object that have not been taken yet.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Where the object stands in the request: `messages[0].`, empty at the top.
    at: String,
}

impl Fields {
    /// The parameters of a whole request.
    ///
    /// # Errors
    /// [`ApiError`] if it is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let unreadable = |why: String| {
            ApiError::invalid(format!(
                "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP \
                 library correctly. The API expects a JSON payload, but what was sent was not valid JSON: {why})"
            ))
        };
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map, at: String::new() }),
            Ok(_) => Err(unreadable("the top level is no object".into())),
            Err(e) => Err(unreadable(e.to_string())),
        }
    }

    /// The parameters of an object in a request.
    ///
    /// # Errors
    /// [`ApiError`] if it is no object.
    pub fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, at: format!("{path}.") }),
            found => Err(ApiError::wrong_type(path, "an object", &found)),
        }
    }

    /// The full name of a parameter.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.at)
    }

    /// A parameter; null is as good as none.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A parameter that has to be there.
    pub fn need(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take(name).ok_or_else(|| {
            let path = self.path(name);
            ApiError::invalid(format!("Missing required parameter: '{path}'."))
                .param(path)
                .code("missing_required_parameter")
        })
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(found) => Err(ApiError::wrong_type(&self.path(name), "a string", &found)),
        }
    }

    /// A yes or no.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(found) => Err(ApiError::wrong_type(&self.path(name), "a boolean", &found)),
        }
    }

    /// A number from `least` to `most`.
    pub fn decimal(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
        let Some(found) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let Some(value) = found.as_f64() else {
            return Err(ApiError::wrong_type(&path, "a decimal", &found));
        };
        let out = |side, than, limit: f64, code| {
            let message = format!(
                "Invalid '{path}': decimal {side} value. Expected a value {than} {limit}, but got {found} instead."
            );
            Err(ApiError::invalid(message).param(&path).code(code))
        };
        match value {
            v if v < least => out("below minimum", ">=", least, "decimal_below_min_value"),
            v if v > most => out("above maximum", "<=", most, "decimal_above_max_value"),
            v => Ok(Some(v)),
        }
    }

    /// A whole number from `least` to `most`.
    pub fn integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let Some(found) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let out = |side, than, limit: i64, code| {
            let message = format!(
                "Invalid '{path}': integer {side} value. Expected a value {than} {limit}, but got {found} instead."
            );
            Err(ApiError::invalid(message).param(&path).code(code))
        };
        // What is larger than any i64 is above every maximum.
        let value = match found.as_i64() {
            Some(value) => value,
            None if found.is_u64() => i64::MAX,
            None => return Err(ApiError::wrong_type(&path, "an integer", &found)),
        };
        match value {
            v if v < least => out("below minimum", ">=", least, "integer_below_min_value"),
            v if v > most || found.is_u64() && found.as_i64().is_none() => {
                out("above maximum", "<=", most, "integer_above_max_value")
            }
            v => Ok(Some(v)),
        }
    }

    /// Parameters that say who asks and how it is billed: nothing here depends on them.
    pub fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.take(name)));
    }

    /// Parameters that are not done; none may be given, unless it says nothing.
    pub fn refuse(&mut self, names: &[&str]) -> Result<(), ApiError> {
        for name in names {
            match self.take(name) {
                None | Some(Value::Bool(false)) => {}
                Some(Value::Array(list)) if list.is_empty() => {}
                Some(_) => return Err(ApiError::unsupported(&self.path(name))),
            }
        }
        Ok(())
    }

    /// The end: nothing may be left.
    pub fn finish(mut self) -> Result<(), ApiError> {
        self.map.retain(|_, value| !value.is_null());
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => {
                let path = self.path(name);
                let message = format!("Unrecognized request argument supplied: {path}");
                Err(ApiError::invalid(message).param(path).code("unknown_parameter"))
            }
        }
    }
}
