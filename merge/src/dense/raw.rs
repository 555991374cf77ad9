//! Merges of tensor files that are no models: adapters, optimizer states, parts of anything.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_merge_checkpoint::write::{OutTensor, ShardName, ShardPlan, Watch, write_shards};
use moe_merge_checkpoint::{CheckpointError, Replace, Source};

use super::models::Models;
use super::modules::Family;
use super::slices::plan;
use super::tensors::{Merge, names};
use super::wrong;
use crate::error::MergeError;
use crate::experts::MoeInputs;
use crate::recipe::{DenseRecipe, Parts};
use crate::sources::Trail;

/// What happens to a name that not all files have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Missing {
    /// It is an error.
    #[default]
    Refuse,
    /// It is left out.
    Drop,
    /// It is merged among those files that have it.
    Union,
}

/// The result of a merge of tensor files; nothing is computed before it is read. Gradients have their first value (depth 0)
/// everywhere, as for all tensors outside of layers.
///
/// # Errors
/// As [`crate::dense`]; [`MergeError::Checkpoint`] for a name that a file lacks, with [`Missing::Refuse`], or that the base
/// lacks.
///
/// # Source
/// mergekit `scripts/merge_raw_pytorch.py`.
pub fn raw(recipe: &DenseRecipe, base_dir: &Path, missing: Missing) -> Result<Source, MergeError> {
    if !recipe.modules.iter().all(|m| matches!(m.parts, Parts::Models(_))) {
        return Err(wrong(&recipe.place, "files of tensors have no layers: write `models`").into());
    }
    if recipe.method.activations.is_some() {
        let what =
            format!("`{}` runs its models, and files of tensors are none", recipe.method.name);
        return Err(wrong(&recipe.place, what).into());
    }
    let trail = Trail::starting_at(&recipe.place.file);
    let experts = MoeInputs::default();
    let mut models =
        Models { trail: &trail, base_dir, recipe, opened: Vec::new(), experts, files: true };
    let family = Family::of_files();
    let modules = plan(recipe, &family, &mut models)?;
    let mut merge = Merge::new(recipe, &models, &family, None);
    let mut dropped = Vec::new();
    for slice in modules.iter().flat_map(|m| &m.slices) {
        let names: BTreeSet<String> =
            slice.inputs.iter().flat_map(|i| names(merge.source(i))).cloned().collect();
        for name in names {
            let without = slice.inputs.iter().find(|i| {
                let source = merge.source(i);
                !source.tensors.contains_key(&name) && source.other(&name).is_none()
            });
            match (without, missing) {
                (Some(_), Missing::Drop) => {
                    dropped.push(name);
                    continue;
                }
                (Some(without), Missing::Refuse) => {
                    return Err(merge.source(without).missing(&name).into());
                }
                (None, _) | (Some(_), Missing::Union) => {}
            }
            let inputs = vec![name.clone(); slice.inputs.len()];
            merge.tensor(slice, 0.0, &inputs, name)?;
        }
    }
    let mut notes: Vec<String> = merge.partial_note().into_iter().collect();
    let Merge { tensors, buffers, .. } = merge;
    if !dropped.is_empty() {
        let names: Vec<String> = dropped.iter().take(4).map(|n| format!("`{n}`")).collect();
        let more = if dropped.len() > 4 { ", …" } else { "" };
        let count = dropped.len();
        notes.push(format!(
            "{count} names left out that not all files have: {}{more}",
            names.join(", ")
        ));
    }
    Ok(Source {
        label: recipe.name.clone().unwrap_or_else(|| recipe.method.name.to_owned()),
        path: recipe.place.file.clone(),
        config: Default::default(),
        tensors,
        other: buffers,
        files: models.opened.iter().flat_map(|m| m.source.files.clone()).collect(),
        side: Vec::new(),
        notes,
    })
}

/// Writes the tensors of `source` as one file, complete or not at all; returns its bytes.
///
/// # Errors
/// [`MergeError::Checkpoint`]: a file that is there, unless it may be replaced; no room; an interruption; numbers that are
/// not finite.
pub fn write_tensors(
    source: &Source,
    out: &Path,
    replace: Replace,
    watch: Watch<'_>,
) -> Result<u64, MergeError> {
    let place = std::path::absolute(out).map_err(|e| CheckpointError::io("resolving", out, e))?;
    let there = place.symlink_metadata();
    if there.as_ref().is_ok_and(|m| replace == Replace::Never || !m.is_file()) {
        return Err(CheckpointError::OutputExists { path: out.to_owned() }.into());
    }
    if source
        .files
        .iter()
        .any(|f| f.canonicalize().ok() == place.canonicalize().ok() && there.is_ok())
    {
        return Err(CheckpointError::Unsupported {
            what: "the output would replace one of its own sources".into(),
            file: out.to_owned(),
            hint: "choose another file with `--out`".into(),
        }
        .into());
    }
    let parent: PathBuf = place.parent().map(Path::to_owned).unwrap_or_default();
    fs_err::create_dir_all(&parent)
        .map_err(|e| CheckpointError::io("creating a folder", &parent, e))?;
    let beside = tempfile::Builder::new()
        .prefix(".moe-merge-")
        .tempdir_in(&parent)
        .map_err(|e| CheckpointError::io("writing to the folder of the output", &parent, e))?;
    let tensors = source.tensors.iter().map(|(name, weight)| OutTensor {
        name: name.clone(),
        weight: weight.clone(),
        dtype: weight.dtype(),
    });
    let name = ShardName::Fixed("tensors".into());
    let buffers = source.other.clone();
    let plan = [ShardPlan { buffers, ..ShardPlan::new(name, tensors.collect()) }];
    let written = write_shards(beside.path(), &plan, watch)?;
    let file = beside.path().join("tensors");
    fs_err::rename(&file, &place)
        .map_err(|e| CheckpointError::io("moving the output", &place, e))?;
    Ok(written.iter().map(|w| w.file.size).sum())
}
