//! Matrices that were fitted, kept in files until the output is written: memory holds those of one layer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{OutTensor, ShardName, ShardPlan, Watch, write_shards};
use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef, weights};
use tempfile::TempDir;

use crate::families::Matrix;
use crate::recipe::AlignMethod;

/// A folder that is gone when the last weight in it is.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    folder: Arc<TempDir>,
    dtype: Dtype,
}

impl Store {
    /// Beside `target` where there is a folder, else where the system keeps files for a while.
    ///
    /// * `dtype`: how numbers are stored in the output; what is fitted later is fitted to numbers rounded like that
    pub fn beside(target: &Path, dtype: Dtype) -> Result<Self, CheckpointError> {
        let parent =
            target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(".moe-merge-fit-");
        let folder = match parent.is_dir() {
            true => builder.tempdir_in(parent),
            false => builder.tempdir(),
        };
        let folder = folder.map_err(|e| CheckpointError::io("making a folder in", parent, e))?;
        Ok(Self { folder: Arc::new(folder), dtype })
    }

    /// Writes the matrices of one expert in one layer, once for each `method`, and maps them.
    ///
    /// * `flat`: as [`moe_merge_model::transplant::LayerFit::weights`]
    pub fn put(
        &self,
        method: AlignMethod,
        (expert, layer): (usize, usize),
        [hidden, inter]: [usize; 2],
        flat: &[f32],
        interrupt: &Interrupt,
    ) -> Result<[WeightRef; 3], CheckpointError> {
        let size = hidden * inter;
        let name = |m: Matrix| format!("expert.{expert}.layer.{layer}.{}", m.name());
        let tensors = Matrix::ALL.iter().zip(flat.chunks_exact(size.max(1))).map(|(&m, values)| {
            let shape = if m == Matrix::Down { [hidden, inter] } else { [inter, hidden] };
            let weight = OwnedWeight::from_f32(&name(m), values, &shape, Dtype::F32);
            OutTensor { name: name(m), weight: Arc::new(weight), dtype: self.dtype }
        });
        // What is mapped already must not be written over.
        let file = format!("{}-{expert:02}-{layer:03}.safetensors", method.name());
        let mut all = self.keep(&file, tensors.collect(), interrupt)?;
        let missing = |tensor: String| CheckpointError::MissingTensor {
            file: self.folder.path().join(&file),
            tensor,
            nearest: None,
        };
        let mut take = |m| all.remove(&name(m)).ok_or_else(|| missing(name(m)));
        Ok([take(Matrix::Gate)?, take(Matrix::Up)?, take(Matrix::Down)?])
    }

    /// Writes `tensors` to a new file and maps them.
    pub fn keep(
        &self,
        file: &str,
        tensors: Vec<OutTensor>,
        interrupt: &Interrupt,
    ) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
        let shard = ShardPlan { name: ShardName::Fixed(file.to_owned()), tensors };
        let watch = Watch { interrupt, progress: &|_| {} };
        write_shards(self.folder.path(), &[shard], watch)?;
        weights(&self.folder.path().join(file))
    }
}
