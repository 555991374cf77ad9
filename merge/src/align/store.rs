//! Matrices that were fitted, kept in files until the output is written: memory holds those of one layer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{OutTensor, ShardName, ShardPlan, Watch, write_shards};
use moe_merge_checkpoint::{CheckpointError, Dtype, WeightRef, weights};
use tempfile::TempDir;

use crate::families::Matrix;
use crate::recipe::{Align, AlignMethod};

/// A folder of fitted matrices.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    folder: Folder,
    dtype: Dtype,
}

#[derive(Debug, Clone)]
enum Folder {
    /// Gone when the last weight in it is.
    Passing(Arc<TempDir>),
    /// A person's.
    Kept(PathBuf),
}

impl Store {
    /// In the folder that `align` names to keep things in, else as [`Store::beside`].
    pub fn of(align: &Align, target: &Path, dtype: Dtype) -> Result<Self, CheckpointError> {
        let Some(folder) = &align.state else { return Self::beside(target, dtype) };
        std::fs::create_dir_all(folder)
            .map_err(|e| CheckpointError::io("making the folder", folder, e))?;
        Ok(Self { folder: Folder::Kept(folder.clone()), dtype })
    }

    /// The folder of a person's, where one was named.
    pub fn kept(&self) -> Option<&Path> {
        match &self.folder {
            Folder::Passing(_) => None,
            Folder::Kept(folder) => Some(folder),
        }
    }

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
        Ok(Self { folder: Folder::Passing(Arc::new(folder)), dtype })
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
        let name = |m: Matrix| name(m, (expert, layer));
        let tensors = Matrix::ALL.iter().zip(flat.chunks_exact(size.max(1))).map(|(&m, values)| {
            let shape = if m == Matrix::Down { [hidden, inter] } else { [inter, hidden] };
            let weight = OwnedWeight::from_f32(&name(m), values, &shape, Dtype::F32);
            OutTensor { name: name(m), weight: Arc::new(weight), dtype: self.dtype }
        });
        // What is mapped already must not be written over.
        let file = file(method, (expert, layer));
        self.keep(&file, tensors.collect(), interrupt)?;
        self.get(method, (expert, layer))
    }

    /// Maps what [`Store::put`] has written, in this run or an earlier one.
    pub fn get(
        &self,
        method: AlignMethod,
        (expert, layer): (usize, usize),
    ) -> Result<[WeightRef; 3], CheckpointError> {
        let name = |m: Matrix| name(m, (expert, layer));
        let file = self.path().join(file(method, (expert, layer)));
        let mut all = weights(&file)?;
        let missing = |tensor: String| CheckpointError::MissingTensor {
            file: file.clone(),
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
        let shard = ShardPlan::new(ShardName::Fixed(file.to_owned()), tensors);
        let watch = Watch { interrupt, progress: &|_| {} };
        write_shards(self.path(), &[shard], watch)?;
        weights(&self.path().join(file))
    }

    fn path(&self) -> &Path {
        match &self.folder {
            Folder::Passing(folder) => folder.path(),
            Folder::Kept(folder) => folder,
        }
    }
}

fn file(method: AlignMethod, (expert, layer): (usize, usize)) -> String {
    format!("{}-{expert:02}-{layer:03}.safetensors", method.name())
}

fn name(matrix: Matrix, (expert, layer): (usize, usize)) -> String {
    format!("expert.{expert}.layer.{layer}.{}", matrix.name())
}
