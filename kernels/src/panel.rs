//! Products with many tokens: tokens stand in the lanes of vectors, weight numbers are broadcast straight from where they are
//! stored.
//!
//! A [`Panel`] holds some tokens side by side, column by column. A task takes a block of weight rows through all its panels, so
//! each weight byte leaves main memory once; what it computes for a row is a vector over tokens, which is also what a panel
//! of the next product is made of.

mod blocks;
mod tile;

use std::ops::Range;

use crate::cast::Dtype;
use crate::exec::{Accuracy, Exec, Isa};
use crate::scratch::Scratch;
use crate::tasks;
use crate::vector::{self, Job, Vector};

pub(crate) use blocks::{GateUpBlock, LinearBlock};

/// Tokens that one task takes through its rows. Bounds a task's memory; weights are read once for so many.
const CHUNK: usize = 512;

/// Weight rows of one task.
pub(crate) const ROWS: usize = 48;

/// How activations stand in panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `[cols, lanes]` f32.
    Wide,
    /// `[cols / 2, lanes, 2]` bf16.
    Pairs,
}

impl Form {
    /// The one for weights of `dtype`.
    pub fn of(dtype: Dtype, exec: &Exec) -> Self {
        let dot = exec.isa == Isa::Avx512Bf16 && exec.accuracy == Accuracy::Fast;
        if dot && dtype == Dtype::BF16 { Form::Pairs } else { Form::Wide }
    }

    /// 32-bit rows of a panel over `cols` columns.
    pub fn rows(self, cols: usize) -> usize {
        match self {
            Form::Wide => cols,
            Form::Pairs => cols.div_ceil(2),
        }
    }
}

/// Lanes of the wide and of the narrow panels of an instruction set.
pub(crate) fn widths(isa: Isa) -> [usize; 2] {
    match isa {
        Isa::Portable => [8, 4],
        Isa::Neon | Isa::Avx2 => [16, 8],
        Isa::Avx512 | Isa::Avx512Bf16 => [32, 16],
    }
}

/// Some tokens side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel {
    /// First of its tokens, and how many.
    pub first: usize,
    pub tokens: usize,
    /// Tokens there is room for; those beyond the last are zero.
    pub lanes: usize,
    /// Where its numbers begin, in 32-bit words.
    pub at: usize,
}

/// Panels over tokens, all with as many columns.
pub(crate) struct Panels {
    pub form: Form,
    pub cols: usize,
    pub list: Vec<Panel>,
    words: Scratch,
}

impl Panels {
    /// Room for `tokens` tokens of `cols` columns; the numbers are arbitrary.
    pub fn new(tokens: usize, cols: usize, form: Form, isa: Isa) -> Self {
        let [wide, narrow] = widths(isa);
        // Blocks of `narrow` columns are written whole.
        let rows = form.rows(cols).next_multiple_of(narrow);
        let (mut list, mut first, mut at) = (Vec::with_capacity(tokens.div_ceil(wide)), 0, 0);
        while first < tokens {
            let left = tokens - first;
            let lanes = if left <= narrow { narrow } else { wide };
            list.push(Panel { first, tokens: left.min(lanes), lanes, at });
            first += left.min(lanes);
            at += rows * lanes;
        }
        Self { form, cols, list, words: Scratch::new(at) }
    }

    /// Fills panel `index` with rows of `x [_, cols]`, those that `row` names.
    ///
    /// # Safety
    /// No other thread touches this panel, `x` holds the rows, and the processor has `isa`.
    pub unsafe fn fill(&self, index: usize, x: &[f32], row: impl Fn(usize) -> usize, isa: Isa) {
        let panel = self.list[index];
        let mut rows = [&x[..0]; 32];
        for (lane, slot) in rows[..panel.tokens].iter_mut().enumerate() {
            let at = row(panel.first + lane) * self.cols;
            *slot = &x[at..at + self.cols];
        }
        let rows = &rows[..panel.lanes];
        vector::run(isa, Fill { rows, form: self.form, cols: self.cols, to: self.words(index) });
    }

    /// Where the numbers of panel `index` begin. Writers see to it that nobody else touches what they write.
    pub fn words(&self, index: usize) -> *mut f32 {
        self.words[self.list[index].at..].as_ptr().cast_mut()
    }

    /// Ranges of panels that one task takes.
    pub fn chunks(&self) -> Vec<Range<usize>> {
        let (mut chunks, mut from) = (Vec::new(), 0);
        while from < self.list.len() {
            let first = self.list[from].first;
            let fits = self.list[from..].iter().take_while(|p| p.first < first + CHUNK).count();
            chunks.push(from..from + fits);
            from += fits;
        }
        chunks
    }
}

// SAFETY: the words are memory of its own; who writes through `words` promises that nobody else touches those.
unsafe impl Sync for Panels {}

/// Tokens into lanes.
struct Fill<'a> {
    /// The numbers of each lane; no number stands for zeros.
    rows: &'a [&'a [f32]],
    form: Form,
    cols: usize,
    to: *mut f32,
}

impl Job for Fill<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Vector>(self) {
        let (lanes, words) = (self.rows.len(), self.form.rows(self.cols));
        let mut block = [0f32; 256];
        for from in (0..words).step_by(S::N) {
            for group in (0..lanes).step_by(S::N) {
                for (row, slot) in
                    self.rows[group..group + S::N].iter().zip(block.chunks_exact_mut(S::N))
                {
                    if row.is_empty() {
                        slot.fill(0.0);
                        continue;
                    }
                    match self.form {
                        Form::Wide => {
                            let part = &row[from..self.cols.min(from + S::N)];
                            slot[..part.len()].copy_from_slice(part);
                            slot[part.len()..].fill(0.0);
                        }
                        Form::Pairs => {
                            let part = &row[2 * from..self.cols.min(2 * (from + S::N))];
                            tile::pairs(part, slot);
                        }
                    }
                }
                // SAFETY: the block has N by N numbers, and panels have room for whole blocks.
                unsafe {
                    S::transpose(block.as_ptr(), S::N, self.to.add(from * lanes + group), lanes);
                }
            }
        }
    }
}

/// Output that tasks write parts of.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    /// First number, and numbers from one row to the next.
    pub start: *mut f32,
    pub stride: usize,
}

impl Output {
    /// The part from row `row` on.
    pub fn row(self, row: usize) -> Self {
        // Stays inside: callers name rows there are.
        Self { start: self.start.wrapping_add(row * self.stride), ..self }
    }
}

// SAFETY: tasks write rows and columns that no other task touches, and its maker outlives them.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Panels of all rows of `x [tokens, cols]`.
pub(crate) fn of_rows(x: &[f32], tokens: usize, cols: usize, form: Form, exec: &Exec) -> Panels {
    let panels = Panels::new(tokens, cols, form, exec.isa);
    tasks::for_each(panels.list.len(), x.len() > 1 << 16, |index| {
        // SAFETY: every task has a panel of its own; `x` holds `tokens` rows.
        unsafe { panels.fill(index, x, |token| token, exec.isa) }
    });
    panels
}
