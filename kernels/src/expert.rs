//! One expert, with LoRA pairs where it has them, on some of its tokens: forward, and gradients.
//!
//! Tokens stand in lanes all the way through. Blocks of rows of gate and up, with the columns of down that belong to them, are
//! widened one after another, and what lies between the matrices never exists for more than one block.

use std::ops::Range;

use crate::activation::Activation;
use crate::dense::Into;
use crate::dispatch::ExpertView;
use crate::exec::Isa;
use crate::lora::{ExpertLora, LoraPair};
use crate::product::{Left, padded, product};
use crate::scratch::Scratch;
use crate::transpose::transpose;
use crate::widen::widen;

/// Tokens that go through together at most.
pub(crate) const TOKENS: usize = 64;

/// Rows of gate and up, columns of down, at a time.
const ROWS: usize = 96;

/// An expert and how it is computed.
#[derive(Clone, Copy)]
pub(crate) struct Expert<'a> {
    pub view: ExpertView<'a>,
    /// Of this expert, if it has some; checked.
    pub lora: Option<&'a ExpertLora<'a>>,
    pub activation: Activation,
    pub isa: Isa,
}

/// Rows of tokens, and the same numbers in lanes.
pub(crate) struct Tokens {
    /// `[count, width]`.
    rows: Scratch,
    /// `[width, lanes]`, zeros behind the last token.
    turned: Scratch,
    count: usize,
    width: usize,
}

impl Tokens {
    /// The rows that `indices` name of `all [tokens, width]`, at most [`TOKENS`].
    pub fn gather(
        isa: Isa,
        all: &[f32],
        width: usize,
        indices: impl ExactSizeIterator<Item = usize>,
    ) -> Self {
        let count = indices.len();
        let mut rows = Scratch::new(count * width);
        for (row, index) in rows.chunks_exact_mut(width.max(1)).zip(indices) {
            row.copy_from_slice(&all[index * width..(index + 1) * width]);
        }
        let lanes = lanes(count);
        let mut turned = Scratch::zeroed(width * lanes);
        transpose(isa, (count, width), (&rows, width), (&mut turned, lanes));
        Self { rows, turned, count, width }
    }
}

/// Lanes for so many tokens: whole vectors of every set.
fn lanes(count: usize) -> usize {
    count.next_multiple_of(16)
}

/// Rows `[count, width]` out of lanes `[width, lanes]`.
fn rows_of(isa: Isa, turned: &[f32], width: usize, out: &mut [f32]) {
    let count = out.len().checked_div(width).unwrap_or(0);
    transpose(isa, (width, count), (turned, lanes(count)), (out, width));
}

/// Gradients of the three pairs of an expert: of `a` and `b` of gate, up and down one after another; empty for pairs there are
/// not. That of `a` of down is its transpose.
pub(crate) struct Factors {
    sizes: [usize; 6],
}

impl Factors {
    pub fn of(lora: &ExpertLora<'_>) -> Self {
        let [gate, up, down] =
            lora.pairs().map(|pair| pair.map_or([0; 2], |p| [p.a.len(), p.b.len()]));
        Self { sizes: [gate[0], gate[1], up[0], up[1], down[0], down[1]] }
    }

    pub fn len(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Number `which` of the six.
    pub fn range(&self, which: usize) -> Range<usize> {
        let from = self.sizes[..which].iter().sum();
        from..from + self.sizes[which]
    }
}

/// Where gradients go.
pub(crate) struct Backward<'a> {
    /// Weights of the pairs, `[count]`.
    pub weights: &'a [f32],
    /// Gradients of them, `[count]`.
    pub d_weights: &'a mut [f32],
    /// `[count, hidden]`, where the gradient of the input is wanted.
    pub d_x: Option<&'a mut [f32]>,
    /// Laid out as [`Factors`], added to; empty without pairs.
    pub d_factors: &'a mut [f32],
}

/// A pair on its way along the blocks of an expert.
struct Along<'a> {
    pair: LoraPair<'a>,
    /// `[rank, lanes]`: for gate and up `scale a x`, for down `scale bᵀ d_out`.
    low: Scratch,
    /// The same as rows `[lanes, rank]`; for down times the weights.
    low_rows: Scratch,
    /// `[rank, lanes]`, summed over blocks: for gate and up `bᵀ dg`, for down `a h`.
    sum: Scratch,
}

impl<'a> Along<'a> {
    /// A pair of gate or up.
    fn input(isa: Isa, pair: LoraPair<'a>, x: &Tokens) -> Self {
        let left = Left::rows(pair.a, x.width);
        Self::new(isa, pair, left, x, &[])
    }

    /// The pair of down, for the way back.
    fn output(isa: Isa, pair: LoraPair<'a>, d_out: &Tokens, weights: &[f32]) -> Self {
        let left = Left::transposed(pair.b, pair.rank);
        Self::new(isa, pair, left, d_out, weights)
    }

    /// The pair of down, for the way forward: nothing is known before the first block.
    fn ahead(pair: LoraPair<'a>, lanes: usize) -> Self {
        let sum = Scratch::zeroed(pair.rank * lanes);
        Self { pair, low: Scratch::new(0), low_rows: Scratch::new(0), sum }
    }

    fn new(isa: Isa, pair: LoraPair<'a>, left: Left<'_>, tokens: &Tokens, weights: &[f32]) -> Self {
        let (rank, lanes) = (pair.rank, lanes(tokens.count));
        let mut low = Scratch::new(rank * lanes);
        let sizes = (rank, tokens.width, lanes);
        product(isa, sizes, left, (&tokens.turned, lanes), (&mut low, lanes), Into::Overwrite);
        low.iter_mut().for_each(|v| *v *= pair.scale);
        let mut low_rows = Scratch::new(lanes * rank);
        transpose(isa, (rank, lanes), (&low, lanes), (&mut low_rows, rank));
        for (row, weight) in low_rows.chunks_exact_mut(rank).zip(weights) {
            row.iter_mut().for_each(|v| *v *= weight);
        }
        Self { pair, low, low_rows, sum: Scratch::zeroed(rank * lanes) }
    }
}

impl Expert<'_> {
    fn hidden(&self) -> usize {
        self.view.gate.cols()
    }

    fn pairs(&self) -> [Option<LoraPair<'_>>; 3] {
        self.lora.map_or([None; 3], ExpertLora::pairs)
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let inter = self.view.gate.rows();
        (0..inter).step_by(ROWS).map(move |from| from..inter.min(from + ROWS))
    }

    /// `out [count, hidden] = down(f(gate x) * up x)`.
    pub fn forward(&self, x: &Tokens, out: &mut [f32]) {
        let (isa, hidden, lanes) = (self.isa, self.hidden(), lanes(x.count));
        let [gate, up, down] = self.pairs();
        let [gate, up] = [gate, up].map(|pair| pair.map(|pair| Along::input(isa, pair, x)));
        let mut down = down.map(|pair| Along::ahead(pair, lanes));
        let mut room = Room::new(self, lanes);
        let mut y = Scratch::zeroed(hidden * lanes); // [hidden, lanes]
        for rows in self.blocks() {
            let n = rows.len();
            room.inner(self, &rows, x, [gate.as_ref(), up.as_ref()]);
            self.activation.gate(&mut room.gate[..n * lanes], &room.up[..n * lanes]);
            let h = &room.gate[..n * lanes];
            widen(
                isa,
                self.view.down,
                0..hidden,
                rows.clone(),
                &mut room.down_wide,
                room.down_width,
            );
            let left = Left::rows(&room.down_wide, room.down_width);
            product(isa, (hidden, n, lanes), left, (h, lanes), (&mut y, lanes), Into::Add);
            if let Some(down) = &mut down {
                down.add_columns(isa, &rows, self.view.down.cols(), h, lanes);
            }
        }
        if let Some(down) = &mut down {
            let (rank, scale) = (down.pair.rank, down.pair.scale);
            down.sum.iter_mut().for_each(|v| *v *= scale);
            let left = Left::rows(down.pair.b, rank);
            product(
                isa,
                (hidden, rank, lanes),
                left,
                (&down.sum, lanes),
                (&mut y, lanes),
                Into::Add,
            );
        }
        rows_of(isa, &y, hidden, out);
    }

    /// Gradients from those of the output of each pair's token, `d_out`, before the weights.
    pub fn backward(&self, x: &Tokens, d_out: &Tokens, to: Backward<'_>) {
        let (isa, hidden, lanes) = (self.isa, self.hidden(), lanes(x.count));
        let inter = self.view.gate.rows();
        let Backward { weights, d_weights, d_x, d_factors } = to;
        let mut lane_weights = [0.0; TOKENS];
        lane_weights[..x.count].copy_from_slice(weights);
        let mut lane_slopes = [0.0; TOKENS];
        let [gate, up, down] = self.pairs();
        let [mut gate, mut up] = [gate, up].map(|pair| pair.map(|pair| Along::input(isa, pair, x)));
        let mut down = down.map(|pair| Along::output(isa, pair, d_out, weights));
        let factors = self.lora.map(Factors::of);
        let mut room = Room::new(self, lanes);
        let mut sums = Scratch::zeroed(if d_x.is_some() { hidden * lanes } else { 0 }); // [hidden, lanes]
        for rows in self.blocks() {
            let n = rows.len();
            room.inner(self, &rows, x, [gate.as_ref(), up.as_ref()]);
            room.outer(self, &rows, d_out, down.as_ref());
            if let (Some(down), Some(factors)) = (&mut down, &factors) {
                let (h, g) = (&mut room.spare[..n * lanes], &room.gate[..n * lanes]);
                h.copy_from_slice(g);
                self.activation.gate(h, &room.up[..n * lanes]);
                down.add_columns(isa, &rows, inter, h, lanes);
                let d_a = &mut d_factors[factors.range(4)][rows.start * down.pair.rank..];
                down.add_outer(isa, h, lanes, n, x.count, d_a);
            }
            room.slopes(self.activation, n * lanes, lanes, &lane_weights, &mut lane_slopes);
            let (d_gate, d_up) = (&room.gate[..n * lanes], &room.up[..n * lanes]);
            if d_x.is_some() {
                for (wide, d) in [(&room.gate_wide, d_gate), (&room.up_wide, d_up)] {
                    let left = Left::transposed(wide, room.width);
                    product(
                        isa,
                        (hidden, n, lanes),
                        left,
                        (d, lanes),
                        (&mut sums, lanes),
                        Into::Add,
                    );
                }
            }
            let Some(factors) = &factors else { continue };
            for (along, d, which) in [(&mut gate, d_gate, 1), (&mut up, d_up, 3)] {
                if let Some(along) = along {
                    let rank = along.pair.rank;
                    let d_b = &mut d_factors[factors.range(which)][rows.start * rank..];
                    along.add_outer(isa, d, lanes, n, x.count, d_b);
                    let left = Left::transposed(&along.pair.b[rows.start * rank..], rank);
                    let sum = (&mut along.sum[..], lanes);
                    product(isa, (rank, n, lanes), left, (d, lanes), sum, Into::Add);
                }
            }
        }
        d_weights.copy_from_slice(&lane_slopes[..x.count]);
        if let Some(factors) = &factors {
            for (along, which) in [(&mut gate, 0), (&mut up, 2)] {
                if let Some(along) = along {
                    along.finish_input(isa, x, &mut sums, &mut d_factors[factors.range(which)]);
                }
            }
            if let Some(down) = &mut down {
                down.finish_output(isa, d_out, &lane_weights, &mut d_factors[factors.range(5)]);
            }
        }
        if let Some(d_x) = d_x {
            rows_of(isa, &sums, hidden, d_x);
        }
    }
}

impl Along<'_> {
    /// `sum += a[:, rows] h`, for down.
    fn add_columns(
        &mut self,
        isa: Isa,
        rows: &Range<usize>,
        inter: usize,
        h: &[f32],
        lanes: usize,
    ) {
        let left = Left { data: &self.pair.a[rows.start..], row: inter, col: 1 };
        let sizes = (self.pair.rank, rows.len(), lanes);
        product(isa, sizes, left, (h, lanes), (&mut self.sum, lanes), Into::Add);
    }

    /// `out [n, rank] += d [n, lanes] low_rows`, summed over tokens.
    fn add_outer(
        &self,
        isa: Isa,
        d: &[f32],
        lanes: usize,
        n: usize,
        count: usize,
        out: &mut [f32],
    ) {
        let rank = self.pair.rank;
        let right = (&self.low_rows[..], rank);
        product(isa, (n, count, rank), Left::rows(d, lanes), right, (out, rank), Into::Add);
    }

    /// After the last block, for gate and up: what goes to the input (if `sums` are not empty) and to `a`.
    fn finish_input(&mut self, isa: Isa, x: &Tokens, sums: &mut [f32], d_a: &mut [f32]) {
        let (rank, hidden, lanes) = (self.pair.rank, x.width, lanes(x.count));
        let scale = self.pair.scale;
        self.sum.iter_mut().for_each(|v| *v *= scale);
        if !sums.is_empty() {
            let left = Left::transposed(self.pair.a, hidden);
            product(isa, (hidden, rank, lanes), left, (&self.sum, lanes), (sums, lanes), Into::Add);
        }
        let left = Left::rows(&self.sum, lanes);
        product(isa, (rank, x.count, hidden), left, (&x.rows, hidden), (d_a, hidden), Into::Add);
    }

    /// After the last block, for down: what goes to `b`.
    fn finish_output(&mut self, isa: Isa, d_out: &Tokens, weights: &[f32], d_b: &mut [f32]) {
        let (rank, lanes) = (self.pair.rank, lanes(d_out.count));
        transpose(isa, (rank, lanes), (&self.sum, lanes), (&mut self.low_rows, rank));
        for (row, weight) in self.low_rows.chunks_exact_mut(rank).zip(weights) {
            row.iter_mut().for_each(|v| *v *= weight * self.pair.scale);
        }
        self.add_outer(isa, &d_out.turned, lanes, d_out.width, d_out.count, d_b);
    }
}

/// Room for one block of an expert.
struct Room {
    /// Rows of gate and of up, `[ROWS, width]`.
    gate_wide: Scratch,
    up_wide: Scratch,
    width: usize,
    /// Columns of down, `[hidden, down_width]`.
    down_wide: Scratch,
    down_width: usize,
    /// `[ROWS, lanes]` each.
    gate: Scratch,
    up: Scratch,
    d_h: Scratch,
    spare: Scratch,
}

impl Room {
    fn new(expert: &Expert<'_>, lanes: usize) -> Self {
        let (hidden, rows) = (expert.hidden(), ROWS.min(expert.view.gate.rows()));
        let (width, down_width) = (padded(hidden), padded(rows));
        let lane_block = || Scratch::new(rows * lanes);
        Self {
            gate_wide: Scratch::new(rows * width),
            up_wide: Scratch::new(rows * width),
            width,
            down_wide: Scratch::new(hidden * down_width),
            down_width,
            gate: lane_block(),
            up: lane_block(),
            d_h: lane_block(),
            spare: lane_block(),
        }
    }

    /// Gate and up of some rows, with their pairs.
    fn inner(
        &mut self,
        expert: &Expert<'_>,
        rows: &Range<usize>,
        x: &Tokens,
        [gate, up]: [Option<&Along<'_>>; 2],
    ) {
        let (isa, hidden, lanes) = (expert.isa, expert.hidden(), lanes(x.count));
        for (view, along, wide, out) in [
            (expert.view.gate, gate, &mut self.gate_wide, &mut self.gate),
            (expert.view.up, up, &mut self.up_wide, &mut self.up),
        ] {
            widen(isa, view, rows.clone(), 0..hidden, wide, self.width);
            let (left, sizes) = (Left::rows(wide, self.width), (rows.len(), hidden, lanes));
            product(isa, sizes, left, (&x.turned, lanes), (out, lanes), Into::Overwrite);
            if let Some(Along { pair, low, .. }) = along {
                let left = Left::rows(&pair.b[rows.start * pair.rank..], pair.rank);
                let sizes = (rows.len(), pair.rank, lanes);
                product(isa, sizes, left, (low, lanes), (out, lanes), Into::Add);
            }
        }
    }

    /// Gradient of what enters some columns of down, before the weights.
    fn outer(
        &mut self,
        expert: &Expert<'_>,
        rows: &Range<usize>,
        d_out: &Tokens,
        down: Option<&Along<'_>>,
    ) {
        let (isa, hidden, lanes) = (expert.isa, expert.hidden(), lanes(d_out.count));
        widen(isa, expert.view.down, 0..hidden, rows.clone(), &mut self.down_wide, self.down_width);
        let left = Left::transposed(&self.down_wide, self.down_width);
        let (sizes, out) = ((rows.len(), hidden, lanes), (&mut self.d_h[..], lanes));
        product(isa, sizes, left, (&d_out.turned, lanes), out, Into::Overwrite);
        if let Some(Along { pair, low, .. }) = down {
            let left = Left { data: &pair.a[rows.start..], row: 1, col: expert.view.gate.rows() };
            let (sizes, out) = ((rows.len(), pair.rank, lanes), (&mut self.d_h[..], lanes));
            product(isa, sizes, left, (low, lanes), out, Into::Add);
        }
    }

    /// From `gate`, `up` and `d_h` to the gradients of gate and up times the weights, in their place; adds `d_h . f(g) u` to
    /// the slopes of the weights.
    fn slopes(
        &mut self,
        activation: Activation,
        len: usize,
        lanes: usize,
        weights: &[f32; TOKENS],
        slopes: &mut [f32; TOKENS],
    ) {
        let (gate, up) = (&mut self.gate[..len], &mut self.up[..len]);
        let before = &mut self.spare[..len];
        before.copy_from_slice(up);
        activation.gate_backward(gate, up, &self.d_h[..len]);
        // d_h . f(g) u is (d_h f(g)) . u: the gradient of up, before the weight.
        let rows = gate.chunks_exact_mut(lanes).zip(up.chunks_exact_mut(lanes));
        for ((gate, up), before) in rows.zip(before.chunks_exact(lanes)) {
            for (i, slope) in slopes[..lanes].iter_mut().enumerate() {
                *slope += up[i] * before[i];
                gate[i] *= weights[i];
                up[i] *= weights[i];
            }
        }
    }
}
