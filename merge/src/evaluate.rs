//! What a build did to text that nothing was fitted to: perplexity per domain, and who visits which expert.

use std::path::PathBuf;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::{CheckpointError, Source};
use moe_merge_model::perplexity::{DEFAULT_WINDOW, Windows, perplexity};
use moe_merge_model::{Model, Tokenizer};

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
        let of = |name: &str| Some(self.models.iter().find(|m| m.name == name)?.perplexity[domain].ln());
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
    let opened = Model::open(moe)?;
    let window = DEFAULT_WINDOW.min(opened.spec().max_positions);
    let mut tokens = Vec::new();
    let mut score = |model: &Model| -> Result<Vec<f64>, MergeError> {
        let mut row = Vec::new();
        tokens.clear();
        for domain in domains {
            interrupt.check()?;
            let windows = Windows { window, stride: None };
            let origin = domain.path.display().to_string();
            let p =
                perplexity(model, &tokenizer, &domain.text, &origin, windows, &mut |_, _| {})?;
            done(p.computed);
            tokens.push(p.tokens);
            row.push(p.perplexity());
        }
        Ok(row)
    };
    let mut rows: Vec<ModelRow> = Vec::new();
    for (name, source) in models {
        let perplexity = match (source, rows.first()) {
            (None, Some(first)) => first.perplexity.clone(),
            (Some(source), _) => score(&Model::open(source)?)?,
            (None, None) => continue,
        };
        rows.push(ModelRow { name: name.clone(), perplexity });
    }
    rows.push(ModelRow { name: "MoE".into(), perplexity: score(&opened)? });
    let routing = domains
        .iter()
        .map(|domain| {
            interrupt.check()?;
            routing(&opened, &tokenizer, domain, window)
        })
        .collect::<Result<_, _>>()?;
    Ok(Evaluation {
        window,
        domains: domains.iter().map(|d| d.name.clone()).collect(),
        tokens,
        models: rows,
        routing,
    })
}

/// Where the tokens of `domain` go, window by window.
fn routing(
    moe: &Model,
    tokenizer: &Tokenizer,
    domain: &Domain,
    window: usize,
) -> Result<RoutingRow, MergeError> {
    let ids = tokenizer.encode(&domain.text)?;
    let bos = tokenizer.bos();
    let (mut first, mut any): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    let mut seen = 0u64;
    for piece in ids.chunks(window - usize::from(bos.is_some())) {
        let tokens: Vec<u32> = bos.into_iter().chain(piece.iter().copied()).collect();
        let skip = usize::from(bos.is_some());
        for layer in moe.routing(&tokens)? {
            first.resize(layer.experts, 0);
            any.resize(layer.experts, 0);
            for chosen in layer.routing.ids.chunks_exact(layer.routing.top_k).skip(skip) {
                seen += 1;
                first[chosen[0] as usize] += 1;
                chosen.iter().for_each(|&e| any[e as usize] += 1);
            }
        }
    }
    let share = |counts: &[u64]| counts.iter().map(|&c| c as f64 / seen.max(1) as f64).collect();
    Ok(RoutingRow { domain: domain.name.clone(), first: share(&first), any: share(&any) })
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
