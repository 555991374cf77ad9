//! What a build did to text that nothing was fitted to: perplexity per domain, and who visits which expert.

use std::path::PathBuf;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::perplexity::{DEFAULT_WINDOW, Perplexity, Windows};
use moe_merge_model::streamed::{TokenText, Watcher, WindowRouting, perplexities};
use moe_merge_model::{ModelError, Spec, Tokenizer};

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
    done: &mut dyn FnMut(usize),
) -> Result<Evaluation, MergeError> {
    let tokenizer = Tokenizer::from_source(moe)?;
    let window = DEFAULT_WINDOW.min(Spec::of(moe)?.max_positions);
    let ids = domains
        .iter()
        .map(|d| Ok((tokenizer.encode(&d.text)?, d.path.display().to_string())))
        .collect::<Result<Vec<_>, MergeError>>()?;
    let texts: Vec<TokenText<'_>> =
        ids.iter().map(|(tokens, origin)| TokenText { tokens, origin }).collect();
    let mut pass = Pass { interrupt, done, loads: vec![Load::default(); texts.len()] };
    let mut score = |source: &Source| {
        pass.loads.fill(Load::default());
        let windows = Windows { window, stride: None };
        perplexities(source, &texts, tokenizer.bos(), windows, &mut pass)
    };
    let each = |found: &[Perplexity]| found.iter().map(Perplexity::perplexity).collect();
    let mut rows: Vec<ModelRow> = Vec::new();
    for (name, source) in models {
        let perplexity: Vec<f64> = match (source, rows.first()) {
            (None, Some(first)) => first.perplexity.clone(),
            (Some(source), _) => each(&score(source)?),
            (None, None) => continue,
        };
        rows.push(ModelRow { name: name.clone(), perplexity });
    }
    let found = score(moe)?;
    let tokens = found.iter().map(|p| p.tokens).collect();
    rows.push(ModelRow { name: "MoE".into(), perplexity: each(&found) });
    Ok(Evaluation {
        window,
        domains: domains.iter().map(|d| d.name.clone()).collect(),
        tokens,
        models: rows,
        routing: domains.iter().zip(&pass.loads).map(|(d, l)| l.row(&d.name)).collect(),
    })
}

/// How often the tokens of one domain visit each expert, over all layers.
#[derive(Debug, Clone, Default)]
struct Load {
    first: Vec<u64>,
    any: Vec<u64>,
    seen: u64,
}

impl Load {
    fn row(&self, domain: &str) -> RoutingRow {
        let share =
            |counts: &[u64]| counts.iter().map(|&c| c as f64 / self.seen.max(1) as f64).collect();
        RoutingRow { domain: domain.to_owned(), first: share(&self.first), any: share(&self.any) }
    }
}

/// One model's way through all domains.
struct Pass<'a> {
    interrupt: &'a Interrupt,
    done: &'a mut dyn FnMut(usize),
    loads: Vec<Load>,
}

impl Watcher for Pass<'_> {
    fn advance(&mut self, tokens: usize) {
        (self.done)(tokens);
    }

    fn routed(&mut self, window: WindowRouting<'_>) {
        let load = &mut self.loads[window.text];
        load.first.resize(load.first.len().max(window.experts), 0);
        load.any.resize(load.any.len().max(window.experts), 0);
        let routing = window.routing;
        for chosen in routing.ids.chunks_exact(routing.top_k).skip(window.skip) {
            load.seen += 1;
            load.first[chosen[0] as usize] += 1;
            chosen.iter().for_each(|&e| load.any[e as usize] += 1);
        }
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
