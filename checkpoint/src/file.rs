//! Small files that are read whole, and names of what is nearby.

use std::io::Read;
use std::path::Path;

use crate::error::CheckpointError;

/// Refuses folders, pipes and devices, which could block or never end.
pub(crate) fn expect_regular(path: &Path) -> Result<(), CheckpointError> {
    let meta = std::fs::metadata(path).map_err(|e| CheckpointError::io("opening", path, e))?;
    if meta.is_file() {
        return Ok(());
    }
    Err(CheckpointError::Malformed {
        what: "not a file".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "a regular file".into(),
        found: if meta.is_dir() { "a folder" } else { "a pipe or device" }.into(),
        hint: None,
    })
}

/// The bytes of a file that may have at most `limit` of them.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    expect_regular(path)?;
    let io = |e| CheckpointError::io("reading", path, e);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::Malformed {
            what: "file is too large for what it should be".into(),
            file: path.to_owned(),
            tensor: None,
            expected: format!("at most {limit} bytes"),
            found: "more".into(),
            hint: None,
        });
    }
    Ok(bytes)
}

/// The candidate with the fewest edits to `wanted`, if they are at most a third of its length (two, if it is short).
pub(crate) fn nearest<'a>(
    wanted: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let length = wanted.chars().count();
    let most = (length / 3).max(2).min(length.saturating_sub(1));
    candidates
        .into_iter()
        .filter(|c| c.len().abs_diff(wanted.len()) <= 4 * most)
        .map(|c| (edits(wanted, c), c))
        .filter(|(n, _)| *n <= most)
        .min_by_key(|(n, _)| *n)
        .map(|(_, c)| c)
}

/// Levenshtein distance over characters.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("abc", "abc"), 0);
    }

    #[test]
    fn nearest_is_near() {
        assert_eq!(nearest("bsae", ["prose", "base", "code"]), Some("base"));
        assert_eq!(nearest("bas", ["prose", "base", "code"]), Some("base"));
        assert_eq!(nearest("x", ["y"]), None);
        assert_eq!(nearest("lm_head.weight", ["model.norm.weight"]), None);
    }
}
