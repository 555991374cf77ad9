//! Trained factors as a PEFT adapter.
//!
//! Two packings. [`Packing::Modules`]: one pair for each projection of the expert, under its name in the checkpoint.
//! [`Packing::Fused`]: one pair for all experts of a layer, as transformers 5 has them in one parameter; those of other
//! experts are 0. In it, rows of `A` are expert-major (`e r + j`) and columns of `B` rank-major (`j E + e`), gate and up are
//! one parameter, whose `B` is block-diagonal.

use std::path::Path;
use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{
    OutTensor, ShardName, ShardPlan, Watch, write_json, write_shards,
};
use moe_merge_checkpoint::{CheckpointError, Dtype};
use moe_merge_model::Spec;
use moe_merge_model::expert_training::{FactorPair, Factors, Part};
use moe_merge_model::spec::{Mlp, MoeMlp};
use serde_json::{Value, json};

use super::error::FinetuneError;

/// How the factors of an expert are laid out in an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// One pair for each projection: vLLM, transformers 4 and this program.
    Modules,
    /// One pair for all experts of a layer (`target_parameters`): transformers 5.
    Fused,
}

/// What an adapter is made of.
pub struct Adapter<'a> {
    /// The model.
    pub spec: &'a Spec,
    /// Its expert, if it is a MoE.
    pub expert: Option<usize>,
    /// The factors.
    pub factors: &'a Factors,
    /// The model's path, for the configuration.
    pub base: &'a str,
    /// Its layout.
    pub packing: Packing,
    /// With how much dropout it was trained.
    pub dropout: f64,
}

/// A matrix `[rows, cols]`.
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, values: vec![0.0; rows * cols] }
    }

    /// Copies `from [rows, cols]` to `(row, col)`.
    fn put(&mut self, at: (usize, usize), from: &[f32], cols: usize) {
        for (i, row) in from.chunks_exact(cols.max(1)).enumerate() {
            let to = (at.0 + i) * self.cols + at.1;
            self.values[to..to + cols].copy_from_slice(row);
        }
    }
}

/// A pair under its module's name.
struct Module {
    name: String,
    a: Matrix,
    b: Matrix,
}

impl Adapter<'_> {
    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`.
    ///
    /// # Errors
    /// [`FinetuneError`] for a family whose experts have no names of their own, with [`Packing::Modules`]; a disk that is
    /// full; interruption.
    pub fn write(&self, dir: &Path, watch: Watch<'_>) -> Result<(), FinetuneError> {
        let (modules, config) = match (self.packing, self.expert) {
            (Packing::Fused, Some(expert)) => self.fused(expert)?,
            _ => self.by_module()?,
        };
        let tensors = modules
            .into_iter()
            .flat_map(|Module { name, a, b }| {
                [("lora_A", a), ("lora_B", b)].map(|(factor, m)| {
                    let name = format!("base_model.model.{name}.{factor}.weight");
                    let weight =
                        OwnedWeight::from_f32(&name, &m.values, &[m.rows, m.cols], Dtype::F32);
                    OutTensor { name, weight: Arc::new(weight), dtype: Dtype::F32 }
                })
            })
            .collect();
        let name = ShardName::Fixed("adapter_model.safetensors".into());
        write_shards(dir, &[ShardPlan::new(name, tensors)], watch)?;
        write_json(dir, "adapter_config.json", &config)?;
        Ok(())
    }

    /// The layers with factors.
    fn layers(&self) -> Vec<usize> {
        let mut layers: Vec<usize> = self.factors.pairs.keys().map(|(l, _)| *l).collect();
        layers.dedup();
        layers
    }

    fn pair(&self, layer: usize, part: Part) -> Option<&FactorPair> {
        self.factors.pairs.get(&(layer, part))
    }

    /// The pairs of gate and up as one, for a weight that holds the gate above up.
    fn joined(&self, layer: usize) -> Option<FactorPair> {
        let parts = [self.pair(layer, Part::Gate), self.pair(layer, Part::Up)];
        let first = parts.into_iter().flatten().next()?;
        let (input, inter) = (first.input, first.output);
        let rank = parts.iter().flatten().map(|p| p.rank).sum();
        let (mut a, mut b) = (Matrix::zeros(rank, input), Matrix::zeros(2 * inter, rank));
        let mut from = 0;
        for (half, pair) in parts.into_iter().enumerate() {
            let Some(pair) = pair else { continue };
            a.put((from, 0), &pair.a, input);
            b.put((half * inter, from), &pair.b, pair.rank);
            from += pair.rank;
        }
        let (a, b, trained) = (a.values, b.values, first.trained);
        Some(FactorPair { rank, input, output: 2 * inter, a, b, trained })
    }

    fn by_module(&self) -> Result<(Vec<Module>, Value), FinetuneError> {
        let mut found: Vec<(usize, String, FactorPair)> = Vec::new();
        for layer in self.layers() {
            let mut add = |name: &str, pair: Option<FactorPair>| {
                found.extend(pair.map(|p| (layer, name.to_owned(), p)));
            };
            match (&self.spec.layers[layer].mlp, self.expert) {
                (Mlp::Dense(mlp), _) if mlp.fused => {
                    add("mlp.gate_up_proj", self.joined(layer));
                    add("mlp.down_proj", self.pair(layer, Part::Down).cloned());
                }
                (Mlp::Dense(_), _) => {
                    for part in Part::ALL {
                        let name = format!("mlp.{}_proj", part.name());
                        add(&name, self.pair(layer, part).cloned());
                    }
                }
                (Mlp::Moe(moe), expert) => {
                    let names = moe.names.expert(expert.unwrap_or(0));
                    let names = names.ok_or_else(|| self.stacked())?;
                    for (part, name) in Part::ALL.into_iter().zip(names) {
                        let module = name.strip_suffix(".weight").unwrap_or(&name);
                        add(module, self.pair(layer, part).cloned());
                    }
                }
            }
        }
        let rank = found.iter().map(|(_, _, p)| p.rank).max().unwrap_or(1);
        let mut leaves: Vec<String> = found.iter().map(|(_, n, _)| regex(n)).collect();
        leaves.sort();
        leaves.dedup();
        let layers: Vec<String> = self.layers().iter().map(usize::to_string).collect();
        let targets = format!(r".*\.layers\.(?:{})\.(?:{})", layers.join("|"), leaves.join("|"));
        let modules = found
            .into_iter()
            .map(|(layer, name, pair)| {
                let (mut a, mut b) =
                    (Matrix::zeros(rank, pair.input), Matrix::zeros(pair.output, rank));
                a.put((0, 0), &pair.a, pair.input);
                b.put((0, 0), &pair.b, pair.rank);
                Module { name: format!("model.layers.{layer}.{name}"), a, b }
            })
            .collect();
        Ok((modules, self.config(rank, json!(targets), Value::Null)))
    }

    fn stacked(&self) -> FinetuneError {
        let family = self.spec.family;
        FinetuneError::Option {
            name: "--packing modules",
            expected: "a family that stores its experts one by one, or all in `gate_up_proj` and `down_proj`".into(),
            found: format!("`{family}`, which has all experts of a layer in one tensor"),
            hint: Some("`--apply` changes the model itself".into()),
        }
    }

    fn fused(&self, expert: usize) -> Result<(Vec<Module>, Value), FinetuneError> {
        let layers = self.layers();
        let all: Vec<(usize, &MoeMlp)> = self.spec.moe_layers().collect();
        let experts = all.first().map_or(0, |(_, moe)| moe.experts);
        if all.first().is_some_and(|(_, moe)| moe.names.expert(0).is_none()) {
            return Err(self.stacked());
        }
        let pairs: Vec<(usize, Option<FactorPair>, Option<FactorPair>)> = layers
            .iter()
            .map(|l| (*l, self.joined(*l), self.pair(*l, Part::Down).cloned()))
            .collect();
        let ranks = pairs.iter().flat_map(|(_, gu, d)| [gu, d]).flatten().map(|p| p.rank);
        let rank = ranks.max().unwrap_or(1);
        let (mut modules, mut targets) = (Vec::new(), Vec::new());
        for (layer, gate_up, down) in pairs {
            let module = format!("model.layers.{layer}.mlp.experts");
            let both = gate_up.is_some() && down.is_some();
            for (name, pair) in [("gate_up_proj", gate_up), ("down_proj", down)] {
                let Some(pair) = pair else { continue };
                // Of two wrappers around the experts, that of gate and up is the inner one.
                let inner = both && name == "gate_up_proj";
                let name_in_file =
                    if inner { format!("{module}.base_layer") } else { module.clone() };
                modules.push(packed(name_in_file, &pair, rank, expert, experts));
                targets.push(match layers.len() == all.len() {
                    true => format!("mlp.experts.{name}"),
                    false => format!("layers.{layer}.mlp.experts.{name}"),
                });
            }
        }
        targets.sort();
        targets.dedup();
        Ok((modules, self.config(rank, json!([]), json!(targets))))
    }

    fn config(&self, rank: usize, modules: Value, parameters: Value) -> Value {
        // PEFT has no dropout in front of parameters, and refuses a configuration with some; loading needs none.
        let dropout = if parameters.is_null() { self.dropout } else { 0.0 };
        // Ranks are filled up with zeros to the largest one; the scale stays what it was.
        let alpha = f64::from(self.factors.scale) * rank as f64;
        let alpha = match alpha.fract() == 0.0 {
            true => json!(alpha as u64),
            false => json!(alpha),
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "revision": null,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "use_rslora": false,
            "use_dora": false,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "target_modules": modules,
            "target_parameters": parameters,
            "modules_to_save": null,
            "layers_to_transform": null,
            "layers_pattern": null,
            "rank_pattern": {},
            "alpha_pattern": {},
            "peft_version": "0.21.2",
        })
    }
}

/// The pair of one expert among those of all.
fn packed(name: String, pair: &FactorPair, rank: usize, expert: usize, experts: usize) -> Module {
    let mut a = Matrix::zeros(experts * rank, pair.input);
    a.put((expert * rank, 0), &pair.a, pair.input);
    let mut b = Matrix::zeros(pair.output, rank * experts);
    for (row, from) in b.values.chunks_exact_mut(rank * experts).zip(pair.b.chunks_exact(pair.rank))
    {
        from.iter().enumerate().for_each(|(j, v)| row[j * experts + expert] = *v);
    }
    Module { name, a, b }
}

/// A name as a regular expression.
fn regex(name: &str) -> String {
    name.replace('.', r"\.")
}

/// Whether an adapter can be made at all: a full update has no low rank, and a row of a router no place in it.
///
/// # Errors
/// [`CheckpointError::Unsupported`].
pub fn check(full: bool, parts: &[Part], model: &Path) -> Result<(), CheckpointError> {
    let what = match (full, parts.contains(&Part::Router)) {
        (true, _) => "a full update is no low-rank adapter",
        (_, true) => "an adapter has no place for one row of a router",
        _ => return Ok(()),
    };
    Err(CheckpointError::Unsupported {
        what: what.into(),
        file: model.to_owned(),
        hint: "`--apply` changes the model itself".into(),
    })
}

#[cfg(test)]
mod tests {
    use moe_merge_model::expert_training::TrainedFactors;

    use super::*;

    #[test]
    fn packed_pairs_by_hand() {
        let pair = FactorPair {
            rank: 1,
            input: 2,
            output: 2,
            a: vec![1.0, 2.0],
            b: vec![3.0, 4.0],
            trained: TrainedFactors::Both,
        };
        // Rank 2, filled up; expert 1 of 3.
        let Module { a, b, .. } = packed("m".into(), &pair, 2, 1, 3);
        assert_eq!((a.rows, a.cols, b.rows, b.cols), (6, 2, 2, 6));
        assert_eq!(a.values, [0., 0., 0., 0., 1., 2., 0., 0., 0., 0., 0., 0.]);
        assert_eq!(b.values, [0., 3., 0., 0., 0., 0., 0., 4., 0., 0., 0., 0.]);
    }
}
