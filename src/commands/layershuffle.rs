//! `layershuffle MODEL...`: a model of layers drawn by chance from several.

use std::path::Path;

use moe_merge_checkpoint::Replace;
use moe_merge_merge::MergeError;
use moe_merge_merge::build::{BuildOptions, PreparedDense, RecipeText};
use moe_merge_merge::families::Layout;
use moe_merge_merge::layershuffle::{Deck, Order, draw, recipe};
use moe_merge_merge::recipe::{self as recipes, Recipe};
use moe_merge_model::Spec;
use serde_json::json;

use super::build::{Bars, notes, versioned};
use super::extract_lora::dtype;
use crate::args::{Common, LayershuffleArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, bytes};

/// Draws layers, then prints the recipe or builds it.
pub fn run(args: &LayershuffleArgs, common: &Common) -> Result<Outcome, Failure> {
    let decks = decks(args, common)?;
    let order = if args.full_random { Order::Random } else { Order::Kept };
    let draws = draw(&decks, order, args.seed)?;
    let text = recipe(&decks, &draws, args.dtype.map(|d| dtype(d).config_name()));
    let Some(out) = &args.out else {
        match common.json {
            true => render::json(&json!({"version": 1, "recipe": text}))?,
            false => render::out(&text)?,
        }
        return Ok(Outcome::Done);
    };
    // Sources were named from the current folder, where a recipe of this name would stand.
    let path = Path::new("layershuffle.yaml");
    let Recipe::Dense(dense) = recipes::parse(&text, path).map_err(MergeError::from)? else {
        return Ok(Outcome::CheckFailed);
    };
    let options = BuildOptions {
        out: Some(out.clone()),
        unfinished: Default::default(),
        replace: if args.force { Replace::Force } else { Replace::Never },
        layout: Layout::Hub,
        interrupt: exit::interrupt().clone(),
        placement: super::device::find(common)?,
        shard_limit: None,
    };
    let prepared = PreparedDense::new(&dense, RecipeText { path, text: &text }, options)?;
    let report = prepared.build(&Bars::new(common))?;
    notes(&report.warnings, common);
    if common.json {
        let mut document = versioned(serde_json::to_value(&report))?;
        document["recipe"] = json!(text);
        render::json(&document)?;
        return Ok(Outcome::Done);
    }
    let mut shown = format!(
        "{}  {} layers; {}, {:.1} s\n",
        report.output.display(),
        draws.len(),
        bytes(report.bytes),
        report.seconds
    );
    for (number, deck) in decks.iter().enumerate() {
        let layers = draws.iter().filter(|d| d.0 == number).count();
        shown += &format!("  {layers:4} of {}\n", deck.model);
    }
    render::out(&shown)?;
    Ok(Outcome::Done)
}

fn decks(args: &LayershuffleArgs, common: &Common) -> Result<Vec<Deck>, Failure> {
    if !args.weights.is_empty() && args.weights.len() != args.models.len() {
        let error = MergeError::Argument {
            what: "there is not one weight for each model".into(),
            name: "--weights".into(),
            expected: format!("{} numbers", args.models.len()),
            found: format!("{}", args.weights.len()),
            hint: None,
        };
        return Err(error.into());
    }
    let even = if args.full_random { 1.0 / args.models.len() as f64 } else { 1.0 };
    let mut decks = Vec::new();
    for (i, model) in args.models.iter().enumerate() {
        let source = super::open(model, common)?;
        let layers = Spec::of(&source)?.layers.len();
        let weight = args.weights.get(i).copied().unwrap_or(even);
        decks.push(Deck { model: model.clone(), layers, weight });
    }
    Ok(decks)
}
