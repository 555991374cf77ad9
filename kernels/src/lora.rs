//! Low-rank adaptation: frozen weights `w` with a trained `scale b a` beside them.

use crate::activation::Activation;
use crate::dense::Into;
use crate::dispatch::{ExpertView, moe_forward};
use crate::dispatch_backward::Block;
use crate::error::KernelError;
use crate::exec::{Exec, Isa};
use crate::expert::{Factors, TOKENS, Tokens};
use crate::linear::linear;
use crate::linear_backward::linear_backward;
use crate::product::{Left, product};
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;
use crate::turned;
use crate::view::MatView;

mod dropout;

pub use dropout::Dropout;

/// Rows of one task. Fixed, so that the split (and with it every bit of the result) does not depend on the number of threads.
const ROWS: usize = 96;

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 20;

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
    /// Whether the factors fit a weight `[out, in]`.
    fn check(&self, out: usize, input: usize) -> Result<(), KernelError> {
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

    /// Whether something is left out of the input of a factor.
    pub(crate) fn drops(&self) -> bool {
        self.pairs().into_iter().flatten().any(|pair| pair.dropout.is_some())
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

/// Gradients of a [`LoraPair`].
#[derive(Debug, Clone, PartialEq)]
pub struct LoraGradients {
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
}

/// Gradients of [`moe_forward_lora`] besides that of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeLoraGradients {
    /// Of the weights of the chosen slots, `[tokens, top_k]`.
    pub weights: Vec<f32>,
    /// Of the pair of gate, if there is one.
    pub gate: Option<LoraGradients>,
    /// Of the pair of up.
    pub up: Option<LoraGradients>,
    /// Of the pair of down.
    pub down: Option<LoraGradients>,
}

/// [`crate::moe_forward`] where one expert has LoRA pairs; all others are computed as they are there.
///
/// * `x`, `out`: `[tokens, hidden]`; f32 sums; the expert with pairs in f32 activations too, but for many tokens of bf16
///   experts where `exec` is fast
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts, pairs and slices do not fit each other.
pub fn moe_forward_lora(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    lora: &ExpertLora<'_>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let block = Block { x, routing, experts, activation, lora: Some(lora), exec };
    let groups = block.groups()?;
    KernelError::check("expert output", x.len(), out.len())?;
    // Without a single row between its matrices the expert gives nothing, and takes no time.
    let mut others = experts.to_vec();
    let (hidden, dtype) = (block.hidden(), experts[lora.expert].gate.dtype());
    let (none, no_columns) =
        (MatView::new(&[], dtype, 0, hidden)?, MatView::new(&[], dtype, hidden, 0)?);
    others[lora.expert] = ExpertView { gate: none, up: none, down: no_columns };
    moe_forward(x, routing, &others, activation, out, exec)?;
    let (from, to) =
        (groups.offsets[lora.expert] as usize, groups.offsets[lora.expert + 1] as usize);
    let order = &groups.order[from..to];
    if order.is_empty() || hidden == 0 {
        return Ok(());
    }
    let token = |pair: &u32| *pair as usize / routing.top_k;
    if block.turned() {
        let y = turned::expert_forward(&block, lora.expert, order.iter().map(token))?;
        add_pairs(order, routing, &y, out, hidden);
        return Ok(());
    }
    let expert = block.expert(lora.expert);
    let mut y = Scratch::new(order.len() * hidden); // [pairs of the expert, hidden]
    let parts = Parts::new(&mut y);
    for_each(order.len().div_ceil(TOKENS), block.shared(order.len()), |index| {
        let first = index * TOKENS;
        let pairs = &order[first..order.len().min(first + TOKENS)];
        let input = Tokens::gather(exec.isa, x, hidden, pairs.iter().map(token));
        // SAFETY: the rows of this task.
        expert.forward(&input, unsafe { parts.range(first * hidden, pairs.len() * hidden) });
    });
    add_pairs(order, routing, &y, out, hidden);
    Ok(())
}

/// Adds what an expert gives for its pairs, `y [pairs, hidden]`, to their tokens.
fn add_pairs(order: &[u32], routing: &Routing, y: &[f32], out: &mut [f32], hidden: usize) {
    for (pair, y) in order.iter().zip(y.chunks_exact(hidden)) {
        let (token, weight) = (*pair as usize / routing.top_k, routing.weights[*pair as usize]);
        let out = &mut out[token * hidden..(token + 1) * hidden];
        out.iter_mut().zip(y).for_each(|(o, y)| *o += weight * y);
    }
}

/// Gradients of [`moe_forward_lora`].
///
/// With `a` the gradient of what enters down, as in [`crate::moe_backward`], but through its pair too:
/// `d_b = sum_t scale dy[t] (a x[t])ᵀ`, `d_a = sum_t scale bᵀ dy[t] x[t]ᵀ`, where `dy` is the gradient of what the matrix
/// gives. Sums run over fixed parts of the tokens, which are added in order.
///
/// * `x`, `d_out`, `d_x` (overwritten; left out where it is not wanted): `[tokens, hidden]`
/// * f32 sums, accuracy as in [`moe_forward_lora`]; the same bits for any number of threads
/// * working memory: that of [`crate::moe_backward`], and at most 8 times the factors
///
/// # Errors
/// As [`moe_forward_lora`].
#[allow(clippy::too_many_arguments)]
pub fn moe_backward_lora(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    lora: &ExpertLora<'_>,
    d_out: &[f32],
    d_x: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<MoeLoraGradients, KernelError> {
    let block = Block { x, routing, experts, activation, lora: Some(lora), exec };
    if block.turned() {
        let (weights, [gate, up, down]) = block.backward_turned(d_out, d_x)?;
        return Ok(MoeLoraGradients { weights, gate, up, down });
    }
    let (weights, factors) = block.backward(d_out, d_x)?;
    let layout = Factors::of(lora);
    let pair = |which: usize| LoraGradients {
        a: factors[layout.range(2 * which)].to_vec(),
        b: factors[layout.range(2 * which + 1)].to_vec(),
    };
    let down = lora.down.map(|LoraPair { rank, .. }| {
        let LoraGradients { a: turned, b } = pair(2); // [inter, rank]
        let mut a = vec![0.0; turned.len()];
        let inter = turned.len() / rank;
        transpose(exec.isa, (inter, rank), (&turned, rank), (&mut a, inter));
        LoraGradients { a, b }
    });
    Ok(MoeLoraGradients {
        weights,
        gate: lora.gate.map(|_| pair(0)),
        up: lora.up.map(|_| pair(1)),
        down,
    })
}

/// Linear layer with a pair beside it: `out[t] = w x[t] + bias + scale b (a x[t])`.
///
/// * `x`: `[tokens, in]`; `out`: `[tokens, out]`; the pair in f32, whatever the accuracy of `exec`
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if slices or pair do not fit the weight.
pub fn lora_linear(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    pair: &LoraPair<'_>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    pair.check(w.rows(), w.cols())?;
    linear(x, w, bias, out, exec)?;
    let (rows, cols, rank, isa) = (w.rows(), w.cols(), pair.rank, exec.isa);
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let dropped = pair.dropout.map(|d| d.of(x, cols));
    let low = low(dropped.as_deref().unwrap_or(x), tokens, pair, cols, isa);
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
    Ok(())
}

/// `scale a x` of an input from which has been left out what is, `[tokens, rank]`.
fn low(x: &[f32], tokens: usize, pair: &LoraPair<'_>, cols: usize, isa: Isa) -> Scratch {
    let rank = pair.rank;
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

/// Gradients of [`lora_linear`] with respect to its pair and, where wanted, its input.
///
/// `d_b = sum_t dy[t] (scale a x[t])ᵀ`, `d_a = sum_t (scale bᵀ dy[t]) x[t]ᵀ`, `dx[t] = wᵀ dy[t] + aᵀ (scale bᵀ dy[t])`,
/// tokens from the first to the last; what dropout leaves out of `x` here has neither part in `d_a` nor a gradient by `a`.
///
/// * `x`, `dx` (overwritten): `[tokens, in]`; `dy`: `[tokens, out]`; f32 sums; the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if slices or pair do not fit the weight.
pub fn lora_linear_backward(
    x: &[f32],
    w: MatView<'_>,
    pair: &LoraPair<'_>,
    dy: &[f32],
    dx: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<LoraGradients, KernelError> {
    pair.check(w.rows(), w.cols())?;
    let (rows, cols, rank, isa) = (w.rows(), w.cols(), pair.rank, exec.isa);
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    KernelError::check("linear input", tokens * cols, x.len())?;
    KernelError::check("gradient of a linear output", tokens * rows, dy.len())?;
    let shared = |size: usize| tokens * rank * size >= ALONE_BELOW;
    let mut back = Scratch::new(tokens * rank); // scale bᵀ dy, [tokens, rank]
    let parts = Parts::new(&mut back);
    for_each(tokens.div_ceil(ROWS), shared(rows), |index| {
        let (from, to) = (index * ROWS, tokens.min((index + 1) * ROWS));
        // SAFETY: the rows of this task.
        let back = unsafe { parts.range(from * rank, (to - from) * rank) };
        let (left, sizes) = (Left::rows(&dy[from * rows..], rows), (to - from, rows, rank));
        product(isa, sizes, left, (pair.b, rank), (back, rank), Into::Overwrite);
        back.iter_mut().for_each(|v| *v *= pair.scale);
    });
    if let Some(dx) = dx {
        linear_backward(dy, w, dx, Into::Overwrite, exec)?;
        let parts = Parts::new(dx);
        for_each(tokens.div_ceil(ROWS), shared(cols), |index| {
            let (from, to) = (index * ROWS, tokens.min((index + 1) * ROWS));
            // SAFETY: the rows of this task.
            let dx = unsafe { parts.range(from * cols, (to - from) * cols) };
            let (left, sizes) = (Left::rows(&back[from * rank..], rank), (to - from, rank, cols));
            let Some(dropout) = pair.dropout else {
                return product(isa, sizes, left, (pair.a, cols), (dx, cols), Into::Add);
            };
            let mut own = Scratch::new(dx.len());
            product(isa, sizes, left, (pair.a, cols), (&mut own, cols), Into::Overwrite);
            dropout.apply(from * cols, &mut own);
            dx.iter_mut().zip(&*own).for_each(|(d, o)| *d += o);
        });
    }
    // Tokens are summed for some columns of x, and for some of dy, at a time.
    let dropped = pair.dropout.map(|d| d.of(x, cols));
    let x = dropped.as_deref().unwrap_or(x);
    let low = low(x, tokens, pair, cols, isa);
    let mut turned = Scratch::new(cols * rank); // [in, rank]
    outer(isa, (x, cols), (&back, rank), tokens, shared(cols), &mut turned);
    let (mut a, mut b) = (vec![0.0; rank * cols], vec![0.0; rows * rank]);
    transpose(isa, (cols, rank), (&turned, rank), (&mut a, cols));
    outer(isa, (dy, rows), (&low, rank), tokens, shared(rows), &mut b);
    Ok(LoraGradients { a, b })
}

/// `out [width, rank] = sum_t wide[t]ᵀ low[t]`.
fn outer(
    isa: Isa,
    (wide, width): (&[f32], usize),
    (low, rank): (&[f32], usize),
    tokens: usize,
    shared: bool,
    out: &mut [f32],
) {
    let parts = Parts::new(out);
    for_each(width.div_ceil(ROWS), shared, |index| {
        let (from, to) = (index * ROWS, width.min((index + 1) * ROWS));
        // SAFETY: the rows of this task.
        let out = unsafe { parts.range(from * rank, (to - from) * rank) };
        let left = Left::transposed(&wide[from.min(wide.len())..], width);
        product(isa, (to - from, tokens, rank), left, (low, rank), (out, rank), Into::Overwrite);
    });
}

#[cfg(test)]
pub(crate) mod tests;
