//! Gradients of low-rank factors.

use crate::dense::Into;
use crate::error::KernelError;
use crate::exec::{Exec, Isa};
use crate::lora::{ALONE_BELOW, LoraPair, ROWS, low};
use crate::product::{Left, product};
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;

/// Gradients of a [`LoraPair`].
#[derive(Debug, Clone, PartialEq)]
pub struct LoraGradients {
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
}

/// Those of a pair that no token meets.
pub(crate) fn no_gradients(pair: LoraPair<'_>) -> LoraGradients {
    LoraGradients { a: vec![0.0; pair.a.len()], b: vec![0.0; pair.b.len()] }
}

/// Gradients of what a pair adds ([`crate::lora_add`]) with respect to the pair and, where wanted, its input.
///
/// `d_b = sum_t dy[t] (scale a x[t])ᵀ`, `d_a = sum_t (scale bᵀ dy[t]) x[t]ᵀ`, `dx[t] += aᵀ (scale bᵀ dy[t])`, tokens from the
/// first to the last; what dropout leaves out of `x` here has neither part in `d_a` nor a gradient by `a`.
///
/// * `[output, input]`: of the weight; `x`, `dx` (added to): `[tokens, input]`; `dy`: `[tokens, output]`; f32 sums
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if slices or pair do not fit the weight.
pub fn lora_backward(
    x: &[f32],
    [output, input]: [usize; 2],
    pair: &LoraPair<'_>,
    dy: &[f32],
    dx: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<LoraGradients, KernelError> {
    pair.check(output, input)?;
    let tokens = x.len().checked_div(input).unwrap_or(0);
    KernelError::check("linear input", tokens * input, x.len())?;
    KernelError::check("gradient of a linear output", tokens * output, dy.len())?;
    let back = PairBack::new(dy, *pair, exec.isa);
    if let Some(dx) = dx {
        KernelError::check("gradient of a linear input", x.len(), dx.len())?;
        back.add_input(dx);
    }
    Ok(back.gradients(x))
}

/// A pair on the way back, with the gradient of the output of its matrix; sizes are checked.
pub(crate) struct PairBack<'a> {
    pair: LoraPair<'a>,
    dy: &'a [f32],
    /// `scale bᵀ dy`, `[tokens, rank]`.
    back: Scratch,
    tokens: usize,
    isa: Isa,
}

impl<'a> PairBack<'a> {
    pub fn new(dy: &'a [f32], pair: LoraPair<'a>, isa: Isa) -> Self {
        let (rows, rank) = (pair.output(), pair.rank);
        let tokens = dy.len().checked_div(rows).unwrap_or(0);
        let mut back = Scratch::new(tokens * rank);
        let parts = Parts::new(&mut back);
        for_each(tokens.div_ceil(ROWS), tokens * rank * rows >= ALONE_BELOW, |index| {
            let (from, to) = (index * ROWS, tokens.min((index + 1) * ROWS));
            // SAFETY: the rows of this task.
            let back = unsafe { parts.range(from * rank, (to - from) * rank) };
            let (left, sizes) = (Left::rows(&dy[from * rows..], rows), (to - from, rows, rank));
            product(isa, sizes, left, (pair.b, rank), (back, rank), Into::Overwrite);
            back.iter_mut().for_each(|v| *v *= pair.scale);
        });
        Self { pair, dy, back, tokens, isa }
    }

    /// `dx [tokens, in] += aᵀ (scale bᵀ dy)`.
    pub fn add_input(&self, dx: &mut [f32]) {
        let Self { pair, back, tokens, isa, .. } = self;
        let (cols, rank) = (pair.input(), pair.rank);
        let parts = Parts::new(dx);
        for_each(tokens.div_ceil(ROWS), tokens * rank * cols >= ALONE_BELOW, |index| {
            let (from, to) = (index * ROWS, (*tokens).min((index + 1) * ROWS));
            // SAFETY: the rows of this task.
            let dx = unsafe { parts.range(from * cols, (to - from) * cols) };
            let (left, sizes) = (Left::rows(&back[from * rank..], rank), (to - from, rank, cols));
            let Some(dropout) = pair.dropout else {
                return product(*isa, sizes, left, (pair.a, cols), (dx, cols), Into::Add);
            };
            let mut own = Scratch::new(dx.len());
            product(*isa, sizes, left, (pair.a, cols), (&mut own, cols), Into::Overwrite);
            dropout.apply(from * cols, &mut own);
            dx.iter_mut().zip(&*own).for_each(|(d, o)| *d += o);
        });
    }

    /// Of the factors, with the input `x [tokens, in]`: tokens are summed for some columns of `x`, and for some of `dy`, at
    /// a time.
    pub fn gradients(&self, x: &[f32]) -> LoraGradients {
        let Self { pair, dy, back, tokens, isa } = self;
        let (rows, cols, rank) = (pair.output(), pair.input(), pair.rank);
        let dropped = pair.dropout.map(|d| d.of(x, cols));
        let low = low(x, *tokens, pair, *isa);
        let x = dropped.as_deref().unwrap_or(x);
        let mut turned = Scratch::new(cols * rank); // [in, rank]
        outer(*isa, (x, cols), (back, rank), *tokens, &mut turned);
        let (mut a, mut b) = (vec![0.0; rank * cols], vec![0.0; rows * rank]);
        transpose(*isa, (cols, rank), (&turned, rank), (&mut a, cols));
        outer(*isa, (dy, rows), (&low, rank), *tokens, &mut b);
        LoraGradients { a, b }
    }
}

/// `out [width, rank] = sum_t wide[t]ᵀ low[t]`.
fn outer(
    isa: Isa,
    (wide, width): (&[f32], usize),
    (low, rank): (&[f32], usize),
    tokens: usize,
    out: &mut [f32],
) {
    let parts = Parts::new(out);
    for_each(width.div_ceil(ROWS), tokens * rank * width >= ALONE_BELOW, |index| {
        let (from, to) = (index * ROWS, width.min((index + 1) * ROWS));
        // SAFETY: the rows of this task.
        let out = unsafe { parts.range(from * rank, (to - from) * rank) };
        let left = Left::transposed(&wide[from.min(wide.len())..], width);
        product(isa, (to - from, tokens, rank), left, (low, rank), (out, rank), Into::Overwrite);
    });
}
