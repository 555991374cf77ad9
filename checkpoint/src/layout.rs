//! Names of expert tensors: whatever layout a file has, seen through the names used on the Hub.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::weight::{RowSlice, WeightRef};

/// Gives fused expert tensors (the layout that transformers 5 keeps in memory, and mergekit writes) their Hub names.
///
/// * `…mlp.experts.gate_up_proj [E, 2I, H]` becomes `…mlp.experts.E.gate_proj.weight [I, H]` (the first `I` rows of
///   each expert) and `up_proj`; `…mlp.experts.down_proj [E, H, I]` becomes `…mlp.experts.E.down_proj.weight`
/// * for Mixtral they become `…block_sparse_moe.experts.E.{w1,w3,w2}.weight`, and `…mlp.gate.weight` becomes
///   `…block_sparse_moe.gate.weight`
/// * `…mlp.gate.moe_statics.e_score_correction_bias` (Ernie) loses its `gate`
///
/// Other tensors stay as they are. No number is copied: the parts are slices of rows.
///
/// # Errors
/// [`CheckpointError::Shape`] for a fused tensor that is not three-dimensional or has an odd number of gate and up
/// rows; [`CheckpointError::Malformed`] if a name is there in both layouts.
pub fn canonical(
    tensors: BTreeMap<String, WeightRef>,
    config: &ConfigJson,
) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
    let mixtral = config.model_type() == "mixtral";
    let mut out = BTreeMap::new();
    for (name, weight) in tensors {
        for (name, weight) in parts(name, weight, mixtral)? {
            let (file, tensor) = weight.origin();
            if out.insert(name.clone(), weight).is_some() {
                return Err(twice(file, tensor, name));
            }
        }
    }
    Ok(out)
}

fn twice(file: PathBuf, tensor: String, name: String) -> CheckpointError {
    CheckpointError::Malformed {
        what: "a tensor is there twice, fused and by expert".into(),
        file,
        tensor: Some(tensor),
        expected: format!("one tensor that means `{name}`"),
        found: "two".into(),
        hint: Some("delete one of the two layouts".into()),
    }
}

/// The tensors that `weight` stands for.
fn parts(
    name: String,
    weight: WeightRef,
    mixtral: bool,
) -> Result<Vec<(String, WeightRef)>, CheckpointError> {
    let (module, names): (&str, [&str; 3]) = if mixtral {
        ("block_sparse_moe", ["w1", "w3", "w2"])
    } else {
        ("mlp", ["gate_proj", "up_proj", "down_proj"])
    };
    if let Some(layer) = name.strip_suffix(".mlp.experts.gate_up_proj") {
        let [experts, rows, _] = three_axes(&weight)?;
        if !rows.is_multiple_of(2) {
            return Err(shape(&weight, "[experts, 2 * width, hidden]"));
        }
        let half = rows / 2;
        return Ok((0..2 * experts)
            .map(|part| {
                let slice = RowSlice::new(weight.clone(), part * half..(part + 1) * half);
                let (expert, which) = (part / 2, names[part % 2]);
                let name = format!("{layer}.{module}.experts.{expert}.{which}.weight");
                (name, Arc::new(slice) as WeightRef)
            })
            .collect());
    }
    if let Some(layer) = name.strip_suffix(".mlp.experts.down_proj") {
        let [experts, rows, _] = three_axes(&weight)?;
        return Ok((0..experts)
            .map(|e| {
                let slice = RowSlice::new(weight.clone(), e * rows..(e + 1) * rows);
                let name = format!("{layer}.{module}.experts.{e}.{}.weight", names[2]);
                (name, Arc::new(slice) as WeightRef)
            })
            .collect());
    }
    let renamed = match name.strip_suffix(".mlp.gate.weight") {
        Some(layer) if mixtral => format!("{layer}.block_sparse_moe.gate.weight"),
        _ => match name.strip_suffix(".mlp.gate.moe_statics.e_score_correction_bias") {
            Some(layer) => format!("{layer}.mlp.moe_statics.e_score_correction_bias"),
            None => name,
        },
    };
    Ok(vec![(renamed, weight)])
}

fn three_axes(weight: &WeightRef) -> Result<[usize; 3], CheckpointError> {
    <[usize; 3]>::try_from(weight.shape())
        .map_err(|_| shape(weight, "three axes: experts, rows, columns"))
}

fn shape(weight: &WeightRef, expected: &str) -> CheckpointError {
    let (file, tensor) = weight.origin();
    CheckpointError::Shape {
        file,
        tensor,
        expected: expected.to_owned(),
        found: weight.shape().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::OwnedWeight;
    use moe_merge_kernels::Dtype;
    use serde_json::json;

    fn weight(name: &str, shape: &[usize]) -> (String, WeightRef) {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32).collect();
        (name.to_owned(), Arc::new(OwnedWeight::from_f32(name, &values, shape, Dtype::F32)))
    }

    fn config(model_type: &str) -> ConfigJson {
        ConfigJson(json!({"model_type": model_type}).as_object().unwrap().clone())
    }

    #[test]
    fn fused_experts_become_slices() {
        for (family, names) in [
            ("mixtral", ["block_sparse_moe.experts.1.w1", "w3", "w2", "block_sparse_moe.gate"]),
            ("olmoe", ["mlp.experts.1.gate_proj", "up_proj", "down_proj", "mlp.gate"]),
        ] {
            let tensors = BTreeMap::from([
                weight("l.mlp.experts.gate_up_proj", &[2, 4, 3]),
                weight("l.mlp.experts.down_proj", &[2, 3, 2]),
                weight("l.mlp.gate.weight", &[2, 3]),
            ]);
            let seen = canonical(tensors, &config(family)).unwrap();
            assert_eq!(seen.len(), 7);
            let stem = names[0].rsplit_once('.').unwrap().0;
            let values = |name: String| seen[&name].to_f32().unwrap();
            let from =
                |start: usize, n: usize| (start..start + n).map(|i| i as f32).collect::<Vec<_>>();
            assert_eq!(values(format!("l.{}.weight", names[0])), from(12, 6));
            assert_eq!(values(format!("l.{stem}.{}.weight", names[1])), from(18, 6));
            assert_eq!(values(format!("l.{stem}.{}.weight", names[2])), from(6, 6));
            assert!(seen.contains_key(&format!("l.{}.weight", names[3])));
            assert_eq!(seen[&format!("l.{}.weight", names[0])].shape(), [2, 3]);
            assert!(seen[&format!("l.{}.weight", names[0])].bytes().is_some());
        }
    }

    #[test]
    fn the_hub_layout_stays() {
        let names = ["model.norm.weight", "l.mlp.gate.weight", "l.mlp.experts.0.up_proj.weight"];
        let tensors: BTreeMap<_, _> = names.iter().map(|n| weight(n, &[2, 2])).collect();
        let seen = canonical(tensors.clone(), &config("qwen3_moe")).unwrap();
        assert_eq!(seen.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        let ernie =
            BTreeMap::from([weight("l.mlp.gate.moe_statics.e_score_correction_bias", &[1, 2])]);
        let seen = canonical(ernie, &config("ernie4_5_moe")).unwrap();
        assert!(seen.contains_key("l.mlp.moe_statics.e_score_correction_bias"));
    }

    #[test]
    fn bad_fused_tensors_are_refused() {
        for (name, shape) in [
            ("l.mlp.experts.gate_up_proj", vec![4, 3]),
            ("l.mlp.experts.gate_up_proj", vec![2, 3, 3]),
            ("l.mlp.experts.down_proj", vec![3]),
        ] {
            let error = canonical(BTreeMap::from([weight(name, &shape)]), &config("mixtral"));
            assert!(matches!(error, Err(CheckpointError::Shape { .. })), "{name}");
        }
        let both = BTreeMap::from([
            weight("l.mlp.experts.down_proj", &[1, 3, 2]),
            weight("l.mlp.experts.0.down_proj.weight", &[3, 2]),
        ]);
        let error = canonical(both, &config("olmoe"));
        assert!(matches!(error, Err(CheckpointError::Malformed { .. })));
    }
}
