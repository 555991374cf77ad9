//! The shards that a change writes: new values, and what moves along with them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::state::{self, State};
use super::{Change, NewTensors, name};
use crate::error::CheckpointError;
use crate::weight::{RowSlice, Stacked, WeightRef};
use crate::write::{OutTensor, SHARD_LIMIT, ShardName, ShardPlan, split};

/// How the one file of a model is called beside an index, with a hash behind it: it comes before all other roles.
pub(super) const BASE: &str = "model-base-";

/// The role of a shard that holds whole layers of experts, each in one tensor.
const FUSED: &str = "experts";

/// The role of what stays of a shard that held a tensor which goes.
const REST: &str = "shared";

type Groups = BTreeMap<String, Vec<OutTensor>>;

/// Rows of a fused tensor, and their new values.
type Part = (Range<usize>, WeightRef);

/// What a change does to the files.
pub(super) struct Shards {
    /// The shards to write.
    pub plans: Vec<ShardPlan>,
    /// Names, in their files, of tensors that the new generation has no more.
    pub gone: BTreeSet<String>,
}

impl Shards {
    /// Checks the change against the model.
    pub fn plan(
        folder: &Path,
        state: &State,
        change: &Change<'_>,
    ) -> Result<Self, CheckpointError> {
        let gone = gone(folder, state, change)?;
        let groups = replacements(folder, state, change)?;
        let plans = plans(folder, state, groups, &gone)?;
        Ok(Self { plans, gone })
    }
}

/// The shard and the name there of a weight of the model.
fn place(folder: &Path, weight: &WeightRef) -> (String, String) {
    let (file, stored) = weight.origin();
    (file.strip_prefix(folder).unwrap_or(&file).to_string_lossy().into_owned(), stored)
}

/// Stored names of the tensors that go: a fused one goes if all of its parts do.
fn gone(
    folder: &Path,
    state: &State,
    change: &Change<'_>,
) -> Result<BTreeSet<String>, CheckpointError> {
    let remove: BTreeSet<&str> = change.remove.iter().map(String::as_str).collect();
    let mut gone = BTreeSet::new();
    for name in &remove {
        gone.insert(place(folder, state.source.weight(name)?).1);
    }
    for (name, weight) in &state.source.tensors {
        let (shard, stored) = place(folder, weight);
        if gone.contains(&stored) && !remove.contains(name.as_str()) {
            return Err(CheckpointError::Malformed {
                what: "a part of a fused tensor cannot go alone".into(),
                file: folder.join(shard),
                tensor: Some(stored),
                expected: "all of its parts to go".into(),
                found: format!("`{name}` stays"),
                hint: None,
            });
        }
    }
    Ok(gone)
}

/// The new tensors of each role under their names in the files, checked against the old ones.
fn replacements(
    folder: &Path,
    state: &State,
    change: &Change<'_>,
) -> Result<Groups, CheckpointError> {
    let remove: BTreeSet<&str> = change.remove.iter().map(String::as_str).collect();
    let mut groups = Groups::new();
    let mut parts: BTreeMap<(String, String), Vec<Part>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for NewTensors { role, tensors } in &change.tensors {
        for (name, weight) in tensors {
            let there = state.source.tensors.get(name).filter(|_| !remove.contains(name.as_str()));
            let old = match (there, &change.config) {
                (Some(old), _) => Some(old),
                (None, Some(_)) => None,
                (None, None) => Some(state.source.weight(name)?),
            };
            let same = change.config.is_none() || old.is_some_and(|o| o.part().is_some());
            if let Some(old) = old.filter(|_| same) {
                weight.expect_shape(old.shape(), &format!("as `{name}` has in the model"))?;
            }
            let (shard, stored) =
                old.map_or_else(|| (String::new(), name.clone()), |o| place(folder, o));
            let rows = old.and_then(|o| o.part());
            if !seen.insert((stored.clone(), rows.as_ref().map(|r| r.start))) {
                return Err(twice(folder.join(shard), stored, name));
            }
            if let Some(rows) = rows {
                parts.entry((shard, stored)).or_default().push((rows, weight.clone()));
                continue;
            }
            let dtype = old.map_or(weight.dtype(), |o| o.dtype());
            let tensor = OutTensor { name: stored, weight: weight.clone(), dtype };
            groups.entry(role.clone()).or_default().push(tensor);
        }
    }
    for ((shard, stored), parts) in parts {
        let whole = state::weights_of(&folder.join(&shard))?.remove(&stored);
        let Some(whole) = whole else { return Err(no_such(folder.join(shard), stored)) };
        let tensor =
            OutTensor { name: stored, dtype: whole.dtype(), weight: patched(&whole, parts) };
        groups.entry(FUSED.into()).or_default().push(tensor);
    }
    Ok(groups)
}

fn twice(file: std::path::PathBuf, stored: String, name: &str) -> CheckpointError {
    CheckpointError::Malformed {
        what: "a tensor is to be replaced twice".into(),
        file,
        tensor: Some(stored),
        expected: "one new value for each tensor".into(),
        found: format!("`{name}` again"),
        hint: None,
    }
}

fn no_such(file: std::path::PathBuf, tensor: String) -> CheckpointError {
    CheckpointError::MissingTensor { file, tensor, nearest: None }
}

/// A fused tensor with new values for some of its rows.
fn patched(whole: &WeightRef, mut parts: Vec<Part>) -> WeightRef {
    parts.sort_by_key(|(rows, _)| rows.start);
    let mut all: Vec<WeightRef> = Vec::new();
    let mut at = 0;
    let end = (whole.rows()..whole.rows(), None);
    for (rows, new) in parts.into_iter().map(|(rows, new)| (rows, Some(new))).chain([end]) {
        if at < rows.start {
            all.push(Arc::new(RowSlice::new(whole.clone(), at..rows.start)));
        }
        at = rows.end;
        all.extend(new);
    }
    Arc::new(Stacked::new(all, whole.shape().to_vec()))
}

/// The shards to write.
///
/// Where a shard of the same role would stay for some of its tensors, these move along: otherwise each change to some
/// layers would leave a further file. Nor does a shard stay that holds a tensor which goes: loaders would still find
/// it there.
fn plans(
    folder: &Path,
    state: &State,
    mut groups: Groups,
    gone: &BTreeSet<String>,
) -> Result<Vec<ShardPlan>, CheckpointError> {
    let mut replaced: BTreeSet<String> =
        groups.values().flatten().map(|t| t.name.clone()).collect();
    for (role, tensors) in &mut groups {
        let own = [format!("model-{role}-"), format!("_{role}-")];
        let own = |shard: &str| {
            shard.contains(&own[1]) || shard.trim_start_matches('~').starts_with(&own[0])
        };
        let touched: BTreeSet<&String> =
            tensors.iter().filter_map(|t| state.weight_map.get(&t.name)).collect();
        for shard in touched.into_iter().filter(|s| own(s)) {
            let Some(rest) =
                rest_of(folder, state, shard, |n| replaced.contains(n) || gone.contains(n))?
            else {
                continue;
            };
            replaced.extend(rest.iter().map(|t| t.name.clone()));
            tensors.extend(rest);
        }
    }
    let emptied =
        state.shards.iter().filter(|(_, held)| held.iter().any(|t| gone.contains(&t.name)));
    for (shard, _) in emptied {
        let rest = rest_of(folder, state, shard, |n| replaced.contains(n) || gone.contains(n))?;
        let Some(rest) = rest else {
            return Err(CheckpointError::Unsupported {
                what: "a shard with a tensor that goes has others which cannot be written again"
                    .into(),
                file: folder.join(shard),
                hint:
                    "load the model in transformers with `dtype=torch.bfloat16` and save it again"
                        .into(),
            });
        };
        if rest.is_empty() {
            continue;
        }
        replaced.extend(rest.iter().map(|t| t.name.clone()));
        groups.entry(REST.into()).or_default().extend(rest);
    }
    let mut plans = Vec::new();
    for (role, tensors) in groups {
        let stem = name::stem(&role, &stale(state, &tensors, &replaced, gone))?;
        let parts = split(tensors, SHARD_LIMIT);
        let many = parts.len() > 1;
        for (i, tensors) in parts.into_iter().enumerate() {
            let stem = if many { format!("{stem}-{:05}", i + 1) } else { stem.clone() };
            plans.push(ShardPlan::new(ShardName::ByContent(stem), tensors));
        }
    }
    Ok(plans)
}

/// Files that stay and hold old values of `tensors`.
fn stale<'a>(
    state: &'a State,
    tensors: &[OutTensor],
    replaced: &BTreeSet<String>,
    gone: &BTreeSet<String>,
) -> Vec<&'a str> {
    let names: BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    let stays = |shard: &String| {
        let mut map = state.weight_map.iter();
        map.any(|(t, s)| s == shard && !replaced.contains(t) && !gone.contains(t))
    };
    state
        .shards
        .iter()
        .filter(|(shard, held)| {
            held.iter().any(|t| names.contains(t.name.as_str())) && stays(shard)
        })
        .map(|(shard, _)| match state.single {
            true => BASE,
            false => shard.as_str(),
        })
        .collect()
}

/// Tensors that the index finds in `shard` and that `leaves` does not name; none if one of them is no weight.
fn rest_of(
    folder: &Path,
    state: &State,
    shard: &str,
    leaves: impl Fn(&str) -> bool,
) -> Result<Option<Vec<OutTensor>>, CheckpointError> {
    let mut weights = state::weights_of(&folder.join(shard))?;
    let map = state.weight_map.iter();
    let rest = map.filter(|(name, s)| *s == shard && !leaves(name)).map(|(name, _)| {
        let weight = weights.remove(name)?;
        Some(OutTensor { name: name.clone(), dtype: weight.dtype(), weight })
    });
    Ok(rest.collect())
}
