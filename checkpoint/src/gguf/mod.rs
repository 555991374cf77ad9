//! GGUF files: a model in one file, seen through Hugging Face names.

mod config;
mod dequant;
mod header;
pub mod key;
mod kinds;
mod names;
mod pre;
mod quantise;
mod rope;
mod table;
mod target;
mod tensors;
mod tokenizer;
mod tokenizer_json;
mod value;
mod vocabulary;
mod write;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moe_merge_kernels::Dtype;

pub use dequant::{BlockWeight, Shifted};
pub use header::{Header, TensorInfo, parse};
pub use kinds::TensorKind;
pub use rope::llama3_factors;
pub use table::{Architecture, ROPE_FREQS};
pub use tensors::{TensorPlan, extra_vector};
pub use value::{List, Value};
pub use vocabulary::{no_vocabulary, vocabulary};
pub use write::{GgufPlan, GgufTensor, MetaValue, Metadata, Storage};

use crate::error::CheckpointError;
use crate::map::MappedFile;
use crate::source::Source;
use crate::weight::{MappedWeight, WeightRef};

/// Opens a GGUF file of versions 2 or 3.
///
/// F32, F16 and BF16 tensors are views of the file; quantised ones are dequantised row by row when they are read, and
/// their dtype is f32. Names, shapes, row order, configuration and tokenizer are those of the Hugging Face model that
/// the file was converted from.
///
/// # Errors
/// [`CheckpointError::Malformed`] for a damaged file, [`CheckpointError::Unsupported`] for an architecture,
/// quantisation or tokenizer that this program does not know, [`CheckpointError::Io`] if it cannot be read.
pub fn open(path: &Path) -> Result<Source, CheckpointError> {
    let file = MappedFile::open(path)?;
    let header = header::parse(file.bytes(), path)?;
    refuse_split(&header, path)?;
    let named = names::map(&header, &file)?;
    let mut notes = named.notes;
    let config = config::config_json(&header, &file, &named.tensors, &mut notes)?;
    let side = tokenizer::side_files(&header, &config, path, &mut notes)?;
    Ok(Source {
        label: path.display().to_string(),
        path: path.to_owned(),
        config,
        tensors: named.tensors,
        other: named.other,
        files: vec![path.to_owned()],
        side,
        notes,
    })
}

/// The tensors of a GGUF file under their own names, shapes row-major, rows in the order of the file.
///
/// # Errors
/// As [`open`], but for the architecture, which may be any.
pub fn open_raw(path: &Path) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
    let file = MappedFile::open(path)?;
    let header = header::parse(file.bytes(), path)?;
    let weights = header.tensors.iter().filter(|t| !t.kind.is_no_weight());
    weights.map(|t| Ok((t.name.to_owned(), weight(&file, t)?))).collect()
}

/// The weight of one tensor.
fn weight(file: &MappedFile, tensor: &TensorInfo) -> Result<WeightRef, CheckpointError> {
    let (range, name, shape) = (tensor.range.clone(), tensor.name.to_owned(), tensor.shape.clone());
    let plain = |dtype| -> WeightRef {
        Arc::new(MappedWeight::new(file.clone(), range.clone(), name.clone(), dtype, shape.clone()))
    };
    match tensor.kind {
        TensorKind::F32 => Ok(plain(Dtype::F32)),
        TensorKind::F16 => Ok(plain(Dtype::F16)),
        TensorKind::BF16 => Ok(plain(Dtype::BF16)),
        kind => match BlockWeight::new(file.clone(), range, name, kind, shape) {
            Some(weight) => Ok(Arc::new(weight)),
            None => Err(CheckpointError::Malformed {
                what: "tensor is quantised in a way this program cannot read".into(),
                file: file.path().to_owned(),
                tensor: Some(tensor.name.to_owned()),
                expected: READABLE.into(),
                found: kind.to_string(),
                hint: Some(
                    "take another quantisation of this model (Q8_0 loses least), or the original"
                        .into(),
                ),
            }),
        },
    }
}

const READABLE: &str =
    "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL or IQ4_XS";

/// A part of a model that was split over several files is refused: half of the layers would be missing.
fn refuse_split(header: &Header, path: &Path) -> Result<(), CheckpointError> {
    match header.get("split.count").and_then(Value::unsigned) {
        Some(count) if count > 1 => Err(CheckpointError::Unsupported {
            what: format!("GGUF model is split over {count} files"),
            file: path.to_owned(),
            hint: "join them first: `llama-gguf-split --merge FIRST-PART OUT.gguf`".into(),
        }),
        _ => Ok(()),
    }
}
