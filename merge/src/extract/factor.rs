//! The change of one tensor, and what of it fits into a few directions.

use moe_merge_checkpoint::{CheckpointError, WeightRef};
use moe_merge_kernels::svd::{Svd, truncated_svd};

use super::pairs::{Form, Pair, same_bytes};
use super::{ExtractOptions, Scale};
use crate::error::MergeError;

/// `W_tuned - W_base = B A` as far as its rank goes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    pub rank: usize,
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
}

/// What became of a pair.
#[derive(Debug, Clone)]
pub(super) enum Change {
    /// Nothing changed.
    None,
    /// Factors, with the energy that they keep of what there is, and the energy of the base.
    Factors { factors: Factors, kept: f64, energy: f64, base: f64 },
    /// The tensor of the tuned model.
    Whole,
}

/// Finds out what changed.
pub(super) fn change(pair: &Pair, options: &ExtractOptions) -> Result<Change, MergeError> {
    let same = match (pair.form, &pair.bias) {
        (Form::Whole, Some(_)) => return Ok(Change::Whole),
        _ => Ok(Change::None),
    };
    if same_bytes(&pair.base, &pair.tuned) {
        return same;
    }
    let base = pair.base.to_f32()?;
    let mut difference = pair.tuned.to_f32()?;
    difference.iter_mut().zip(&base).for_each(|(d, b)| *d -= b);
    if let Some(index) = difference.iter().position(|d| !d.is_finite()) {
        let wrong = if base[index].is_finite() { &pair.tuned } else { &pair.base };
        let (file, tensor) = wrong.origin();
        return Err(CheckpointError::NotFinite { file, tensor, index }.into());
    }
    if difference.iter().all(|d| *d == 0.0) {
        return same;
    }
    if pair.form == Form::Whole {
        return Ok(Change::Whole);
    }
    let energy_of_base = base.iter().map(|v| f64::from(*v).powi(2)).sum();
    drop(base);
    let (rows, cols) = (pair.base.rows(), pair.base.cols());
    let svd = truncated_svd(&difference, rows, cols, options.rank.get())
        .map_err(|_| overflow(&pair.tuned))?;
    let rank = rank(&svd, options);
    let kept = svd.values[..rank].iter().map(|s| s * s).sum();
    let factors = factors(&svd, rank, [rows, cols], pair.form, options.scale);
    Ok(Change::Factors { factors, kept, energy: svd.energy, base: energy_of_base })
}

fn overflow(weight: &WeightRef) -> MergeError {
    let (file, tensor) = weight.origin();
    CheckpointError::Malformed {
        what: "the change of a tensor is too large to be decomposed".into(),
        file,
        tensor: Some(tensor),
        expected: "numbers of the size of the base's".into(),
        found: "squares that add up to infinity".into(),
        hint: Some("the checkpoint is damaged or diverged in training".into()),
    }
    .into()
}

/// Directions above the threshold; of these, as few as keep the share of the energy that is asked for.
fn rank(svd: &Svd, options: &ExtractOptions) -> usize {
    let above = svd.values.iter().take_while(|s| **s > options.threshold).count();
    let Some(share) = options.energy else { return above };
    let mut kept = 0.0;
    for (i, s) in svd.values[..above].iter().enumerate() {
        kept += s * s;
        if kept >= share * svd.energy {
            return i + 1;
        }
    }
    above
}

fn factors(svd: &Svd, rank: usize, [rows, cols]: [usize; 2], form: Form, scale: Scale) -> Factors {
    // An embedding is looked up: its factors are those of the transpose.
    let (left, right, outputs, inputs) = match form {
        Form::Embedding => (&svd.right, &svd.left, cols, rows),
        _ => (&svd.left, &svd.right, rows, cols),
    };
    let (mut a, mut b) = (vec![0.0; rank * inputs], vec![0.0; outputs * rank]);
    for (i, &value) in svd.values[..rank].iter().enumerate() {
        let (to_a, to_b) = match scale {
            Scale::Both => (value.sqrt() as f32, value.sqrt() as f32),
            Scale::A => (value as f32, 1.0),
        };
        let from = &right[i * inputs..(i + 1) * inputs];
        a[i * inputs..(i + 1) * inputs].iter_mut().zip(from).for_each(|(a, v)| *a = to_a * v);
        let from = &left[i * outputs..(i + 1) * outputs];
        b.iter_mut().skip(i).step_by(rank).zip(from).for_each(|(b, u)| *b = to_b * u);
    }
    Factors { rank, a, b }
}

impl Factors {
    /// Nothing, as a pair of rank 1.
    pub fn zero(outputs: usize, inputs: usize) -> Self {
        Self { rank: 1, a: vec![0.0; inputs], b: vec![0.0; outputs] }
    }

    /// The same product at a larger rank.
    pub fn filled(mut self, rank: usize) -> Self {
        let (inputs, outputs) = match self.rank {
            0 => return self,
            own => (self.a.len() / own, self.b.len() / own),
        };
        if rank <= self.rank {
            return self;
        }
        let mut b = vec![0.0; outputs * rank];
        for (to, from) in b.chunks_exact_mut(rank).zip(self.b.chunks_exact(self.rank)) {
            to[..self.rank].copy_from_slice(from);
        }
        self.a.resize(rank * inputs, 0.0);
        Self { rank, a: self.a, b }
    }
}
