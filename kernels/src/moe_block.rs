//! The routed experts of a layer as training needs them: what lies between their matrices is kept for the way back.

use std::ops::Range;

use crate::activation::Activation;
use crate::dense::Into;
use crate::dispatch::{ExpertView, Groups, group};
use crate::error::KernelError;
use crate::exec::Exec;
use crate::linear_backward::{Share, shares_backward};
use crate::lora::{ExpertLora, LoraPair, add_pair};
use crate::lora_backward::{LoraGradients, PairBack, no_gradients};
use crate::panel::{Form, LinearBlock, Output, Panels, ROWS};
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::simd::each_set;
use crate::tasks::{Parts, for_each};
use crate::view::MatView;

/// Pairs whose gradients one task takes through the activation.
const PAIRS: usize = 16;

/// Numbers below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 16;

/// The routed experts of a layer, one of which may have LoRA pairs.
///
/// A pair of token `t` and expert `e` with weight `w` gives `w down_e(f(g) u)`, `g = gate_e x[t]`, `u = up_e x[t]`, and
/// `out[t]` is the sum over the slots of `t`, in their order. A matrix with a LoRA pair is `w + scale b a`.
///
/// * f32 sums; many tokens of bf16 experts are rounded to bf16 where `exec` is fast and the processor multiplies bf16 faster;
///   pairs in f32 in any case
/// * the same bits for any number of threads
#[derive(Debug, Clone, Copy)]
pub struct MoeBlock<'a> {
    /// `[tokens, hidden]`.
    pub x: &'a [f32],
    /// Which tokens visit which experts, with which weights.
    pub routing: &'a Routing,
    /// The matrices of each.
    pub experts: &'a [ExpertView<'a>],
    /// `f`.
    pub activation: Activation,
    /// The pairs of one expert.
    pub lora: Option<ExpertLora<'a>>,
    /// How products are computed.
    pub exec: &'a Exec,
}

/// What lies between the matrices: outputs of gate and up of every pair, `[pairs by expert, inter]`.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeInner {
    groups: Groups,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl MoeInner {
    /// Memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        (self.gate.len() + self.up.len()) * size_of::<f32>()
    }
}

/// Gradients of the experts of a layer besides that of their input.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeGradients {
    /// Of the weights of the chosen slots, `[tokens, top_k]`.
    pub weights: Vec<f32>,
    /// Of the pair of gate, if there is one.
    pub gate: Option<LoraGradients>,
    /// Of the pair of up.
    pub up: Option<LoraGradients>,
    /// Of the pair of down.
    pub down: Option<LoraGradients>,
}

impl<'a> MoeBlock<'a> {
    /// The first half of the way: outputs of gate and up.
    ///
    /// # Errors
    /// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts, pairs and `x` do not fit each other.
    pub fn inner(&self) -> Result<MoeInner, KernelError> {
        let groups = self.groups()?;
        let size = groups.order.len() * self.inter();
        let (mut gate, mut up) = (vec![0.0; size], vec![0.0; size]);
        let k = self.routing.top_k;
        let token = |pair: usize| groups.order[pair] as usize / k;
        let outs = [&mut gate[..], &mut up[..]];
        self.products(&groups, (self.x, &token), [|e| e.gate, |e| e.up], outs);
        if let Some((lora, pairs)) = self.adapted(&groups) {
            let x = gather(self.x, self.hidden(), pairs.clone(), token);
            for (pair, out) in [(lora.gate, &mut gate), (lora.up, &mut up)] {
                if let Some(pair) = pair {
                    add_pair(&x, &pair, &mut out[rows_of(&pairs, self.inter())], self.exec.isa);
                }
            }
        }
        Ok(MoeInner { groups, gate, up })
    }

    /// The second half, from what [`MoeBlock::inner`] gave: `out [tokens, hidden]`.
    ///
    /// # Errors
    /// As [`MoeBlock::inner`].
    pub fn forward(&self, inner: &MoeInner, out: &mut [f32]) -> Result<(), KernelError> {
        let MoeInner { groups, gate, up } = inner;
        self.check_inner(inner)?;
        KernelError::check("expert output", self.x.len(), out.len())?;
        let h = self.gated(gate, up); // [pairs, inter]
        let mut y = Scratch::new(groups.order.len() * self.hidden()); // [pairs, hidden]
        self.products(groups, (&h, &|pair| pair), [|e| e.down], [&mut y]);
        if let Some((ExpertLora { down: Some(pair), .. }, pairs)) = self.adapted(groups) {
            let h = &h[rows_of(&pairs, self.inter())];
            add_pair(h, &pair, &mut y[rows_of(&pairs, self.hidden())], self.exec.isa);
        }
        let k = self.routing.top_k;
        self.combine(groups, &y, out, |pair| self.routing.weights[pair], k);
        Ok(())
    }

    /// Gradients, from what [`MoeBlock::inner`] gave and the gradient `d_out` of what [`MoeBlock::forward`] gave.
    ///
    /// With `a = down_eᵀ d_out[t]`: `dw = a . f(g) u`, `dg = w a u f'(g)`, `du = w a f(g)`, `dx[t] += gate_eᵀ dg + up_eᵀ du`;
    /// of a LoRA pair beside a matrix with input `z` and gradient `dy` of its output `d_b = sum_t scale dy (a z)ᵀ`,
    /// `d_a = sum_t scale bᵀ dy zᵀ`.
    ///
    /// * `d_out`, `d_x` (overwritten; left out where it is not wanted): `[tokens, hidden]`
    /// * working memory: three times the inner numbers, and `d_x` of every pair
    ///
    /// # Errors
    /// As [`MoeBlock::inner`].
    pub fn backward(
        &self,
        inner: MoeInner,
        d_out: &[f32],
        d_x: Option<&mut [f32]>,
    ) -> Result<MoeGradients, KernelError> {
        self.check_inner(&inner)?;
        KernelError::check("gradient of expert output", self.x.len(), d_out.len())?;
        let MoeInner { groups, gate: mut g, up: mut u } = inner;
        let (hidden, inter, k, exec) = (self.hidden(), self.inter(), self.routing.top_k, self.exec);
        let pairs = groups.order.len();
        let token = |pair: usize| groups.order[pair] as usize / k.max(1);
        let dy = gather(d_out, hidden, 0..pairs, token); // [pairs, hidden]
        let mut a = Scratch::new(pairs * inter);
        shares_backward(&self.shares(&groups, |e| e.down), &dy, &mut a, Into::Overwrite, exec)?;
        let adapted = self.adapted(&groups);
        let down = adapted.as_ref().and_then(|(lora, pairs)| {
            let dy = &dy[rows_of(pairs, hidden)];
            Some((PairBack::new(dy, lora.down?, exec.isa), pairs.clone()))
        });
        if let Some((back, pairs)) = &down {
            back.add_input(&mut a[rows_of(pairs, inter)]);
        }
        let own = down.as_ref().map_or(0..0, |(_, pairs)| pairs.clone());
        let mut h = Scratch::new(own.len() * inter); // w f(g) u of the expert with a pair beside down
        let slopes = self.slopes(&groups, [&mut g, &mut u, &mut a], &own, &mut h);
        let of_down = down.map(|(back, _)| back.gradients(&h));
        let mut backs = [None, None];
        if let Some((lora, pairs)) = &adapted {
            for (back, (pair, d)) in backs.iter_mut().zip([(lora.gate, &g), (lora.up, &u)]) {
                *back = pair.map(|pair| PairBack::new(&d[rows_of(pairs, inter)], pair, exec.isa));
            }
        }
        if let Some(d_x) = d_x {
            KernelError::check("gradient of expert input", self.x.len(), d_x.len())?;
            let mut d_pairs = Scratch::new(pairs * hidden);
            shares_backward(
                &self.shares(&groups, |e| e.gate),
                &g,
                &mut d_pairs,
                Into::Overwrite,
                exec,
            )?;
            shares_backward(&self.shares(&groups, |e| e.up), &u, &mut d_pairs, Into::Add, exec)?;
            for back in backs.iter().flatten() {
                let pairs = adapted.as_ref().map_or(0..0, |(_, pairs)| pairs.clone());
                back.add_input(&mut d_pairs[rows_of(&pairs, hidden)]);
            }
            self.combine(&groups, &d_pairs, d_x, |_| 1.0, k);
        }
        let weights = groups.inverse.iter().map(|at| slopes[*at as usize]).collect();
        let [mut of_gate, mut of_up] = [None, None];
        if let Some((_, pairs)) = adapted {
            let x = gather(self.x, hidden, pairs, token);
            [of_gate, of_up] = backs.map(|back| back.map(|back| back.gradients(&x)));
        }
        let found = |found: Option<LoraGradients>,
                     pair: fn(&ExpertLora<'a>) -> Option<LoraPair<'a>>| {
            found.or_else(|| self.lora.as_ref().and_then(pair).map(no_gradients))
        };
        Ok(MoeGradients {
            weights,
            gate: found(of_gate, |l| l.gate),
            up: found(of_up, |l| l.up),
            down: found(of_down, |l| l.down),
        })
    }

    /// `f(g) u`.
    fn gated(&self, g: &[f32], u: &[f32]) -> Scratch {
        let mut h = Scratch::new(g.len());
        let part = (PAIRS * self.inter()).max(1);
        let parts = Parts::new(&mut h);
        for_each(g.len().div_ceil(part), g.len() >= ALONE_BELOW, |task| {
            let (from, to) = (task * part, g.len().min((task + 1) * part));
            // SAFETY: the numbers of this task.
            let h = unsafe { parts.range(from, to - from) };
            h.copy_from_slice(&g[from..to]);
            self.activation.gate(h, &u[from..to]);
        });
        h
    }

    /// Through the activation: `g`, `u` become their gradients, `a` is multiplied by the weights; returns `a . f(g) u` of every
    /// pair. `h` becomes `w f(g) u` of the pairs `own`.
    fn slopes(
        &self,
        groups: &Groups,
        [g, u, a]: [&mut [f32]; 3],
        own: &Range<usize>,
        h: &mut [f32],
    ) -> Vec<f32> {
        let (pairs, inter) = (groups.order.len(), self.inter());
        let mut slopes = vec![0.0; pairs];
        let shared = a.len() >= ALONE_BELOW;
        let (g, u, a) = (Parts::new(g), Parts::new(u), Parts::new(a));
        let (found, kept) = (Parts::new(&mut slopes), Parts::new(h));
        for_each(pairs.div_ceil(PAIRS), shared, |task| {
            let rows = task * PAIRS..pairs.min((task + 1) * PAIRS);
            let (from, len) = (rows.start * inter, rows.len() * inter);
            // SAFETY: the pairs of this task.
            let [g, u, a] = [&g, &u, &a].map(|part| unsafe { part.range(from, len) });
            // SAFETY: as above.
            let slopes = unsafe { found.range(rows.start, rows.len()) };
            let mut h = Scratch::new(len);
            h.copy_from_slice(g);
            self.activation.gate(&mut h, u);
            for (i, pair) in rows.enumerate() {
                let weight = self.routing.weights[groups.order[pair] as usize];
                let (a, h) = (&mut a[i * inter..(i + 1) * inter], &h[i * inter..(i + 1) * inter]);
                dot(a, h, &mut slopes[i]);
                a.iter_mut().for_each(|a| *a *= weight);
                if own.contains(&pair) {
                    // SAFETY: as above.
                    let kept = unsafe { kept.range((pair - own.start) * inter, inter) };
                    kept.iter_mut().zip(h).for_each(|(kept, h)| *kept = weight * h);
                }
            }
            self.activation.gate_backward(g, u, a);
        });
        slopes
    }

    /// Checks all sizes, and sorts pairs by expert.
    fn groups(&self) -> Result<Groups, KernelError> {
        let Self { x, routing, experts, lora, .. } = self;
        let (tokens, k) = (routing.tokens, routing.top_k);
        KernelError::check("routing ids", tokens * k, routing.ids.len())?;
        KernelError::check("routing weights", tokens * k, routing.weights.len())?;
        let hidden = self.hidden();
        KernelError::check("expert input", tokens * hidden, x.len())?;
        for expert in *experts {
            expert.check(hidden)?;
            KernelError::check("rows of an expert's gate", self.inter(), expert.gate.rows())?;
        }
        if let Some(lora) = lora {
            lora.check(experts)?;
        }
        group(routing, experts.len())
    }

    fn check_inner(&self, inner: &MoeInner) -> Result<(), KernelError> {
        let pairs = self.routing.ids.len();
        KernelError::check("routing weights", pairs, self.routing.weights.len())?;
        KernelError::check("pairs of tokens and experts", inner.groups.order.len(), pairs)?;
        KernelError::check("numbers inside experts", pairs * self.inter(), inner.gate.len())?;
        KernelError::check("expert input", self.routing.tokens * self.hidden(), self.x.len())
    }

    fn hidden(&self) -> usize {
        self.experts.first().map_or(0, |e| e.gate.cols())
    }

    fn inter(&self) -> usize {
        self.experts.first().map_or(0, |e| e.gate.rows())
    }

    /// The expert that has LoRA pairs and which of the pairs by expert are its, if some are.
    fn adapted(&self, groups: &Groups) -> Option<(ExpertLora<'a>, Range<usize>)> {
        let lora = self.lora?;
        let pairs = of_expert(groups, lora.expert);
        (!pairs.is_empty()).then_some((lora, pairs))
    }

    /// One matrix of every expert with its pairs.
    fn shares(
        &self,
        groups: &Groups,
        matrix: fn(&ExpertView<'a>) -> MatView<'a>,
    ) -> Vec<Share<'a>> {
        let all = self.experts.iter().enumerate();
        all.map(|(e, expert)| Share { rows: of_expert(groups, e), w: matrix(expert) }).collect()
    }

    /// `outs[m][pair] = matrices[m] x[row(pair)]` for the pairs of all experts together.
    fn products<const M: usize>(
        &self,
        groups: &Groups,
        (x, row): (&[f32], &(impl Fn(usize) -> usize + Sync)),
        matrices: [fn(&ExpertView<'a>) -> MatView<'a>; M],
        mut outs: [&mut [f32]; M],
    ) {
        let exec = self.exec;
        let mut parts: Vec<_> = (0..self.experts.len())
            .filter_map(|e| {
                let (pairs, ws) = (of_expert(groups, e), matrices.map(|m| m(&self.experts[e])));
                let dots = ws.iter().all(|w| Form::of(w.dtype(), exec) == Form::Pairs);
                let form = if dots { Form::Pairs } else { Form::Wide };
                let panels = Panels::new(pairs.len(), ws[0].cols(), form, exec.isa);
                (!pairs.is_empty()).then_some((pairs, ws, panels))
            })
            .collect();
        // Large ones first: what is left at the end is small.
        parts.sort_by_key(|(pairs, ..)| std::cmp::Reverse(pairs.len()));
        let shared = x.len() >= ALONE_BELOW;
        let fills: Vec<_> =
            parts.iter().flat_map(|p| (0..p.2.list.len()).map(move |i| (p, i))).collect();
        for_each(fills.len(), shared, |task| {
            let ((pairs, _, panels), index) = fills[task];
            // SAFETY: every task has a panel of its own; `row` names rows of `x`.
            unsafe { panels.fill(index, x, |pair| row(pairs.start + pair), exec.isa) }
        });
        let tasks: Vec<_> = parts
            .iter()
            .flat_map(|part| part.2.chunks().into_iter().map(move |chunk| (part, chunk)))
            .flat_map(|(part, chunk)| (0..M).map(move |m| (part, chunk.clone(), m)))
            .flat_map(|(part, chunk, m)| {
                let rows = part.1[m].rows();
                let blocks = (0..rows).step_by(ROWS);
                blocks.map(move |from| (part, chunk.clone(), m, from..rows.min(from + ROWS)))
            })
            .collect();
        let starts = outs.each_mut().map(|out| Output { start: out.as_mut_ptr(), stride: 0 });
        for_each(tasks.len(), shared, |task| {
            let ((pairs, ws, panels), chunk, m, rows) = tasks[task].clone();
            let out = Output { stride: ws[m].rows(), ..starts[m] }.row(pairs.start);
            // SAFETY: every task has rows and pairs of its own, and the outputs hold all pairs.
            unsafe {
                LinearBlock { w: ws[m], bias: None, rows, panels, chunk, out }.compute(exec.isa)
            }
        });
    }

    /// `out[t]` is the sum of the rows of its pairs times their factors, in slot order.
    fn combine(
        &self,
        groups: &Groups,
        rows: &[f32],
        out: &mut [f32],
        factor: impl Fn(usize) -> f32 + Sync,
        k: usize,
    ) {
        let hidden = self.hidden();
        if hidden == 0 || k == 0 {
            return out.fill(0.0);
        }
        let tokens = self.routing.tokens;
        let shared = rows.len() >= ALONE_BELOW;
        let out = Parts::new(out);
        for_each(tokens.div_ceil(PAIRS), shared, |task| {
            for token in task * PAIRS..tokens.min((task + 1) * PAIRS) {
                // SAFETY: the tokens of this task.
                let out = unsafe { out.range(token * hidden, hidden) };
                out.fill(0.0);
                for pair in token * k..(token + 1) * k {
                    let row = &rows[groups.inverse[pair] as usize * hidden..][..hidden];
                    let factor = factor(pair);
                    out.iter_mut().zip(row).for_each(|(o, v)| *o += factor * v);
                }
            }
        });
    }
}

/// The pairs by expert that are expert `e`'s.
fn of_expert(groups: &Groups, e: usize) -> Range<usize> {
    groups.offsets[e] as usize..groups.offsets[e + 1] as usize
}

/// Where the rows of some pairs lie.
fn rows_of(pairs: &Range<usize>, width: usize) -> Range<usize> {
    pairs.start * width..pairs.end * width
}

/// Rows of `all [_, width]` that `token` names, one for each of `pairs`.
fn gather(
    all: &[f32],
    width: usize,
    pairs: Range<usize>,
    token: impl Fn(usize) -> usize + Sync,
) -> Scratch {
    let mut rows = Scratch::new(pairs.len() * width);
    let shared = rows.len() >= ALONE_BELOW;
    let parts = Parts::new(&mut rows);
    for_each(pairs.len().div_ceil(PAIRS), shared, |task| {
        for row in task * PAIRS..pairs.len().min((task + 1) * PAIRS) {
            let from = token(pairs.start + row) * width;
            // SAFETY: the rows of this task.
            let to = unsafe { parts.range(row * width, width) };
            to.copy_from_slice(&all[from..from + width]);
        }
    });
    rows
}

each_set! {
    fn dot(a: &[f32], b: &[f32], sum: &mut f32) {
        let mut lanes = [0f32; 32];
        let (a, b) = (a.chunks_exact(32), b.chunks_exact(32));
        let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
        for (a, b) in a.zip(b) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        *sum = lanes.iter().sum::<f32>() + rest;
    }
}

#[cfg(test)]
pub(crate) mod tests;
