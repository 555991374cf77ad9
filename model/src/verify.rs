//! Whether a model is whole: tensors, shapes, finite values, hashes.

use std::collections::BTreeMap;

use rayon::prelude::*;

use moe_merge_checkpoint::generation;
use moe_merge_checkpoint::manifest::{Manifest, Problem};
use moe_merge_checkpoint::{CheckpointError, Interrupt, Source, Weight, WeightRef};
use moe_merge_kernels::cast;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// A tensor that the config asks for is not there.
    Missing {
        /// Its name.
        tensor: String,
        /// Its shape by the config.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the config says.
    Shape {
        /// Its name.
        tensor: String,
        /// Shape by the config.
        expected: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// A tensor holds NaN or infinity.
    NotFinite {
        /// Its name.
        tensor: String,
        /// Flat index of the first bad number.
        index: usize,
    },
    /// A tensor cannot be computed from its file.
    Unreadable {
        /// Its name.
        tensor: String,
        /// Why.
        reason: String,
    },
    /// A file is not as the manifest says.
    File(Problem),
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { tensor, shape } => {
                write!(f, "`{tensor}` is missing, expected {shape:?}")
            }
            Self::Shape { tensor, expected, found } => {
                write!(f, "`{tensor}` has shape {found:?}, expected {expected:?}")
            }
            Self::NotFinite { tensor, index } => {
                write!(f, "`{tensor}` holds NaN or infinity, first at flat index {index}")
            }
            Self::Unreadable { tensor, reason } => write!(f, "`{tensor}` cannot be read: {reason}"),
            Self::File(problem) => problem.fmt(f),
        }
    }
}

/// What a check of a model found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Tensors that were read.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Tensors that the model does not use.
    pub extra: Vec<String>,
    /// Files compared with the manifest; none if there is no manifest.
    pub hashed: Option<usize>,
    /// The generation of the manifest.
    pub generation: Option<u32>,
    /// What a person should know that is no fault of the model.
    pub notes: Vec<String>,
    /// What is wrong; empty for a whole model.
    pub findings: Vec<Finding>,
}

/// Checks that every tensor of `expected` is there with its shape, that all weights are finite, and that files and
/// history are as manifest and journal say, if there are any. Everything wrong is listed.
///
/// Tensors are read in parallel, each by blocks, and their pages are given back, so that memory stays bounded.
///
/// * `expected`: names and shapes by the config
/// * `optional`: the same of tensors that may be absent
/// * `progress`: told the bytes that were read, from any thread
///
/// # Errors
/// [`CheckpointError::Interrupted`], and a manifest that is none.
pub fn verify(
    source: &Source,
    expected: &[(String, Vec<usize>)],
    optional: &[(String, Vec<usize>)],
    interrupt: &Interrupt,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Verification, CheckpointError> {
    let known: BTreeMap<&str, (&[usize], bool)> = expected
        .iter()
        .map(|(name, shape)| (name.as_str(), (shape.as_slice(), true)))
        .chain(optional.iter().map(|(name, shape)| (name.as_str(), (shape.as_slice(), false))))
        .collect();
    let mut findings = Vec::new();
    for (&tensor, &(shape, required)) in &known {
        let tensor = tensor.to_owned();
        match source.tensors.get(&tensor) {
            None if !required => {}
            None => findings.push(match source.missing(&tensor) {
                CheckpointError::Malformed { expected, found, .. } => {
                    let reason = format!("{found}, expected {expected}");
                    Finding::Unreadable { tensor, reason }
                }
                _ => Finding::Missing { tensor, shape: shape.to_vec() },
            }),
            Some(weight) if weight.shape() != shape => findings.push(Finding::Shape {
                tensor,
                expected: shape.to_vec(),
                found: weight.shape().to_vec(),
            }),
            Some(_) => {}
        }
    }
    let extra = source.tensors.keys().filter(|n| !known.contains_key(n.as_str()));
    let other = source.other.iter().map(|o| &o.name);
    let other = other.filter(|n| !known.contains_key(n.as_str()));
    let mut extra: Vec<String> = extra.chain(other).cloned().collect();
    extra.sort();
    let tensors: Vec<(&String, &WeightRef)> = source.tensors.iter().collect();
    let checked: Vec<Option<Finding>> = tensors
        .par_iter()
        .map(|(name, weight)| {
            interrupt.check()?;
            let finding = match first_non_finite(weight.as_ref()) {
                Ok(index) => {
                    index.map(|index| Finding::NotFinite { tensor: (*name).clone(), index })
                }
                Err(e) => {
                    Some(Finding::Unreadable { tensor: (*name).clone(), reason: e.to_string() })
                }
            };
            weight.release();
            progress(weight.size_in(weight.dtype()));
            Ok(finding)
        })
        .collect::<Result<_, CheckpointError>>()?;
    findings.extend(checked.into_iter().flatten());
    let manifest = Manifest::load(&source.path)?;
    let mut notes = Vec::new();
    if let Some(manifest) = &manifest {
        let problems = manifest.check(&source.path, interrupt)?;
        let history = generation::check(&source.path, interrupt)?;
        findings.extend(problems.into_iter().chain(history.problems).map(Finding::File));
        notes = history.notes;
    }
    Ok(Verification {
        tensors: tensors.len(),
        bytes: tensors.iter().map(|(_, w)| w.size_in(w.dtype())).sum(),
        extra,
        hashed: manifest.as_ref().map(|m| m.files.len()),
        generation: manifest.map(|m| m.generation),
        notes,
        findings,
    })
}

/// Flat index of the first number of a weight that is NaN or infinite.
///
/// # Errors
/// What computing the rows can meet.
pub fn first_non_finite(weight: &dyn Weight) -> Result<Option<usize>, CheckpointError> {
    /// Rows computed at a time.
    const ROWS: usize = 64;
    if let Some(bytes) = weight.bytes() {
        return Ok(cast::first_non_finite(bytes, weight.dtype()));
    }
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut values = vec![0.0; ROWS.min(rows) * cols];
    for from in (0..rows).step_by(ROWS) {
        let to = rows.min(from + ROWS);
        let values = &mut values[..(to - from) * cols];
        weight.read_rows(from..to, values)?;
        if let Some(bad) = values.iter().position(|v| !v.is_finite()) {
            return Ok(Some(from * cols + bad));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::{OwnedWeight, PermutedRows};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn weight(name: &str, values: &[f32], shape: &[usize]) -> WeightRef {
        Arc::new(OwnedWeight::from_f32(name, values, shape, Dtype::F32))
    }

    #[test]
    fn every_kind_of_problem_is_listed() {
        let Some(path) = moe_merge_testkit::shared("models/tiny/base") else { return };
        let mut source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
        source.tensors = [
            ("a", weight("a", &[1.0, f32::NAN], &[2])),
            ("b", weight("b", &[1.0; 6], &[2, 3])),
            ("d", weight("d", &[1.0], &[1])),
        ]
        .map(|(n, w)| (n.to_owned(), w))
        .into();
        let expected =
            [("a", vec![2]), ("b", vec![3, 2]), ("c", vec![4])].map(|(n, s)| (n.to_owned(), s));
        let bytes = AtomicU64::new(0);
        let count = |n| {
            bytes.fetch_add(n, Ordering::Relaxed);
        };
        let found = verify(&source, &expected, &[], &Interrupt::default(), &count).unwrap();
        assert_eq!((found.tensors, found.bytes, found.hashed), (3, 36, None));
        assert_eq!(bytes.into_inner(), 36);
        assert_eq!(found.extra, ["d"]);
        let text: Vec<String> = found.findings.iter().map(|f| f.to_string()).collect();
        assert_eq!(
            text,
            [
                "`b` has shape [2, 3], expected [3, 2]",
                "`c` is missing, expected [4]",
                "`a` holds NaN or infinity, first at flat index 1",
            ]
        );
    }

    #[test]
    fn computed_weights_are_checked_too() {
        let mut values = vec![1.0; 200];
        values[150] = f32::INFINITY;
        let inner = weight("w", &values, &[100, 2]);
        let order = Arc::new((0..100).rev().collect());
        let permuted = PermutedRows::new(inner, order);
        // Flat 150 is row 75, which comes 24th in reverse order.
        assert_eq!(first_non_finite(&permuted).unwrap(), Some(48));
    }

    #[test]
    fn an_interrupt_ends_it() {
        let Some(path) = moe_merge_testkit::shared("models/tiny/base") else { return };
        let source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
        let interrupt = Interrupt::default();
        interrupt.trigger();
        let error = verify(&source, &[], &[], &interrupt, &|_| {}).unwrap_err();
        assert!(matches!(error, CheckpointError::Interrupted));
    }
}
