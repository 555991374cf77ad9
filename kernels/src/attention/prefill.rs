//! Attention of many queries: panels of them, over blocks of keys with a softmax that goes along.
//!
//! Queries stand in lanes: keys and values are read where they are, maxima and sums need no sum across lanes, and no
//! matrix of all scores exists.

use super::panel::{LOWEST, Panel, QUERIES, room, soften, widened};
use super::{AttentionSpec, KeptNumber, KeyValues};
use crate::dense::Into;
use crate::exec::{Exec, Isa};
use crate::product::{Left, product};
use crate::scratch::Scratch;
use crate::tasks::{Parts, for_each};
use crate::transpose::transpose;
use crate::vector::{Job, Vector, run};

/// Multiply-adds below which handing work to other threads costs more than it gains.
const ALONE_BELOW: usize = 1 << 20;

/// [`super::attention`] with all sizes checked.
///
/// * `q`: `[tokens, heads * qk_dim]`; `out`: `[tokens, heads * v_dim]`; `tokens > 0`
pub(super) fn prefill<T: KeptNumber>(
    q: &[f32],
    kv: KeyValues<'_, T>,
    spec: &AttentionSpec,
    tokens: usize,
    exec: &Exec,
    out: &mut [f32],
) {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let panels = tokens.div_ceil(QUERIES);
    let shared = tokens * kv.count * heads * (qk_dim + v_dim) >= ALONE_BELOW;
    let out = Parts::new(out);
    for_each(heads * panels, shared, |index| {
        // Late queries see more keys: they come first.
        let (first, head) = ((panels - 1 - index / heads) * QUERIES, index % heads);
        let count = QUERIES.min(tokens - first);
        let panel = Panel::new(kv.count - tokens + first, count, spec);
        let q =
            panel.turned(exec.isa, (q, heads * qk_dim), (first, head * qk_dim), qk_dim, spec.scale);
        let sums = attend(exec.isa, panel, &q, &kv, spec, head * kv_heads / heads);
        for (i, row) in sums.chunks_exact(v_dim.max(1)).enumerate() {
            // SAFETY: no other task has these queries of this head.
            let out = unsafe { out.range(((first + i) * heads + head) * v_dim, v_dim) };
            out.copy_from_slice(row);
        }
    });
}

/// What the queries `q [qk_dim, lanes]` (scaled) of one panel get from head `group`: `[count, v_dim]`.
fn attend<T: KeptNumber>(
    isa: Isa,
    panel: Panel,
    q: &[f32],
    kv: &KeyValues<'_, T>,
    spec: &AttentionSpec,
    group: usize,
) -> Scratch {
    let (lanes, v_dim) = (panel.lanes, spec.v_dim);
    let mut scores = Scratch::new(super::panel::KEYS * lanes); // [keys, lanes]
    let mut sums = Scratch::zeroed(v_dim * lanes); // [v_dim, lanes]
    let mut room = room::<T>(v_dim);
    let (mut max, mut total) = ([LOWEST; QUERIES], [0.0; QUERIES]);
    for keys in panel.blocks() {
        let scores = &mut scores[..keys.len() * lanes];
        panel.scores(isa, kv, group, keys.clone(), q, scores);
        if let Some(cap) = spec.softcap {
            soften(isa, scores, cap);
        }
        panel.mask(keys.clone(), scores, f32::NEG_INFINITY);
        let (max, total) = (&mut max[..lanes], &mut total[..lanes]);
        run(isa, Step { scores, max, total, sums: &mut sums });
        panel.mask(keys.clone(), scores, 0.0);
        let (row, head) = kv.value_strides;
        let kept = &kv.values[group * head + keys.start * row..];
        let (data, row) = widened(isa, kept, row, [keys.len(), v_dim], &mut room);
        let left = Left { data, row: 1, col: row };
        let sizes = (v_dim, keys.len(), lanes);
        product(isa, sizes, left, (scores, lanes), (&mut sums, lanes), Into::Add);
    }
    let inverse = total.map(|total| 1.0 / total);
    let mut rows = Scratch::new(panel.count * v_dim);
    for sums in sums.chunks_exact_mut(lanes) {
        sums.iter_mut().zip(&inverse).for_each(|(v, by)| *v *= by);
    }
    transpose(isa, (v_dim, panel.count), (&sums, lanes), (&mut rows, v_dim));
    rows
}

/// Another block of scores: they become `exp(score - max)` with the new maximum, and what was summed up so far changes over
/// to that.
pub(crate) struct Step<'a> {
    /// `[keys, lanes]`.
    pub scores: &'a mut [f32],
    /// `[lanes]`.
    pub max: &'a mut [f32],
    /// `[lanes]`.
    pub total: &'a mut [f32],
    /// `[v_dim, lanes]`.
    pub sums: &'a mut [f32],
}

impl Job for Step<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let Step { scores, max, total, sums } = self;
        let lanes = max.len();
        for at in (0..lanes).step_by(S::N) {
            // SAFETY: `lanes` is a multiple of `N`, every row has so many numbers, and the processor has the set.
            unsafe {
                let before = S::load(max[at..].as_ptr());
                let (mut even, mut odd) = (before, before);
                for pair in scores.chunks(2 * lanes) {
                    even = S::max(S::load(pair.as_ptr().add(at)), even);
                    if pair.len() > lanes {
                        odd = S::max(S::load(pair.as_ptr().add(lanes + at)), odd);
                    }
                }
                let now = S::max(even, odd);
                let by = S::exp(S::sub(before, now));
                let mut sum = S::mul(S::load(total[at..].as_ptr()), by);
                for row in scores.chunks_exact_mut(lanes) {
                    let p = S::exp(S::sub(S::load(row.as_ptr().add(at)), now));
                    S::store(row.as_mut_ptr().add(at), p);
                    sum = S::add(sum, p);
                }
                S::store(max[at..].as_mut_ptr(), now);
                S::store(total[at..].as_mut_ptr(), sum);
                for row in sums.chunks_exact_mut(lanes) {
                    let scaled = S::mul(S::load(row.as_ptr().add(at)), by);
                    S::store(row.as_mut_ptr().add(at), scaled);
                }
            }
        }
    }
}
