//! Backward products with bf16 weights on bf16 dot products: the weight is turned, block by block, and then multiplied like any
//! other.

use crate::cast::Dtype;
use crate::dense::Into;
use crate::dispatch::ExpertView;
use crate::dispatch_backward::Block;
use crate::error::KernelError;
use crate::exec::Exec;
use crate::linear::linear;
use crate::linear_backward::linear_backward;
use crate::lora::{ExpertLora, LoraGradients, LoraPair, lora_linear, lora_linear_backward};
use crate::panel::Form;
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;
use crate::view::MatView;

/// Tokens from which turning a weight costs less than it gains.
const WORTH: usize = 64;

/// Columns of a weight that one task turns.
const COLS: usize = 128;

/// Whether a product backwards, with so many tokens, is made so.
pub(crate) fn worth(w: MatView<'_>, tokens: usize, exec: &Exec) -> bool {
    tokens >= WORTH && Form::of(w.dtype(), exec) == Form::Pairs && w.rows().is_multiple_of(2)
}

/// A bf16 weight `[rows, cols]`, turned: `[cols, rows]`.
struct Turned {
    /// Pairs of numbers as bits, `[cols, rows / 2]`.
    words: Scratch,
    rows: usize,
    cols: usize,
}

impl Turned {
    fn new(w: MatView<'_>, exec: &Exec) -> Self {
        let (rows, cols) = (w.rows(), w.cols());
        let half = rows / 2;
        let mut words = Scratch::new(half * cols);
        let out = Parts::new(&mut words);
        for_each(cols.div_ceil(COLS), rows * cols >= 1 << 16, |task| {
            let from = task * COLS;
            let width = COLS.min(cols - from);
            let mut pairs = Scratch::new(half * width); // [rows / 2, width], a pair of rows in each word
            for (pair, words) in pairs.chunks_exact_mut(width).enumerate() {
                let part = |row: usize| &w.row(row)[2 * from..2 * (from + width)];
                let (low, high) = (part(2 * pair), part(2 * pair + 1));
                for ((word, low), high) in
                    words.iter_mut().zip(low.chunks_exact(2)).zip(high.chunks_exact(2))
                {
                    *word = f32::from_bits(u32::from_le_bytes([low[0], low[1], high[0], high[1]]));
                }
            }
            // SAFETY: the rows of this task.
            let to = unsafe { out.range(from * half, width * half) };
            transpose(exec.isa, (half, width), (&pairs, width), (to, half));
        });
        Self { words, rows, cols }
    }

    fn view(&self) -> Result<MatView<'_>, KernelError> {
        MatView::new(bytemuck::cast_slice(&self.words), Dtype::BF16, self.cols, self.rows)
    }
}

/// `dx = dy w`, or added to it.
pub(crate) fn product(
    dy: &[f32],
    w: MatView<'_>,
    dx: &mut [f32],
    into: Into,
    exec: &Exec,
) -> Result<(), KernelError> {
    let turned = Turned::new(w, exec);
    match into {
        Into::Overwrite => linear(dy, turned.view()?, None, dx, exec),
        Into::Add => {
            let mut more = Scratch::new(dx.len());
            linear(dy, turned.view()?, None, &mut more, exec)?;
            dx.iter_mut().zip(&*more).for_each(|(d, m)| *d += m);
            Ok(())
        }
    }
}

/// Rows of `all [_, width]` that `tokens` names.
fn gather(all: &[f32], width: usize, tokens: impl ExactSizeIterator<Item = usize>) -> Scratch {
    let mut rows = Scratch::new(tokens.len() * width);
    for (row, token) in rows.chunks_exact_mut(width.max(1)).zip(tokens) {
        row.copy_from_slice(&all[token * width..(token + 1) * width]);
    }
    rows
}

/// A matrix of an expert with the pair beside it, if it has one.
type Side<'a> = (MatView<'a>, Option<LoraPair<'a>>);

fn forward((w, pair): Side<'_>, x: &[f32], exec: &Exec) -> Result<Scratch, KernelError> {
    let mut out = Scratch::new(x.len().checked_div(w.cols()).unwrap_or(0) * w.rows());
    match pair {
        Some(pair) => lora_linear(x, w, None, &pair, &mut out, exec)?,
        None => linear(x, w, None, &mut out, exec)?,
    }
    Ok(out)
}

/// Gradient of the input, and of the pair if there is one.
fn back(
    (w, pair): Side<'_>,
    x: &[f32],
    dy: &[f32],
    dx: Option<&mut [f32]>,
    exec: &Exec,
) -> Result<Option<LoraGradients>, KernelError> {
    match (pair, dx) {
        (Some(pair), dx) => lora_linear_backward(x, w, &pair, dy, dx, exec).map(Some),
        (None, Some(dx)) => linear_backward(dy, w, dx, Into::Overwrite, exec).map(|()| None),
        (None, None) => Ok(None),
    }
}

/// What an expert gives for some tokens: `out [tokens, hidden]`.
pub(crate) fn expert_forward(
    block: &Block<'_>,
    expert: usize,
    tokens: impl ExactSizeIterator<Item = usize>,
) -> Result<Scratch, KernelError> {
    let [gate, up, down] = sides(block, expert);
    let x = gather(block.x, block.hidden(), tokens);
    let mut h = forward(gate, &x, block.exec)?;
    block.activation.gate(&mut h, &forward(up, &x, block.exec)?);
    forward(down, &h, block.exec)
}

fn sides<'a>(block: &Block<'a>, expert: usize) -> [Side<'a>; 3] {
    let ExpertView { gate, up, down } = block.experts[expert];
    let lora = block.lora.filter(|l| l.expert == expert);
    let [g, u, d] = lora.map_or([None; 3], |l| l.pairs());
    [(gate, g), (up, u), (down, d)]
}

/// Gradients of one expert on some of its pairs: of the slot weights, of the input (into `d_x [pairs, hidden]`), of its LoRA
/// pairs.
pub(crate) fn expert_backward(
    block: &Block<'_>,
    expert: usize,
    order: &[u32],
    d_out: &[f32],
    d_weights: &mut [f32],
    d_x: Option<&mut [f32]>,
) -> Result<[Option<LoraGradients>; 3], KernelError> {
    let (hidden, k, exec) = (block.hidden(), block.routing.top_k, block.exec);
    let [gate, up, down] = sides(block, expert);
    let inter = gate.0.rows();
    let tokens = || order.iter().map(|pair| *pair as usize / k);
    let (x, dy) = (gather(block.x, hidden, tokens()), gather(d_out, hidden, tokens()));
    let (mut g, mut u) = (forward(gate, &x, exec)?, forward(up, &x, exec)?);
    let mut h = Scratch::new(g.len());
    h.copy_from_slice(&g);
    block.activation.gate(&mut h, &u);
    let weight = |row: usize| block.routing.weights[order[row] as usize];
    // `a` is the gradient of `h` before the weight; that of the pair of down is linear in `h`, so the weight goes there.
    let mut a = Scratch::new(h.len());
    for (row, (h, d)) in h.chunks_exact_mut(inter.max(1)).zip(&mut *d_weights).enumerate() {
        *d = weight(row);
        h.iter_mut().for_each(|h| *h *= *d);
    }
    let of_down = back(down, &h, &dy, Some(&mut a), exec)?;
    for (row, (a, h)) in
        a.chunks_exact_mut(inter.max(1)).zip(h.chunks_exact(inter.max(1))).enumerate()
    {
        let weight = d_weights[row];
        let slope = slope(a, h, &g[row * inter..], &u[row * inter..], weight, block);
        d_weights[row] = slope;
        a.iter_mut().for_each(|a| *a *= weight);
    }
    block.activation.gate_backward(&mut g, &mut u, &a);
    let Some(d_x) = d_x else {
        return Ok([back(gate, &x, &g, None, exec)?, back(up, &x, &u, None, exec)?, of_down]);
    };
    let mut more = Scratch::new(d_x.len());
    let of_gate = back(gate, &x, &g, Some(d_x), exec)?;
    let of_up = back(up, &x, &u, Some(&mut more), exec)?;
    d_x.iter_mut().zip(&*more).for_each(|(d, m)| *d += m);
    Ok([of_gate, of_up, of_down])
}

/// `a . h` where `h` has been multiplied by `weight`.
fn slope(a: &[f32], h: &[f32], g: &[f32], u: &[f32], weight: f32, block: &Block<'_>) -> f32 {
    if weight != 0.0 {
        return a.iter().zip(h).map(|(a, h)| a * h).sum::<f32>() / weight;
    }
    let plain = g.iter().zip(u).map(|(g, u)| block.activation.apply(*g) * u);
    a.iter().zip(plain).map(|(a, h)| a * h).sum()
}

impl Block<'_> {
    /// Whether its products are made so, matrix by matrix: bf16 experts, and enough tokens for each; or dropout, which needs
    /// all columns of an input at once.
    pub fn turned(&self) -> bool {
        if self.lora.is_some_and(ExpertLora::drops) {
            return true;
        }
        let experts = self.experts.len().max(1);
        let tokens = self.routing.ids.len() / experts;
        let fits = |e: &ExpertView<'_>| {
            [e.gate, e.up, e.down].into_iter().all(|w| worth(w, tokens, self.exec))
        };
        !self.experts.is_empty() && self.experts.iter().all(fits)
    }

    /// Gradients of the weights of the slots, and of the LoRA pairs; as [`Block::backward`] otherwise.
    pub fn backward_turned(
        &self,
        d_out: &[f32],
        d_x: Option<&mut [f32]>,
    ) -> Result<(Vec<f32>, [Option<LoraGradients>; 3]), KernelError> {
        let groups = self.groups()?;
        let hidden = self.hidden();
        KernelError::check("gradient of expert output", self.x.len(), d_out.len())?;
        if let Some(d_x) = &d_x {
            KernelError::check("gradient of expert input", self.x.len(), d_x.len())?;
        }
        let mut d_weights = vec![0.0; groups.order.len()]; // [pairs by expert]
        let mut d_pairs = d_x.is_some().then(|| Scratch::new(groups.order.len() * hidden));
        let mut found =
            self.lora.map_or([None, None, None], |lora| lora.pairs().map(|p| p.map(none)));
        for expert in 0..self.experts.len() {
            let pairs = groups.offsets[expert] as usize..groups.offsets[expert + 1] as usize;
            if pairs.is_empty() {
                continue;
            }
            let rows = pairs.start * hidden..pairs.end * hidden;
            let d_rows = d_pairs.as_mut().map(|d| &mut d[rows]);
            let slopes = &mut d_weights[pairs.clone()];
            let order = &groups.order[pairs];
            let of_pairs = expert_backward(self, expert, order, d_out, slopes, d_rows)?;
            if self.lora.is_some_and(|lora| lora.expert == expert) {
                found = of_pairs;
            }
        }
        if let (Some(d_x), Some(d_pairs)) = (d_x, d_pairs) {
            self.combine(&groups, &d_pairs, d_x);
        }
        let by_pair = groups.inverse.iter().map(|at| d_weights[*at as usize]).collect();
        Ok((by_pair, found))
    }
}

/// The gradient of a pair that no token meets.
fn none(pair: LoraPair<'_>) -> LoraGradients {
    LoraGradients { a: vec![0.0; pair.a.len()], b: vec![0.0; pair.b.len()] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::tests::{bytes, numbers};
    use crate::{
        Activation, Isa, RouterSpec, moe_backward, moe_backward_lora, moe_forward_lora, route,
    };

    fn fast() -> Option<Exec> {
        let exec = Exec { isa: Isa::Avx512Bf16, ..Exec::fast() };
        exec.isa.available().then_some(exec)
    }

    /// Largest difference over the largest number.
    fn apart(found: &[f32], wanted: &[f32]) -> f32 {
        let size = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
        let pairs = found.iter().zip(wanted);
        pairs.fold(0f32, |m, (f, w)| m.max((f - w).abs())) / size.max(1e-6)
    }

    #[test]
    fn turned_weights_are_transposes() {
        let exec = Exec::default();
        for (rows, cols) in [(2, 1), (6, 5), (34, 300), (128, 129)] {
            let w = bytes(rows * cols, 3);
            let turned = Turned::new(MatView::new(&w, Dtype::BF16, rows, cols).unwrap(), &exec);
            let view = turned.view().unwrap();
            assert_eq!((view.rows(), view.cols()), (cols, rows));
            for r in 0..rows {
                for c in 0..cols {
                    let at = 2 * (r * cols + c);
                    assert_eq!(view.row(c)[2 * r..2 * r + 2], w[at..at + 2], "{r} {c}");
                }
            }
        }
    }

    #[test]
    fn fast_products_are_near_exact_ones() {
        let Some(exec) = fast() else { return };
        let (tokens, rows, cols) = (70, 96, 130);
        let w = bytes(rows * cols, 1);
        let view = MatView::new(&w, Dtype::BF16, rows, cols).unwrap();
        let dy = numbers(tokens * rows, 2);
        let run = |exec: &Exec| {
            let mut dx = vec![1.0; tokens * cols];
            linear_backward(&dy, view, &mut dx, Into::Add, exec).unwrap();
            dx
        };
        assert!(worth(view, tokens, &exec));
        assert!(apart(&run(&exec), &run(&Exec::default())) < 5e-3);
    }

    #[test]
    fn fast_experts_have_the_gradients_of_exact_ones() {
        let Some(exec) = fast() else { return };
        let (tokens, hidden, inter, count) = (150, 48, 64, 2);
        let weights: Vec<[Vec<u8>; 3]> =
            (0..count).map(|e| [0, 1, 2].map(|m| bytes(hidden * inter, 3 * e + m + 1))).collect();
        let experts: Vec<ExpertView<'_>> = weights
            .iter()
            .map(|[gate, up, down]| ExpertView {
                gate: MatView::new(gate, Dtype::BF16, inter, hidden).unwrap(),
                up: MatView::new(up, Dtype::BF16, inter, hidden).unwrap(),
                down: MatView::new(down, Dtype::BF16, hidden, inter).unwrap(),
            })
            .collect();
        let spec = RouterSpec::softmax(2);
        let routing = route(&numbers(tokens * count, 9), tokens, count, None, &spec).unwrap();
        let x: Vec<f32> = numbers(tokens * hidden, 5).iter().map(|v| 0.3 * v).collect();
        let d_out = numbers(tokens * hidden, 6);
        let (a, b) = (numbers(2 * hidden, 7), numbers(inter * 2, 8));
        let (down_a, down_b) = (numbers(2 * inter, 10), numbers(hidden * 2, 11));
        let pair = |a, b| Some(LoraPair { a, b, rank: 2, scale: 0.1, dropout: None });
        let lora =
            ExpertLora { expert: 1, gate: pair(&a, &b), up: None, down: pair(&down_a, &down_b) };
        let silu = Activation::Silu;
        let run = |exec: &Exec| {
            let mut y = vec![0.0; x.len()];
            moe_forward_lora(&x, &routing, &experts, silu, &lora, &mut y, exec).unwrap();
            let mut d_x = vec![0.0; x.len()];
            let d = Some(&mut d_x[..]);
            let found =
                moe_backward_lora(&x, &routing, &experts, silu, &lora, &d_out, d, exec).unwrap();
            let mut plain = vec![0.0; x.len()];
            let d = Some(&mut plain[..]);
            let slots = moe_backward(&x, &routing, &experts, silu, &d_out, d, exec).unwrap();
            let (gate, down) = (found.gate.unwrap(), found.down.unwrap());
            vec![y, d_x, found.weights, gate.a, gate.b, down.a, down.b, plain, slots]
        };
        for (i, (fast, exact)) in run(&exec).iter().zip(run(&Exec::default())).enumerate() {
            let apart = apart(fast, &exact);
            assert!(apart < 2e-2 && (apart > 0.0 || i == 2), "{i}: {apart}");
        }
    }
}
