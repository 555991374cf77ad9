//! Products for few tokens, bound by the speed of memory: weights are read once, one row after another.

mod kernel;
mod moe;

use crate::cast::Dtype;
use crate::error::KernelError;
use crate::exec::{Batching, Exec, Isa};
use crate::scratch::Scratch;
use crate::tasks::{self, Parts};
use crate::vector::{self, Job, Vector};
use crate::view::MatView;
use kernel::{Ahead, Rows};
pub(crate) use moe::moe_few;

/// The most tokens that these products take. One layer of experts takes 0.6 ms for one, 0.7, 1.0, 1.2 for four and 1.7 for
/// six (a busy machine, bf16, hidden 576, inner 1536, two experts).
pub(crate) const FEW: usize = 4;

/// Whether so many tokens go through these products.
pub(crate) fn takes(tokens: usize, exec: &Exec) -> bool {
    match exec.batching {
        Batching::Fastest => tokens <= FEW,
        Batching::Together => false,
        Batching::Alone => true,
    }
}

/// How vectors that meet the same weights are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sums {
    /// Two vectors at a time, where there are two: the order of a sum depends on that.
    Pairs,
    /// Each vector as if it were the only one.
    Single,
}

impl Sums {
    fn of(exec: &Exec) -> Self {
        if exec.batching == Batching::Alone { Self::Single } else { Self::Pairs }
    }
}

/// Bytes of weights of one task: a few microseconds from memory.
const TASK: usize = 128 << 10;

/// Bytes of weights from which on other threads help. The projections of attention are there for them not to fall asleep as
/// much as for their own time: with 2 MiB two threads decode a 135M model at 92 tokens/s instead of 107, a MoE of four at 78
/// instead of 84.
pub(super) const SHARED_FROM: usize = 200 << 10;

/// Numbers that activation vectors are padded to: a block of the widest set.
const PAD: usize = 32;

/// The set whose vectors are used: those of AVX-512 are as long as a cache line, and weights in files lie across two lines,
/// which makes them slower than AVX2 here: 0.76 against 1.0 of the plain read speed for bf16 rows of 576, 16 bytes off a
/// line. So are the dot products of AVX512-BF16, 0.87, which are less exact besides.
fn set(exec: &Exec) -> Isa {
    if exec.isa > Isa::Avx2 { Isa::Avx2 } else { exec.isa }
}

/// Order of activations in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As they come.
    Plain,
    /// In blocks of `2 N`: those at even places, then those at odd ones. So two bf16 weights are taken out of 32 bits with
    /// a shift and a mask, where they stand.
    Split,
}

impl Form {
    fn of(dtype: Dtype) -> Self {
        if dtype == Dtype::BF16 { Form::Split } else { Form::Plain }
    }

    /// Writes one vector in this form, zero up to the end of its last block.
    fn put(self, isa: Isa, from: &[f32], to: &mut [f32]) {
        match self {
            Form::Plain => {
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
            Form::Split => vector::run(isa, Split { from, to }),
        }
    }
}

/// Activations in the form that kernels read.
pub(crate) struct Prepared {
    data: Scratch, // [vectors, stride]
    stride: usize,
    cols: usize,
    form: Form,
    isa: Isa,
    sums: Sums,
}

impl Prepared {
    /// Prepares vectors for products with weights of `dtype`.
    ///
    /// * `x`: `[vectors, cols]`
    pub fn new(x: &[f32], vectors: usize, cols: usize, dtype: Dtype, exec: &Exec) -> Self {
        Self::in_form(x, vectors, cols, Form::of(dtype), exec)
    }

    fn in_form(x: &[f32], vectors: usize, cols: usize, form: Form, exec: &Exec) -> Self {
        let (stride, isa) = (cols.next_multiple_of(PAD), set(exec));
        let mut data = Scratch::new(vectors * stride);
        for (to, from) in data.chunks_exact_mut(stride.max(1)).zip(x.chunks_exact(cols.max(1))) {
            form.put(isa, from, to);
        }
        Self { data, stride, cols, form, isa, sums: Sums::of(exec) }
    }

    fn vector(&self, index: usize) -> &[f32] {
        &self.data[index * self.stride..(index + 1) * self.stride]
    }
}

/// Puts numbers into the order of [`Form::Split`].
struct Split<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Job for Split<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let block = 2 * S::N;
        let mut to = self.to.chunks_exact_mut(block);
        let mut from = self.from.chunks_exact(block);
        for (from, to) in from.by_ref().zip(to.by_ref()) {
            for i in 0..S::N {
                (to[i], to[S::N + i]) = (from[2 * i], from[2 * i + 1]);
            }
        }
        let rest = from.remainder();
        if let Some(to) = to.next()
            && !rest.is_empty()
        {
            to.fill(0.0);
            for (i, x) in rest.iter().enumerate() {
                to[i % 2 * S::N + i / 2] = *x;
            }
        }
    }
}

/// `sums[r, i] = sum_c w[r, c] * x[which[i], c]`.
///
/// * `which`: 1 to [`FEW`] vectors of `x`, prepared for the dtype of `w`; `sums`: `[w.rows(), which.len()]`
pub(crate) fn multiply(w: MatView<'_>, x: &Prepared, which: &[usize], sums: &mut [f32]) {
    assert!(x.form == Form::of(w.dtype()) && x.cols == w.cols(), "activations of another matrix");
    let mut vectors: [&[f32]; FEW] = [&[]; FEW];
    vectors.iter_mut().zip(which).for_each(|(v, i)| *v = x.vector(*i));
    multiply_vectors(w, vectors, which.len(), sums, (x.isa, x.sums));
}

/// [`multiply`] with the first `count` of `x`, which are in the form of the dtype.
fn multiply_vectors(
    w: MatView<'_>,
    x: [&[f32]; FEW],
    count: usize,
    sums: &mut [f32],
    (isa, how): (Isa, Sums),
) {
    let (bytes, dtype, cols) = (w.bytes(), w.dtype(), w.cols());
    let (tokens, ahead) = (count, Ahead::here());
    vector::run(isa, Rows { bytes, dtype, cols, x, tokens, ahead, sums, how });
}

/// Linear layer for few tokens: `out[t, r] = sum_c x[t, c] * w[r, c] + bias[r]`.
///
/// * `x`: `[tokens, w.cols()]`, tokens as [`takes`] says; `bias`: `[w.rows()]`; `out`: `[tokens, w.rows()]`
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit the weight.
pub(crate) fn linear_few(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let (rows, cols) = (w.rows(), w.cols());
    if rows == 0 {
        return KernelError::check("linear output", 0, out.len());
    }
    let tokens = out.len() / rows;
    KernelError::check("linear output", tokens * rows, out.len())?;
    check_tokens(tokens, exec)?;
    KernelError::check("linear input", tokens * cols, x.len())?;
    if let Some(bias) = bias {
        KernelError::check("linear bias", rows, bias.len())?;
    }
    let x = Prepared::new(x, tokens, cols, w.dtype(), exec);
    let size = w.bytes().len();
    let block = (TASK / (size / rows).max(1)).clamp(1, rows);
    let out = Parts::new(out);
    tasks::for_each(rows.div_ceil(block), size >= SHARED_FROM, |task| {
        let (from, to) = (task * block, rows.min((task + 1) * block));
        let mut sums = Scratch::new((to - from) * tokens.min(FEW));
        // The weights of a task stay in the second cache for all tokens.
        for first in (0..tokens).step_by(FEW) {
            let count = FEW.min(tokens - first);
            let which: [usize; FEW] = std::array::from_fn(|t| first + t);
            let sums = &mut sums[..(to - from) * count];
            multiply(w.slice_rows(from, to), &x, &which[..count], sums);
            for token in 0..count {
                // SAFETY: no other task has these rows.
                let out = unsafe { out.range((first + token) * rows + from, to - from) };
                for (r, o) in out.iter_mut().enumerate() {
                    *o = sums[r * count + token] + bias.map_or(0.0, |b| b[from + r]);
                }
            }
        }
    });
    Ok(())
}

fn check_tokens(tokens: usize, exec: &Exec) -> Result<(), KernelError> {
    let most = if takes(FEW + 1, exec) { usize::MAX } else { FEW };
    KernelError::check("tokens of one product", tokens.clamp(1, most), tokens)
}

#[cfg(test)]
mod tests;
