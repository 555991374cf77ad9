//! What a fine-tuning does to each domain: perplexity before and after.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::Interrupt;
use moe_merge_merge::documents::{Cutting, Encoder, Unprompted, encode_labelled, read_labelled};
use moe_merge_merge::gates::TokenPrompts;
use moe_merge_model::expert_training::{Factors, Goal, Lesson, Trainee};
use serde::Serialize;

use super::data::Corpus;
use super::error::FinetuneError;
use super::train::look;

/// Name of the recipe that a build leaves in the model's folder.
const RECIPE: &str = "moe-merge.yaml";

/// Text of a domain.
#[derive(Debug, Clone, PartialEq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its text, in batches.
    batches: Vec<Vec<Lesson>>,
}

impl Domain {
    /// Its text.
    pub fn lessons(&self) -> impl Iterator<Item = &Lesson> {
        self.batches.iter().flatten()
    }
}

/// Perplexity of a domain's text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainReport {
    /// Its name.
    pub name: String,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity of the model as it was.
    pub before: f64,
    /// With the trained factors.
    pub after: f64,
    /// Share of the tokens that visit the expert before and after, mean over layers; none in a dense model.
    pub visits: Option<[f64; 2]>,
}

/// A rise of perplexity, as a share of it, from which on a domain has suffered.
const SUFFERED: f64 = 0.01;

/// What to do about domains of other experts whose perplexity rose by more than 1 %, where there are any.
pub fn suffered(domains: &[DomainReport], expert: &str, held: f64) -> Option<String> {
    let rise = |d: &DomainReport| d.after / d.before - 1.0;
    let worse = domains.iter().filter(|d| d.name != expert && rise(d) > SUFFERED);
    let told: Vec<String> =
        worse.map(|d| format!("`{}` by {:.1} %", d.name, 100.0 * rise(d))).collect();
    let what = match held > 0.0 {
        true => format!(
            "a larger `--keep` than {held}, more `--keep-text`, or text of theirs (`--keep-data FILE...`) holds them"
        ),
        false => "`--keep 30` holds them".into(),
    };
    let rose = format!("the perplexity of other domains rose: {}", told.join(", "));
    (!told.is_empty()).then(|| format!("{rose}: {what}"))
}

/// Text of files, the first `tokens` of each.
///
/// # Errors
/// As [`Corpus::open`].
pub fn from_files(
    files: &[(String, PathBuf)],
    encoder: &Encoder<'_>,
    window: usize,
    tokens: usize,
    interrupt: &Interrupt,
) -> Result<Vec<Domain>, FinetuneError> {
    let mut domains = Vec::new();
    for (name, file) in files {
        let corpus = Corpus::open(std::slice::from_ref(file), encoder, window, interrupt)?;
        let lessons = first(&corpus, (0..corpus.len()).collect(), tokens)?;
        domains.push(Domain { name: name.clone(), batches: batched(lessons, tokens) });
    }
    Ok(domains)
}

/// The lessons of documents, until so many tokens are reached.
///
/// # Errors
/// As [`Corpus::lessons`].
pub fn first(
    corpus: &Corpus<'_>,
    documents: Vec<usize>,
    tokens: usize,
) -> Result<Vec<Lesson>, FinetuneError> {
    let (mut lessons, mut held) = (Vec::new(), 0);
    for document in documents {
        for lesson in corpus.lessons(document)? {
            if held > 0 && held + lesson.tokens.len() > tokens {
                return Ok(lessons);
            }
            held += lesson.tokens.len();
            lessons.push(lesson);
        }
    }
    Ok(lessons)
}

/// Tokens of a batch that is only looked at.
const BATCH: usize = 4096;

/// Lessons of all domains in turn, in batches of at most `tokens` tokens.
pub fn mixed(domains: &[Domain], tokens: usize) -> Vec<Vec<Lesson>> {
    let mut rests: Vec<_> = domains.iter().map(Domain::lessons).collect();
    let mut lessons = Vec::new();
    loop {
        let before = lessons.len();
        lessons.extend(rests.iter_mut().filter_map(Iterator::next).cloned());
        if lessons.len() == before {
            return batched(lessons, tokens);
        }
    }
}

/// Lessons in batches of at most [`BATCH`] or `tokens` tokens.
pub fn batched(lessons: Vec<Lesson>, tokens: usize) -> Vec<Vec<Lesson>> {
    let (mut batches, mut held): (Vec<Vec<Lesson>>, usize) = (Vec::new(), 0);
    for lesson in lessons {
        let count = lesson.tokens.len();
        match batches.last_mut() {
            Some(batch) if held + count <= BATCH.min(tokens) => batch.push(lesson),
            _ => {
                batches.push(vec![lesson]);
                held = 0;
            }
        }
        held += count;
    }
    batches
}

/// The prompts of all experts of a MoE that this program built, from the recipe in its folder. None where there is no
/// recipe; a note where it cannot be read any more.
pub fn prompts(
    folder: &Path,
    encoder: &Encoder<'_>,
    experts: &[String],
    tokens: usize,
) -> (Vec<(String, TokenPrompts)>, Option<String>) {
    let recipe = folder.join(RECIPE);
    if !recipe.is_file() {
        return (Vec::new(), None);
    }
    let read = read_labelled(&recipe, experts, Unprompted::Allowed).and_then(|(prompts, _)| {
        let (encoded, _) = encode_labelled(encoder, &prompts, Cutting::Budget(tokens))?;
        let names = prompts.into_iter().map(|p| p.label);
        Ok(names.zip(encoded).collect())
    });
    match read {
        Ok(read) => (read, None),
        Err(e) => (Vec::new(), Some(format!("the prompts in `{RECIPE}` cannot be read: {e}"))),
    }
}

/// Domains of texts that begin with `lead` tokens that are not predicted.
pub fn of_texts(texts: Vec<(String, Vec<Vec<u32>>)>, lead: usize, tokens: usize) -> Vec<Domain> {
    let lesson = |tokens: Vec<u32>| {
        let scored = (0..tokens.len()).map(|i| i >= lead).collect();
        Lesson { tokens, scored }
    };
    let domains = texts.into_iter().map(|(name, texts)| {
        let lessons = texts.into_iter().map(lesson).filter(|l| l.scored() > 0).collect();
        Domain { name, batches: batched(lessons, tokens) }
    });
    domains.filter(|d| !d.batches.is_empty()).collect()
}

/// The prompts of a MoE as domains.
pub fn stored(
    folder: &Path,
    encoder: &Encoder<'_>,
    experts: &[String],
    tokens: usize,
) -> (Vec<Domain>, Option<String>) {
    let (prompts, note) = prompts(folder, encoder, experts, tokens);
    let lead = usize::from(encoder.tokenizer().bos().is_some());
    let texts = prompts.into_iter().map(|(name, p)| (name, p.positive)).collect();
    (of_texts(texts, lead, tokens), note)
}

/// Perplexity of each domain with the model as it is and with factors on top, routed as its routers say (`Route::Natural`), and how much of it
/// visits the expert.
///
/// # Errors
/// [`FinetuneError`].
pub fn compare(
    model: &Trainee,
    factors: &Factors,
    domains: &[Domain],
    interrupt: &Interrupt,
) -> Result<Vec<DomainReport>, FinetuneError> {
    let goal = Goal::NextToken;
    domains
        .iter()
        .map(|domain| {
            let before = look(model, None, &domain.batches, &goal, interrupt)?;
            let after = look(model, Some(factors), &domain.batches, &goal, interrupt)?;
            Ok(DomainReport {
                name: domain.name.clone(),
                tokens: domain.lessons().map(Lesson::scored).sum(),
                before: before.loss.exp(),
                after: after.loss.exp(),
                visits: before.visits.zip(after.visits).map(|(b, a)| [b, a]),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_domains_that_suffered_are_named() {
        let domain = |name: &str, after| DomainReport {
            name: name.into(),
            tokens: 9,
            before: 10.0,
            after,
            visits: None,
        };
        let domains =
            [domain("own", 20.0), domain("a", 10.05), domain("b", 10.5), domain("c", 8.0)];
        let told = suffered(&domains, "own", 0.0).unwrap();
        assert_eq!(
            told,
            "the perplexity of other domains rose: `b` by 5.0 %: `--keep 30` holds them"
        );
        assert!(suffered(&domains, "own", 30.0).unwrap().contains("a larger `--keep` than 30"));
        assert!(suffered(&domains[..2], "own", 0.0).is_none());
    }
}
