//! What a fine-tuning does to each domain: perplexity before and after.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{Interrupt, Source};
use moe_merge_merge::documents::{Cutting, Encoder, Unprompted, encode_labelled, read_labelled};
use moe_merge_merge::gates::TokenPrompts;
use moe_merge_model::expert_training::{Factors, Goal, Lesson, Route, Trainee};
use serde::Serialize;

use super::data::Corpus;
use super::error::FinetuneError;
use super::train::mean_loss;

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

/// Perplexity of each domain with the model as it is and with factors on top, routed as its routers say.
///
/// # Errors
/// [`FinetuneError`].
pub fn compare(
    source: &Source,
    expert: Option<usize>,
    factors: &Factors,
    domains: &[Domain],
    interrupt: &Interrupt,
) -> Result<Vec<DomainReport>, FinetuneError> {
    if domains.is_empty() {
        return Ok(Vec::new());
    }
    let model = Trainee::open(source, expert, Route::Natural)?;
    let perplexity = |factors, domain: &Domain| {
        let goal = Goal::NextToken;
        mean_loss(&model, factors, &domain.batches, &goal, interrupt).map(f64::exp)
    };
    domains
        .iter()
        .map(|domain| {
            Ok(DomainReport {
                name: domain.name.clone(),
                tokens: domain.batches.iter().flatten().map(Lesson::scored).sum(),
                before: perplexity(None, domain)?,
                after: perplexity(Some(factors), domain)?,
            })
        })
        .collect()
}
