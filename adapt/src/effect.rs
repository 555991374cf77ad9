//! What a change does to text: how well it is predicted, and which experts its tokens visit, before and after.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::generation::Settings;
use moe_merge_checkpoint::{Interrupt, Source, generation};
use moe_merge_merge::documents::{Cutting, Encoder, Unprompted, encode_labelled, read_labelled};
use moe_merge_merge::evaluate::Domain;
use moe_merge_model::perplexity::{DEFAULT_WINDOW, Windows};
use moe_merge_model::streamed::{TokenText, Watcher, WindowRouting, perplexities};
use moe_merge_model::{ModelError, Placement};
use serde::{Deserialize, Serialize};

use crate::error::AdaptError;
use crate::moe::Moe;

/// Text whose way through the model is watched.
#[derive(Debug, Clone)]
pub struct Text {
    /// What it is about: the name of an expert, or of a domain.
    pub domain: String,
    /// Its tokens, without beginning-of-text tokens.
    pub tokens: Vec<u32>,
    /// Names it in messages.
    pub origin: String,
}

/// What a change does to text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Domains, in order.
    pub domains: Vec<DomainEffect>,
    /// Seconds that it took to find out.
    pub seconds: f64,
}

/// What it does to the text of one domain.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainEffect {
    /// Its name.
    pub domain: String,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Perplexity before and after.
    pub perplexity: [f64; 2],
    /// Share of tokens whose first choice the expert is, mean over layers, before and after.
    pub first: [f64; 2],
    /// Share of tokens that have the expert among their choices, mean over layers, before and after.
    pub any: [f64; 2],
    /// Share of tokens whose first choice is another expert than before, mean over layers.
    pub moved: f64,
}

impl DomainEffect {
    /// Relative rise of perplexity; negative where it falls.
    pub fn rise(&self) -> f64 {
        self.perplexity[1] / self.perplexity[0] - 1.0
    }
}

/// Where the two models are looked at: which number the expert has in each, if it is there.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    /// Before.
    pub before: Option<usize>,
    /// After.
    pub after: Option<usize>,
}

impl Watched {
    /// The number that the expert with the number `id` has after the change.
    fn now(self, id: u16) -> Option<u16> {
        match (self.before, self.after) {
            (Some(gone), None) if usize::from(id) == gone => None,
            (Some(gone), None) if usize::from(id) > gone => Some(id - 1),
            _ => Some(id),
        }
    }
}

impl Effect {
    /// Runs all texts through both models, one layer in memory at a time.
    ///
    /// # Errors
    /// What opening or running a model meets; interruption.
    pub fn measure(
        before: &Source,
        after: &Source,
        watched: Watched,
        texts: &[Text],
        interrupt: &Interrupt,
    ) -> Result<Self, AdaptError> {
        let clock = Instant::now();
        let pass = |source: &Source, expert| Pass::run(source, expert, texts, interrupt);
        let [old, new] = [pass(before, watched.before)?, pass(after, watched.after)?];
        let mut by_domain: BTreeMap<usize, [Sum; 3]> = BTreeMap::new();
        let mut names: Vec<&str> = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            let at = names.iter().position(|n| *n == text.domain).unwrap_or_else(|| {
                names.push(&text.domain);
                names.len() - 1
            });
            let sums = by_domain.entry(at).or_default();
            sums[0].add(&old.sums[i]);
            sums[1].add(&new.sums[i]);
            let pairs = old.chosen[i].iter().zip(&new.chosen[i]);
            sums[2].first += pairs.filter(|(a, b)| watched.now(**a) != Some(**b)).count();
            sums[2].seen += old.chosen[i].len();
        }
        let domains = by_domain.into_iter().map(|(at, [old, new, moved])| DomainEffect {
            domain: names[at].to_owned(),
            tokens: new.tokens,
            perplexity: [&old, &new].map(|s| (s.nats / s.tokens.max(1) as f64).exp()),
            first: [&old, &new].map(|s| s.share(s.first)),
            any: [&old, &new].map(|s| s.share(s.any)),
            moved: moved.share(moved.first),
        });
        Ok(Self { domains: domains.collect(), seconds: clock.elapsed().as_secs_f64() })
    }
}

/// What is added up over a text.
#[derive(Debug, Clone, Default)]
struct Sum {
    tokens: usize,
    nats: f64,
    /// Choices, one for each token and layer; how many of them are the expert, first or at all.
    seen: usize,
    first: usize,
    any: usize,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.nats += other.nats;
        self.seen += other.seen;
        self.first += other.first;
        self.any += other.any;
    }

    fn share(&self, part: usize) -> f64 {
        part as f64 / self.seen.max(1) as f64
    }
}

/// One model's way through all texts.
struct Pass<'a> {
    expert: Option<usize>,
    sums: Vec<Sum>,
    /// First choices of each text, layer after layer.
    chosen: Vec<Vec<u16>>,
    interrupt: &'a Interrupt,
}

impl<'a> Pass<'a> {
    fn run(
        source: &Source,
        expert: Option<usize>,
        texts: &[Text],
        interrupt: &'a Interrupt,
    ) -> Result<Self, AdaptError> {
        let tokenizer = moe_merge_model::Tokenizer::from_source(source)?;
        let context = moe_merge_model::Spec::of(source)?.max_positions;
        let mut pass = Self {
            expert,
            sums: vec![Sum::default(); texts.len()],
            chosen: vec![Vec::new(); texts.len()],
            interrupt,
        };
        let windows = Windows { window: DEFAULT_WINDOW.min(context), stride: None };
        let texts: Vec<TokenText<'_>> =
            texts.iter().map(|t| TokenText { tokens: &t.tokens, origin: &t.origin }).collect();
        let placement = Placement::cpu();
        perplexities(source, &texts, tokenizer.bos(), windows, &mut pass, &placement)?;
        Ok(pass)
    }
}

impl Watcher for Pass<'_> {
    fn advance(&mut self, _: usize) {}

    fn routed(&mut self, window: WindowRouting<'_>) {
        let routing = window.routing;
        let sum = &mut self.sums[window.text];
        for chosen in routing.ids.chunks_exact(routing.top_k).skip(window.skip) {
            let is = |id: &u32| self.expert == Some(*id as usize);
            sum.seen += 1;
            sum.first += usize::from(is(&chosen[0]));
            sum.any += usize::from(chosen.iter().any(is));
            self.chosen[window.text].push(chosen[0] as u16);
        }
    }

    fn scored(&mut self, text: usize, _: usize, nats: f64) {
        self.sums[text].tokens += 1;
        self.sums[text].nats += nats;
    }

    fn go_on(&mut self) -> Result<(), ModelError> {
        Ok(self.interrupt.check()?)
    }
}

/// Tokens for each domain of a forecast, at most: it is to be cheap beside the model.
pub const FORECAST_TOKENS: usize = 512;

/// Recipes that a model folder may hold, with the prompts of its experts.
const RECIPES: [&str; 2] = ["moe-merge.yaml", "mergekit_moe_config.yml"];

/// The recipe in a model folder.
pub(crate) fn stored_recipe(folder: &Path) -> Option<PathBuf> {
    RECIPES.iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

/// The evaluation text that the folder's settings name.
///
/// # Errors
/// A file that cannot be read, or is no text.
pub fn evaluation_texts(moe: &Moe, settings: &Settings) -> Result<Vec<Text>, AdaptError> {
    let folder = &moe.source.path;
    let files: Vec<_> =
        settings.evaluation.iter().map(|(name, file)| (name.clone(), folder.join(file))).collect();
    let domains = Domain::read_all(&files)?;
    let tokenizer = moe_merge_model::Tokenizer::from_source(&moe.source)?;
    let text = |d: Domain| {
        let tokens = tokenizer.encode(&d.text)?;
        Ok(Text { domain: d.name, tokens, origin: d.path.display().to_string() })
    };
    domains.into_iter().map(text).collect()
}

/// The prompts of the experts: those of `file`, else those of the recipe in the folder, up to `budget` tokens for each
/// expert. What stands in the way of stored prompts is a note.
///
/// * `names`: of the experts that `file` speaks of
///
/// # Errors
/// A `file` that cannot be used.
pub fn prompt_texts(
    moe: &Moe,
    names: &[String],
    file: Option<&Path>,
    budget: usize,
) -> Result<(Vec<Text>, Vec<String>), AdaptError> {
    if let Some(file) = file {
        return prompts_in(moe, [names, names], file, budget);
    }
    let Some(stored) = stored_recipe(&moe.source.path) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let names = [names_then(moe), moe.names.clone()];
    let names = [names[0].as_slice(), names[1].as_slice()];
    Ok(prompts_in(moe, names, &stored, budget).unwrap_or_else(|e| {
        let note = format!("no forecast from the prompts in {}: {e}", stored.display());
        (Vec::new(), vec![note])
    }))
}

/// Names that the experts had when the recipe was written, if they are still as many.
pub(crate) fn names_then(moe: &Moe) -> Vec<String> {
    let first = generation::manifest(&moe.source.path, 0).map(|m| m.experts).unwrap_or_default();
    match first.len() == moe.names.len() {
        true => first,
        false => moe.names.clone(),
    }
}

/// * `names`: those that the file knows, and those of today
fn prompts_in(
    moe: &Moe,
    [known, names]: [&[String]; 2],
    file: &Path,
    budget: usize,
) -> Result<(Vec<Text>, Vec<String>), AdaptError> {
    let (labelled, notes) = read_labelled(file, known, Unprompted::Allowed)?;
    let encoder = Encoder::new(&moe.source)?;
    let (encoded, _) = encode_labelled(&encoder, &labelled, Cutting::Budget(budget))?;
    let skip = usize::from(encoder.tokenizer().bos().is_some());
    let mut texts = Vec::new();
    for (name, prompts) in names.iter().zip(encoded) {
        for (i, tokens) in prompts.positive.into_iter().enumerate() {
            let tokens: Vec<u32> = tokens.into_iter().skip(skip).collect();
            // One token predicts nothing where nothing stands before it.
            if tokens.len() > 1 {
                let origin = format!("{}, prompt {i} of `{name}`", file.display());
                texts.push(Text { domain: name.clone(), tokens, origin });
            }
        }
    }
    Ok((texts, notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_behind_one_that_goes_have_other_numbers() {
        let dropped = Watched { before: Some(1), after: None };
        assert_eq!([0, 1, 2].map(|id| dropped.now(id)), [Some(0), None, Some(1)]);
        let swapped = Watched { before: Some(1), after: Some(1) };
        assert_eq!([0, 1, 2].map(|id| swapped.now(id)), [Some(0), Some(1), Some(2)]);
    }
}
