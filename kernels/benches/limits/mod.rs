//! What the machine can do, measured beside the kernels in one process, and the report that compares them.
//!
//! A [`Bench`] runs the sides of a measure in turn, once each per round, so that both see the same minute of a shared
//! machine; criterion prints the first side's time, the report at the end the medians of the ratios within rounds. What runs on
//! one thread is timed by the processor's time, which other programs do not lengthen.

// Every bench file uses its part of this module.
#![allow(dead_code, unused_imports)]

pub mod clock;
pub mod flops;
pub mod reading;
pub mod report;
pub mod shapes;

pub use clock::Clock;
pub use report::{Bar, Bench, GBS, GFLOPS, Side, TOKENS};

use rayon::ThreadPool;

/// A pool of so many threads.
pub fn pool(threads: usize) -> ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started")
}

/// `1 thread`, `2 threads`.
pub fn threads_text(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

/// Whether there is a second processor to measure with.
pub fn two_threads() -> bool {
    std::thread::available_parallelism().is_ok_and(|n| n.get() >= 2)
}

/// The bytes of numbers.
pub fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: every byte of an f32 is a byte, and the slice covers exactly those of `values`.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
