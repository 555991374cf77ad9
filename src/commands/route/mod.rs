//! `route PATH --text FILE...`: which experts each token visits, in every MoE layer.

mod document;
mod labels;

use std::path::PathBuf;

use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_checkpoint::{Explain, Kind, Source};
use moe_merge_model::perplexity::DEFAULT_WINDOW;
use moe_merge_model::streamed::TokenText;
use moe_merge_model::trace::{TracedWindow, trace, windows_of};
use moe_merge_model::{ModelError, Spec, TextError, Tokenizer};
use moe_merge_router::traffic::{Choices, Traffic, judge};

use crate::args::{Common, RouteArgs};
use crate::exit::{self, Outcome};
use crate::picture::{Label, Routes, TextRoutes, TokenRoutes, html, svg, terminal};
use crate::progress::{Progress, Unit};
use crate::render::{self, Failure, Paint};

/// Tokens of each text in pictures, and in the terminal, where nothing else is said.
const IN_PICTURES: usize = 600;
const IN_TERMINAL: usize = 120;

/// What is wrong with what was asked.
#[derive(Debug, thiserror::Error)]
enum RouteError {
    #[error("`--labels` does not fit the texts")]
    Count { texts: usize, labels: usize },
    #[error("no expert is called `{label}`")]
    Unknown { label: String, experts: Vec<String>, named: bool },
    #[error("`--svg` and `--html` name the same file")]
    SameFile { path: PathBuf },
}

impl Explain for RouteError {
    fn kind(&self) -> Kind {
        Kind::Usage
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Count { texts, labels } => vec![
                ("expected", format!("{texts}, one for each text and prompt")),
                ("found", labels.to_string()),
            ],
            Self::Unknown { label, experts, named } => vec![
                (
                    "expected",
                    match named {
                        true => format!("one of {}, or its number", experts.join(", ")),
                        false => format!("a number from 0 to {}", experts.len().saturating_sub(1)),
                    },
                ),
                ("found", label.clone()),
            ],
            Self::SameFile { path } => vec![("file", path.display().to_string())],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Count { .. } => {
                Some("files come before prompts; `-` stands for a text without a label".into())
            }
            Self::Unknown { .. } | Self::SameFile { .. } => None,
        }
    }
}

/// A text with its tokens.
struct Text {
    origin: String,
    path: Option<PathBuf>,
    text: String,
    tokens: Vec<u32>,
}

/// Traces the texts, prints or writes what was found.
pub fn run(args: &RouteArgs, common: &Common) -> Result<Outcome, Failure> {
    if let (Some(path), true) = (&args.svg, args.svg == args.html) {
        return Err(RouteError::SameFile { path: path.clone() }.into());
    }
    let mut texts = read(args)?;
    let source = super::open(&args.path, common)?;
    let mut routes = describe(&source, args, common)?;
    let labels = labels::of(args, &texts, &routes)?;
    let tokenizer = Tokenizer::from_source(&source)?;
    for text in &mut texts {
        text.tokens = tokenizer.encode(&text.text)?;
    }
    let keep = if args.tokens { usize::MAX } else { args.show.unwrap_or(IN_PICTURES) };
    let found = trace_all(&source, &tokenizer, &texts, &labels, (routes.window, keep), common)?;
    routes.verdict = judge(&found.iter().map(|f| f.traffic.clone()).collect::<Vec<_>>());
    for ((text, label), found) in texts.iter().zip(labels).zip(found) {
        let pieces = pieces(&tokenizer, &text.tokens[..found.visits.len()])?;
        let tokens = text.tokens.iter().zip(pieces).zip(found.visits);
        routes.texts.push(TextRoutes {
            origin: text.origin.clone(),
            label,
            windows: windows_of(text.tokens.len(), tokenizer.bos(), routes.window),
            traffic: found.traffic.report(),
            tokens: tokens.map(|((&id, piece), visits)| token(id, piece, visits)).collect(),
        });
    }
    let document = common.json.then(|| document::of(&routes, args.tokens));
    let limit = |routes: &mut Routes, most: usize| {
        routes.texts.iter_mut().for_each(|t| t.tokens.truncate(args.show.unwrap_or(most)));
    };
    limit(&mut routes, IN_PICTURES);
    write_pictures(args, &routes, common)?;
    match document {
        Some(document) => render::json(&document)?,
        None => {
            limit(&mut routes, IN_TERMINAL);
            render::out(&terminal::render(&routes, Paint::for_stdout()))?;
        }
    }
    Ok(Outcome::Done)
}

/// The texts, files first.
fn read(args: &RouteArgs) -> Result<Vec<Text>, Failure> {
    let text = |origin, path, text| Text { origin, path, text, tokens: Vec::new() };
    let mut texts = Vec::new();
    for path in &args.text {
        let content = super::read_text(path)?;
        texts.push(text(path.display().to_string(), Some(path.clone()), content));
    }
    let prompts = args.prompt.iter().enumerate();
    texts.extend(prompts.map(|(i, p)| text(format!("prompt {}", i + 1), None, p.clone())));
    if let Some(empty) = texts.iter().find(|t| t.text.is_empty()) {
        let origin = empty.origin.clone();
        let expected = "at least 1 token".into();
        return Err(TextError::EmptyText { origin, expected, found: "0".into() }.into());
    }
    Ok(texts)
}

/// What is known about the model before any text goes through it.
fn describe(source: &Source, args: &RouteArgs, common: &Common) -> Result<Routes, Failure> {
    let spec = Spec::of(source)?;
    let (mut experts, mut top_k, mut shared) = (0, 0, false);
    for (_, moe) in spec.moe_layers() {
        experts = experts.max(moe.experts);
        top_k = top_k.max(moe.router.top_k);
        shared |= moe.shared.is_some();
    }
    if experts == 0 {
        let path = source.path.clone();
        return Err(ModelError::NoRouters { path, family: spec.family }.into());
    }
    let names = Manifest::load(&source.path)?.map(|m| m.experts).unwrap_or_default();
    let named = names.len() == experts;
    if !named && !names.is_empty() && !common.quiet {
        render::note(&format!(
            "the manifest names {} experts, the model has {experts}: numbers are used",
            names.len()
        ));
    }
    let numbers = || (0..experts).map(|e| format!("expert {e}")).collect();
    Ok(Routes {
        model: args.path.clone(),
        family: spec.family,
        experts: if named { names } else { numbers() },
        named,
        top_k,
        shared,
        window: args.window.unwrap_or(DEFAULT_WINDOW.min(spec.max_positions)),
        texts: Vec::new(),
        verdict: None,
    })
}

/// Per MoE layer the experts visited and their weights, best first.
type Visits = Vec<Vec<(u32, f32)>>;

/// What was found about one text: figures, and the visits of its first tokens.
struct Found {
    traffic: Traffic,
    visits: Vec<Visits>,
}

fn trace_all(
    source: &Source,
    tokenizer: &Tokenizer,
    texts: &[Text],
    labels: &[Option<Label>],
    (window, keep): (usize, usize),
    common: &Common,
) -> Result<Vec<Found>, Failure> {
    let mut found: Vec<Found> = texts
        .iter()
        .zip(labels)
        .map(|(text, label)| Found {
            traffic: Traffic::new(label.map(|l| l.expert)),
            visits: vec![Vec::new(); text.tokens.len().min(keep)],
        })
        .collect();
    let origins: Vec<TokenText<'_>> =
        texts.iter().map(|t| TokenText { tokens: &t.tokens, origin: &t.origin }).collect();
    let layers = Spec::of(source)?.moe_layers().count() as u64;
    let total = texts.iter().map(|t| t.tokens.len() as u64).sum();
    let progress = Progress::new(total, Unit::Tokens, common.quiet || common.json);
    let interrupt = exit::interrupt();
    let mut done = 0;
    trace(source, &origins, tokenizer.bos(), window, &mut |seen: TracedWindow<'_>| {
        interrupt.check()?;
        let (routing, found) = (seen.routing, &mut found[seen.text]);
        found.traffic.add(
            seen.layer,
            Choices {
                experts: seen.experts,
                top_k: routing.top_k,
                ids: &routing.ids,
                weights: &routing.weights,
                probabilities: seen.probabilities,
                position: 0,
            },
        );
        let chosen = routing.ids.chunks(routing.top_k).zip(routing.weights.chunks(routing.top_k));
        for (kept, (ids, weights)) in found.visits.iter_mut().skip(seen.start).zip(chosen) {
            kept.push(ids.iter().copied().zip(weights.iter().copied()).collect());
        }
        done += routing.tokens as u64;
        progress.set(done / layers.max(1), total);
        Ok(())
    })?;
    Ok(found)
}

/// The text of each token; empty for one that holds the beginning of a character only.
fn pieces(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<Vec<String>, Failure> {
    let mut stream = tokenizer.stream();
    let mut pieces = Vec::with_capacity(tokens.len());
    for &id in tokens {
        let mut piece = stream.push(id)?;
        if piece.is_empty() && !tokenizer.decode(&[id])?.contains('\u{fffd}') {
            // Special tokens have no text of their own.
            piece = tokenizer.token_text(id).unwrap_or_default();
        }
        pieces.push(piece);
    }
    Ok(pieces)
}

/// A token, with the expert whose weight is largest when every layer counts the same; the lowest of equals.
fn token(id: u32, text: String, layers: Visits) -> TokenRoutes {
    let mut sums = std::collections::BTreeMap::<u32, f64>::new();
    for visits in &layers {
        let all: f64 = visits.iter().map(|v| f64::from(v.1)).sum();
        for &(expert, weight) in visits {
            let share = if all > 0.0 { f64::from(weight) / all } else { 1.0 / visits.len() as f64 };
            *sums.entry(expert).or_default() += share / layers.len() as f64;
        }
    }
    let most = sums.into_iter().reduce(|best, s| if s.1 > best.1 { s } else { best });
    let (expert, weight) = most.unwrap_or_default();
    TokenRoutes { id, text, expert: expert as usize, weight, layers }
}

fn write_pictures(args: &RouteArgs, routes: &Routes, common: &Common) -> Result<(), Failure> {
    let files = [
        (&args.svg, svg::render as fn(&Routes) -> String),
        (&args.html, html::render as fn(&Routes) -> String),
    ];
    for (path, render_to) in files {
        let Some(path) = path else { continue };
        super::write_beside(path, render_to(routes).as_bytes())?;
        if !common.quiet && !common.json {
            render::note(&format!("written to `{}`", path.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expert_of_a_token_has_the_largest_mean_weight() {
        // Layer weights are shares first: 2 has (0.75 + 0.5) / 2, although 1 has the larger raw number.
        let layers = vec![vec![(2, 0.3), (0, 0.1)], vec![(1, 0.9), (2, 0.9)]];
        let found = token(7, "x".into(), layers);
        assert_eq!(found.expert, 2);
        assert!((found.weight - 0.625).abs() < 1e-6);
        assert_eq!(token(7, "x".into(), vec![vec![(3, 1.0)], vec![(1, 1.0)]]).expert, 1);
    }
}
