//! Files of example text.

use std::path::Path;

/// The documents of a file: blocks divided by blank lines, or the `text` of each line of a `.jsonl` file.
///
/// # Errors
/// What is wrong with the file, in one line.
pub(super) fn read(path: &Path) -> Result<Vec<String>, String> {
    let text = fs_err::read_to_string(path).map_err(|e| e.to_string())?;
    let lines = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    let documents = if lines { json_lines(&text)? } else { blocks(&text) };
    if documents.is_empty() {
        return Err("the file holds no text".into());
    }
    Ok(documents)
}

fn blocks(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for line in text.lines() {
        let Some(last) = documents.last_mut() else { continue };
        if !line.trim().is_empty() {
            if !last.is_empty() {
                last.push('\n');
            }
            last.push_str(line);
        } else if !last.is_empty() {
            documents.push(String::new());
        }
    }
    documents.retain(|d| !d.is_empty());
    documents
}

fn json_lines(text: &str) -> Result<Vec<String>, String> {
    let mut documents = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let value: serde_json::Value =
            serde_json::from_str(line).map_err(|e| format!("line {}: {e}", i + 1))?;
        let text = value.get("text").and_then(|t| t.as_str());
        let text = text.ok_or_else(|| format!("line {}: no text under `text`", i + 1))?;
        if !text.trim().is_empty() {
            documents.push(text.to_owned());
        }
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_divided_by_blank_lines() {
        assert_eq!(blocks("\n\na\n b\n\n \nc\r\n"), ["a\n b", "c"]);
        assert!(blocks(" \n\n").is_empty());
    }

    #[test]
    fn json_lines_name_the_bad_line() {
        let good = json_lines("{\"text\": \"a\\nb\"}\n\n{\"text\": \"c\"}\n");
        assert_eq!(good.unwrap(), ["a\nb", "c"]);
        assert!(json_lines("{\"text\": \"a\"}\n{}").unwrap_err().starts_with("line 2"));
        assert!(json_lines("x").unwrap_err().starts_with("line 1"));
    }
}
