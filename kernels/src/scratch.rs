//! Working memory that each thread keeps for its next use.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers a thread keeps, and the size above which one is given back instead.
const KEPT: usize = 8;
const LARGEST: usize = (32 << 20) / size_of::<Line>();

/// One cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: an array of f32 that fills its alignment, so without padding; any bits are numbers.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers at a multiple of 64 bytes; the memory goes back to the thread that drops them.
pub(crate) struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// Room for `len` numbers, which hold whatever they held before.
    pub fn new(len: usize) -> Self {
        let needed = len.div_ceil(16);
        let mut lines = FREE
            .with_borrow_mut(|free| {
                let fits = free.iter().position(|lines| lines.len() >= needed);
                fits.map(|at| free.swap_remove(at)).or_else(|| free.pop())
            })
            .unwrap_or_default();
        if lines.len() < needed {
            lines.resize(needed, Line([0.0; 16]));
        }
        Self { lines, len }
    }

    /// Room for `len` numbers, all zero.
    pub fn zeroed(len: usize) -> Self {
        let mut scratch = Self::new(len);
        scratch.fill(0.0);
        scratch
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that ends has dropped its store already.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT && lines.len() <= LARGEST {
                free.push(lines);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_used_again() {
        let mut a = Scratch::new(100);
        a.fill(1.0);
        let at = a.as_ptr();
        assert_eq!(at as usize % 64, 0);
        let b = Scratch::zeroed(3);
        assert_ne!(b.as_ptr(), at);
        assert_eq!(*b, [0.0; 3]);
        drop(a);
        let again = Scratch::new(90);
        assert_eq!((again.as_ptr(), again.len()), (at, 90));
        assert!(Scratch::new(0).is_empty());
    }
}
