//! Low-rank adaptation: frozen weights `w` with a trained `scale b a` beside them.

use crate::dense::Into;
use crate::dispatch::ExpertView;
use crate::error::KernelError;
use crate::exec::{Exec, Isa};
use crate::product::{Left, product};
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;

mod dropout;

pub use dropout::Dropout;

/// Rows of one task. Fixed, so that the split (and with it every bit of the result) does not depend on the number of threads.
pub(crate) const ROWS: usize = 96;

/// Multiply-adds below which handing work to other threads costs more than it gains.
pub(crate) const ALONE_BELOW: usize = 1 << 20;

/// A pair of factors beside a weight `[out, in]`: `y = w x + scale b (a x)`, or `a dropout(x)` in it.
///
/// # Source
/// Hu et al., LoRA (2021), section 4.1; `scale` is their `alpha / r`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPair<'a> {
    /// `[rank, in]`.
    pub a: &'a [f32],
    /// `[out, rank]`.
    pub b: &'a [f32],
    /// Rows of `a`, columns of `b`; at least 1.
    pub rank: usize,
    /// Factor on the product.
    pub scale: f32,
    /// What is left out of the input of `a`, in training.
    pub dropout: Option<Dropout>,
}

impl LoraPair<'_> {
    /// Columns of the weight.
    pub(crate) fn input(&self) -> usize {
        self.a.len() / self.rank
    }

    /// Rows of the weight.
    pub(crate) fn output(&self) -> usize {
        self.b.len() / self.rank
    }

    /// Whether the factors fit a weight `[out, in]`.
    pub(crate) fn check(&self, out: usize, input: usize) -> Result<(), KernelError> {
        KernelError::check("rank of a LoRA pair, at least", self.rank.max(1), self.rank)?;
        KernelError::check("factor a of a LoRA pair", self.rank * input, self.a.len())?;
        KernelError::check("factor b of a LoRA pair", out * self.rank, self.b.len())
    }
}

/// The pairs of one expert among those of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ExpertLora<'a> {
    /// Which expert.
    pub expert: usize,
    /// Beside its gate, `[inter, hidden]`.
    pub gate: Option<LoraPair<'a>>,
    /// Beside its up, `[inter, hidden]`.
    pub up: Option<LoraPair<'a>>,
    /// Beside its down, `[hidden, inter]`.
    pub down: Option<LoraPair<'a>>,
}

impl<'a> ExpertLora<'a> {
    pub(crate) fn pairs(&self) -> [Option<LoraPair<'a>>; 3] {
        [self.gate, self.up, self.down]
    }

    /// Whether the expert exists and the pairs fit it.
    pub(crate) fn check(&self, experts: &[ExpertView<'_>]) -> Result<(), KernelError> {
        let Some(expert) = experts.get(self.expert) else {
            let what = "experts, with the one that has LoRA pairs";
            return Err(KernelError::Length {
                what,
                expected: self.expert + 1,
                found: experts.len(),
            });
        };
        for (pair, view) in self.pairs().iter().zip([expert.gate, expert.up, expert.down]) {
            if let Some(pair) = pair {
                pair.check(view.rows(), view.cols())?;
            }
        }
        Ok(())
    }
}

/// What a pair adds to a linear layer: `out[t] += scale b (a x[t])`.
///
/// * `[output, input]`: of the weight; `x`: `[tokens, input]`; `out`: `[tokens, output]`; all in f32
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if slices or pair do not fit the weight.
pub fn lora_add(
    x: &[f32],
    [output, input]: [usize; 2],
    pair: &LoraPair<'_>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    pair.check(output, input)?;
    let tokens = x.len().checked_div(input).unwrap_or(0);
    KernelError::check("linear input", tokens * input, x.len())?;
    KernelError::check("linear output", tokens * output, out.len())?;
    add_pair(x, pair, out, exec.isa);
    Ok(())
}

/// `out [tokens, out] += scale b (a x)`; sizes are checked.
pub(crate) fn add_pair(x: &[f32], pair: &LoraPair<'_>, out: &mut [f32], isa: Isa) {
    let (cols, rows) = (pair.input(), pair.output());
    let (tokens, rank) = (x.len().checked_div(cols).unwrap_or(0), pair.rank);
    let low = low(x, tokens, pair, isa);
    let mut b = Scratch::new(rank * rows); // [rank, out]
    transpose(isa, (rows, rank), (pair.b, rank), (&mut b, rows));
    let parts = Parts::new(out);
    for_each(tokens.div_ceil(ROWS), tokens * rank * rows >= ALONE_BELOW, |index| {
        let (from, to) = (index * ROWS, tokens.min((index + 1) * ROWS));
        // SAFETY: the rows of this task.
        let out = unsafe { parts.range(from * rows, (to - from) * rows) };
        let left = Left::rows(&low[from * rank..], rank);
        product(isa, (to - from, rank, rows), left, (&b, rows), (out, rows), Into::Add);
    });
}

/// `scale a x`, or `scale a dropout(x)`: `[tokens, rank]`.
pub(crate) fn low(x: &[f32], tokens: usize, pair: &LoraPair<'_>, isa: Isa) -> Scratch {
    let (rank, cols) = (pair.rank, pair.input());
    let dropped = pair.dropout.map(|d| d.of(x, cols));
    let x = dropped.as_deref().unwrap_or(x);
    let mut a = Scratch::new(cols * rank); // [in, rank]
    transpose(isa, (rank, cols), (pair.a, cols), (&mut a, rank));
    let mut low = Scratch::new(tokens * rank);
    let parts = Parts::new(&mut low);
    for_each(tokens.div_ceil(ROWS), tokens * rank * cols >= ALONE_BELOW, |index| {
        let (from, to) = (index * ROWS, tokens.min((index + 1) * ROWS));
        // SAFETY: the rows of this task.
        let low = unsafe { parts.range(from * rank, (to - from) * rank) };
        let (left, sizes) = (Left::rows(&x[from * cols..], cols), (to - from, cols, rank));
        product(isa, sizes, left, (&a, rank), (low, rank), Into::Overwrite);
        low.iter_mut().for_each(|v| *v *= pair.scale);
    });
    low
}
