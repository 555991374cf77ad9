//! Sparse dispatch of few tokens.

use std::cell::Cell;
use std::ops::Range;

use super::{
    FEW, Form, PAD, Prepared, SHARED_FROM, Sums, TASK, check_tokens, multiply, multiply_vectors,
    set,
};
use crate::activation::Activation;
use crate::dispatch::ExpertView;
use crate::error::KernelError;
use crate::exec::Exec;
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::tasks::{self, Parts};
use crate::view::MatView;

/// Pairs of token and slot that chose the same expert, whose weights are read once for all of them.
#[derive(Clone, Copy, Default)]
struct Group {
    expert: usize,
    /// The first `count` are used: `token * top_k + slot`.
    pairs: [usize; FEW],
    tokens: [usize; FEW],
    count: usize,
}

thread_local! {
    /// Memory of the last list of groups.
    static KEPT: Cell<Vec<Group>> = const { Cell::new(Vec::new()) };
}

/// The routed experts of one layer for few tokens.
///
/// `out[t] = sum_slot weight[t, slot] * down_e(f(gate_e(x[t])) * up_e(x[t]))`, `e = ids[t, slot]`, added in slot order.
///
/// * `x`, `out`: `[tokens, hidden]`, tokens as [`super::takes`] says
/// * each weight of an expert is read once for [`FEW`] tokens; the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] or [`KernelError::TopK`] if routing, experts and slices do not fit each other.
pub(crate) fn moe_few(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    activation: Activation,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let mut groups = KEPT.take();
    let result = check_tokens(routing.tokens, exec)
        .and_then(|()| group(routing, experts.len(), &mut groups))
        .and_then(|()| {
            let hidden = experts.first().map_or(0, |e| e.gate.cols());
            check(x, routing, experts, &groups, hidden, out)?;
            let layer = Layer { routing, experts, groups: &groups, hidden, exec };
            let h = layer.gate_and_up(x, activation);
            layer.down_and_combine(&h, out);
            Ok(())
        });
    KEPT.set(groups);
    result
}

/// Pairs by expert, in the order in which experts first appear.
fn group(routing: &Routing, experts: usize, groups: &mut Vec<Group>) -> Result<(), KernelError> {
    let (tokens, k) = (routing.tokens, routing.top_k);
    KernelError::check("routing ids", tokens * k, routing.ids.len())?;
    KernelError::check("routing weights", tokens * k, routing.weights.len())?;
    groups.clear();
    for (pair, &id) in routing.ids.iter().enumerate() {
        let expert = id as usize;
        if expert >= experts {
            return Err(KernelError::TopK { top_k: expert + 1, experts });
        }
        let open = groups.iter().position(|g| g.expert == expert && g.count < FEW);
        let at = open.unwrap_or_else(|| {
            groups.push(Group { expert, ..Group::default() });
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.pairs[group.count] = pair;
        group.tokens[group.count] = pair / k;
        group.count += 1;
    }
    Ok(())
}

fn check(
    x: &[f32],
    routing: &Routing,
    experts: &[ExpertView<'_>],
    groups: &[Group],
    hidden: usize,
    out: &[f32],
) -> Result<(), KernelError> {
    KernelError::check("expert input", routing.tokens * hidden, x.len())?;
    KernelError::check("expert output", routing.tokens * hidden, out.len())?;
    for group in groups {
        let ExpertView { gate, up, down } = &experts[group.expert];
        KernelError::check("columns of an expert's gate", hidden, gate.cols())?;
        KernelError::check("columns of an expert's up", hidden, up.cols())?;
        KernelError::check("rows of an expert's up", gate.rows(), up.rows())?;
        KernelError::check("columns of an expert's down", gate.rows(), down.cols())?;
        KernelError::check("rows of an expert's down", hidden, down.rows())?;
    }
    Ok(())
}

/// One call, checked.
struct Layer<'a> {
    routing: &'a Routing,
    experts: &'a [ExpertView<'a>],
    groups: &'a [Group],
    hidden: usize,
    exec: &'a Exec,
}

/// `[pairs, stride]`.
struct Inner {
    numbers: Scratch,
    stride: usize,
}

impl Layer<'_> {
    fn chosen(&self) -> impl Iterator<Item = &ExpertView<'_>> {
        self.groups.iter().map(|g| &self.experts[g.expert])
    }

    /// `h = f(gate(x)) * up(x)` of every pair, in the form that its expert's down product reads.
    fn gate_and_up(&self, x: &[f32], activation: Activation) -> Inner {
        let prepared = [Form::Plain, Form::Split].map(|form| {
            let wanted = |e: &ExpertView<'_>| {
                Form::of(e.gate.dtype()) == form || Form::of(e.up.dtype()) == form
            };
            self.chosen()
                .any(wanted)
                .then(|| Prepared::in_form(x, self.routing.tokens, self.hidden, form, self.exec))
        });
        let widest = self.chosen().map(|e| e.gate.rows()).max().unwrap_or(0);
        let stride = widest.next_multiple_of(PAD);
        let size = self.routing.ids.len() * stride;
        let mut both = Scratch::new(2 * size); // gate, up: [pairs, stride]
        self.each_block(2, &mut both, (size, stride), |matrix, group, rows, sums| {
            let expert = &self.experts[group.expert];
            let w = [expert.gate, expert.up][matrix];
            let x = prepared.iter().flatten().find(|x| x.form == Form::of(w.dtype()));
            let x = x.expect("prepared above for every chosen expert");
            multiply(w.slice_rows(rows.start, rows.end), x, &group.tokens[..group.count], sums);
        });
        let (gate, up) = both.split_at_mut(size);
        let mut numbers = Scratch::new(size);
        for group in self.groups {
            let down = &self.experts[group.expert].down;
            for pair in &group.pairs[..group.count] {
                let inner = pair * stride..pair * stride + down.cols();
                activation.gate(&mut gate[inner.clone()], &up[inner.clone()]);
                let to = &mut numbers[pair * stride..(pair + 1) * stride];
                Form::of(down.dtype()).put(set(self.exec), &gate[inner], to);
            }
        }
        Inner { numbers, stride }
    }

    /// `out[t] = sum_slot weight[t, slot] * down(h[t, slot])`.
    fn down_and_combine(&self, h: &Inner, out: &mut [f32]) {
        let (k, hidden) = (self.routing.top_k, self.hidden);
        let mut y = Scratch::new(self.routing.ids.len() * hidden); // [pairs, hidden]
        let size = y.len();
        self.each_block(1, &mut y, (size, hidden), |_, group, rows, sums| {
            let down = self.experts[group.expert].down.slice_rows(rows.start, rows.end);
            let mut vectors: [&[f32]; FEW] = [&[]; FEW];
            for (vector, pair) in vectors.iter_mut().zip(&group.pairs[..group.count]) {
                *vector = &h.numbers[pair * h.stride..(pair + 1) * h.stride];
            }
            let how = (set(self.exec), Sums::of(self.exec));
            multiply_vectors(down, vectors, group.count, sums, how);
        });
        for (token, out) in out.chunks_exact_mut(hidden.max(1)).enumerate() {
            out.fill(0.0);
            for pair in token * k..(token + 1) * k {
                let (weight, y) = (self.routing.weights[pair], &y[pair * hidden..][..hidden]);
                out.iter_mut().zip(y).for_each(|(o, v)| *o += weight * v);
            }
        }
    }

    /// Products with gate and up, or with down, of the chosen experts, in blocks of rows. Whoever takes one block after
    /// the other reads on where it stopped: going from one matrix to another and back costs the memory's speed.
    ///
    /// * `matrices`: 2 for gate and up, 1 for down
    /// * `product(matrix, group, rows, sums)`: `sums` is `[rows, group.count]`
    /// * `all`: for each matrix, `size` apart, `[pairs, stride]`
    fn each_block(
        &self,
        matrices: usize,
        all: &mut [f32],
        (size, stride): (usize, usize),
        product: impl Fn(usize, &Group, Range<usize>, &mut [f32]) + Sync,
    ) {
        fn weight<'a>(e: &ExpertView<'a>, matrices: usize) -> MatView<'a> {
            if matrices == 2 { e.gate } else { e.down }
        }
        let rows = self.chosen().map(|e| weight(e, matrices).rows()).max().unwrap_or(0);
        let bytes: usize =
            self.chosen().map(|e| matrices * weight(e, matrices).bytes().len()).sum();
        let count = matrices * self.groups.len();
        let row = bytes / (count * rows).max(1);
        let block = (TASK / row.max(1)).clamp(1, rows.max(1));
        let blocks = rows.div_ceil(block);
        let all = Parts::new(all);
        tasks::for_each(count * blocks, bytes >= SHARED_FROM, |task| {
            let (matrix, group) =
                (task / blocks % matrices, &self.groups[task / blocks / matrices]);
            let from = task % blocks * block;
            let to = weight(&self.experts[group.expert], matrices).rows().min(from + block);
            if from >= to {
                return;
            }
            let mut sums = Scratch::new((to - from) * group.count);
            product(matrix, group, from..to, &mut sums);
            for (i, pair) in group.pairs[..group.count].iter().enumerate() {
                // SAFETY: no other task has these rows of this pair and matrix.
                let out = unsafe { all.range(matrix * size + pair * stride + from, to - from) };
                out.iter_mut()
                    .zip(sums.iter().skip(i).step_by(group.count))
                    .for_each(|(out, sum)| *out = *sum);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{numbers, sets, stored};
    use super::*;
    use crate::cast::Dtype;
    use crate::exec::Batching;

    /// Bytes and values of gate, up and down.
    type Stored = [(Vec<u8>, Vec<f32>); 3];

    fn experts(count: usize, hidden: usize, inter: usize, dtypes: [Dtype; 3]) -> Vec<Stored> {
        let one = |e: usize| [0, 1, 2].map(|m| stored(hidden * inter, dtypes[m], 3 * e + m));
        (0..count).map(one).collect()
    }

    fn views(
        experts: &[Stored],
        hidden: usize,
        inter: usize,
        dtypes: [Dtype; 3],
    ) -> Vec<ExpertView<'_>> {
        experts
            .iter()
            .map(|[gate, up, down]| ExpertView {
                gate: MatView::new(&gate.0[1..], dtypes[0], inter, hidden).unwrap(),
                up: MatView::new(&up.0[1..], dtypes[1], inter, hidden).unwrap(),
                down: MatView::new(&down.0[1..], dtypes[2], hidden, inter).unwrap(),
            })
            .collect()
    }

    /// The formula in f64.
    fn plain(x: &[f32], routing: &Routing, experts: &[Stored], hidden: usize) -> Vec<f64> {
        let inter = experts[0][0].1.len() / hidden;
        let product = |w: &[f32], x: &[f64]| -> Vec<f64> {
            w.chunks_exact(x.len())
                .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
                .collect()
        };
        let mut out = vec![0.0; x.len()];
        for (pair, &id) in routing.ids.iter().enumerate() {
            let token = pair / routing.top_k;
            let x: Vec<f64> =
                x[token * hidden..(token + 1) * hidden].iter().map(|v| f64::from(*v)).collect();
            let [gate, up, down] = &experts[id as usize];
            let (g, u) = (product(&gate.1, &x), product(&up.1, &x));
            let h: Vec<f64> = (0..inter).map(|i| g[i] / (1.0 + (-g[i]).exp()) * u[i]).collect();
            for (o, y) in out[token * hidden..].iter_mut().zip(product(&down.1, &h)) {
                *o += f64::from(routing.weights[pair]) * y;
            }
        }
        out
    }

    fn routing(tokens: usize, top_k: usize, experts: usize, seed: usize) -> Routing {
        let ids = (0..tokens * top_k).map(|i| {
            let (token, slot) = (i / top_k, i % top_k);
            ((token * seed + slot) % experts) as u32
        });
        let weights = (0..tokens * top_k).map(|i| 0.2 + 0.1 * (i % 5) as f32).collect();
        Routing { tokens, top_k, ids: ids.collect(), weights }
    }

    #[test]
    fn equals_the_formula() {
        use Dtype::*;
        let sizes = [(1, 1, 1, 3, 5), (1, 2, 4, 33, 70), (2, 2, 4, 64, 31), (3, 4, 5, 17, 40)];
        for dtypes in [[BF16; 3], [F32; 3], [F16, F16, F16], [BF16, F32, F16]] {
            for (tokens, k, count, hidden, inter) in sizes {
                for seed in 0..3 {
                    let routing = routing(tokens, k, count, seed);
                    let weights = experts(count, hidden, inter, dtypes);
                    let views = views(&weights, hidden, inter, dtypes);
                    let x = numbers(tokens * hidden, 9);
                    let expected = plain(&x, &routing, &weights, hidden);
                    for exec in sets() {
                        let mut out = vec![f32::NAN; x.len()];
                        let silu = Activation::Silu;
                        moe_few(&x, &routing, &views, silu, &mut out, &exec).unwrap();
                        for (o, e) in out.iter().zip(&expected) {
                            let error = (f64::from(*o) - e).abs() / (1.0 + e.abs());
                            assert!(error < 2e-5, "{exec:?} {dtypes:?} {hidden}: {o} {e}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (hidden, inter, dtypes) = (200, 1700, [Dtype::BF16; 3]);
        let weights = experts(4, hidden, inter, dtypes);
        let views = views(&weights, hidden, inter, dtypes);
        let x = numbers(FEW * hidden, 9);
        let three = routing(FEW, 4, 4, 1);
        let exec = Exec::default();
        let run = |threads, x: &[f32], routing: &Routing| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; x.len()];
            let silu = Activation::Silu;
            pool.install(|| moe_few(x, routing, &views, silu, &mut out, &exec)).unwrap();
            out
        };
        let alone = run(1, &x, &three);
        assert_eq!(alone, run(2, &x, &three));
        assert_eq!(alone, run(3, &x, &three));
    }

    #[test]
    fn a_token_alone_has_the_bits_it_has_among_others() {
        let (hidden, inter) = (70, 130);
        for dtypes in [[Dtype::BF16; 3], [Dtype::F32; 3], [Dtype::F16, Dtype::BF16, Dtype::F32]] {
            let weights = experts(3, hidden, inter, dtypes);
            let views = views(&weights, hidden, inter, dtypes);
            let (tokens, k) = (FEW + 7, 2);
            let (x, all) = (numbers(tokens * hidden, 9), routing(tokens, k, 3, 1));
            for exec in sets() {
                let mut together = vec![0.0; x.len()];
                let exec = Exec { batching: Batching::Alone, ..exec };
                moe_few(&x, &all, &views, Activation::Silu, &mut together, &exec).unwrap();
                let exec = Exec { batching: Batching::Fastest, ..exec };
                for token in 0..tokens {
                    let own = token * k..(token + 1) * k;
                    let (ids, weights) = (all.ids[own.clone()].into(), all.weights[own].into());
                    let one = Routing { tokens: 1, top_k: k, ids, weights };
                    let row = token * hidden..(token + 1) * hidden;
                    let mut out = vec![0.0; hidden];
                    moe_few(&x[row.clone()], &one, &views, Activation::Silu, &mut out, &exec)
                        .unwrap();
                    assert_eq!(out, together[row], "{exec:?} {token}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dtypes = [Dtype::F32; 3];
        let weights = experts(2, 4, 6, dtypes);
        let views = views(&weights, 4, 6, dtypes);
        let (x, mut out) = (numbers(4 * (FEW + 1), 1), vec![0.0; 4 * (FEW + 1)]);
        let exec = Exec::default();
        let mut run = |x: &[f32], routing: &Routing, experts: &[ExpertView<'_>]| {
            let out = &mut out[..x.len()];
            moe_few(x, routing, experts, Activation::Silu, out, &exec)
        };
        assert!(run(&x[..4], &routing(1, 2, 2, 0), &views).is_ok());
        assert!(run(&x[..3], &routing(1, 2, 2, 0), &views).is_err());
        assert!(run(&x, &routing(FEW + 1, 2, 2, 0), &views).is_err());
        assert!(run(&x[..4], &routing(1, 2, 2, 0), &views[..1]).is_err());
        let short = Routing { weights: vec![1.0], ..routing(1, 2, 2, 0) };
        assert!(run(&x[..4], &short, &views).is_err());
        let crossed = ExpertView { up: views[0].down, ..views[0] };
        assert!(run(&x[..4], &routing(1, 1, 1, 0), &[crossed]).is_err());
    }
}
