//! Small model folders, made for one test.

use std::fs;
use std::path::Path;

use moe_merge_checkpoint::hub::Hub;
use moe_merge_checkpoint::{CheckpointError, Source, SourceRef};
use safetensors::tensor::TensorView;

/// Writes a shard with one-number F32 tensors.
pub fn shard(path: &Path, names: &[&str]) {
    let views = names.iter().map(|n| {
        (*n, TensorView::new(safetensors::Dtype::F32, vec![1], &[0, 0, 128, 63]).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Writes the smallest `config.json`.
pub fn config(folder: &Path) {
    fs::write(folder.join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
}

/// Opens `text` below `base`, without a Hub.
#[allow(dead_code)]
pub fn open(text: &str, base: &Path) -> Result<Source, CheckpointError> {
    Source::open_with(&SourceRef::parse(text, base)?, base, &Hub::default())
}
