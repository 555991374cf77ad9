//! The journal: one line of JSON for each generation, each with the hash of the line before.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::CONFIG;
use super::switch::View;
use crate::error::CheckpointError;
use crate::manifest::{FileRecord, MANIFEST_NAME, hash_bytes};
use crate::write::INDEX_NAME;

/// Where the journal is, seen from the model folder.
pub const JOURNAL_NAME: &str = ".moe-merge/journal.jsonl";

/// One generation in the journal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalLine {
    /// Counts from 0.
    pub generation: u32,
    /// What made it: `build`, `import` (a folder of another program, as it was found), `calibrate`, `swap`, ….
    pub action: String,
    /// BLAKE3 of the line before, without its line end; none for the first.
    pub previous: Option<String>,
    /// BLAKE3 of the manifest of this generation.
    pub manifest: String,
    /// The generation that was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u32>,
    /// Why, in the words of a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When: RFC 3339, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// Who: the name that the environment gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Files that this generation has and its parent has not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added: Vec<FileRecord>,
    /// Files that its parent has and this generation has not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<FileRecord>,
    /// Names, in their files, of the tensors that were replaced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<String>,
    /// Parameters and measured effect, as the action reports them.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub details: Value,
}

impl JournalLine {
    /// The line as it is written, with its end.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }
}

/// All generations of a model folder, first to last; empty for a folder that this program has not written or changed.
///
/// # Errors
/// [`CheckpointError::Malformed`] naming the line if the chain of hashes is broken, a line cannot be read, or a
/// manifest is not the one that the journal recorded.
pub fn history(folder: &Path) -> Result<Vec<JournalLine>, CheckpointError> {
    let view = View::of(folder)?;
    let (path, Some(text)) = view.read(JOURNAL_NAME)? else { return Ok(Vec::new()) };
    let lines = parse(&text, &path)?;
    for (i, line) in lines.iter().enumerate() {
        let name = match i + 1 == lines.len() {
            true => MANIFEST_NAME.to_owned(),
            false => old_manifest(line.generation),
        };
        let (path, bytes) = view.read(&name)?;
        let found = bytes.map_or("no such file".into(), |bytes| hash_bytes(&bytes));
        if found != line.manifest {
            return Err(CheckpointError::Malformed {
                what: "the manifest is not the one that the journal recorded".into(),
                file: path,
                tensor: None,
                expected: format!("hash {} for generation {}", line.manifest, line.generation),
                found,
                hint: Some("somebody changed the history by hand, or the file is damaged".into()),
            });
        }
    }
    Ok(lines)
}

/// Where the manifest of an older generation is kept, seen from the model folder.
pub(super) fn old_manifest(generation: u32) -> String {
    format!(".moe-merge/manifests/{generation}.json")
}

/// Where index and configuration of an older generation are kept, if another one took their place.
pub(super) fn kept(name: &str, generation: u32) -> Option<String> {
    let kind = match name {
        INDEX_NAME => "index",
        CONFIG => "config",
        _ => return None,
    };
    Some(format!(".moe-merge/manifests/{generation}.{kind}.json"))
}

/// A file's bytes, `None` if it is not there.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, CheckpointError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if [NotFound, NotADirectory].contains(&e.kind()) => Ok(None),
        Err(e) => Err(CheckpointError::io("reading", path, e)),
    }
}

/// Reads the lines and checks that each holds the hash of the one before, and that generations count up by one.
pub(super) fn parse(text: &[u8], path: &Path) -> Result<Vec<JournalLine>, CheckpointError> {
    let broken = |number: usize, expected: String, found: String| CheckpointError::Malformed {
        what: format!("the journal is broken at line {}", number + 1),
        file: path.to_owned(),
        tensor: None,
        expected,
        found,
        hint: Some("somebody changed the journal by hand, or the file is damaged".into()),
    };
    let mut lines: Vec<JournalLine> = Vec::new();
    let mut before: Option<String> = None;
    for (i, line) in text.strip_suffix(b"\n").unwrap_or(text).split(|b| *b == b'\n').enumerate() {
        let parsed: JournalLine = serde_json::from_slice(line)
            .map_err(|e| broken(i, "a generation as JSON".into(), e.to_string()))?;
        if parsed.previous != before {
            let show = |hash: &Option<String>| hash.clone().unwrap_or("none".into());
            let expected = format!("the hash of the line before, {}", show(&before));
            return Err(broken(i, expected, show(&parsed.previous)));
        }
        let next = lines.last().map_or(parsed.generation, |l| l.generation.saturating_add(1));
        if parsed.generation != next {
            let found = format!("generation {}", parsed.generation);
            return Err(broken(i, format!("generation {next}"), found));
        }
        before = Some(hash_bytes(line));
        lines.push(parsed);
    }
    Ok(lines)
}

/// Now, as RFC 3339 in UTC, to the second.
pub(super) fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    rfc3339(since.map_or(0, |d| d.as_secs()))
}

/// Seconds since 1970 as RFC 3339. Days to a date of the Gregorian calendar: years begin in March, so that the leap day
/// is the last one; 400 years have 146 097 days.
fn rfc3339(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3_600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The name of the user, if the environment tells.
pub(super) fn user() -> Option<String> {
    ["USER", "LOGNAME"]
        .into_iter()
        .find_map(|key| std::env::var(key).ok())
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_000_000_000, "2001-09-09T01:46:40Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

    #[test]
    fn a_broken_chain_names_its_line() {
        let first = JournalLine { action: "build".into(), ..JournalLine::default() };
        let second = JournalLine {
            generation: 1,
            action: "swap".into(),
            previous: Some(hash_bytes(first.text().trim_end().as_bytes())),
            ..JournalLine::default()
        };
        let third = JournalLine {
            generation: 2,
            previous: Some(hash_bytes(second.text().trim_end().as_bytes())),
            ..second.clone()
        };
        let whole = first.text() + &second.text() + &third.text();
        let read = |text: &str| parse(text.as_bytes(), Path::new("journal.jsonl"));
        assert_eq!(read(&whole).unwrap(), [first.clone(), second.clone(), third.clone()]);
        let refused = |text: &str, line: usize| match read(text) {
            Err(CheckpointError::Malformed { what, .. }) => {
                assert_eq!(what, format!("the journal is broken at line {line}"));
            }
            other => panic!("{other:?}"),
        };
        refused(&whole.replacen("build", "Build", 1), 2);
        refused(&(first.text() + &third.text()), 2);
        refused(&(second.text() + &third.text()), 1);
        refused(&whole[..whole.len() - 9], 3);
        let skipped = JournalLine { generation: 5, ..second };
        refused(&(first.text() + &skipped.text()), 2);
        refused("", 1);
    }

    #[test]
    fn the_line_of_a_build_has_four_fields() {
        let line = JournalLine { action: "build".into(), ..JournalLine::default() };
        let expected = r#"{"generation":0,"action":"build","previous":null,"manifest":""}"#;
        assert_eq!(line.text(), format!("{expected}\n"));
    }
}
