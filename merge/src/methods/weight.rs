//! The result of a method as a weight.

use std::fmt::Debug;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use half::{bf16, f16};
use moe_merge_checkpoint::{CheckpointError, Dtype, Weight, WeightRef};
use moe_merge_kernels::elementwise;

use super::scan::BLOCK;
use super::{Method, passthrough};
use crate::compose::rounded;

/// One tensor of several models, and what the recipe says about it.
#[derive(Debug)]
pub struct Group {
    /// The tensors; all of one shape.
    pub inputs: Vec<WeightRef>,
    /// Which of them is the base.
    pub base: Option<usize>,
    /// Per input, the values of the method's per-model parameters, in the order of its table; NaN where not given.
    pub own: Vec<Vec<f64>>,
    /// The values of its global parameters, in the order of its table.
    pub global: Vec<f64>,
    /// Dtype of the arithmetic.
    pub dtype: Dtype,
    /// Dtype of the output.
    pub out_dtype: Dtype,
    /// Name of the output tensor.
    pub name: String,
    /// The recipe.
    pub recipe: PathBuf,
    /// Seed of the random methods.
    pub seed: u64,
}

impl Group {
    /// The value of the per-model parameter `index` for each input.
    pub(super) fn own(&self, index: usize) -> Vec<f64> {
        self.own.iter().map(|values| values[index]).collect()
    }

    /// The inputs that are not the base, in recipe order.
    pub(crate) fn others(&self) -> Vec<usize> {
        (0..self.inputs.len()).filter(|m| Some(*m) != self.base).collect()
    }

    /// Which input is the base, for methods that need one.
    pub(super) fn required_base(&self) -> Result<usize, String> {
        self.base.ok_or_else(|| "the base is not among the models".into())
    }
}

/// Makes rows of the result from rows of the inputs.
pub trait Combine: Debug + Send + Sync {
    /// Finds what has to be known about whole tensors. Outside of the thread pool this is done by all its threads.
    fn prepare(&self, _inputs: &[WeightRef]) -> Result<(), CheckpointError> {
        Ok(())
    }

    /// Forgets what was found, if it takes memory that counts.
    fn release(&self) {}

    /// What a person should know about the result, once it is computed.
    fn remark(&self) -> Option<String> {
        None
    }

    /// Writes `rows` of the result to `out`, in the dtype of the arithmetic.
    fn rows(
        &self,
        inputs: &[WeightRef],
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError>;
}

/// The result of `method` for one tensor, computed when it is read.
///
/// # Errors
/// What the method cannot do with these values, in one line.
pub fn merged(method: &Method, group: Group) -> Result<WeightRef, String> {
    let dtype = group.dtype;
    // A computed weight (an adapter applied) counts as the dtype in which it would have been stored.
    let as_dtype = |w: &WeightRef| rounded(rounded(w.clone(), w.dtype()), dtype);
    let group = Group { inputs: group.inputs.iter().map(as_dtype).collect(), ..group };
    if let [only] = group.inputs.as_slice()
        && passthrough::is_copy(method, &group)
        && dtype == group.out_dtype
    {
        return Ok(only.clone());
    }
    let combine = (method.build)(&group)?;
    let shape = group.inputs.first().map(|w| w.shape().to_vec()).ok_or("no model has it")?;
    Ok(Arc::new(Merged {
        combine,
        shape,
        inputs: group.inputs,
        arithmetic: dtype,
        dtype: group.out_dtype,
        name: group.name,
        recipe: group.recipe,
    }))
}

#[derive(Debug)]
struct Merged {
    combine: Box<dyn Combine>,
    inputs: Vec<WeightRef>,
    shape: Vec<usize>,
    arithmetic: Dtype,
    dtype: Dtype,
    name: String,
    recipe: PathBuf,
}

/// Whether `values` are what `dtype` holds.
fn is_rounded(values: &[f32], dtype: Dtype) -> bool {
    let mut rounded = values.to_vec();
    elementwise::round(&mut rounded, dtype);
    rounded.iter().zip(values).all(|(r, v)| r.to_bits() == v.to_bits() || v.is_nan())
}

impl Weight for Merged {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let cols = (self as &dyn Weight).cols().max(1);
        let step = (BLOCK / cols).max(1);
        let mut from = rows.start;
        while from < rows.end {
            let to = rows.end.min(from + step);
            let part = &mut out[(from - rows.start) * cols..(to - rows.start) * cols];
            self.combine.rows(&self.inputs, from..to, part)?;
            debug_assert!(is_rounded(part, self.arithmetic), "{}", self.name);
            if self.dtype != self.arithmetic {
                elementwise::round(part, self.dtype);
            }
            from = to;
        }
        Ok(())
    }

    fn inputs(&self) -> &[WeightRef] {
        &self.inputs
    }

    fn prepare(&self) -> Result<(), CheckpointError> {
        self.inputs.iter().try_for_each(|w| w.prepare())?;
        self.combine.prepare(&self.inputs)
    }

    fn origin(&self) -> (PathBuf, String) {
        (self.recipe.clone(), self.name.clone())
    }

    fn release(&self) {
        self.combine.release();
        self.inputs.iter().for_each(|w| w.release());
    }

    fn remark(&self) -> Option<String> {
        self.combine.remark().or_else(|| self.inputs.iter().find_map(|w| w.remark()))
    }
}

/// `value` rounded to nearest even in `dtype`.
pub(super) fn round(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
    }
}
