//! Names of new shards: where an old value of a tensor stays in a file that is still read, the new one has to win.

use std::cmp::Ordering;

use crate::error::CheckpointError;

/// The beginning of the name of a shard for `role` whose tensors win over those in the files `stale`.
///
/// A loader that reads every tensor of every file of the index (transformers, vLLM, llama.cpp's converter) goes
/// through the files in the order of their names and keeps what it saw last. Some compare bytes, some compare
/// numbers in names as numbers: the name is the last one in both orders.
///
/// # Errors
/// [`CheckpointError::Unsupported`] if no name would come last.
pub(super) fn stem(role: &str, stale: &[&str]) -> Result<String, CheckpointError> {
    let behind = |name: &&str| {
        let stem = name.strip_suffix(".safetensors").unwrap_or(name);
        format!("{stem}_{role}")
    };
    let usual = format!("model-{role}");
    let by_bytes = stale.iter().max().map(behind);
    let by_numbers = stale.iter().max_by(|a, b| natural(a, b)).map(behind);
    let last = format!("~model-{role}");
    let mut candidates = [Some(usual), by_bytes, by_numbers, Some(last)].into_iter().flatten();
    candidates.find(|c| stale.iter().all(|name| is_behind(c, name))).ok_or_else(|| {
        CheckpointError::Unsupported {
            what: "no name for a new shard comes after those of the old ones".into(),
            file: stale.first().copied().unwrap_or_default().into(),
            hint:
                "save the model again with ordinary shard names: `model-00001-of-00002.safetensors`"
                    .into(),
        }
    })
}

/// Whether every name that begins with `stem` and goes on with a hash comes after `name`.
fn is_behind(stem: &str, name: &str) -> bool {
    ["00000000", "99999999", "a0000000", "ffffffff"].iter().all(|hash| {
        let new = format!("{stem}-{hash}.safetensors");
        new.as_str() > name && natural(&new, name) == Ordering::Greater
    })
}

/// Compares runs of digits by their value, everything else by its bytes.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let split = |s: &str, digits: bool| {
            s.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(s.len())
        };
        let ((text_a, rest_a), (text_b, rest_b)) =
            (a.split_at(split(a, false)), b.split_at(split(b, false)));
        let ((number_a, next_a), (number_b, next_b)) =
            (rest_a.split_at(split(rest_a, true)), rest_b.split_at(split(rest_b, true)));
        let value = |s: &str| {
            let digits = s.trim_start_matches('0');
            (digits.len(), digits.to_owned())
        };
        let order = text_a.cmp(text_b).then_with(|| value(number_a).cmp(&value(number_b)));
        if order != Ordering::Equal {
            return order;
        }
        if next_a.is_empty() || next_b.is_empty() {
            return next_a.len().cmp(&next_b.len());
        }
        (a, b) = (next_a, next_b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_names_come_last() {
        for (stale, expected) in [
            (vec![], "model-router"),
            (
                vec!["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
                "model-router",
            ),
            (vec!["model-base-12345678.safetensors"], "model-router"),
            (vec!["1.safetensors"], "model-router"),
            (vec!["model.safetensors"], "model_router"),
            (vec!["model-shared-12345678.safetensors"], "model-shared-12345678_router"),
            (
                vec![
                    "pytorch_model-00001-of-00002.safetensors",
                    "pytorch_model-00002-of-00002.safetensors",
                ],
                "pytorch_model-00002-of-00002_router",
            ),
            // By bytes `s-9` is the last, by numbers `s-10`.
            (vec!["s-9.safetensors", "s-10.safetensors"], "~model-router"),
            (vec!["model-router-zz.safetensors"], "model-router-zz_router"),
        ] {
            let stem = stem("router", &stale).unwrap();
            assert_eq!(stem, expected, "{stale:?}");
        }
        assert!(stem("router", &["ü-9.safetensors", "ü-10.safetensors"]).is_err());
    }

    #[test]
    fn numbers_compare_as_numbers() {
        assert_eq!(natural("m-9", "m-10"), Ordering::Less);
        assert_eq!(natural("m-09", "m-9"), Ordering::Equal);
        assert_eq!(natural("m-1-of-2", "m-1"), Ordering::Greater);
        assert_eq!(natural("m-18446744073709551616", "m-2"), Ordering::Greater);
    }
}
