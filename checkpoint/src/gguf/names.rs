//! Tensor names and row order: from llama.cpp's to Hugging Face's.
//!
//! # Source
//! llama.cpp `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`; transformers
//! `modeling_gguf_pytorch_utils.py`. Differs from the latter: experts stay one by one, attention biases of llama models are
//! put back in order as well, and nothing is dropped unsaid.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::CheckpointError;
use crate::gguf::config::Meta;
use crate::gguf::dequant::Shifted;
use crate::gguf::header::{Header, TensorInfo};
use crate::gguf::table::{self, Architecture, Change};
use crate::map::MappedFile;
use crate::shard::OtherTensor;
use crate::weight::{PermutedRows, RowSlice, Stacked, WeightRef};

/// The weights of a file under Hugging Face names.
pub(super) struct Named {
    pub tensors: BTreeMap<String, WeightRef>,
    /// Tensors that became no weight, under their GGUF names.
    pub other: Vec<OtherTensor>,
    pub notes: Vec<String>,
}

/// What becomes of one tensor of the file.
#[derive(Debug, PartialEq)]
enum Place {
    /// It is the weight of this name.
    As(String),
    /// The same, with its rows in the order of rotary pairs, for this many heads.
    Rotary(String, usize),
    /// The same, with 1 added by the converter.
    PlusOne(String),
    /// The same, as one row of a matrix.
    Row(String),
    /// One matrix for each expert; the name of expert `e` is prefix + e + suffix.
    Experts(String, String),
    /// The first or second half of the rows of this weight, of each expert if there are three axes.
    Half(String, usize),
    /// The configuration has it.
    Config,
    /// Nobody knows it.
    Unknown,
}

/// Renames the tensors of a file and undoes what its converter did to them.
pub(super) fn map(header: &Header, file: &MappedFile) -> Result<Named, CheckpointError> {
    let meta = Meta::new(header, file)?;
    let namer = Namer {
        architecture: meta.architecture,
        layers: meta.required("block_count")?,
        heads: meta.heads()?,
        kv_heads: meta.kv_heads()?,
        experts: meta.optional("expert_count").unwrap_or(0),
    };
    let mut named = Named { tensors: BTreeMap::new(), other: Vec::new(), notes: Vec::new() };
    let mut unknown = Vec::new();
    let mut halves = BTreeMap::<String, [Option<WeightRef>; 2]>::new();
    for tensor in &header.tensors {
        let place =
            if tensor.kind.is_no_weight() { Place::Config } else { namer.place(tensor.name) };
        match place {
            Place::Config => named.other.push(other(tensor, file)),
            Place::Unknown => {
                unknown.push(tensor.name);
                named.other.push(other(tensor, file));
            }
            Place::Half(name, half) => {
                halves.entry(name).or_default()[half] = Some(super::weight(file, tensor)?);
            }
            place => put(&namer, place, tensor, file, &mut named.tensors)?,
        }
    }
    for (name, halves) in halves {
        let joined = join_halves(&name, halves, file)?;
        named.tensors.insert(name, joined);
    }
    if !unknown.is_empty() {
        named
            .notes
            .push(format!("tensors that are not understood are left out: {}", unknown.join(", ")));
    }
    Ok(named)
}

fn other(tensor: &TensorInfo, file: &MappedFile) -> OtherTensor {
    OtherTensor {
        name: tensor.name.to_owned(),
        dtype: format!("{:?}", tensor.kind),
        shape: tensor.shape.clone(),
        file: file.path().to_owned(),
        data: None,
    }
}

fn put(
    namer: &Namer,
    place: Place,
    tensor: &TensorInfo,
    file: &MappedFile,
    tensors: &mut BTreeMap<String, WeightRef>,
) -> Result<(), CheckpointError> {
    let weight = super::weight(file, tensor)?;
    let mut insert = |name: String, weight: WeightRef| match tensors.insert(name, weight) {
        None => Ok(()),
        Some(first) => Err(CheckpointError::Malformed {
            what: "two tensors stand for the same weight".into(),
            file: file.path().to_owned(),
            tensor: Some(tensor.name.to_owned()),
            expected: "one tensor for each weight".into(),
            found: format!("`{}` as well", first.origin().1),
            hint: None,
        }),
    };
    let shape_error = |expected: String| CheckpointError::Shape {
        file: file.path().to_owned(),
        tensor: tensor.name.to_owned(),
        expected,
        found: tensor.shape.clone(),
    };
    match place {
        Place::As(name) => insert(name, weight),
        Place::PlusOne(name) => insert(name, Arc::new(Shifted::new(weight, -1.0))),
        Place::Row(name) => match tensor.shape.len() {
            1 => insert(name, Arc::new(RowSlice::new(weight, 0..1))),
            _ => insert(name, weight),
        },
        Place::Rotary(name, heads) => {
            let rows = tensor.shape[0];
            match rotary_order(rows, heads) {
                Some(order) => insert(name, Arc::new(PermutedRows::new(weight, Arc::new(order)))),
                None => Err(shape_error(format!("rows for {heads} heads of even size"))),
            }
        }
        Place::Experts(prefix, suffix) => {
            let &[experts, rows, _] = tensor.shape.as_slice() else {
                return Err(shape_error("[experts, rows, columns]".into()));
            };
            if experts != namer.experts {
                let why = "expert_count of the metadata";
                return Err(shape_error(format!("[{}, rows, columns] ({why})", namer.experts)));
            }
            for e in 0..experts {
                let slice = RowSlice::new(weight.clone(), e * rows..(e + 1) * rows);
                insert(format!("{prefix}{e}{suffix}"), Arc::new(slice))?;
            }
            Ok(())
        }
        Place::Half(..) | Place::Config | Place::Unknown => Ok(()),
    }
}

/// The weight whose rows the file has in two tensors: the first half above the second, for each expert.
fn join_halves(
    name: &str,
    halves: [Option<WeightRef>; 2],
    file: &MappedFile,
) -> Result<WeightRef, CheckpointError> {
    let [Some(first), Some(second)] = halves else {
        return Err(CheckpointError::MissingTensor {
            file: file.path().to_owned(),
            tensor: format!("{name} (gate and up)"),
            nearest: None,
        });
    };
    let shape = first.shape().to_vec();
    second.expect_shape(&shape, "as the other half of the same weight")?;
    let (experts, rows, cols) = match *shape.as_slice() {
        [rows, cols] => (1, rows, cols),
        [experts, rows, cols] => (experts, rows, cols),
        _ => {
            return Err(CheckpointError::Shape {
                file: file.path().to_owned(),
                tensor: first.origin().1,
                expected: "two or three axes".into(),
                found: shape,
            });
        }
    };
    let parts = (0..experts).flat_map(|e| {
        [&first, &second].map(|half| {
            Arc::new(RowSlice::new(half.clone(), e * rows..(e + 1) * rows)) as WeightRef
        })
    });
    let mut joined = shape;
    let axis = joined.len() - 2;
    joined[axis] = 2 * rows;
    debug_assert_eq!(joined.last(), Some(&cols));
    Ok(Arc::new(Stacked::new(parts.collect(), joined)))
}

/// For each row in Hugging Face's order its row in the file; `None` if `rows` are no `heads` heads of even size.
///
/// llama.cpp rotates neighbouring dimensions `(2i, 2i + 1)` of a head, Hugging Face dimensions `(i, i + size / 2)`.
pub(super) fn rotary_order(rows: usize, heads: usize) -> Option<Vec<u32>> {
    let halves = heads > 0 && rows.is_multiple_of(heads) && (rows / heads).is_multiple_of(2);
    if !halves || u32::try_from(rows).is_err() {
        return None;
    }
    let size = rows / heads;
    let order = (0..rows).map(|row| {
        let (head, within) = (row / size, row % size);
        let (second, pair) = (within / (size / 2), within % (size / 2));
        (head * size + 2 * pair + second) as u32
    });
    Some(order.collect())
}

/// Knows the names of one architecture.
struct Namer {
    architecture: Architecture,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    experts: usize,
}

impl Namer {
    fn place(&self, name: &str) -> Place {
        if let Some((hub, change)) = table::outside_by_gguf(name) {
            return match change {
                Change::Norm => self.norm(hub.to_owned()),
                _ => Place::As(hub.to_owned()),
            };
        }
        if [table::ROPE_FREQS, table::ROPE_LONG, table::ROPE_SHORT].contains(&name) {
            return Place::Config;
        }
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((layer, (module, parameter))) =
            layer.and_then(|(n, rest)| Some((n.parse::<usize>().ok()?, rest.rsplit_once('.')?)))
        else {
            return Place::Unknown;
        };
        if layer >= self.layers || !matches!(parameter, "weight" | "bias") {
            return Place::Unknown;
        }
        self.in_layer(&format!("model.layers.{layer}."), module, parameter)
            .unwrap_or(Place::Unknown)
    }

    fn norm(&self, name: String) -> Place {
        if self.architecture.is_gemma() { Place::PlusOne(name) } else { Place::As(name) }
    }

    fn in_layer(&self, prefix: &str, module: &str, parameter: &str) -> Option<Place> {
        // Files from before the experts were stacked have one tensor for each: `ffn_up.3`.
        if let Some((kind, expert)) = module.split_once('.') {
            let expert = expert.parse::<usize>().ok().filter(|e| *e < self.experts)?;
            let row = table::by_gguf(self.architecture, &format!("{kind}_exps"))?;
            let (before, after) = row.hub.split_once("{}")?;
            return Some(Place::As(format!("{prefix}{before}{expert}{after}.{parameter}")));
        }
        let is_moe = module.starts_with("ffn_gate_inp")
            || module.ends_with("_exps")
            || module.ends_with("_shexp")
            || module == "exp_probs_b";
        if is_moe && self.experts == 0 {
            return None;
        }
        let row = table::by_gguf(self.architecture, module)?;
        let name = match row.hub.ends_with("_bias") {
            true => format!("{prefix}{}", row.hub),
            false => format!("{prefix}{}.{parameter}", row.hub),
        };
        let rotary = |name, heads| match self.architecture.reorders_rows() {
            true => Place::Rotary(name, heads),
            false => Place::As(name),
        };
        Some(match row.change {
            Change::As => Place::As(name),
            Change::Norm => self.norm(name),
            Change::Query => rotary(name, self.heads),
            Change::Key => rotary(name, self.kv_heads),
            Change::Vector => Place::Row(name),
            Change::FirstHalf => Place::Half(name, 0),
            Change::SecondHalf => Place::Half(name, 1),
            Change::Experts => {
                let (before, after) = row.hub.split_once("{}")?;
                Place::Experts(format!("{prefix}{before}"), format!("{after}.{parameter}"))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namer(architecture: Architecture, experts: usize) -> Namer {
        Namer { architecture, layers: 2, heads: 4, kv_heads: 2, experts }
    }

    #[test]
    fn rotary_pairs_become_halves() {
        // Two heads of four rows: pairs (0, 1), (2, 3) become first halves 0, 2 and second halves 1, 3.
        assert_eq!(rotary_order(8, 2), Some(vec![0, 2, 1, 3, 4, 6, 5, 7]));
        assert_eq!(rotary_order(6, 2), None);
        assert_eq!(rotary_order(8, 0), None);
        assert_eq!(rotary_order(7, 2), None);
    }

    #[test]
    fn names_by_architecture() {
        use Architecture::*;
        let place = |architecture, experts, name: &str| namer(architecture, experts).place(name);
        let named = |name: &str| Place::As(name.into());
        assert_eq!(
            place(Llama, 0, "blk.1.attn_k.bias"),
            Place::Rotary("model.layers.1.self_attn.k_proj.bias".into(), 2)
        );
        assert_eq!(
            place(Qwen2, 0, "blk.1.attn_k.bias"),
            named("model.layers.1.self_attn.k_proj.bias")
        );
        assert_eq!(
            place(Phi3, 0, "blk.0.ffn_up.weight"),
            named("model.layers.0.mlp.gate_up_proj.weight")
        );
        assert_eq!(
            place(Gemma2, 0, "blk.0.ffn_norm.weight"),
            Place::PlusOne("model.layers.0.pre_feedforward_layernorm.weight".into())
        );
        assert_eq!(
            place(Llama, 8, "blk.0.ffn_down_exps.weight"),
            Place::Experts("model.layers.0.block_sparse_moe.experts.".into(), ".w2.weight".into())
        );
        assert_eq!(
            place(Llama, 8, "blk.0.ffn_up.7.weight"),
            named("model.layers.0.block_sparse_moe.experts.7.w3.weight")
        );
        assert_eq!(
            place(Qwen2Moe, 8, "blk.0.ffn_gate_inp_shexp.weight"),
            Place::Row("model.layers.0.mlp.shared_expert_gate.weight".into())
        );
        assert_eq!(
            place(Deepseek2, 8, "blk.1.ffn_gate_shexp.weight"),
            named("model.layers.1.mlp.shared_experts.gate_proj.weight")
        );
        assert_eq!(
            place(GraniteMoe, 8, "blk.1.ffn_up_exps.weight"),
            Place::Half("model.layers.1.block_sparse_moe.input_linear.weight".into(), 1)
        );
        assert_eq!(
            place(Ernie4_5Moe, 8, "blk.1.exp_probs_b.bias"),
            Place::Row("model.layers.1.mlp.moe_statics.e_score_correction_bias".into())
        );
    }

    #[test]
    fn what_is_not_known_is_not_named() {
        use Architecture::*;
        for name in ["blk.2.attn_q.weight", "blk.0.attn_q.scale", "blk.x.attn_q.weight", "rope"] {
            assert_eq!(namer(Llama, 0).place(name), Place::Unknown, "{name}");
        }
        assert_eq!(namer(Llama, 8).place("blk.0.ffn_up.8.weight"), Place::Unknown);
        assert_eq!(namer(Llama, 0).place("blk.0.attn_kv_b.weight"), Place::Unknown);
    }
}
