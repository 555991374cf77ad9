//! The adapter's two files, as PEFT writes them.
//!
//! `r = lora_alpha`, so that the product of the factors is added as it is. In a packed pair, rows of `A` are expert-major
//! (`e r + j`) and columns of `B` rank-major (`j E + e`); gate and up are the inner one of two nested wrappers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{
    OutTensor, ShardName, ShardPlan, Watch, write_json, write_shards,
};
use moe_merge_checkpoint::{Dtype, Staging};
use serde_json::{Map, Value, json};

use super::factor::{Change, Factors};
use super::pairs::{Form, Part, Slot};
use super::{Done, ExtractOptions, Packing};
use crate::error::MergeError;

/// Version of PEFT whose packing of experts is used: it changed with 0.20.
const PEFT_VERSION: &str = "0.21.2";

/// Where a pair of factors stands in the file.
struct Module {
    name: String,
    form: Form,
    factors: Factors,
    expert: bool,
}

/// The two fused pairs of a layer: what each expert has.
#[derive(Default)]
struct Layer {
    experts: usize,
    pairs: BTreeMap<Part, BTreeMap<usize, Factors>>,
    /// `[out, in]` of each part.
    sizes: BTreeMap<Part, [usize; 2]>,
}

/// An adapter, ready to be written.
pub(super) struct Adapter<'a> {
    options: &'a ExtractOptions,
    rank: usize,
    modules: Vec<Module>,
    layers: BTreeMap<usize, Layer>,
    /// Layers with routed experts, changed or not.
    moe_layers: usize,
    /// Tensors as they are.
    whole: Vec<OutTensor>,
    saved: Vec<String>,
    /// Biases beside factors.
    biases: bool,
    /// Last parts of names that stand for more modules than the adapter has.
    partial: BTreeSet<String>,
    /// Whether the head is the embedding.
    tied_head: bool,
}

const PREFIX: &str = "base_model.model.";

impl<'a> Adapter<'a> {
    pub fn new(done: Vec<Done>, tied: bool, options: &'a ExtractOptions) -> Self {
        let mut adapter = Self {
            options,
            rank: 1,
            modules: Vec::new(),
            layers: BTreeMap::new(),
            moe_layers: 0,
            whole: Vec::new(),
            saved: Vec::new(),
            biases: false,
            partial: BTreeSet::new(),
            tied_head: tied,
        };
        let layers: BTreeSet<usize> =
            done.iter().filter_map(|d| d.pair.slot.map(|s| s.layer)).collect();
        adapter.moe_layers = layers.len();
        for done in done {
            adapter.add(done);
        }
        adapter
    }

    fn has_embedding(&self) -> bool {
        let names = self.modules.iter().map(|m| &m.name).chain(&self.saved);
        names.into_iter().any(|n| n.ends_with("embed_tokens"))
    }

    fn add(&mut self, done: Done) {
        let only_bias = done.only_bias();
        let Done { mut pair, change } = done;
        if self.options.packing == Packing::Fused {
            // Where experts are one parameter, the block around them has the same name in all families.
            pair.module = pair.module.replace(".block_sparse_moe.", ".mlp.");
        }
        let size = [pair.base.rows(), pair.base.cols()];
        let factors = match change {
            Change::Factors { factors, .. } if factors.rank > 0 => Some(factors),
            Change::Whole if !self.options.skip_undecomposable => {
                self.as_it_is(&format!("{}.weight", pair.module), &pair.tuned);
                if let Some(bias) = &pair.bias {
                    self.as_it_is(&format!("{}.bias", pair.module), bias);
                }
                if self.tied_head && pair.module.ends_with("embed_tokens") {
                    // Loaders that tie the two look for both.
                    self.as_it_is("lm_head.weight", &pair.tuned);
                    self.saved.push("lm_head".into());
                }
                self.saved.push(pair.module);
                return;
            }
            _ if only_bias => Some(Factors::zero(size[0], size[1])),
            _ => None,
        };
        if let Some(slot) = pair.slot {
            self.packed(slot, factors, size);
            return;
        }
        let Some(factors) = factors else {
            self.partial.insert(leaf(&pair.module).to_owned());
            return;
        };
        self.rank = self.rank.max(factors.rank);
        if let Some(bias) = &pair.bias {
            self.biases = true;
            self.as_it_is(&format!("{}.base_layer.bias", pair.module), bias);
        }
        let (name, form, expert) = (pair.module, pair.form, pair.expert);
        self.modules.push(Module { name, form, factors, expert });
    }

    fn as_it_is(&mut self, name: &str, weight: &moe_merge_checkpoint::WeightRef) {
        let (name, weight, dtype) = (format!("{PREFIX}{name}"), weight.clone(), weight.dtype());
        self.whole.push(OutTensor { name, weight, dtype });
    }

    fn packed(&mut self, slot: Slot, factors: Option<Factors>, size: [usize; 2]) {
        let layer = self.layers.entry(slot.layer).or_default();
        layer.experts = slot.experts;
        layer.sizes.insert(slot.part, size);
        if let Some(factors) = factors {
            self.rank = self.rank.max(factors.rank);
            layer.pairs.entry(slot.part).or_default().insert(slot.expert, factors);
        }
    }

    /// Writes both files; returns the bytes of the weights and the rank.
    pub fn write(
        mut self,
        staging: &Staging,
        watch: Watch<'_>,
    ) -> Result<(u64, usize), MergeError> {
        self.layers.retain(|_, layer| !layer.pairs.is_empty());
        let (rank, config) = (self.rank, self.config());
        let mut tensors = std::mem::take(&mut self.whole);
        for module in std::mem::take(&mut self.modules) {
            tensors.extend(self.pair(module));
        }
        for (number, layer) in std::mem::take(&mut self.layers) {
            for (part, name) in [(Part::GateUp, ".base_layer"), (Part::Down, "")] {
                let name = format!("model.layers.{number}.mlp.experts{name}");
                tensors.extend(self.packed_pair(&name, &layer, part));
            }
        }
        let bytes: u64 = tensors.iter().map(OutTensor::size).sum();
        staging.need(bytes)?;
        let name = ShardName::Fixed("adapter_model.safetensors".into());
        write_shards(staging.path(), &[ShardPlan::new(name, tensors)], watch)?;
        write_json(staging.path(), "adapter_config.json", &config)?;
        Ok((bytes, rank))
    }

    fn tensor(&self, name: String, values: &[f32], shape: [usize; 2]) -> OutTensor {
        let name = format!("{PREFIX}{name}");
        let dtype = self.options.dtype;
        // Rounded once, by the writer.
        let weight = OwnedWeight::from_f32(&name, values, &shape, Dtype::F32);
        OutTensor { name, weight: Arc::new(weight), dtype }
    }

    fn pair(&self, module: Module) -> [OutTensor; 2] {
        let factors = match module.expert {
            true => module.factors.filled(self.rank),
            false => module.factors,
        };
        let rank = factors.rank;
        let (inputs, outputs) = (factors.a.len() / rank, factors.b.len() / rank);
        let (kind, end) = match module.form {
            Form::Embedding => ("lora_embedding", ""),
            _ => ("lora", ".weight"),
        };
        let name = |factor: &str| format!("{}.{kind}_{factor}{end}", module.name);
        [
            self.tensor(name("A"), &factors.a, [rank, inputs]),
            self.tensor(name("B"), &factors.b, [outputs, rank]),
        ]
    }

    fn packed_pair(&self, name: &str, layer: &Layer, part: Part) -> [OutTensor; 2] {
        let (rank, experts) = (self.rank, layer.experts);
        let [outputs, inputs] = layer.sizes.get(&part).copied().unwrap_or_default();
        let mut a = vec![0.0; experts * rank * inputs];
        let mut b = vec![0.0; outputs * rank * experts];
        for (&e, factors) in layer.pairs.get(&part).into_iter().flatten() {
            a[e * rank * inputs..][..factors.a.len()].copy_from_slice(&factors.a);
            let rows = factors.b.chunks_exact(factors.rank);
            for (to, from) in b.chunks_exact_mut(rank * experts).zip(rows) {
                from.iter().enumerate().for_each(|(j, v)| to[j * experts + e] = *v);
            }
        }
        [
            self.tensor(format!("{name}.lora_A.weight"), &a, [experts * rank, inputs]),
            self.tensor(format!("{name}.lora_B.weight"), &b, [outputs, rank * experts]),
        ]
    }

    /// Names that PEFT looks for at the end of module names.
    fn targets(&self) -> BTreeSet<String> {
        let whole = self.options.expert.is_some() || !self.options.filter.is_empty();
        let name = |m: &Module| match whole || self.partial.contains(leaf(&m.name)) {
            true => m.name.clone(),
            false => leaf(&m.name).to_owned(),
        };
        self.modules.iter().map(name).collect()
    }

    fn parameters(&self) -> BTreeSet<String> {
        let all = self.layers.len() == self.moe_layers && self.options.filter.is_empty();
        let name = |(layer, part): (&usize, Part)| match all {
            true => format!("mlp.experts.{}", part.name()),
            false => format!("layers.{layer}.mlp.experts.{}", part.name()),
        };
        let parts = |l| [(l, Part::GateUp), (l, Part::Down)];
        self.layers.keys().flat_map(parts).map(name).collect()
    }

    fn config(&self) -> Value {
        // An expert's factors are filled up with zeros: loaders stack those of all experts.
        let smaller = |m: &&Module| m.factors.rank < self.rank && !m.expert;
        let pattern: Map<String, Value> = self
            .modules
            .iter()
            .filter(smaller)
            .map(|m| (m.name.clone(), json!(m.factors.rank)))
            .collect();
        let mut config = json!({
            "alpha_pattern": pattern,
            "base_model_name_or_path": self.options.base_name,
            "bias": if self.biases { "lora_only" } else { "none" },
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "modules_to_save": if self.saved.is_empty() { Value::Null } else { json!(self.saved) },
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": pattern,
            "revision": null,
            "target_modules": self.targets(),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": false,
        });
        let parameters = self.parameters();
        if !parameters.is_empty() {
            config["target_parameters"] = json!(parameters);
            config["peft_version"] = json!(PEFT_VERSION);
        }
        if self.tied_head && self.has_embedding() {
            config["ensure_weight_tying"] = json!(true);
        }
        config
    }
}

/// The last part of a module's name.
fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}
