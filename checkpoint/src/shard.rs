//! One safetensors file.

use std::path::Path;

use moe_merge_kernels::Dtype;

use crate::error::CheckpointError;
use crate::map::MappedFile;
use crate::weight::MappedWeight;

/// The weights of one shard, and the names of tensors that are no weights (integer buffers).
pub(crate) struct Shard {
    pub weights: Vec<(String, MappedWeight)>,
    pub other: Vec<String>,
}

/// Maps a shard and checks its header.
pub(crate) fn open(path: &Path) -> Result<Shard, CheckpointError> {
    let file = MappedFile::open(path)?;
    let malformed = |what: String| CheckpointError::Malformed {
        what,
        file: path.to_owned(),
        tensor: None,
        expected: "a complete safetensors file".into(),
        found: format!("{} bytes", file.bytes().len()),
        hint: Some("download or copy it again".into()),
    };
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(file.bytes())
        .map_err(|e| malformed(format!("not a safetensors file: {e}")))?;
    let mut shard = Shard { weights: Vec::new(), other: Vec::new() };
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::BF16 => Dtype::BF16,
            safetensors::Dtype::F16 => Dtype::F16,
            _ => {
                shard.other.push(name);
                continue;
            }
        };
        let start = header_len + 8;
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        let weight =
            MappedWeight::new(file.clone(), range, name.clone(), dtype, info.shape.clone());
        shard.weights.push((name, weight));
    }
    Ok(shard)
}
