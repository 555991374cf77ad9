//! Fewer experts: several of a MoE merged into one, by how alike they are and how much they are used.

mod cluster;
mod usage;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{ConfigJson, Dtype, Replace, Source, Staging, WeightRef};
use serde::Serialize;
use serde_json::json;

use crate::documents::expert_names;
use crate::error::MergeError;
use crate::experts::{ExpertLayer, expert_layers, weight_distances};
use crate::families::Matrix;
use crate::methods::{self, Group};
use crate::write::{Provenance, write_dense};
use cluster::group;
pub use usage::{Usage, usage};

/// The experts of one layer, before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerGroups {
    /// The layer.
    pub layer: usize,
    /// For each expert of the output, those it is made of.
    pub groups: Vec<Vec<usize>>,
    /// How much each expert was used, of sum 1.
    pub used: Vec<f64>,
    /// What is lost: mean squared distance of experts from what replaces them, weighted by use, as a share of the mean
    /// square of all experts.
    pub loss: f64,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct ShrinkReport {
    /// The folder.
    pub output: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Experts of the model, and of the output.
    pub experts: [usize; 2],
    /// Experts per token of the output.
    pub experts_per_token: usize,
    /// Layer by layer.
    pub layers: Vec<LayerGroups>,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// A MoE with fewer experts, whose weights are computed when they are written.
#[derive(Debug)]
pub struct Shrinking {
    source: Source,
    /// The model, for the manifest.
    original: Source,
    layers: Vec<LayerGroups>,
    experts: [usize; 2],
    top_k: usize,
    names: Vec<String>,
    started: Instant,
}

/// Use of an expert that no token visited: small, but not nothing, so that of unused experts the alike are joined.
const UNUSED: f64 = 1e-4;

impl Shrinking {
    /// Finds out which of the model's experts become one, so that `wanted` are left in each layer. Reads all experts once.
    ///
    /// * `used`: from [`usage`]; without it all count the same
    ///
    /// # Errors
    /// [`MergeError::Argument`] for a number of experts that cannot be, [`MergeError::Incompatible`] for a model without
    /// experts of their own, [`MergeError::Checkpoint`] for tensors that are missing or of different shapes.
    pub fn prepare(
        original: &Source,
        wanted: usize,
        used: Option<&Usage>,
        watch: Watch<'_>,
    ) -> Result<Self, MergeError> {
        let started = Instant::now();
        original.computable()?;
        let all = expert_layers(original)?;
        let first = all.first().ok_or_else(|| dense(original))?;
        let (experts, top_k) = (first.experts, first.top_k.min(wanted));
        check(original, experts, wanted)?;
        let mut source = original.clone();
        let mut layers = Vec::new();
        for layer in &all {
            watch.interrupt.check()?;
            let own = used.and_then(|u| u.get(&layer.layer)).cloned();
            let used = own.unwrap_or_else(|| vec![1.0 / experts as f64; experts]);
            let weights: Vec<f64> = used.iter().map(|u| u.max(UNUSED / experts as f64)).collect();
            let distances = weight_distances(original, layer)?;
            let grouping = group(&distances.squared, &weights, wanted);
            let mean = distances.energy / experts as f64;
            merge(&mut source, original, layer, &grouping.groups, &weights)?;
            layers.push(LayerGroups {
                layer: layer.layer,
                loss: if mean > 0.0 { grouping.cost / mean } else { 0.0 },
                groups: grouping.groups,
                used,
            });
            (watch.progress)(1);
        }
        source.config = config(&original.config, wanted, top_k);
        let names = names(original, experts, &layers)?;
        let original = original.clone();
        Ok(Self { source, original, layers, experts: [experts, wanted], top_k, names, started })
    }

    /// The shrunk model, computed when it is read.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Bytes of tensors that will be written.
    pub fn bytes(&self) -> u64 {
        self.source.tensors.values().map(|w| w.size_in(w.dtype())).sum()
    }

    /// Writes it to `out`.
    ///
    /// # Errors
    /// [`MergeError`]; then there is no output.
    pub fn run(
        self,
        out: &Path,
        replace: Replace,
        watch: Watch<'_>,
    ) -> Result<ShrinkReport, MergeError> {
        let staging = Staging::new(out, replace)?;
        let [before, after] = self.experts;
        let provenance = Provenance {
            name: out.file_name().map_or("moe".into(), |n| n.to_string_lossy().into_owned()),
            title: Some(format!("MoE of {after} experts, merged from {before}")),
            experts: self.names.clone(),
            ..Provenance::default()
        };
        let inputs = vec![("model".to_owned(), &self.original)];
        let written = write_dense(&self.source, &inputs, None, &provenance, &staging, watch)?;
        staging.publish()?;
        Ok(ShrinkReport {
            output: out.to_owned(),
            bytes: written.bytes,
            experts: self.experts,
            experts_per_token: self.top_k,
            layers: self.layers,
            seconds: self.started.elapsed().as_secs_f64(),
            warnings: self.source.notes,
        })
    }
}

fn dense(source: &Source) -> MergeError {
    MergeError::Incompatible {
        what: "the model has no experts".into(),
        first: source.label.clone(),
        second: "output family of MoE models".into(),
        expected: "a mixture of experts".into(),
        found: format!("model_type `{}`", source.config.model_type()),
        hint: "`moe-merge inspect` shows what a model is made of".into(),
        recipe: None,
    }
}

fn check(source: &Source, experts: usize, wanted: usize) -> Result<(), MergeError> {
    let wrong = |what: &str, expected: String, hint: Option<String>| {
        Err(MergeError::Argument {
            what: what.into(),
            name: "--experts".into(),
            expected,
            found: wanted.to_string(),
            hint,
        })
    };
    if wanted == 0 || wanted >= experts {
        let expected = format!("1 to {}: `{}` has {experts}", experts - 1, source.label);
        return wrong("the model cannot be shrunk to this number of experts", expected, None);
    }
    let groups = source.config.usize("n_group").unwrap_or(1);
    if groups > 1 {
        let expected = "a model whose experts are not divided into groups".into();
        let hint = format!("its router chooses among {groups} groups of experts (`n_group`)");
        return wrong("experts of this model cannot be merged", expected, Some(hint));
    }
    Ok(())
}

/// Puts the merged experts of one layer into `source`.
fn merge(
    source: &mut Source,
    original: &Source,
    layer: &ExpertLayer,
    groups: &[Vec<usize>],
    used: &[f64],
) -> Result<(), MergeError> {
    for expert in 0..layer.experts {
        for matrix in Matrix::ALL {
            source.tensors.remove(&layer.matrix(expert, matrix));
        }
    }
    for (to, members) in groups.iter().enumerate() {
        let all: f64 = members.iter().map(|e| used[*e]).sum();
        let weights: Vec<f64> = members.iter().map(|e| used[*e] / all).collect();
        for matrix in Matrix::ALL {
            let inputs = members.iter().map(|e| layer.weight(original, *e, matrix).cloned());
            let inputs: Vec<WeightRef> = inputs.collect::<Result<_, _>>()?;
            let name = layer.matrix(to, matrix);
            source.tensors.insert(name.clone(), mean(original, name, inputs, &weights)?);
        }
    }
    let router = original.weight(&layer.router())?;
    router.expect_shape(&[layer.experts, router.cols()], "one row for each expert")?;
    let shape = vec![groups.len(), router.cols()];
    let rows = mean_rows(router, &layer.router(), groups, used, shape)?;
    source.tensors.insert(layer.router(), rows);
    if let Some(name) = layer.selection_bias()
        && let Some(bias) = original.tensors.get(&name).filter(|b| b.len() == layer.experts)
    {
        let shape = bias.shape().iter().map(|n| if *n == 1 { 1 } else { groups.len() }).collect();
        let rows = mean_rows(bias, &name, groups, used, shape)?;
        source.tensors.insert(name, rows);
    }
    Ok(())
}

/// The mean of the members' numbers in `weight`, which holds the same count for each expert, as `shape`.
fn mean_rows(
    weight: &WeightRef,
    name: &str,
    groups: &[Vec<usize>],
    used: &[f64],
    shape: Vec<usize>,
) -> Result<WeightRef, MergeError> {
    let values = weight.to_f32()?;
    let width = values.len() / used.len();
    let mut rows = Vec::with_capacity(groups.len() * width);
    for members in groups {
        let all: f64 = members.iter().map(|e| used[*e]).sum();
        let at = |e: usize, col: usize| f64::from(values[e * width + col]);
        let mean = |col| members.iter().map(|e| used[*e] * at(*e, col)).sum::<f64>() / all;
        rows.extend((0..width).map(|col| match members.as_slice() {
            [only] => values[only * width + col],
            _ => mean(col) as f32,
        }));
    }
    Ok(Arc::new(OwnedWeight::from_f32(name, &rows, &shape, weight.dtype())))
}

/// The weighted mean of `inputs`; a single one is copied as it is.
fn mean(
    original: &Source,
    name: String,
    inputs: Vec<WeightRef>,
    weights: &[f64],
) -> Result<WeightRef, MergeError> {
    if let [only] = inputs.as_slice() {
        return Ok(only.clone());
    }
    let stored = inputs[0].dtype();
    let dtype = if inputs.iter().all(|w| w.dtype() == stored) { stored } else { Dtype::F32 };
    let method = methods::by_name("linear").ok_or_else(|| dense(original))?;
    let group = Group {
        base: None,
        own: weights.iter().map(|w| vec![*w]).collect(),
        global: vec![1.0],
        dtype,
        out_dtype: dtype,
        name: name.clone(),
        seed: 0,
        recipe: original.path.clone(),
        inputs,
    };
    methods::merged(method, group).map_err(|reason| MergeError::Argument {
        what: "experts cannot be merged".into(),
        name: "--experts".into(),
        expected: "weights with a sum that is not zero".into(),
        found: format!("tensor `{name}`: {reason}"),
        hint: None,
    })
}

/// The configuration with another number of experts, under whichever key the family has it.
fn config(original: &ConfigJson, experts: usize, top_k: usize) -> ConfigJson {
    let mut config = original.clone();
    for (keys, value) in [
        (&["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"][..], experts),
        (&["num_experts_per_tok", "moe_k"], top_k),
    ] {
        for key in keys.iter().filter(|k| original.get(k).is_some()) {
            config.0.insert((*key).into(), json!(value));
        }
    }
    config
}

/// `a+b` where the same experts were joined in all layers, numbers elsewhere.
fn names(
    original: &Source,
    experts: usize,
    layers: &[LayerGroups],
) -> Result<Vec<String>, MergeError> {
    let old = expert_names(&original.path, experts)?;
    let same = layers.windows(2).all(|w| w[0].groups == w[1].groups);
    Ok(match layers.first().filter(|_| same) {
        Some(first) => {
            let joined = |g: &Vec<usize>| g.iter().map(|e| old[*e].clone()).collect::<Vec<_>>();
            first.groups.iter().map(|g| joined(g).join("+")).collect()
        }
        None => Vec::new(),
    })
}
