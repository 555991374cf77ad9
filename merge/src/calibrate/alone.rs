//! A MoE whose every token visits one expert.

use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{Dtype, Source};
use moe_merge_model::Spec;
use moe_merge_model::spec::Mlp;

/// Keys of `config.json` that count experts, or those that a token visits.
const COUNTS: [&str; 8] = [
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
    "moe_k",
    "n_group",
    "topk_group",
];

/// The model with `expert` as its only one: the expert's weight is 1, shared experts stay. No weight is copied.
///
/// `None` for a family that has all experts of a layer in one tensor.
pub fn alone(source: &Source, spec: &Spec, expert: usize) -> Option<Source> {
    let mut only = source.clone();
    for key in COUNTS {
        if let Some(value) = only.config.0.get_mut(key).filter(|v| v.is_u64()) {
            *value = 1.into();
        }
    }
    for (number, layer) in spec.layers.iter().enumerate() {
        let Mlp::Moe(moe) = &layer.mlp else { continue };
        let name = |below: &str| format!("model.layers.{number}.{below}");
        let own = moe.names.expert(expert)?.map(|n| only.tensors.get(&name(&n)).cloned());
        for names in (0..moe.experts).filter_map(|e| moe.names.expert(e)) {
            names.iter().for_each(|n| drop(only.tensors.remove(&name(n))));
        }
        for (to, weight) in moe.names.expert(0)?.into_iter().zip(own) {
            only.tensors.insert(name(&to), weight?);
        }
        let zeros = |name: String, shape: [usize; 2]| {
            (name.clone(), Arc::new(OwnedWeight::zeros(&name, &shape, Dtype::F32)) as _)
        };
        only.tensors.extend([zeros(name(moe.names.router()), [1, spec.hidden])]);
        only.tensors.extend(moe.selection_bias.map(|bias| zeros(name(bias), [1, 1])));
    }
    Some(only)
}
