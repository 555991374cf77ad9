//! What a build did to text that nothing was fitted to: perplexity per domain, and who visits which expert.

use std::path::PathBuf;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::perplexity::{DEFAULT_WINDOW, Windows};
use moe_merge_model::streamed::{TokenText, Watcher, WindowRouting, perplexities};
use moe_merge_model::{ModelError, Placement, Spec, TextError, Tokenizer};

use crate::error::MergeError;

/// Text of one domain.
#[derive(Debug, Clone)]
pub struct Domain {
    /// Its name; the name of its expert, where it has one.
    pub name: String,
    /// The text.
    pub text: String,
    /// Where it was read from, for messages.
    pub path: PathBuf,
}

impl Domain {
    /// Reads the evaluation files of a recipe.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if a file cannot be read, [`CheckpointError::Malformed`] if it is not UTF-8 or empty.
    pub fn read_all(files: &[(String, PathBuf)]) -> Result<Vec<Self>, MergeError> {
        let read = |(name, path): &(String, PathBuf)| {
            let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("reading", path, e))?;
            let wrong = |found: String| CheckpointError::Malformed {
                what: "evaluation text cannot be used".into(),
                file: path.clone(),
                tensor: None,
                expected: "text in UTF-8".into(),
                found,
                hint: None,
            };
            let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
            if text.trim().is_empty() {
                return Err(wrong("nothing but white space".into()).into());
            }
            Ok(Self { name: name.clone(), text, path: path.clone() })
        };
        files.iter().map(read).collect()
    }
}

/// Perplexity of several models on several domains.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Tokens that a model saw at once.
    pub window: usize,
    /// Domains, in the order of the recipe.
    pub domains: Vec<String>,
    /// Tokens scored per domain.
    pub tokens: Vec<usize>,
    /// One row per model.
    pub models: Vec<ModelRow>,
    /// Who visits which expert.
    pub routing: Vec<RoutingRow>,
}

/// One model on all domains.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ModelRow {
    /// `base`, the name of an expert, or `MoE`.
    pub name: String,
    /// Perplexity per domain.
    pub perplexity: Vec<f64>,
}

/// Where the tokens of one domain go.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct RoutingRow {
    /// The domain.
    pub domain: String,
    /// Share of tokens whose first choice each expert is, mean over layers; sums to 1.
    pub first: Vec<f64>,
    /// Share of tokens that have each expert among their top-k, mean over layers.
    pub any: Vec<f64>,
}

impl Evaluation {
    /// Share of what the expert of a domain gains over the base that the MoE gains too, by log perplexity; `None` where no
    /// expert has the domain's name or it gains less than one part in a thousand.
    pub fn recovered(&self, domain: usize) -> Option<f64> {
        let of =
            |name: &str| Some(self.models.iter().find(|m| m.name == name)?.perplexity[domain].ln());
        let (base, own, moe) = (of("base")?, of(&self.domains[domain])?, of("MoE")?);
        (base - own > 1e-3).then(|| (base - moe) / (base - own))
    }
}

/// Scores every model on every domain.
///
/// * `models`: name and opened model; one that is `None` has the numbers of the first row (an expert that is the base)
/// * `moe`: the finished folder
/// * `done` is told the tokens that went through a model
///
/// # Errors
/// What opening or running a model meets; interruption.
pub fn evaluate(
    models: &[(String, Option<&Source>)],
    moe: &Source,
    domains: &[Domain],
    interrupt: &Interrupt,
    placement: &Placement,
    done: &mut dyn FnMut(usize),
) -> Result<Evaluation, MergeError> {
    let scorer = Scorer::new(moe, domains, Cut::default(), interrupt, placement)?;
    let all: Vec<usize> = (0..domains.len()).collect();
    let each = |scores: &[Score]| scores.iter().map(Score::perplexity).collect();
    let mut rows: Vec<ModelRow> = Vec::new();
    for (name, source) in models {
        let perplexity: Vec<f64> = match (source, rows.first()) {
            (None, Some(first)) => first.perplexity.clone(),
            (Some(source), _) => each(&scorer.score(source, &all, done)?),
            (None, None) => continue,
        };
        rows.push(ModelRow { name: name.clone(), perplexity });
    }
    let found = scorer.score(moe, &all, done)?;
    rows.push(ModelRow { name: "MoE".into(), perplexity: each(&found) });
    Ok(Evaluation {
        window: scorer.window,
        domains: domains.iter().map(|d| d.name.clone()).collect(),
        tokens: found.iter().map(|s| s.tokens.iter().sum()).collect(),
        models: rows,
        routing: domains.iter().zip(&found).map(|(d, s)| s.load.row(&d.name)).collect(),
    })
}

/// First positions of the groups by which text is judged: tokens of a window that stand before the one predicted.
pub const POSITION_GROUPS: [usize; 8] = [0, 1, 2, 4, 8, 16, 32, 64];

/// How much of a text is scored, in what pieces.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cut {
    /// Tokens that a model sees at once; [`DEFAULT_WINDOW`], or the context where it is shorter.
    pub window: Option<usize>,
    /// Tokens of each text, from its beginning; all.
    pub tokens: Option<usize>,
}

/// Texts as tokens, to be scored with one model after the other.
#[derive(Debug)]
pub(crate) struct Scorer<'a> {
    /// Tokens that a model sees at once.
    pub window: usize,
    bos: Option<u32>,
    /// Tokens and origin.
    texts: Vec<(Vec<u32>, String)>,
    interrupt: &'a Interrupt,
    placement: &'a Placement,
}

impl<'a> Scorer<'a> {
    /// The texts of `domains` by the tokenizer of `model`.
    ///
    /// # Errors
    /// A tokenizer that cannot be read; [`TextError::TooLong`] for a window longer than the context.
    pub fn new(
        model: &Source,
        domains: &[Domain],
        cut: Cut,
        interrupt: &'a Interrupt,
        placement: &'a Placement,
    ) -> Result<Self, MergeError> {
        let tokenizer = Tokenizer::from_source(model)?;
        let context = Spec::of(model)?.max_positions;
        let window = cut.window.unwrap_or(DEFAULT_WINDOW.min(context));
        if window > context {
            return Err(MergeError::Text(TextError::TooLong {
                what: "window",
                context,
                found: window,
                hint: format!("`--window {context}` is the most this model can see at once"),
            }));
        }
        let encode = |d: &Domain| {
            let mut tokens = tokenizer.encode(&d.text)?;
            tokens.truncate(cut.tokens.unwrap_or(usize::MAX));
            Ok((tokens, d.path.display().to_string()))
        };
        let texts = domains.iter().map(encode).collect::<Result<_, MergeError>>()?;
        Ok(Self { window, bos: tokenizer.bos(), texts, interrupt, placement })
    }

    /// Tokens of the texts of `domains`.
    pub fn tokens(&self, domains: &[usize]) -> usize {
        domains.iter().map(|&d| self.texts[d].0.len()).sum()
    }

    /// How well `source` predicts each text of `domains`.
    ///
    /// # Errors
    /// What opening or running the model meets; interruption.
    pub fn score(
        &self,
        source: &Source,
        domains: &[usize],
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<Score>, MergeError> {
        let text = |&d: &usize| TokenText { tokens: &self.texts[d].0, origin: &self.texts[d].1 };
        let texts: Vec<TokenText<'_>> = domains.iter().map(text).collect();
        let scores = vec![Score::default(); texts.len()];
        let mut pass = Pass { interrupt: self.interrupt, done, scores };
        let windows = Windows { window: self.window, stride: None };
        perplexities(source, &texts, self.bos, windows, &mut pass, self.placement)?;
        Ok(pass.scores)
    }
}

/// What one model did on one text.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Score {
    /// Tokens that were scored, by [`POSITION_GROUPS`].
    pub tokens: [usize; POSITION_GROUPS.len()],
    /// Sums of `-ln p(token)` over them.
    pub nats: [f64; POSITION_GROUPS.len()],
    /// Who visited which expert.
    pub load: Load,
}

impl Score {
    /// Mean of `-ln p(token)` over some groups of positions; `None` if none of them has a token.
    pub fn nats_per_token(&self, groups: std::ops::Range<usize>) -> Option<f64> {
        let tokens: usize = self.tokens[groups.clone()].iter().sum();
        (tokens > 0).then(|| self.nats[groups].iter().sum::<f64>() / tokens as f64)
    }

    /// Over all positions. A text always has a token that is scored: [`perplexities`] refuses others.
    pub fn perplexity(&self) -> f64 {
        self.nats_per_token(0..POSITION_GROUPS.len()).map_or(f64::NAN, f64::exp)
    }
}

/// How often the tokens of one domain visit each expert, over all layers.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Load {
    first: Vec<u64>,
    any: Vec<u64>,
    seen: u64,
}

impl Load {
    /// Share of tokens whose first choice is `expert`, mean over layers.
    pub fn first(&self, expert: usize) -> f64 {
        self.first.get(expert).map_or(0.0, |&n| n as f64 / self.seen.max(1) as f64)
    }

    /// Share of tokens that have `expert` among their top-k, mean over layers.
    pub fn any(&self, expert: usize) -> f64 {
        self.any.get(expert).map_or(0.0, |&n| n as f64 / self.seen.max(1) as f64)
    }

    fn row(&self, domain: &str) -> RoutingRow {
        let all = 0..self.first.len();
        RoutingRow {
            domain: domain.to_owned(),
            first: all.clone().map(|e| self.first(e)).collect(),
            any: all.map(|e| self.any(e)).collect(),
        }
    }
}

/// One model's way through all texts.
struct Pass<'a> {
    interrupt: &'a Interrupt,
    done: &'a mut dyn FnMut(usize),
    scores: Vec<Score>,
}

impl Watcher for Pass<'_> {
    fn advance(&mut self, tokens: usize) {
        (self.done)(tokens);
    }

    fn routed(&mut self, window: WindowRouting<'_>) {
        let load = &mut self.scores[window.text].load;
        load.first.resize(load.first.len().max(window.experts), 0);
        load.any.resize(load.any.len().max(window.experts), 0);
        let routing = window.routing;
        for chosen in routing.ids.chunks_exact(routing.top_k).skip(window.skip) {
            load.seen += 1;
            load.first[chosen[0] as usize] += 1;
            chosen.iter().for_each(|&e| load.any[e as usize] += 1);
        }
    }

    fn scored(&mut self, text: usize, position: usize, nats: f64) {
        let group = POSITION_GROUPS.partition_point(|&first| first <= position).max(1) - 1;
        self.scores[text].tokens[group] += 1;
        self.scores[text].nats[group] += nats;
    }

    fn go_on(&mut self) -> Result<(), ModelError> {
        Ok(self.interrupt.check()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovered_share_by_hand() {
        let row = |name: &str, p: f64| ModelRow { name: name.into(), perplexity: vec![p.exp()] };
        let evaluation = Evaluation {
            window: 512,
            domains: vec!["code".into()],
            tokens: vec![10],
            models: vec![row("base", 3.0), row("code", 2.0), row("MoE", 2.25)],
            routing: Vec::new(),
        };
        assert!((evaluation.recovered(0).unwrap() - 0.75).abs() < 1e-12);
        let unnamed = Evaluation { domains: vec!["rust".into()], ..evaluation };
        assert_eq!(unnamed.recovered(0), None);
    }
}
