//! What differs between two generations.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::{CheckpointError, Interrupt, Source, WeightRef, generation};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::error::AdaptError;

/// What differs between two generations of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diff {
    /// The folder.
    pub folder: PathBuf,
    /// The first generation.
    pub from: u32,
    /// The second one.
    pub to: u32,
    /// Tensors that both have with the same numbers.
    pub same: usize,
    /// What belongs together: an expert, the routers, everything else.
    pub groups: Vec<Group>,
    /// Tensors that differ, by name.
    pub tensors: Vec<TensorChange>,
    /// Keys of `config.json` that differ.
    pub config: Vec<ConfigChange>,
}

/// Tensors of one role.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// `expert 3`, `router` or `shared`.
    pub name: String,
    /// Tensors with other numbers.
    pub changed: usize,
    /// Tensors that only the second one has.
    pub added: usize,
    /// Tensors that only the first one has.
    pub removed: usize,
    /// Root mean square of `|b - a| / |a|` over the changed ones.
    pub difference: f64,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorChange {
    /// Its name.
    pub tensor: String,
    /// Shape in the first generation, if it is there.
    pub from: Option<Vec<usize>>,
    /// Shape in the second one.
    pub to: Option<Vec<usize>>,
    /// `|b - a| / |a|`, Frobenius norms, where both have it in one shape; `|b|` if `a` is zero.
    pub difference: Option<f64>,
    /// Largest change of a number.
    pub largest: Option<f64>,
}

/// One key of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigChange {
    /// The key.
    pub key: String,
    /// Its value in the first generation.
    pub from: Option<Value>,
    /// In the second one.
    pub to: Option<Value>,
}

/// Compares two generations, number by number. Tensors that lie in the same file are not read.
///
/// # Errors
/// A generation that is not there or whose files are gone, a broken history, interruption.
pub fn diff(folder: &Path, from: u32, to: u32, interrupt: &Interrupt) -> Result<Diff, AdaptError> {
    let _ = generation::recover(folder);
    let (a, b) = (generation::open_old(folder, from)?, generation::open_old(folder, to)?);
    let names: BTreeSet<&String> = a.tensors.keys().chain(b.tensors.keys()).collect();
    let names: Vec<&String> = names.into_iter().collect();
    let found: Vec<Option<TensorChange>> = names
        .par_iter()
        .map(|name| {
            interrupt.check()?;
            change(name, a.tensors.get(*name), b.tensors.get(*name))
        })
        .collect::<Result<_, CheckpointError>>()?;
    let tensors: Vec<TensorChange> = found.into_iter().flatten().collect();
    Ok(Diff {
        folder: folder.to_owned(),
        from,
        to,
        same: names.len() - tensors.len(),
        groups: groups(&tensors),
        config: config(&a, &b),
        tensors,
    })
}

/// How a tensor differs, if it does.
fn change(
    name: &str,
    a: Option<&WeightRef>,
    b: Option<&WeightRef>,
) -> Result<Option<TensorChange>, CheckpointError> {
    let mut change = TensorChange {
        tensor: name.to_owned(),
        from: a.map(|w| w.shape().to_vec()),
        to: b.map(|w| w.shape().to_vec()),
        difference: None,
        largest: None,
    };
    let (Some(a), Some(b)) = (a, b) else { return Ok(Some(change)) };
    if change.from != change.to {
        return Ok(Some(change));
    }
    let place = |w: &WeightRef| (w.origin(), w.part());
    let same = || a.dtype() == b.dtype() && a.bytes().is_some() && a.bytes() == b.bytes();
    if place(a) == place(b) || same() {
        return Ok(None);
    }
    let (difference, largest) = distance(a, b)?;
    a.release();
    b.release();
    if largest == 0.0 {
        return Ok(None);
    }
    (change.difference, change.largest) = (Some(difference), Some(largest));
    Ok(Some(change))
}

/// Rows read at a time.
const ROWS: usize = 64;

/// `|b - a| / |a|`, and the largest change of a number.
fn distance(a: &WeightRef, b: &WeightRef) -> Result<(f64, f64), CheckpointError> {
    let (rows, cols) = (a.rows(), a.cols());
    let (mut between, mut own, mut other, mut largest) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    let (mut x, mut y) = (vec![0.0; ROWS.min(rows) * cols], vec![0.0; ROWS.min(rows) * cols]);
    for from in (0..rows).step_by(ROWS) {
        let to = rows.min(from + ROWS);
        let (x, y) = (&mut x[..(to - from) * cols], &mut y[..(to - from) * cols]);
        a.read_rows(from..to, x)?;
        b.read_rows(from..to, y)?;
        for (x, y) in x.iter().zip(y.iter()) {
            let (x, y) = (f64::from(*x), f64::from(*y));
            between += (y - x) * (y - x);
            own += x * x;
            other += y * y;
            largest = largest.max((y - x).abs());
        }
    }
    let scale = if own > 0.0 { own } else { other };
    Ok((if between == 0.0 { 0.0 } else { (between / scale).sqrt() }, largest))
}

/// `expert 3`, `router` or `shared`.
fn group(tensor: &str) -> String {
    let expert = tensor.split_once(".experts.").and_then(|(_, rest)| rest.split('.').next());
    if let Some(expert) = expert.filter(|e| e.bytes().all(|b| b.is_ascii_digit())) {
        return format!("expert {expert}");
    }
    let router = ["mlp.gate.", "block_sparse_moe.gate.", ".router.", "e_score_correction_bias"];
    let stacked = ["block_sparse_moe.input_linear.", "block_sparse_moe.output_linear."];
    let is = |parts: &[&str]| parts.iter().any(|part| tensor.contains(part));
    match () {
        () if is(&router) => "router".into(),
        () if is(&stacked) => "experts".into(),
        () => "shared".into(),
    }
}

fn groups(tensors: &[TensorChange]) -> Vec<Group> {
    let mut groups: BTreeMap<(usize, String), Vec<&TensorChange>> = BTreeMap::new();
    for tensor in tensors {
        let name = group(&tensor.tensor);
        // Experts by number, then the rest.
        let number = name.strip_prefix("expert ").and_then(|n| n.parse().ok());
        groups.entry((number.unwrap_or(usize::MAX), name)).or_default().push(tensor);
    }
    let summary = |((_, name), tensors): ((usize, String), Vec<&TensorChange>)| {
        let count = |is: fn(&TensorChange) -> bool| tensors.iter().filter(|t| is(t)).count();
        let known: Vec<f64> = tensors.iter().filter_map(|t| t.difference).collect();
        Group {
            name,
            changed: count(|t| t.from.is_some() && t.to.is_some()),
            added: count(|t| t.from.is_none()),
            removed: count(|t| t.to.is_none()),
            difference: crate::compatibility::root_mean_square(&known),
        }
    };
    groups.into_iter().map(summary).collect()
}

fn config(a: &Source, b: &Source) -> Vec<ConfigChange> {
    let keys: BTreeSet<&String> = a.config.0.keys().chain(b.config.0.keys()).collect();
    keys.into_iter()
        .filter(|key| a.config.0.get(*key) != b.config.0.get(*key))
        .map(|key| ConfigChange {
            key: key.clone(),
            from: a.config.0.get(key).cloned(),
            to: b.config.0.get(key).cloned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_roles() {
        for (tensor, role) in [
            ("model.layers.0.block_sparse_moe.experts.11.w1.weight", "expert 11"),
            ("model.layers.0.mlp.experts.3.gate_proj.weight", "expert 3"),
            ("model.layers.0.mlp.gate.weight", "router"),
            ("model.layers.0.block_sparse_moe.router.layer.weight", "router"),
            ("model.layers.0.block_sparse_moe.input_linear.weight", "experts"),
            ("model.layers.0.mlp.shared_experts.gate_proj.weight", "shared"),
            ("model.norm.weight", "shared"),
        ] {
            assert_eq!(group(tensor), role, "{tensor}");
        }
    }
}
