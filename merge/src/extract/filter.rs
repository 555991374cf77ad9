//! Which modules an extraction looks at.

use std::fmt;

use fancy_regex::Regex;

use crate::error::MergeError;

/// Patterns for module names, searched for anywhere in them.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    include: Vec<Regex>,
    exclude: Vec<Regex>,
}

impl Filter {
    /// Modules that one of `include` finds (all, if there is none) and none of `exclude` does.
    ///
    /// # Errors
    /// [`MergeError::Argument`] for what is no regular expression.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Self, MergeError> {
        let all = |name: &str, patterns: &[String]| {
            patterns
                .iter()
                .map(|text| {
                    Regex::new(text).map_err(|e| MergeError::Argument {
                        what: "this is no regular expression".into(),
                        name: name.into(),
                        expected: "a regular expression for module names".into(),
                        found: format!("`{text}`: {e}"),
                        hint: Some("a plain part of a name, such as `down_proj`, is one".into()),
                    })
                })
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self { include: all("--include", include)?, exclude: all("--exclude", exclude)? })
    }

    /// Whether it lets everything through.
    pub(super) fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Whether `module` is one of them. A pattern that cannot be decided within the matcher's limits finds nothing.
    pub(super) fn chooses(&self, module: &str) -> bool {
        let found = |list: &[Regex]| list.iter().any(|r| r.is_match(module).unwrap_or(false));
        (self.include.is_empty() || found(&self.include)) && !found(&self.exclude)
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |l: &[Regex]| l.iter().map(|r| format!("`{r}`")).collect::<Vec<_>>().join(", ");
        write!(f, "include {}; exclude {}", list(&self.include), list(&self.exclude))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_searched_not_anchored() {
        let texts = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let filter = Filter::new(&texts(&["mlp", "o_proj$"]), &texts(&[r"layers\.0\."])).unwrap();
        let chosen = |m: &str| filter.chooses(m);
        assert!(chosen("model.layers.1.mlp.up_proj") && chosen("model.layers.1.self_attn.o_proj"));
        assert!(!chosen("model.layers.0.mlp.up_proj") && !chosen("model.norm"));
        assert!(Filter::default().chooses("anything"));
        assert!(Filter::new(&texts(&["("]), &[]).is_err());
    }
}
