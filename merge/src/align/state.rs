//! What is kept of fitting experts, so that a run that was stopped loses little: experts that are done, and where distilling was.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use moe_merge_checkpoint::CheckpointError;
use moe_merge_checkpoint::manifest::hash_bytes;
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_model::ModelError;
use moe_merge_model::transplant::{DistillationState, Distilled, Told};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::AlignedExpert;
use crate::error::MergeError;
use crate::recipe::AlignMethod;

/// Time between two saves.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// One thing to do and the file that keeps what was done of it.
#[derive(Debug, Clone)]
pub(super) struct Keeper {
    file: PathBuf,
    /// What has to be the same when a run goes on.
    begun: Value,
    saved: Instant,
}

/// What the file says before its numbers.
#[derive(Debug, Serialize, Deserialize)]
struct Header<T> {
    begun: Value,
    kept: T,
    /// Lengths of the lists of numbers that follow.
    lengths: Vec<usize>,
}

/// [`DistillationState`] without its numbers.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    steps: usize,
    stale: usize,
    best_step: usize,
    held_out: [Vec<Option<f64>>; 2],
    numbers: usize,
}

impl Keeper {
    /// * `texts`: what is learnt from
    pub fn new(folder: &Path, name: &str, mut begun: Value, texts: &[&[Vec<u32>]]) -> Self {
        let bytes: Vec<u8> = texts
            .iter()
            .flat_map(|texts| texts.iter())
            .flat_map(|text| text.iter().chain([&u32::MAX]))
            .flat_map(|token| token.to_le_bytes())
            .collect();
        begun["texts"] = json!(hash_bytes(&bytes));
        Self { file: folder.join(name), begun, saved: Instant::now() }
    }

    /// What a finished run has left; `None` if none has, or one that was begun otherwise.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn done<T: DeserializeOwned>(&self) -> Result<Option<T>, CheckpointError> {
        Ok(self.read::<T>()?.map(|(kept, _)| kept))
    }

    /// Keeps what a finished run has come to.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn finish<T: Serialize>(&self, kept: &T) -> Result<(), CheckpointError> {
        self.write(kept, &[])
    }

    /// Where distilling was.
    ///
    /// # Errors
    /// As [`Keeper::done`].
    pub fn state(&self) -> Result<Option<DistillationState>, CheckpointError> {
        let Some((place, mut numbers)) = self.read::<Place>()? else { return Ok(None) };
        let best = numbers.split_off(place.numbers.min(numbers.len()));
        let Place { steps, stale, best_step, held_out, .. } = place;
        Ok(Some(DistillationState { steps, stale, best_step, held_out, numbers, best }))
    }

    /// Keeps it, now or if it is time to.
    ///
    /// # Errors
    /// As [`Keeper::finish`].
    pub fn save(
        &mut self,
        now: bool,
        state: &mut dyn FnMut() -> DistillationState,
    ) -> Result<(), CheckpointError> {
        if !now && self.saved.elapsed() < SAVE_EVERY {
            return Ok(());
        }
        let DistillationState { steps, stale, best_step, held_out, numbers, best } = state();
        let place = Place { steps, stale, best_step, held_out, numbers: numbers.len() };
        let all: Vec<&[f32]> = numbers.iter().chain(&best).map(Vec::as_slice).collect();
        self.write(&place, &all)?;
        self.saved = Instant::now();
        Ok(())
    }

    /// The file has done its service.
    pub fn forget(&self) -> Result<(), CheckpointError> {
        match std::fs::remove_file(&self.file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(CheckpointError::io("removing", &self.file, e))
            }
            _ => Ok(()),
        }
    }

    fn write<T: Serialize>(&self, kept: &T, numbers: &[&[f32]]) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::io("writing", &self.file, e);
        let lengths = numbers.iter().map(|n| n.len()).collect();
        let header = Header { begun: self.begun.clone(), kept, lengths };
        let mut header = serde_json::to_vec(&header).map_err(|e| failed(e.into()))?;
        header.push(b'\n');
        let folder = self.file.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        for numbers in numbers {
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            file.write_all(&bytes).map_err(failed)?;
        }
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&self.file).map_err(|e| failed(e.error))?;
        Ok(())
    }

    #[expect(clippy::type_complexity, reason = "a value and its numbers")]
    fn read<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<Vec<f32>>)>, CheckpointError> {
        let bytes = match std::fs::read(&self.file) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(CheckpointError::io("reading", &self.file, e)),
        };
        let malformed = |found: String| CheckpointError::Malformed {
            what: "this is no state of fitting experts".into(),
            file: self.file.clone(),
            tensor: None,
            expected: "what `align` keeps while it runs".into(),
            found,
            hint: Some("delete it to begin anew, or name another folder".into()),
        };
        let end = bytes.iter().position(|b| *b == b'\n').unwrap_or(bytes.len());
        let header: Header<Value> =
            serde_json::from_slice(&bytes[..end]).map_err(|e| malformed(e.to_string()))?;
        if header.begun != self.begun {
            return Ok(None);
        }
        let kept = serde_json::from_value(header.kept).map_err(|e| malformed(e.to_string()))?;
        let mut rest = bytes.get(end + 1..).unwrap_or_default();
        let mut lists = Vec::new();
        for length in header.lengths {
            let size = length.checked_mul(4).filter(|size| *size <= rest.len());
            let size = size.ok_or_else(|| malformed(format!("a file of {} bytes", bytes.len())))?;
            let (own, left) = rest.split_at(size);
            let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            lists.push(own.chunks_exact(4).map(number).collect());
            rest = left;
        }
        Ok(Some((kept, lists)))
    }
}

/// What is kept of an expert that is done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Done {
    /// Under whose name its matrices are in the store.
    pub method: AlignMethod,
    /// Layers with new ones.
    pub layers: Vec<usize>,
    /// The report.
    pub made: AlignedExpert,
}

/// Distils with what `keeper` has, and lets it keep where that is.
///
/// # Errors
/// As `run`; interruption; a state that cannot be read or written.
pub(super) fn kept(
    keeper: &mut Option<Keeper>,
    interrupt: &Interrupt,
    done: &mut dyn FnMut(),
    run: &mut dyn FnMut(Option<DistillationState>, &mut Told<'_>) -> Result<Distilled, ModelError>,
) -> Result<Distilled, MergeError> {
    let state = keeper.as_ref().map(Keeper::state).transpose()?.flatten();
    let mut failed = None;
    let made = run(state, &mut |_, state| {
        done();
        let stopped = interrupt.check().is_err();
        if let Some(keeper) = keeper
            && let Err(e) = keeper.save(stopped, state)
        {
            failed = Some(e);
            return ControlFlow::Break(());
        }
        if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    failed.map_or(Ok(()), Err)?;
    interrupt.check()?;
    Ok(made?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_and_only_to_the_run_it_belongs_to() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = |steps: u32, text: u32| {
            let texts = [vec![text, 2], vec![3]];
            Keeper::new(folder.path(), "x.state", json!({"steps": steps}), &[&texts])
        };
        let state = DistillationState {
            steps: 7,
            stale: 1,
            best_step: 5,
            held_out: [vec![Some(1.0 / 3.0), None], vec![Some(0.25), None]],
            numbers: vec![vec![1.5, -2.0], vec![], vec![f32::MIN_POSITIVE]],
            best: vec![vec![0.1; 3]],
        };
        let mut own = keeper(9, 1);
        assert_eq!(own.state().unwrap(), None);
        own.save(false, &mut || panic!("it is too soon")).unwrap();
        own.save(true, &mut || state.clone()).unwrap();
        assert_eq!(own.state().unwrap(), Some(state));
        assert_eq!(keeper(8, 1).state().unwrap(), None);
        assert_eq!(keeper(9, 4).state().unwrap(), None);
        let file = folder.path().join("x.state");
        let bytes = std::fs::read(&file).unwrap();
        for cut in [bytes.len() - 1, 40, 0] {
            std::fs::write(&file, &bytes[..cut]).unwrap();
            let error = own.state().unwrap_err().to_string();
            assert!(error.contains("no state of fitting experts"), "{error}");
        }
        own.forget().unwrap();
        own.forget().unwrap();
        assert_eq!(own.state().unwrap(), None);
    }
}
