//! Facts about whole tensors: found in one or more passes, whatever the number of threads.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, OnceLock};

use moe_merge_checkpoint::{CheckpointError, WeightRef};
use rayon::prelude::*;

/// Numbers that are read at a time: few enough for those of two models to stay in the first-level cache.
pub(super) const BLOCK: usize = 1 << 12;

/// Numbers of a tensor for which a segment of its own pays.
const SEGMENT: usize = 1 << 19;

/// Segments of a tensor, at most: each keeps a state of its own.
const SEGMENTS: usize = 16;

/// Visits all numbers of `inputs`, which agree in shape, in segments whose cut depends on the shape alone, and returns
/// the states of the segments in order. Sums made of them in that order do not depend on the number of threads.
///
/// * `start(i)`: the state in which segment `i` begins
/// * `visit(state, first, blocks)`: whole rows, one block for each input; `first` is the flat index of the first number.
pub(super) fn scan<T: Send>(
    inputs: &[&WeightRef],
    start: impl Fn(usize) -> T + Sync,
    visit: impl Fn(&mut T, usize, &[Vec<f32>]) + Sync,
) -> Result<Vec<T>, CheckpointError> {
    scan_some(inputs, |_| true, start, visit)
}

/// As [`scan`], but of the segments that `wanted` says no to only the state in which they begin is made.
pub(super) fn scan_some<T: Send>(
    inputs: &[&WeightRef],
    wanted: impl Fn(usize) -> bool + Sync,
    start: impl Fn(usize) -> T + Sync,
    visit: impl Fn(&mut T, usize, &[Vec<f32>]) + Sync,
) -> Result<Vec<T>, CheckpointError> {
    let Some(first) = inputs.first().filter(|w| !w.is_empty()) else { return Ok(Vec::new()) };
    let (rows, cols) = (first.rows(), first.cols());
    let count = first.len().div_ceil(SEGMENT).clamp(1, SEGMENTS).min(rows);
    let height = rows.div_ceil(count);
    let one = |i: usize| {
        let mut state = start(i);
        if !wanted(i) {
            return Ok(state);
        }
        let range = (i * height).min(rows)..((i + 1) * height).min(rows);
        blocks(inputs, range, cols, |first, blocks| visit(&mut state, first, blocks))?;
        Ok(state)
    };
    // A thread of the pool that waits for others would take up their work, which may wait for what it is finding.
    match rayon::current_thread_index() {
        Some(_) => (0..count).map(one).collect(),
        None => (0..count).into_par_iter().map(one).collect(),
    }
}

fn blocks(
    inputs: &[&WeightRef],
    rows: Range<usize>,
    cols: usize,
    mut visit: impl FnMut(usize, &[Vec<f32>]),
) -> Result<(), CheckpointError> {
    let step = (BLOCK / cols.max(1)).max(1);
    let mut blocks = vec![Vec::new(); inputs.len()];
    let mut from = rows.start;
    while from < rows.end {
        let to = rows.end.min(from + step);
        for (block, input) in blocks.iter_mut().zip(inputs) {
            block.resize((to - from) * cols, 0.0);
            input.read_rows(from..to, block)?;
        }
        visit(from * cols, &blocks);
        from = to;
    }
    Ok(())
}

/// Rows of one input in a buffer of their own.
pub(super) fn read(input: &WeightRef, rows: Range<usize>) -> Result<Block, CheckpointError> {
    let mut values = Block::new(rows.len() * input.cols());
    input.read_rows(rows, &mut values)?;
    Ok(values)
}

thread_local! {
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Blocks that a thread keeps for the next rows, at most.
const SPARES: usize = 8;

/// Scratch for a block of numbers. A thread takes up again those it is done with: they need not be cleared.
#[derive(Debug)]
pub(super) struct Block(Vec<f32>);

impl Block {
    /// `count` numbers of any value.
    pub fn new(count: usize) -> Self {
        let mut values = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        values.resize(count, 0.0);
        Self(values)
    }

    /// `count` zeros.
    pub fn zeros(count: usize) -> Self {
        let mut block = Self::new(count);
        block.fill(0.0);
        block
    }

    /// The numbers, for good.
    pub fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.0);
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARES && (1..=4 * BLOCK).contains(&values.capacity()) {
                spare.push(values);
            }
        });
    }
}

impl Deref for Block {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// A fact about a whole tensor, found on first use. Threads of the pool that come while it is being found wait for it.
#[derive(Debug)]
pub(super) struct Once<T> {
    value: OnceLock<T>,
    finding: Mutex<()>,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self { value: OnceLock::new(), finding: Mutex::new(()) }
    }
}

impl<T> Once<T> {
    pub fn get(
        &self,
        find: impl FnOnce() -> Result<T, CheckpointError>,
    ) -> Result<&T, CheckpointError> {
        if let Some(value) = self.value.get() {
            return Ok(value);
        }
        // Outside of the pool `find` lets the pool work, whose threads must not wait for it meanwhile.
        let pool = rayon::current_thread_index().is_some();
        let _finding = pool.then(|| self.finding.lock().unwrap_or_else(|e| e.into_inner()));
        if let Some(value) = self.value.get() {
            return Ok(value);
        }
        let value = find()?;
        Ok(self.value.get_or_init(|| value))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use moe_merge_checkpoint::Dtype;
    use moe_merge_checkpoint::weight::OwnedWeight;

    use super::*;

    fn sums(weight: &WeightRef) -> Vec<(usize, f32)> {
        scan(
            &[weight],
            |_| (0, 0f32),
            |state, first, blocks| {
                assert!(state.0 == 0 || first > 0);
                state.0 += blocks[0].len();
                state.1 += blocks[0].iter().sum::<f32>();
            },
        )
        .unwrap()
    }

    #[test]
    fn segments_are_the_same_inside_and_outside_of_the_pool() {
        let (rows, cols) = (1031, 1024);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32).sin()).collect();
        let weight: WeightRef =
            Arc::new(OwnedWeight::from_f32("w", &values, &[rows, cols], Dtype::F32));
        let outside = sums(&weight);
        assert_eq!(outside.iter().map(|s| s.0).sum::<usize>(), rows * cols);
        assert!(outside.len() > 1);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| sums(&weight)), outside);
        }
    }
}
