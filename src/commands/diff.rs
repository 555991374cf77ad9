//! `diff PATH A B`: what differs between two generations, and by how much.

use moe_merge_adapt::{ConfigChange, Diff, diff};
use moe_merge_checkpoint::CheckpointError;

use super::build::{table, versioned};
use crate::args::{Common, DiffArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure, count};

/// Compares two generations.
pub fn run(args: &DiffArgs, common: &Common) -> Result<Outcome, Failure> {
    let to = match args.to {
        Some(to) => to,
        None => moe_merge_adapt::history(&args.path)?.live.ok_or_else(|| {
            CheckpointError::NoGeneration { path: args.path.clone(), wanted: args.from, last: None }
        })?,
    };
    let found = diff(&args.path, args.from, to, exit::interrupt())?;
    match common.json {
        true => render::json(&versioned(serde_json::to_value(&found))?)?,
        false => render::out(&text(&found))?,
    }
    Ok(Outcome::Done)
}

fn text(diff: &Diff) -> String {
    let mut text = format!(
        "{}  generation {} to {}: {} tensors differ, {} are the same\n",
        diff.folder.display(),
        diff.from,
        diff.to,
        count(diff.tensors.len()),
        count(diff.same),
    );
    if !diff.groups.is_empty() {
        let rows = diff.groups.iter().map(|group| {
            let difference = match group.changed {
                0 => "-".to_owned(),
                _ => format!("{:.2} %", 100.0 * group.difference),
            };
            let counts = [group.changed, group.added, group.removed].map(count);
            (group.name.clone(), counts.into_iter().chain([difference]).collect())
        });
        text += &table(&["changed", "added", "removed", "difference"], rows);
    }
    for ConfigChange { key, from, to } in &diff.config {
        let show = |value: &Option<serde_json::Value>| {
            value.as_ref().map_or("absent".to_owned(), ToString::to_string)
        };
        text += &format!("  config.json: `{key}` {} -> {}\n", show(from), show(to));
    }
    text
}
