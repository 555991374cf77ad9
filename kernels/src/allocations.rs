//! Counts what tests allocate, and holds kernels to what they promise.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::exec::Exec;
use crate::rows::{FEW, linear_few, moe_few};
use crate::{
    Activation, AttentionSpec, Dtype, ExpertView, KeyValues, MatView, Routing, attention,
    attention_lanes,
};

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn note() {
    // A thread that ends has no count any more.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(p, layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller's.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `work` allocates on this thread once it has run a few times (memory goes round until the largest request has
/// met every buffer).
fn allocations(mut work: impl FnMut()) -> usize {
    (0..8).for_each(|_| work());
    let before = COUNT.get();
    (0..8).for_each(|_| work());
    COUNT.get() - before
}

/// Inside a pool, as models run: a caller from outside gives each helper a box.
fn check(what: &str, mut work: impl FnMut() + Send) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(pool.install(|| allocations(&mut work)), 0, "{what}");
}

#[test]
fn the_count_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 8);
}

#[test]
fn decoding_allocates_nothing() {
    let (hidden, inter, exec) = (64, 300, Exec::default());
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let bytes = vec![0; hidden * inter * dtype.size()];
        let wide = MatView::new(&bytes, dtype, inter, hidden).unwrap();
        let down = MatView::new(&bytes, dtype, hidden, inter).unwrap();
        let experts = [ExpertView { gate: wide, up: wide, down }; 4];
        for tokens in 1..=FEW {
            let x = vec![1.0; tokens * hidden];
            let mut out = vec![0.0; tokens * inter];
            check("linear", || linear_few(&x, wide, None, &mut out, &exec).unwrap());
            let ids = (0..2 * tokens as u32).map(|i| i % 4).collect();
            let routing = Routing { tokens, top_k: 2, ids, weights: vec![0.5; 2 * tokens] };
            let out = &mut out[..tokens * hidden];
            let silu = Activation::Silu;
            check("experts", || moe_few(&x, &routing, &experts, silu, out, &exec).unwrap());
        }
    }
}

#[test]
fn attention_of_few_queries_allocates_nothing() {
    let spec = AttentionSpec {
        heads: 4,
        kv_heads: 2,
        qk_dim: 32,
        v_dim: 32,
        scale: 0.2,
        softcap: None,
        window: None,
    };
    let cache = vec![0.5; 2 * 1500 * 32];
    let kv = KeyValues {
        keys: &cache,
        values: &cache,
        count: 1400,
        key_strides: (32, 1500 * 32),
        value_strides: (32, 1500 * 32),
    };
    let q = vec![1.0; 3 * 128];
    let mut out = vec![0.0; 3 * 128];
    check("one query", || {
        attention(&q[..128], kv, &spec, &mut out[..128], &Exec::default()).unwrap()
    });
    check("three queries", || attention(&q, kv, &spec, &mut out, &Exec::default()).unwrap());
    check("three sequences", || {
        attention_lanes(&q, &[kv; 3], &spec, &mut out, &Exec::default()).unwrap()
    });
}
