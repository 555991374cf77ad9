//! Parts of `tokenizer.json` that GGUF files spell otherwise.

use std::path::Path;

use serde_json::Value as Json;

use crate::error::CheckpointError;

/// Pairs of tokens in the order in which they are merged.
pub(super) fn merges<'j>(
    tokenizer: &'j Json,
    file: &Path,
) -> Result<Vec<(&'j str, &'j str)>, CheckpointError> {
    let list = tokenizer["model"]["merges"].as_array();
    let pair = |merge: &'j Json| {
        pair_of(merge).ok_or_else(|| CheckpointError::Malformed {
            what: "merge of the tokenizer cannot be read".into(),
            file: file.to_owned(),
            tensor: None,
            expected: "two tokens".into(),
            found: merge.to_string(),
            hint: None,
        })
    };
    list.into_iter().flatten().map(pair).collect()
}

/// Two tokens: a list of two, or a text with a space between them.
fn pair_of(merge: &Json) -> Option<(&str, &str)> {
    match merge {
        Json::String(text) => text.split_once(' '),
        Json::Array(pair) => match pair.as_slice() {
            [left, right] => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

/// `<0x0A>`: a byte of a character that the vocabulary lacks.
pub(super) fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The steps of a normalizer.
pub(super) fn normalizers(normalizer: &Json) -> Vec<&Json> {
    match normalizer["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => normalizer["normalizers"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(normalizers)
            .collect(),
        Some(_) => vec![normalizer],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merges_in_both_spellings() {
        assert_eq!(pair_of(&json!("a b")), Some(("a", "b")));
        assert_eq!(pair_of(&json!(["a", "b c"])), Some(("a", "b c")));
        assert_eq!(pair_of(&json!(["a"])), None);
        assert_eq!(pair_of(&json!("ab")), None);
    }

    #[test]
    fn bytes_by_name() {
        assert!(is_byte("<0x0A>") && is_byte("<0xff>"));
        assert!(!is_byte("<0x0>") && !is_byte("0x0A") && !is_byte("<0xzz>"));
    }
}
