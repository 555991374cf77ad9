//! What one task does: a block of weight rows times some panels.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::tile::Bf16Dot;
use super::tile::{Engine, F32};
use super::{Form, Output, Panel, Panels};
use crate::activation::Activation;
use crate::cast::{self, Dtype};
use crate::exec::Isa;
use crate::product::padded;
use crate::scratch::Scratch;
#[cfg(target_arch = "aarch64")]
use crate::vector::Neon;
#[cfg(target_arch = "x86_64")]
use crate::vector::{Avx2, Avx512};
use crate::vector::{Portable, Vector};
use crate::view::MatView;

/// Work that is compiled once for each engine: twice `H` rows times `V` vectors are a tile of a wide panel, twice `H2 = 2 H` times
/// `V2 = V / 2` one of a narrow panel.
trait Block {
    /// # Safety
    /// The processor has the engine's instruction set.
    unsafe fn run<E: Engine, const H: usize, const V: usize, const H2: usize, const V2: usize>(
        self,
    );
}

fn run(isa: Isa, form: Form, block: impl Block) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn bf16<B: Block>(block: B) {
            // SAFETY: this function has the features.
            unsafe { block.run::<Bf16Dot, 6, 2, 12, 1>() }
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512<B: Block>(block: B) {
            // SAFETY: this function has the features.
            unsafe { block.run::<F32<Avx512>, 6, 2, 12, 1>() }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<B: Block>(block: B) {
            // SAFETY: this function has the features.
            unsafe { block.run::<F32<Avx2>, 3, 2, 6, 1>() }
        }
        // SAFETY: `Exec` holds only sets that the processor has, and pairs are made only for AVX512-BF16.
        match isa {
            Isa::Avx512Bf16 if form == Form::Pairs => return unsafe { bf16(block) },
            Isa::Avx512Bf16 | Isa::Avx512 => return unsafe { avx512(block) },
            Isa::Avx2 => return unsafe { avx2(block) },
            Isa::Neon | Isa::Portable => {}
        }
    }
    #[cfg(target_arch = "aarch64")]
    if isa == Isa::Neon {
        // SAFETY: every 64-bit Arm processor has them.
        return unsafe { block.run::<F32<Neon>, 3, 4, 6, 2>() };
    }
    // SAFETY: plain Rust has no demands.
    unsafe { block.run::<F32<Portable>, 3, 2, 6, 1>() }
}

/// `out[t, r] = sum_c w[r, c] x[t, c] + bias[r]` for some rows and all tokens of some panels.
pub(crate) struct LinearBlock<'a> {
    pub w: MatView<'a>,
    pub bias: Option<&'a [f32]>,
    pub rows: Range<usize>,
    pub panels: &'a Panels,
    pub chunk: Range<usize>,
    /// Where row 0 of the first token of all panels goes.
    pub out: Output,
}

impl LinearBlock<'_> {
    /// # Safety
    /// No other thread writes these columns of the tokens' rows of `out`, and the panels are filled with `w.cols()` columns.
    pub unsafe fn compute(self, isa: Isa) {
        run(isa, self.panels.form, self);
    }
}

impl Block for LinearBlock<'_> {
    #[inline(always)]
    unsafe fn run<E: Engine, const H: usize, const V: usize, const H2: usize, const V2: usize>(
        self,
    ) {
        let Self { w, bias, rows, panels, chunk, out } = self;
        let list = &panels.list[chunk.clone()];
        let height = rows.len().next_multiple_of(2 * H2);
        let lanes: usize = list.iter().map(|p| p.lanes).sum();
        let mut sums = Scratch::new(height * lanes); // [panel][height, lanes]
        let mut weights = RowBuffer::new::<E>(w, 2 * H2);
        let wide = V * E::S::N;
        for from in (0..rows.len()).step_by(2 * H2) {
            let at = rows.start + from;
            let mut offsets = [0f32; 64];
            if let Some(bias) = bias {
                let part = &bias[at..rows.end.min(at + 2 * H2)];
                offsets[..part.len()].copy_from_slice(part);
            }
            let (a, b, stride) = weights.rows::<E>([(w, at), (w, at + H2)], H2, rows.end);
            let mut base = 0;
            for (index, panel) in chunk.clone().zip(list) {
                let words = panels.words(index);
                // SAFETY: `rows` gave R rows at `a` and at `b`; the panel holds its lanes; `sums` has room for `height` rows of
                // every panel.
                unsafe {
                    let to = sums.as_mut_ptr().add(base + from * panel.lanes);
                    if panel.lanes == wide {
                        for skip in [0, H] {
                            let (a, b) = (a.add(skip * stride), b.add(skip * stride));
                            let found = E::tile::<H, V>(a, b, stride, words, panels.cols);
                            let offsets = &offsets[skip..];
                            store::<E::S, H, V>(found, H2, offsets, to.add(skip * panel.lanes));
                        }
                    } else {
                        let found = E::tile::<H2, V2>(a, b, stride, words, panels.cols);
                        store::<E::S, H2, V2>(found, H2, &offsets, to);
                    }
                }
                base += height * panel.lanes;
            }
        }
        let mut base = 0;
        for panel in list {
            // SAFETY: `sums` holds `height` rows of this panel from `base` on; the caller has the output to itself.
            unsafe { scatter::<E::S>(sums.as_ptr().add(base), &rows, panel, out) };
            base += height * panel.lanes;
        }
    }
}

/// Sums plus what is added to each row: the first run's rows from 0 on, the second's from `second` on.
#[inline(always)]
unsafe fn store<S: Vector, const H: usize, const V: usize>(
    sums: [[[S::V; V]; H]; 2],
    second: usize,
    offsets: &[f32],
    to: *mut f32,
) {
    for (run, sums) in sums.into_iter().enumerate() {
        for (r, sums) in sums.into_iter().enumerate() {
            let row = run * second + r;
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: the caller has room for `second + H` rows of `V` vectors.
                unsafe {
                    let sum = S::add(sum, S::splat(offsets[row]));
                    S::store(to.add((row * V + v) * S::N), sum);
                }
            }
        }
    }
}

/// Sums `[rows, lanes]` of one panel to `out[token, row]`.
#[inline(always)]
unsafe fn scatter<S: Vector>(sums: *const f32, rows: &Range<usize>, panel: &Panel, out: Output) {
    let mut block = [0f32; 256];
    for from in (0..rows.len()).step_by(S::N) {
        for lane in (0..panel.tokens).step_by(S::N) {
            let (height, tokens) = (S::N.min(rows.len() - from), S::N.min(panel.tokens - lane));
            // SAFETY: the caller's: both sides hold what is read and written here; sums are padded to whole blocks of lanes, and
            // their rows to more than the vectors' width or read only as far as they go.
            unsafe {
                let src = sums.add(from * panel.lanes + lane);
                let dst = out.start.add((panel.first + lane) * out.stride + rows.start + from);
                if height == S::N && tokens == S::N {
                    S::transpose(src, panel.lanes, dst, out.stride);
                    continue;
                }
                for i in 0..height {
                    for j in 0..tokens {
                        block[j * S::N + i] = *src.add(i * panel.lanes + j);
                    }
                }
                for (j, row) in block.chunks_exact(S::N).take(tokens).enumerate() {
                    let to = std::slice::from_raw_parts_mut(dst.add(j * out.stride), height);
                    to.copy_from_slice(&row[..height]);
                }
            }
        }
    }
}

/// `h[r] = f(gate[r] . x) * (up[r] . x)` for some rows and all tokens of some panels, into panels of the next product.
pub(crate) struct GateUpBlock<'a> {
    pub gate: MatView<'a>,
    pub up: MatView<'a>,
    pub activation: Activation,
    /// Begins at an even row.
    pub rows: Range<usize>,
    pub panels: &'a Panels,
    pub chunk: Range<usize>,
    /// Panels over the same tokens, of the same form.
    pub out: &'a Panels,
}

impl GateUpBlock<'_> {
    /// # Safety
    /// No other thread writes these rows of the output's panels, and the panels are filled with `gate.cols()` columns.
    pub unsafe fn compute(self, isa: Isa) {
        run(isa, self.panels.form, self);
    }
}

impl Block for GateUpBlock<'_> {
    #[inline(always)]
    unsafe fn run<E: Engine, const H: usize, const V: usize, const H2: usize, const V2: usize>(
        self,
    ) {
        let Self { gate, up, activation, rows, panels, chunk, out } = self;
        let mut weights = RowBuffer::new::<E>(gate, 2 * H2);
        let wide = V * E::S::N;
        for at in rows.clone().step_by(H2) {
            let (a, b, stride) = weights.rows::<E>([(gate, at), (up, at)], H2, rows.end);
            for index in chunk.clone() {
                let (words, to) = (panels.words(index), out.words(index));
                // SAFETY: `rows` gave R rows at `a` and at `b`; the panel holds its lanes, and its partner room for the rows.
                unsafe {
                    if panels.list[index].lanes == wide {
                        for skip in [0, H] {
                            let (a, b) = (a.add(skip * stride), b.add(skip * stride));
                            let found = E::tile::<H, V>(a, b, stride, words, panels.cols);
                            store_gated::<E, H, V>(found, activation, at + skip, rows.end, to);
                        }
                    } else {
                        let found = E::tile::<H2, V2>(a, b, stride, words, panels.cols);
                        store_gated::<E, H2, V2>(found, activation, at, rows.end, to);
                    }
                }
            }
        }
    }
}

/// Gates the second half of `sums` by the first, and stores that as rows `at..end` of a panel.
#[inline(always)]
unsafe fn store_gated<E: Engine, const H: usize, const V: usize>(
    [gates, ups]: [[[<E::S as Vector>::V; V]; H]; 2],
    activation: Activation,
    at: usize,
    end: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut gated = [[E::S::zero(); V]; H];
        for (r, gated) in gated.iter_mut().enumerate() {
            // A row beyond the last is a partner that must be zero.
            if at + r < end {
                for ((gated, gate), up) in gated.iter_mut().zip(gates[r]).zip(ups[r]) {
                    *gated = E::S::mul(gate_value::<E::S>(activation, gate), up);
                }
            }
        }
        let rows = H.min(end.saturating_sub(at));
        match E::FORM {
            Form::Wide => {
                for (r, gated) in gated[..rows].iter().enumerate() {
                    for (v, gated) in gated.iter().enumerate() {
                        E::S::store(to.add(((at + r) * V + v) * E::S::N), *gated);
                    }
                }
            }
            Form::Pairs => {
                for r in (0..rows).step_by(2) {
                    let (low, high) = (gated[r], gated[r + 1]);
                    for (v, (low, high)) in low.into_iter().zip(high).enumerate() {
                        let pair = E::interleave(low, high);
                        E::S::store(to.add(((at + r) / 2 * V + v) * E::S::N), pair);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn gate_value<S: Vector>(activation: Activation, x: S::V) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        // x / (1 + exp(-y)): y = x for SiLU, y = 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU by tanh.
        let y = match activation {
            Activation::Silu => x,
            Activation::GeluTanh => {
                let cube = S::mul(S::mul(x, x), S::mul(x, S::splat(0.044715)));
                S::mul(S::add(x, cube), S::splat(1.595_769))
            }
            Activation::Gelu => {
                let mut lanes = [0f32; 16];
                S::store(lanes.as_mut_ptr(), x);
                lanes[..S::N].iter_mut().for_each(|v| *v = activation.apply(*v));
                return S::load(lanes.as_ptr());
            }
        };
        let down = S::exp(S::sub(S::zero(), y));
        S::div(x, S::add(S::splat(1.0), down))
    }
}

/// Weight rows as an engine reads them: in place where they are stored so, else copied.
struct RowBuffer {
    copied: Scratch,
    cols: usize,
    /// f32 words from copied row to row: so many that equal columns of many rows do not crowd into few sets of a cache.
    words: usize,
    direct: bool,
}

impl RowBuffer {
    fn new<E: Engine>(w: MatView<'_>, rows: usize) -> Self {
        let direct = match E::FORM {
            Form::Wide => w.dtype() == Dtype::F32,
            Form::Pairs => true,
        };
        let words = padded(w.cols());
        Self { copied: Scratch::new(rows * words), cols: w.cols(), words, direct }
    }

    /// Two runs of `count` rows, and the bytes from row to row; rows from `end` on are zero.
    #[inline(always)]
    fn rows<E: Engine>(
        &mut self,
        runs: [(MatView<'_>, usize); 2],
        count: usize,
        end: usize,
    ) -> (*const u8, *const u8, usize) {
        let size = match E::FORM {
            Form::Wide => 4,
            Form::Pairs => 2,
        };
        if self.direct && runs.iter().all(|(_, at)| at + count <= end) {
            let stride = self.cols * size;
            let [a, b] = runs.map(|(w, at)| w.bytes()[at * stride..].as_ptr());
            return (a, b, stride);
        }
        let stride = self.words * 4;
        for (run, (w, at)) in runs.into_iter().enumerate() {
            for r in 0..count {
                let from = (run * count + r) * self.words;
                match E::FORM {
                    Form::Wide => {
                        let to = &mut self.copied[from..from + self.cols];
                        if at + r < end {
                            cast::widen(w.row(at + r), w.dtype(), to);
                        } else {
                            to.fill(0.0);
                        }
                    }
                    Form::Pairs => {
                        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut self.copied);
                        let to = &mut all[from * 4..from * 4 + self.cols * 2];
                        if at + r < end {
                            to.copy_from_slice(w.row(at + r));
                        } else {
                            to.fill(0);
                        }
                    }
                }
            }
        }
        let a = self.copied.as_ptr().cast::<u8>();
        // SAFETY: the buffer holds twice `count` rows.
        (a, unsafe { a.add(count * stride) }, stride)
    }
}
