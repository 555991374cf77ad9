//! Dense merge methods: one file each, one row in [`METHODS`] each.
//!
//! A method makes one tensor out of the same tensor of several models. What it makes is a [`Weight`] whose rows are
//! computed when they are read; methods that need a fact about the whole tensor (an angle, a threshold) find it on
//! first use.

use std::fmt::Debug;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use half::{bf16, f16};
use moe_merge_checkpoint::{CheckpointError, Dtype, Weight, WeightRef};

use crate::recipe::ParameterKind;

mod linear;
mod passthrough;
mod slerp;
mod task_arithmetic;
mod ties;

/// A dense merge method.
#[derive(Debug)]
pub struct Method {
    /// Its name in recipes.
    pub name: &'static str,
    /// One line about it.
    pub summary: &'static str,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// What the base model is to it.
    pub base: Base,
    /// How many models it takes, the base included.
    pub models: (usize, usize),
    /// Whether its arithmetic looks at whole tensors.
    pub whole_tensor: bool,
    /// The paper or code it comes from.
    pub source: &'static str,
    build: fn(&Group) -> Result<Box<dyn Combine>, String>,
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What the base model is to a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// What the others are compared with; it needs no parameters of its own.
    Required,
    /// A model like any other.
    Ordinary,
}

/// A parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name in recipes.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Whether each model has its own.
    pub scope: Scope,
    /// What it holds.
    pub kind: ParameterKind,
    /// What holds without it; `None` if it has to be given.
    pub default: Option<f64>,
}

/// Whom a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Each model has its own.
    Model,
    /// All models together.
    Global,
}

const fn number(
    name: &'static str,
    scope: Scope,
    default: Option<f64>,
    doc: &'static str,
) -> Parameter {
    Parameter { name, doc, scope, kind: ParameterKind::Number, default }
}

const fn flag(name: &'static str, default: bool, doc: &'static str) -> Parameter {
    let default = Some(if default { 1.0 } else { 0.0 });
    Parameter { name, doc, scope: Scope::Global, kind: ParameterKind::Bool, default }
}

/// Every method of this version.
pub const METHODS: &[Method] =
    &[linear::METHOD, slerp::METHOD, task_arithmetic::METHOD, ties::METHOD, passthrough::METHOD];

/// mergekit's other methods, which this version does not have.
pub const LATER: &[&str] = &[
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "ramplus_tl",
    "sce",
];

/// The method called `name`.
pub fn by_name(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|m| m.name == name)
}

/// One tensor of several models, and what the recipe says about it.
#[derive(Debug)]
pub(crate) struct Group {
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
}

impl Group {
    /// The value of the per-model parameter `index` for each input.
    fn own(&self, index: usize) -> Vec<f64> {
        self.own.iter().map(|values| values[index]).collect()
    }
}

/// Makes rows of the result from rows of the inputs.
trait Combine: Debug + Send + Sync {
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
pub(crate) fn merged(method: &Method, group: Group) -> Result<WeightRef, String> {
    let dtype = group.dtype;
    let plain = |w: &WeightRef| w.dtype() == dtype && w.bytes().is_some();
    let as_dtype = |w: &WeightRef| -> WeightRef {
        if plain(w) { w.clone() } else { Arc::new(Cast { inner: w.clone(), dtype }) }
    };
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
        dtype: group.out_dtype,
        name: group.name,
        recipe: group.recipe,
    }))
}

/// Rows that are computed at a time hold about this many numbers: bounds the scratch memory.
const BLOCK: usize = 1 << 14;

#[derive(Debug)]
struct Merged {
    combine: Box<dyn Combine>,
    inputs: Vec<WeightRef>,
    shape: Vec<usize>,
    dtype: Dtype,
    name: String,
    recipe: PathBuf,
}

impl Weight for Merged {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let cols = (self as &dyn Weight).cols().max(1);
        let step = (BLOCK / cols).max(1);
        let mut from = rows.start;
        while from < rows.end {
            let to = rows.end.min(from + step);
            let part = &mut out[(from - rows.start) * cols..(to - rows.start) * cols];
            self.combine.rows(&self.inputs, from..to, part)?;
            part.iter_mut().for_each(|v| *v = round(*v, self.dtype));
            from = to;
        }
        Ok(())
    }

    fn origin(&self) -> (PathBuf, String) {
        (self.recipe.clone(), self.name.clone())
    }

    fn release(&self) {
        self.inputs.iter().for_each(|w| w.release());
    }
}

/// A weight rounded to the dtype of the arithmetic.
#[derive(Debug)]
struct Cast {
    inner: WeightRef,
    dtype: Dtype,
}

impl Weight for Cast {
    fn shape(&self) -> &[usize] {
        self.inner.shape()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.inner.read_rows(rows, out)?;
        let stored = self.inner.dtype();
        // A computed weight (an adapter applied) counts as the dtype in which it would have been stored.
        out.iter_mut().for_each(|v| *v = round(round(*v, stored), self.dtype));
        Ok(())
    }

    fn origin(&self) -> (PathBuf, String) {
        self.inner.origin()
    }

    fn release(&self) {
        self.inner.release();
    }
}

/// `value` rounded to nearest even in `dtype`.
fn round(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
    }
}

/// A fact about a whole tensor, found on first use. Who comes while it is being found waits for it.
#[derive(Debug)]
struct Once<T> {
    value: OnceLock<T>,
    finding: Mutex<()>,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self { value: OnceLock::new(), finding: Mutex::new(()) }
    }
}

impl<T> Once<T> {
    fn get(
        &self,
        find: impl FnOnce() -> Result<T, CheckpointError>,
    ) -> Result<&T, CheckpointError> {
        if let Some(value) = self.value.get() {
            return Ok(value);
        }
        let _finding = self.finding.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(value) = self.value.get() {
            return Ok(value);
        }
        let value = find()?;
        Ok(self.value.get_or_init(|| value))
    }
}

/// Calls `visit(first, blocks)` for consecutive blocks of all `inputs`, which agree in shape; `first` is the flat index of
/// the block's first number.
fn scan(
    inputs: &[&WeightRef],
    mut visit: impl FnMut(usize, &[Vec<f32>]),
) -> Result<(), CheckpointError> {
    let Some(first) = inputs.first() else { return Ok(()) };
    let (rows, cols) = (first.rows(), first.cols().max(1));
    let step = (BLOCK / cols).max(1);
    let mut blocks = vec![Vec::new(); inputs.len()];
    for from in (0..rows).step_by(step) {
        let to = rows.min(from + step);
        for (block, input) in blocks.iter_mut().zip(inputs) {
            block.resize((to - from) * cols, 0.0);
            input.read_rows(from..to, block)?;
        }
        visit(from * cols, &blocks);
    }
    Ok(())
}

/// Rows of one input in a buffer of their own.
fn read(input: &WeightRef, rows: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let mut values = vec![0.0; rows.len() * input.cols()];
    input.read_rows(rows, &mut values)?;
    Ok(values)
}
