//! `route PATH --text FILE...`: which experts each token visits, in every MoE layer.

mod document;
mod error;
mod follow;
mod labels;

use std::path::PathBuf;

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::manifest::Manifest;
use moe_merge_model::perplexity::DEFAULT_WINDOW;
use moe_merge_model::trace::windows_of;
use moe_merge_model::{ModelError, Spec, TextError, Tokenizer};
use moe_merge_router::traffic::judge;

use crate::args::{Common, RouteArgs};
use crate::exit::Outcome;
use crate::picture::{Routes, TextRoutes, html, svg, terminal};
use crate::render::{self, Failure, Paint};

use error::RouteError;
use follow::{pieces, token, trace_all};

/// Tokens of each text in pictures, and in the terminal, where nothing else is said.
const IN_PICTURES: usize = 600;
const IN_TERMINAL: usize = 120;

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
        return Err(ModelError::NoExperts { path, family: spec.family }.into());
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
