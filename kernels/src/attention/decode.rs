//! Attention of few queries: one pass over the cache for each key-value head, with all query heads that it serves.

// Indices of registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::{AttentionSpec, KeptNumber, KeyValues};
use crate::Dtype;
use crate::exec::Isa;
use crate::scratch::Scratch;
use crate::simd::exp;
use crate::tasks::{self, Parts};
use crate::vector::{self, Job, Vector};
use crate::widen::stored;

/// Keys of one task. Fixed, so that no bit depends on the number of threads.
const SPAN: usize = 1024;

/// Keys whose scores are held at a time: they and their values stay in the first cache for all query heads.
const BLOCK: usize = 64;

/// Query rows and keys whose products are summed side by side.
const ROWS: usize = 3;
const KEYS: usize = 4;

/// Bytes of keys and values from which on other threads help.
const SHARED_FROM: usize = 200 << 10;

/// Numbers in the longest vector.
const MOST_LANES: usize = 16;

/// Numbers before the weighted values in a row of a partial result: largest score, sum of weights, last correction, none.
const STATE: usize = 4;
const LARGEST: usize = 0;
const SUM: usize = 1;
const CORRECTION: usize = 2;

/// Attention of `tokens` queries of each sequence, the last of which stands at its last key; all sizes are checked.
///
/// * `q`: `[sequences, tokens, heads * qk_dim]`; `out`: `[sequences, tokens, heads * v_dim]`; `tokens > 0`
pub(super) fn decode<T: KeptNumber>(
    q: &[f32],
    sequences: &[KeyValues<'_, T>],
    tokens: usize,
    spec: &AttentionSpec,
    out: &mut [f32],
    isa: Isa,
) {
    let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *spec;
    let rows = tokens * heads / kv_heads;
    let seen = |kv: &KeyValues<'_, T>| first_key(kv.count, tokens, spec)..kv.count;
    let spans = sequences.iter().map(|kv| seen(kv).len().div_ceil(SPAN)).max().unwrap_or(0);
    let keys: usize = sequences.iter().map(|kv| seen(kv).len()).sum();
    let share = keys * kv_heads * (qk_dim + v_dim) * size_of::<T>() >= SHARED_FROM;
    let width = STATE + v_dim;
    let mut partial = Scratch::new(sequences.len() * kv_heads * spans * rows * width);
    let parts = Parts::new(&mut partial);
    tasks::for_each(sequences.len() * kv_heads * spans, share, |task| {
        let (sequence, head, span) =
            (task / spans / kv_heads, task / spans % kv_heads, task % spans);
        let kv = sequences[sequence];
        let seen = seen(&kv);
        let from = seen.start + span * SPAN;
        // SAFETY: no other task has this index.
        let state = unsafe { parts.range(task * rows * width, rows * width) };
        let mut scores = Scratch::new(rows * BLOCK);
        let q = &q[sequence * tokens * heads * qk_dim..][..tokens * heads * qk_dim];
        let keys = from..seen.end.min(from + SPAN);
        vector::run(isa, Span { q, kv, spec, tokens, head, keys, state, scores: &mut scores });
    });
    for (index, out) in out.chunks_exact_mut(v_dim.max(1)).enumerate() {
        let (query, head) = (index / heads, index % heads);
        let (sequence, token) = (query / tokens, query % tokens);
        let group = heads / kv_heads;
        let row = token * group + head % group;
        let first = (sequence * kv_heads + head / group) * spans;
        let states = (first..first + spans).map(|s| &partial[(s * rows + row) * width..][..width]);
        combine(states, out);
    }
}

/// The first key that any of the queries sees.
fn first_key(count: usize, tokens: usize, spec: &AttentionSpec) -> usize {
    (count - tokens + 1).saturating_sub(spec.window.unwrap_or(usize::MAX))
}

/// Puts the parts of one row together: each is weighed with `exp(largest - largest of all)`.
fn combine<'a>(states: impl Iterator<Item = &'a [f32]> + Clone, out: &mut [f32]) {
    let states = states.filter(|s| s[SUM] != 0.0);
    let largest = states.clone().map(|s| s[LARGEST]).fold(f32::MIN, f32::max);
    let weigh = |s: &[f32]| (s[LARGEST] - largest).exp();
    let sum: f32 = states.clone().map(|s| weigh(s) * s[SUM]).sum();
    out.fill(0.0);
    for state in states {
        let weight = weigh(state) / sum;
        out.iter_mut().zip(&state[STATE..]).for_each(|(o, v)| *o += weight * v);
    }
}

/// Some keys of one key-value head, for all queries of the heads it serves.
struct Span<'a, T> {
    q: &'a [f32], // [tokens, heads * qk_dim]
    kv: KeyValues<'a, T>,
    spec: &'a AttentionSpec,
    tokens: usize,
    head: usize,
    keys: Range<usize>,
    state: &'a mut [f32], // [rows, STATE + v_dim], rows: token, then head of the group
    scores: &'a mut [f32], // [rows, BLOCK]
}

impl<T: KeptNumber> Job for Span<'_, T> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let AttentionSpec { heads, kv_heads, qk_dim, v_dim, .. } = *self.spec;
        let (group, width) = (heads / kv_heads, STATE + v_dim);
        let rows = self.tokens * group;
        for state in self.state.chunks_exact_mut(width) {
            state.fill(0.0);
            state[LARGEST] = f32::MIN;
        }
        let query = |row: usize| {
            let head = self.head * group + row % group;
            &self.q[(row / group * heads + head) * qk_dim..][..qk_dim]
        };
        let (key_step, value_step) = (self.kv.key_strides.0, self.kv.value_strides.0);
        for from in self.keys.clone().step_by(BLOCK) {
            let count = BLOCK.min(self.keys.end - from);
            let keys = &self.kv.keys[self.head * self.kv.key_strides.1 + from * key_step..];
            let values = &self.kv.values[self.head * self.kv.value_strides.1 + from * value_step..];
            assert!(keys.len() >= (count - 1) * key_step + qk_dim);
            assert!(values.len() >= (count - 1) * value_step + v_dim);
            for (first, tile) in tiles(rows) {
                let scores = &mut self.scores[first * BLOCK..][..tile * BLOCK];
                // SAFETY: `count` keys lie at their stride, as asserted; the caller's processor.
                unsafe {
                    let k = (keys.as_ptr(), key_step);
                    match tile {
                        1 => products::<S, T, 1>([query(first)], k, count, scores),
                        2 => {
                            products::<S, T, 2>([0, 1].map(|i| query(first + i)), k, count, scores)
                        }
                        _ => {
                            let q = [0, 1, 2].map(|i| query(first + i));
                            products::<S, T, ROWS>(q, k, count, scores);
                        }
                    }
                }
            }
            for row in 0..rows {
                let position = self.kv.count - self.tokens + row / group;
                let window = self.spec.window.unwrap_or(usize::MAX);
                let seen = (position + 1).saturating_sub(window).max(from)..position + 1;
                let seen = seen.start - from..count.min(seen.end.saturating_sub(from));
                let scores = &mut self.scores[row * BLOCK..][..BLOCK];
                // SAFETY: the caller's processor.
                unsafe { weights::<S>(scores, seen, self.spec, &mut self.state[row * width..]) };
            }
            for (first, tile) in tiles(rows) {
                let scores = &self.scores[first * BLOCK..][..tile * BLOCK];
                let state = &mut self.state[first * width..][..tile * width];
                // SAFETY: `count` values lie at their stride, as asserted; the caller's processor.
                unsafe {
                    let v = (values.as_ptr(), value_step);
                    match tile {
                        1 => weigh::<S, T, 1>(scores, v, count, v_dim, state),
                        2 => weigh::<S, T, 2>(scores, v, count, v_dim, state),
                        _ => weigh::<S, T, ROWS>(scores, v, count, v_dim, state),
                    }
                }
            }
        }
    }
}

/// First row and size of tiles of nearly equal size, at most [`ROWS`].
fn tiles(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(ROWS);
    (0..count).map(move |i| {
        let (from, to) = (i * rows / count, (i + 1) * rows / count);
        (from, to - from)
    })
}

/// `scores[t, j] = q[t] . k[j]`.
///
/// # Safety
/// `count` keys of the queries' length can be read at `k`, a pointer and the distance from one to the next; the processor has
/// the set of `S`.
#[inline(always)]
unsafe fn products<S: Vector, E: KeptNumber, const T: usize>(
    q: [&[f32]; T],
    k: (*const E, usize),
    count: usize,
    scores: &mut [f32], // [T, BLOCK]
) {
    let mut j = 0;
    // SAFETY: the caller's; fewer than `count` keys are read.
    unsafe {
        while j + KEYS <= count {
            let sums = some_products::<S, E, T, KEYS>(q, k.0.add(j * k.1), k.1);
            for t in 0..T {
                scores[t * BLOCK + j..][..KEYS].copy_from_slice(&sums[t]);
            }
            j += KEYS;
        }
        while j < count {
            let sums = some_products::<S, E, T, 1>(q, k.0.add(j * k.1), k.1);
            for t in 0..T {
                scores[t * BLOCK + j] = sums[t][0];
            }
            j += 1;
        }
    }
}

/// Products of `T` queries with `K` keys, `step` apart. The order of a sum does not depend on `T` and `K`.
///
/// # Safety
/// As [`products`].
#[inline(always)]
unsafe fn some_products<S: Vector, E: KeptNumber, const T: usize, const K: usize>(
    q: [&[f32]; T],
    k: *const E,
    step: usize,
) -> [[f32; K]; T] {
    let dim = q[0].len();
    // SAFETY: the caller's: all vectors have `dim` numbers.
    unsafe {
        let mut sums = [[S::zero(); K]; T];
        let mut d = 0;
        while d + S::N <= dim {
            // The smaller number of vectors is held: AVX2 has just enough for it.
            let mut queries = [S::zero(); T];
            for t in 0..T {
                queries[t] = S::load(q[t].as_ptr().add(d));
            }
            for j in 0..K {
                let key = stored::<S>(k.add(j * step + d).cast(), E::DTYPE);
                for t in 0..T {
                    sums[t][j] = S::fma(queries[t], key, sums[t][j]);
                }
            }
            d += S::N;
        }
        let mut out = [[0.0; K]; T];
        for t in 0..T {
            for j in 0..K {
                let rest: f32 = (d..dim).map(|d| q[t][d] * number(*k.add(j * step + d))).sum();
                out[t][j] = S::sum(sums[t][j]) + rest;
            }
        }
        out
    }
}

/// A single number as f32.
fn number<E: KeptNumber>(x: E) -> f32 {
    match E::DTYPE {
        Dtype::F16 => bytemuck::cast::<E, half::f16>(x).to_f32(),
        _ => bytemuck::cast(x),
    }
}

/// Turns the products of one row into weights, `exp(score - largest)` for the keys it sees and 0 for others.
///
/// # Safety
/// The processor has the set of `S`.
#[inline(always)]
unsafe fn weights<S: Vector>(
    scores: &mut [f32],
    seen: Range<usize>,
    spec: &AttentionSpec,
    state: &mut [f32],
) {
    if seen.is_empty() {
        scores.fill(0.0);
        state[CORRECTION] = 1.0;
        return;
    }
    assert!(scores.len() == BLOCK && BLOCK.is_multiple_of(S::N));
    // SAFETY: `BLOCK` numbers, whole vectors of them; the caller's processor.
    unsafe {
        let scale = S::splat(spec.scale);
        for j in (0..BLOCK).step_by(S::N) {
            let mut score = S::mul(S::load(scores.as_mut_ptr().add(j)), scale);
            if let Some(cap) = spec.softcap {
                // tanh(y) = 1 - 2 / (exp(2 y) + 1)
                let (one, two) = (S::splat(1.0), S::splat(2.0));
                let e = S::exp(S::mul(score, S::splat(2.0 / cap)));
                score = S::mul(S::splat(cap), S::sub(one, S::div(two, S::add(e, one))));
            }
            S::store(scores.as_mut_ptr().add(j), score);
        }
        let hide = |scores: &mut [f32], with| {
            scores[..seen.start].fill(with);
            scores[seen.end..].fill(with);
        };
        hide(scores, f32::MIN);
        let before = state[LARGEST];
        let mut most = S::splat(before);
        for j in (0..BLOCK).step_by(S::N) {
            most = S::max(S::load(scores.as_ptr().add(j)), most);
        }
        let mut lanes = [before; MOST_LANES];
        S::store(lanes.as_mut_ptr(), most);
        let largest = lanes.into_iter().fold(before, f32::max);
        let mut sum = S::zero();
        for j in (0..BLOCK).step_by(S::N) {
            let weight = S::exp(S::sub(S::load(scores.as_mut_ptr().add(j)), S::splat(largest)));
            S::store(scores.as_mut_ptr().add(j), weight);
            sum = S::add(sum, weight);
        }
        hide(scores, 0.0);
        let correction = exp(before - largest);
        state[LARGEST] = largest;
        state[CORRECTION] = correction;
        state[SUM] = state[SUM] * correction + S::sum(sum);
    }
}

/// `sum[t] = sum[t] * correction[t] + sum_j weights[t, j] v[j]`.
///
/// # Safety
/// `count` values of `dim` numbers can be read at `v`, a pointer and the distance from one to the next; the processor has
/// the set of `S`.
#[inline(always)]
unsafe fn weigh<S: Vector, E: KeptNumber, const T: usize>(
    weights: &[f32], // [T, BLOCK]
    v: (*const E, usize),
    count: usize,
    dim: usize,
    state: &mut [f32], // [T, STATE + dim]
) {
    let mut d = 0;
    // SAFETY: the caller's; no column behind `dim` is touched.
    unsafe {
        while d + 4 * S::N <= dim {
            some_columns::<S, E, T, 4>(weights, v, count, d..dim, state);
            d += 4 * S::N;
        }
        while d + S::N <= dim {
            some_columns::<S, E, T, 1>(weights, v, count, d..dim, state);
            d += S::N;
        }
        for t in 0..T {
            let state = &mut state[t * (STATE + dim)..][..STATE + dim];
            for d in d..dim {
                let mut sum = state[STATE + d] * state[CORRECTION];
                for (j, weight) in weights[t * BLOCK..][..count].iter().enumerate() {
                    sum += weight * number(*v.0.add(j * v.1 + d));
                }
                state[STATE + d] = sum;
            }
        }
    }
}

/// [`weigh`] for `C` vectors of columns from `columns.start` on.
///
/// # Safety
/// As [`weigh`]; the columns lie before `columns.end`.
#[inline(always)]
unsafe fn some_columns<S: Vector, E: KeptNumber, const T: usize, const C: usize>(
    weights: &[f32],
    v: (*const E, usize),
    count: usize,
    columns: Range<usize>,
    state: &mut [f32],
) {
    let (from, width) = (columns.start, STATE + columns.end);
    assert!(weights.len() >= T * BLOCK && state.len() >= T * width);
    // SAFETY: the caller's; rows of weights and state lie inside, as asserted.
    unsafe {
        let at = state.as_mut_ptr().add(STATE + from);
        let mut sums = [[S::zero(); C]; T];
        for t in 0..T {
            let correction = S::splat(state[t * width + CORRECTION]);
            for c in 0..C {
                sums[t][c] = S::mul(S::load(at.add(t * width + c * S::N)), correction);
            }
        }
        for j in 0..count {
            let v = v.0.add(j * v.1 + from);
            let mut weight = [S::zero(); T];
            for t in 0..T {
                weight[t] = S::splat(*weights.as_ptr().add(t * BLOCK + j));
            }
            for c in 0..C {
                let value = stored::<S>(v.add(c * S::N).cast(), E::DTYPE);
                for t in 0..T {
                    sums[t][c] = S::fma(weight[t], value, sums[t][c]);
                }
            }
        }
        for t in 0..T {
            for c in 0..C {
                S::store(at.add(t * width + c * S::N), sums[t][c]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_lanes;
    use super::super::tests::{flat, numbers, plain};
    use super::*;
    use crate::Exec;

    fn spec(heads: usize, kv_heads: usize, qk_dim: usize, v_dim: usize) -> AttentionSpec {
        let scale = 1.0 / (qk_dim as f32).sqrt();
        AttentionSpec { heads, kv_heads, qk_dim, v_dim, scale, softcap: None, window: None }
    }

    #[test]
    fn every_set_equals_the_formula() {
        let shapes = [(4, 2, 6, 5), (9, 3, 64, 64), (7, 1, 40, 72), (2, 2, 16, 8), (5, 5, 33, 35)];
        let mut worst = 0f64;
        for (heads, kv_heads, qk_dim, v_dim) in shapes {
            let plain_spec = spec(heads, kv_heads, qk_dim, v_dim);
            for (tokens, keys) in [(1, 1), (1, 63), (2, 64), (3, 70), (3, 3), (5, 131)] {
                for (window, softcap) in
                    [(None, None), (Some(1), None), (Some(30), None), (None, Some(5.0))]
                {
                    let s = AttentionSpec { window, softcap, ..plain_spec };
                    let q = numbers(tokens * heads * qk_dim, 1);
                    let k = numbers(keys * kv_heads * qk_dim, 2);
                    let v = numbers(keys * kv_heads * v_dim, 3);
                    let expected = plain(&q, &k, &v, tokens, &s);
                    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                        let mut out = vec![f32::NAN; expected.len()];
                        decode(&q, &[flat(&k, &v, &s)], tokens, &s, &mut out, isa);
                        for (o, e) in out.iter().zip(&expected) {
                            worst = worst.max((f64::from(*o) - e).abs());
                            assert!((f64::from(*o) - e).abs() < 3e-6, "{isa:?} {tokens} {s:?}");
                        }
                    }
                }
            }
        }
        println!("largest error: {worst:.1e}");
    }

    #[test]
    fn large_scores_and_long_caches() {
        let s = AttentionSpec { scale: 20.0, ..spec(2, 1, 8, 8) };
        let keys = 2 * SPAN + 77;
        let (q, k, v) = (numbers(16, 1), numbers(keys * 8, 2), numbers(keys * 8, 3));
        let mut out = vec![f32::NAN; 16];
        decode(&q, &[flat(&k, &v, &s)], 1, &s, &mut out, Isa::best());
        for (o, e) in out.iter().zip(plain(&q, &k, &v, 1, &s)) {
            assert!((f64::from(*o) - e).abs() < 1e-4, "{o} {e}");
        }
        let far = AttentionSpec { window: Some(SPAN + 5), ..s };
        decode(&q, &[flat(&k, &v, &far)], 1, &far, &mut out, Isa::best());
        for (o, e) in out.iter().zip(plain(&q, &k, &v, 1, &far)) {
            assert!((f64::from(*o) - e).abs() < 1e-4, "{o} {e}");
        }
    }

    #[test]
    fn threads_and_other_sequences_do_not_change_a_bit() {
        let s = spec(6, 2, 64, 64);
        let counts = [1, 3000, 700, 1500];
        let caches: Vec<_> =
            counts.iter().map(|n| (numbers(n * 128, *n), numbers(n * 128, n + 1))).collect();
        let views: Vec<_> = caches.iter().map(|(k, v)| flat(k, v, &s)).collect();
        let q = numbers(counts.len() * 384, 5);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; q.len()];
            pool.install(|| attention_lanes(&q, &views, &s, &mut out, &Exec::default())).unwrap();
            out
        };
        let together = run(1);
        assert_eq!(together, run(2));
        assert_eq!(together, run(3));
        for (i, kv) in views.iter().enumerate() {
            let mut alone = vec![0.0; 384];
            crate::attention(&q[i * 384..][..384], *kv, &s, &mut alone, &Exec::default()).unwrap();
            assert_eq!(together[i * 384..][..384], alone);
        }
    }
}
