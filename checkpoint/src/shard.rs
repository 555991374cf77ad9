//! One safetensors file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::CheckpointError;
use crate::header;
use crate::map::MappedFile;
use crate::weight::{MappedWeight, WeightRef};

/// A tensor that is no weight: an integer buffer, or numbers in a dtype that is not computed with.
#[derive(Debug, Clone)]
pub struct OtherTensor {
    /// Its name.
    pub name: String,
    /// Its dtype as the file spells it: `I64`, `F8_E4M3`, …
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The file it is in.
    pub file: PathBuf,
    /// Its bytes; none in formats with tensors that stand for something else.
    pub(crate) data: Option<(MappedFile, Range<usize>)>,
}

impl OtherTensor {
    /// Its bytes as a safetensors file has them, if it is in one.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.data.as_ref().map(|(file, range)| &file.bytes()[range.clone()])
    }

    /// Whether it looks like a weight in a dtype that is not computed with: numbers with a point, or integers called a weight.
    pub fn is_weight(&self) -> bool {
        let integers = self.dtype.starts_with(['I', 'U']) || self.dtype == "BOOL";
        let last = self.name.rsplit('.').next().unwrap_or_default();
        self.data.is_some() && (!integers || last.contains("weight"))
    }

    /// That it cannot be computed with.
    pub fn unsupported(&self) -> CheckpointError {
        let hint = match self.dtype.as_str() {
            "I8" | "U8" | "I32" | "U32" => {
                "this looks like a quantised checkpoint (bitsandbytes, GPTQ, AWQ); take its bf16 original"
            }
            d if d.starts_with('F') && d != "F64" => {
                "this is a quantised checkpoint; take its bf16 original"
            }
            _ => "load the model in transformers with `dtype=torch.bfloat16` and save it again",
        };
        CheckpointError::Malformed {
            what: "weight has an unsupported dtype".into(),
            file: self.file.clone(),
            tensor: Some(self.name.clone()),
            expected: "F32, BF16 or F16".into(),
            found: format!("{} {:?}", self.dtype, self.shape),
            hint: Some(hint.into()),
        }
    }
}

impl std::fmt::Display for OtherTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} {:?})", self.name, self.dtype, self.shape)
    }
}

/// The weights of one shard, and the tensors that are no weights.
#[derive(Debug)]
pub(crate) struct Shard {
    pub weights: Vec<(String, MappedWeight)>,
    pub other: Vec<OtherTensor>,
}

/// The weights of one safetensors file, mapped; tensors that are no weights are left out.
///
/// # Errors
/// A file that is not there, or is no safetensors file.
pub fn weights(path: &Path) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
    let weights = open(path)?.weights.into_iter();
    Ok(weights.map(|(name, weight)| (name, Arc::new(weight) as WeightRef)).collect())
}

/// Maps a shard and checks its header; the data are not touched.
pub(crate) fn open(path: &Path) -> Result<Shard, CheckpointError> {
    crate::file::expect_regular(path)?;
    let file = MappedFile::open(path)?;
    let header = header::parse(file.bytes(), path)?;
    let mut shard = Shard { weights: Vec::with_capacity(header.tensors.len()), other: Vec::new() };
    for tensor in header.tensors {
        match tensor.dtype {
            Some(dtype) => {
                let name = tensor.name.clone();
                let weight =
                    MappedWeight::new(file.clone(), tensor.range, tensor.name, dtype, tensor.shape);
                shard.weights.push((name, weight));
            }
            None => shard.other.push(OtherTensor {
                name: tensor.name,
                dtype: tensor.stored.to_owned(),
                shape: tensor.shape,
                file: path.to_owned(),
                data: Some((file.clone(), tensor.range)),
            }),
        }
    }
    Ok(shard)
}
