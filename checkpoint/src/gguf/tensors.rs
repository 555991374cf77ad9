//! The tensors of a model as a GGUF file has them: the inverse of what reading one undoes.

use std::collections::HashMap;
use std::sync::Arc;

use moe_merge_kernels::Dtype;

use crate::error::CheckpointError;
use crate::gguf::dequant::Shifted;
use crate::gguf::names::rotary_order;
use crate::gguf::quantise;
use crate::gguf::table::{self, Architecture, Change, Written};
use crate::gguf::write::{GgufTensor, Storage};
use crate::source::Source;
use crate::weight::{OwnedWeight, PermutedRows, RowSlice, WeightRef};

/// How the tensors of a model are written.
#[derive(Debug, Clone)]
pub struct TensorPlan {
    /// The architecture that the file names.
    pub architecture: Architecture,
    /// Query and key-value heads whose rows change from halves to neighbours, where model and file rotate other pairs.
    pub reordered_heads: Option<(usize, usize)>,
    /// How matrices are stored; as they are if none.
    pub storage: Option<Storage>,
    /// Whether the embedding is written as the head, too.
    pub copy_head: bool,
}

impl TensorPlan {
    /// The tensors of `source` that `expected` names, with the shapes given there, under their names in the file.
    ///
    /// Vectors, norms and the weights of routers are kept in f32, as llama.cpp computes with them. In Q8_0, a matrix whose
    /// rows are no whole blocks is stored as f16: the second value lists them.
    ///
    /// # Errors
    /// [`CheckpointError::Unsupported`] for a tensor that the architecture has no place for, [`CheckpointError::Shape`],
    /// [`CheckpointError::MissingTensor`].
    pub fn tensors(
        &self,
        source: &Source,
        expected: &[(String, Vec<usize>)],
    ) -> Result<(Vec<GgufTensor>, Vec<String>), CheckpointError> {
        let mut list = List { plan: self, tensors: Vec::new(), by_name: HashMap::new() };
        for (name, shape) in expected {
            let weight = source.weight(name)?;
            weight.expect_shape(shape, "by the configuration")?;
            let places = table::by_hub(self.architecture, name);
            if places.is_empty() {
                return Err(CheckpointError::Unsupported {
                    what: format!(
                        "llama.cpp's `{}` has no place for the tensor `{name}`",
                        self.architecture.name()
                    ),
                    file: source.path.clone(),
                    hint: "this model cannot be written as a GGUF file".into(),
                });
            }
            for place in places {
                list.put(weight, place)?;
            }
            if name == table::EMBEDDING && self.copy_head {
                let place =
                    Written { name: table::OUTPUT.into(), change: Change::As, expert: None };
                list.put(weight, place)?;
            }
        }
        let mut tensors = list.tensors;
        let mut uneven = Vec::new();
        for tensor in &mut tensors {
            tensor.storage = self.storage_of(tensor);
            let cols = tensor.shape.last().copied().unwrap_or(0);
            if tensor.storage == Storage::Q8_0 && !cols.is_multiple_of(quantise::BLOCK) {
                tensor.storage = Storage::F16;
                uneven.push(tensor.name.clone());
            }
        }
        Ok((tensors, uneven))
    }

    fn storage_of(&self, tensor: &GgufTensor) -> Storage {
        let module = tensor.name.rsplit('.').nth(1).unwrap_or_default();
        let in_full = tensor.shape.len() < 2
            || !tensor.name.ends_with(".weight")
            || module.ends_with("_norm")
            || module.starts_with("ffn_gate_inp");
        if in_full {
            return Storage::F32;
        }
        self.storage.unwrap_or_else(|| {
            let mut stored = tensor.parts.iter().map(|p| Storage::of(p.dtype()));
            let first = stored.next().unwrap_or(Storage::F32);
            if stored.all(|s| s == first) { first } else { Storage::F32 }
        })
    }
}

/// The file's tensors as they come together.
struct List<'p> {
    plan: &'p TensorPlan,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
}

impl List<'_> {
    fn put(&mut self, weight: &WeightRef, place: Written) -> Result<(), CheckpointError> {
        let shape = weight.shape().to_vec();
        let (shape, parts): (Vec<usize>, Vec<WeightRef>) = match place.change {
            Change::As => (shape, vec![weight.clone()]),
            Change::Norm if self.plan.architecture.is_gemma() => {
                (shape, vec![Arc::new(Shifted::new(weight.clone(), 1.0))])
            }
            Change::Norm => (shape, vec![weight.clone()]),
            Change::Query => (shape, vec![self.rotary(weight, |(heads, _)| heads)?]),
            Change::Key => (shape, vec![self.rotary(weight, |(_, heads)| heads)?]),
            Change::Vector => (vec![weight.len()], vec![weight.clone()]),
            Change::FirstHalf => half(weight, 0)?,
            Change::SecondHalf => half(weight, 1)?,
            Change::Experts => return self.expert(weight, place),
        };
        self.by_name.insert(place.name.clone(), self.tensors.len());
        self.tensors.push(GgufTensor { name: place.name, shape, storage: Storage::F32, parts });
        Ok(())
    }

    /// One more expert of a stacked tensor; they come in order.
    fn expert(&mut self, weight: &WeightRef, place: Written) -> Result<(), CheckpointError> {
        let at = *self.by_name.entry(place.name.clone()).or_insert(self.tensors.len());
        if at == self.tensors.len() {
            let shape = [&[0], weight.shape()].concat();
            let (storage, parts) = (Storage::F32, Vec::new());
            self.tensors.push(GgufTensor { name: place.name, shape, storage, parts });
        }
        let stacked = &mut self.tensors[at];
        if place.expert != Some(stacked.shape[0]) || stacked.shape[1..] != *weight.shape() {
            let (file, tensor) = weight.origin();
            return Err(CheckpointError::Shape {
                file,
                tensor,
                expected: format!("expert {} of {:?}", stacked.shape[0], &stacked.shape[1..]),
                found: weight.shape().to_vec(),
            });
        }
        stacked.shape[0] += 1;
        stacked.parts.push(weight.clone());
        Ok(())
    }

    fn rotary(
        &self,
        weight: &WeightRef,
        heads: impl Fn((usize, usize)) -> usize,
    ) -> Result<WeightRef, CheckpointError> {
        let Some(heads) = self.plan.reordered_heads.map(heads) else { return Ok(weight.clone()) };
        let rows = weight.shape().first().copied().unwrap_or(0);
        let Some(order) = rotary_order(rows, heads) else {
            let (file, tensor) = weight.origin();
            return Err(CheckpointError::Shape {
                file,
                tensor,
                expected: format!("rows for {heads} heads of even size"),
                found: weight.shape().to_vec(),
            });
        };
        let mut inverse = vec![0u32; rows];
        for (hub, file) in order.into_iter().enumerate() {
            inverse[file as usize] = hub as u32;
        }
        Ok(Arc::new(PermutedRows::new(weight.clone(), Arc::new(inverse))))
    }
}

/// The first or second half of the rows, of each expert if there are three axes.
fn half(weight: &WeightRef, which: usize) -> Result<(Vec<usize>, Vec<WeightRef>), CheckpointError> {
    let mut shape = weight.shape().to_vec();
    let (experts, rows) = match *shape.as_slice() {
        [rows, _] if rows.is_multiple_of(2) => (1, rows),
        [experts, rows, _] if rows.is_multiple_of(2) => (experts, rows),
        _ => {
            let (file, tensor) = weight.origin();
            return Err(CheckpointError::Shape {
                file,
                tensor,
                expected: "two or three axes, with an even number of rows".into(),
                found: shape,
            });
        }
    };
    let axis = shape.len() - 2;
    shape[axis] = rows / 2;
    let from = |e: usize| e * rows + which * rows / 2;
    let parts = (0..experts)
        .map(|e| Arc::new(RowSlice::new(weight.clone(), from(e)..from(e) + rows / 2)) as WeightRef);
    Ok((shape, parts.collect()))
}

/// A vector that the Hub's model has not as a tensor: rotary factors, a correction bias of zeros.
pub fn extra_vector(name: &str, values: &[f32]) -> GgufTensor {
    let shape = vec![values.len()];
    let weight = OwnedWeight::from_f32(name, values, &shape, Dtype::F32);
    GgufTensor {
        name: name.to_owned(),
        shape,
        storage: Storage::F32,
        parts: vec![Arc::new(weight)],
    }
}
