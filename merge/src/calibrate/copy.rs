//! A model folder somewhere else, with its history.

use std::fs;
use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, Interrupt};

/// Copies what `from` holds to `to`, which exists: links are followed, and what a change that is under way has prepared is
/// left out.
pub(crate) fn copy(from: &Path, to: &Path, interrupt: &Interrupt) -> Result<(), CheckpointError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |e| CheckpointError::io(action, &path, e)
    };
    for entry in fs::read_dir(from).map_err(io("listing", from))? {
        interrupt.check()?;
        let name = entry.map_err(io("listing", from))?.file_name();
        let (source, target) = (from.join(&name), to.join(&name));
        if from.ends_with(".moe-merge")
            && ["lock", "staging", "pending.json"].iter().any(|n| name == *n)
        {
            continue;
        }
        if source.is_dir() {
            fs::create_dir(&target).map_err(io("creating a folder", &target))?;
            copy(&source, &target, interrupt)?;
        } else {
            fs::copy(&source, &target).map_err(io("copying", &source))?;
        }
    }
    Ok(())
}
