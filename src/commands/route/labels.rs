//! The expert that each text belongs to.

use crate::args::RouteArgs;
use crate::picture::{Label, LabelFrom, Routes};

use super::Text;
use super::error::RouteError;

/// Labels that were given, else those that file names tell.
pub fn of(
    args: &RouteArgs,
    texts: &[Text],
    routes: &Routes,
) -> Result<Vec<Option<Label>>, RouteError> {
    if args.labels.is_empty() {
        return Ok(texts.iter().map(|t| from_file_name(t, routes)).collect());
    }
    if args.labels.len() != texts.len() {
        return Err(RouteError::Count { texts: texts.len(), labels: args.labels.len() });
    }
    args.labels.iter().map(|label| named(label.trim(), routes)).collect()
}

/// An expert by name or number; `-` for none. A name goes before a number.
fn named(label: &str, routes: &Routes) -> Result<Option<Label>, RouteError> {
    if label == "-" {
        return Ok(None);
    }
    let by_name = routes.experts.iter().position(|n| n == label);
    let number = || label.parse().ok().filter(|&n: &usize| n < routes.experts.len());
    match by_name.or_else(number) {
        Some(expert) => Ok(Some(Label { expert, from: LabelFrom::Option })),
        None => Err(RouteError::Unknown {
            label: label.to_owned(),
            experts: routes.experts.clone(),
            named: routes.named,
        }),
    }
}

fn from_file_name(text: &Text, routes: &Routes) -> Option<Label> {
    if !routes.named {
        return None;
    }
    let stem = text.path.as_ref()?.file_stem()?.to_str()?;
    let expert = expert_in(stem, &routes.experts)?;
    Some(Label { expert, from: LabelFrom::FileName })
}

/// The expert whose name stands in `stem` as a word of its own; the longest, if it is the only one so long.
fn expert_in(stem: &str, experts: &[String]) -> Option<usize> {
    let stem = stem.to_lowercase();
    let found: Vec<(usize, usize)> = experts
        .iter()
        .enumerate()
        .filter(|(_, name)| is_word_of(&name.to_lowercase(), &stem))
        .map(|(e, name)| (name.chars().count(), e))
        .collect();
    let longest = found.iter().map(|f| f.0).max()?;
    let mut candidates = found.iter().filter(|f| f.0 == longest);
    candidates.next().filter(|_| candidates.next().is_none()).map(|f| f.1)
}

fn is_word_of(word: &str, text: &str) -> bool {
    let part_of_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    !word.is_empty()
        && text.match_indices(word).any(|(at, _)| {
            let (before, after) = (&text[..at], &text[at + word.len()..]);
            !part_of_word(before.chars().next_back()) && !part_of_word(after.chars().next())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_tell_experts() {
        let experts = ["code", "rust-code", "prose", ""].map(str::to_owned);
        for (stem, expert) in [
            ("prose", Some(2)),
            ("eval_Prose", Some(2)),
            ("eval_rust-code_2", Some(1)),
            ("code.test", Some(0)),
            ("decoder", None),
            ("notes", None),
            ("prose_and_prosecode", Some(2)),
            ("", None),
        ] {
            assert_eq!(expert_in(stem, &experts), expert, "{stem}");
        }
        let twins = ["a1", "b2"].map(str::to_owned);
        assert_eq!(expert_in("a1 and b2", &twins), None);
    }
}
