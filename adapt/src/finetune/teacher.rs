//! A model whose predictions are learnt, in the place of the next token.

use std::path::Path;

use moe_merge_checkpoint::Source;
use moe_merge_model::{Spec, Tokenizer};

use super::error::FinetuneError;

/// The teacher at `path`: a model of any family and width, a MoE as its routers say, with the student's vocabulary.
///
/// * `window`: tokens of a sequence at most
///
/// # Errors
/// [`FinetuneError::Option`] for another vocabulary or a context that is shorter than `window`; a model that cannot be
/// opened.
pub(super) fn source(
    path: &str,
    (student, spec): (&Source, &Spec),
    window: usize,
) -> Result<Source, FinetuneError> {
    let source = Source::open(&path.parse()?, Path::new("."))?;
    let taught = Spec::of(&source)?;
    let refused = |expected: String, found: String| FinetuneError::Option {
        name: "--teacher",
        expected,
        found: format!("{}: {found}", source.label),
        hint: Some("leave `--teacher` out to learn the text itself".into()),
    };
    if taught.vocab != spec.vocab {
        let expected = format!("a model with the student's vocabulary of {} tokens", spec.vocab);
        return Err(refused(expected, format!("{} tokens", taught.vocab)));
    }
    if taught.max_positions < window {
        let expected = format!("a model that sees {window} tokens at once (`--window`)");
        return Err(refused(expected, format!("{} tokens", taught.max_positions)));
    }
    if let (Some(own), Some(other)) =
        (student.side_file("tokenizer.json"), source.side_file("tokenizer.json"))
        && own.read()? != other.read()?
        && let Some(difference) =
            Tokenizer::from_source(student)?.differences(&Tokenizer::from_source(&source)?)
    {
        return Err(refused("the same text for every token id".into(), difference.to_string()));
    }
    Ok(source)
}
