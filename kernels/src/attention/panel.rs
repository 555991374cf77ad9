//! Queries side by side in lanes: which keys they see, and their scores with a block of keys.

use std::ops::Range;

use super::{AttentionSpec, KeptNumber, KeyValues};
use crate::Dtype;
use crate::dense::Into;
use crate::exec::Isa;
use crate::product::{Left, product};
use crate::scratch::Scratch;
use crate::transpose::transpose;
use crate::vector::{Job, Vector, run};
use crate::widen::widen_strided;

/// Queries of a panel at most.
pub(crate) const QUERIES: usize = 32;

/// Keys of a block, which starts at a multiple of it: what a query computes does not depend on its neighbours.
pub(crate) const KEYS: usize = 96;

/// Where every maximum starts: below any score, and above what stands for a masked one.
pub(crate) const LOWEST: f32 = -1e30;

/// Some consecutive queries of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel {
    /// Position of the first one.
    pub position: usize,
    /// Queries there are.
    pub count: usize,
    /// Lanes, a multiple of every vector; those behind the last query hold zeros.
    pub lanes: usize,
    window: usize,
}

impl Panel {
    pub fn new(position: usize, count: usize, spec: &AttentionSpec) -> Self {
        let window = spec.window.unwrap_or(usize::MAX);
        Self { position, count, lanes: count.next_multiple_of(16), window }
    }

    /// Blocks of keys of which some query sees some.
    pub fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let first = (self.position + 1).saturating_sub(self.window) / KEYS * KEYS;
        let end = self.position + self.count;
        (first..end).step_by(KEYS).map(move |from| from..end.min(from + KEYS))
    }

    /// Overwrites the numbers `[keys, lanes]` of keys that a lane's query does not see.
    pub fn mask(self, keys: Range<usize>, numbers: &mut [f32], value: f32) {
        let seen_by_all = (self.position + self.lanes).saturating_sub(self.window);
        if keys.end <= self.position + 1 && keys.start >= seen_by_all {
            return;
        }
        for (key, row) in keys.zip(numbers.chunks_exact_mut(self.lanes)) {
            row[..key.saturating_sub(self.position).min(self.lanes)].fill(value);
            let far = key.saturating_add(self.window).saturating_sub(self.position);
            row[far.min(self.lanes)..].fill(value);
        }
    }

    /// Numbers of this panel's queries in `rows [tokens, width]` from row `first` and column `column` on, as
    /// `[dim, lanes]` times `factor`.
    pub fn turned(
        self,
        isa: Isa,
        (rows, width): (&[f32], usize),
        (first, column): (usize, usize),
        dim: usize,
        factor: f32,
    ) -> Scratch {
        let mut turned = Scratch::new(dim * self.lanes);
        if self.count < self.lanes {
            turned.fill(0.0);
        }
        let src = &rows[first * width + column..];
        transpose(isa, (self.count, dim), (src, width), (&mut turned, self.lanes));
        if factor != 1.0 {
            turned.iter_mut().for_each(|v| *v *= factor);
        }
        turned
    }

    /// `scores [keys, lanes]` of some keys of head `group` with queries `q [qk_dim, lanes]`, before softcap and mask.
    pub fn scores<T: KeptNumber>(
        self,
        isa: Isa,
        kv: &KeyValues<'_, T>,
        group: usize,
        keys: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let (row, head) = kv.key_strides;
        let sizes = (keys.len(), q.len() / self.lanes, self.lanes);
        let mut room = room::<T>(sizes.1);
        let kept = &kv.keys[group * head + keys.start * row..];
        let (data, row) = widened(isa, kept, row, [sizes.0, sizes.1], &mut room);
        let left = Left { data, row, col: 1 };
        product(isa, sizes, left, (q, self.lanes), (scores, self.lanes), Into::Overwrite);
    }
}

/// Room for a block of keys or values of `dim` numbers as f32, if that is not what they are.
pub(crate) fn room<T: KeptNumber>(dim: usize) -> Scratch {
    Scratch::new(if T::DTYPE == Dtype::F32 { 0 } else { KEYS * dim })
}

/// Rows of `dim` numbers, `stride` apart, as f32: where they are, or put into the room; and how far apart they are there.
pub(crate) fn widened<'a, T: KeptNumber>(
    isa: Isa,
    kept: &'a [T],
    stride: usize,
    [rows, dim]: [usize; 2],
    room: &'a mut [f32],
) -> (&'a [f32], usize) {
    if T::DTYPE == Dtype::F32 {
        return (bytemuck::cast_slice(kept), stride);
    }
    widen_strided(isa, kept, stride, [rows, dim], room);
    (room, dim)
}

/// `scores = cap * tanh(scores / cap)`.
pub(crate) fn soften(isa: Isa, scores: &mut [f32], cap: f32) {
    run(isa, Soften { scores, cap });
}

struct Soften<'a> {
    /// As many as fill vectors.
    scores: &'a mut [f32],
    cap: f32,
}

impl Job for Soften<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        for scores in self.scores.chunks_exact_mut(S::N) {
            // SAFETY: the processor has the set, and a chunk is a vector.
            unsafe {
                // tanh y = 1 - 2 / (exp(2y) + 1)
                let y = S::mul(S::load(scores.as_ptr()), S::splat(2.0 / self.cap));
                let below = S::div(S::splat(2.0 * self.cap), S::add(S::exp(y), S::splat(1.0)));
                S::store(scores.as_mut_ptr(), S::sub(S::splat(self.cap), below));
            }
        }
    }
}
