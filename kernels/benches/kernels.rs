//! Speed of the kernels against what this machine can do, measured in the same process.
//!
//! `cargo bench -p moe-merge-kernels`. Every line is the median of rounds in which the kernel and its limit take turns;
//! set `RAYON_NUM_THREADS=1` for one thread. Limits: for products the f32 `gemm` crate on a large square product, for
//! single tokens the sum of a buffer that does not fit the caches.

use std::hint::black_box;
use std::time::Instant;

use moe_merge_kernels::{
    Activation, AttentionSpec, Dtype, Exec, KeyValues, MatView, attention, attention_backward,
    cast, dense, linear, linear_backward,
};
use rayon::prelude::*;

const ROUNDS: usize = 15;

fn seconds(work: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Medians of `kernel` and `limit`, in turn.
fn in_turn(kernel: &mut dyn FnMut(), limit: &mut dyn FnMut()) -> (f64, f64) {
    kernel();
    limit();
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        times.0.push(seconds(kernel));
        times.1.push(seconds(limit));
    }
    (median(times.0), median(times.1))
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect()
}

fn stored(n: usize, dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; n * dtype.size()];
    cast::narrow(&numbers(n), dtype, &mut bytes);
    bytes
}

/// `SIZE³` multiply-adds by the `gemm` crate, one product per thread.
const SIZE: usize = 1024;

fn square_products(a: &[f32], b: &[f32], out: &mut [f32], threads: usize) {
    out.par_chunks_exact_mut(SIZE * SIZE).take(threads).for_each(|out| {
        // SAFETY: three square matrices of SIZE.
        unsafe {
            gemm::gemm(
                SIZE,
                SIZE,
                SIZE,
                out.as_mut_ptr(),
                SIZE as isize,
                1,
                false,
                a.as_ptr(),
                SIZE as isize,
                1,
                b.as_ptr(),
                SIZE as isize,
                1,
                0f32,
                1f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}

fn prefill(threads: usize) {
    let (a, b) = (numbers(SIZE * SIZE), numbers(SIZE * SIZE));
    let mut square = vec![0.0; SIZE * SIZE * threads];
    for (tokens, rows, cols) in [
        (512, 1536, 576),
        (512, 576, 1536),
        (512, 576, 576),
        (512, 192, 576),
        (32, 1536, 576),
        (512, 4096, 4096),
    ] {
        for dtype in [Dtype::BF16, Dtype::F32] {
            let (x, bytes) = (numbers(tokens * cols), stored(rows * cols, dtype));
            let weight = MatView::new(&bytes, dtype, rows, cols).expect("sizes fit");
            let mut out = vec![0.0; tokens * rows];
            let (time, limit) = in_turn(
                &mut || {
                    linear(&x, weight, None, black_box(&mut out), &Exec::default())
                        .expect("sizes fit")
                },
                &mut || square_products(&a, &b, black_box(&mut square), threads),
            );
            let speed = 2e-9 * (tokens * rows * cols) as f64 / time;
            let peak = 2e-9 * (SIZE * SIZE * SIZE * threads) as f64 / limit;
            println!(
                "linear   {tokens:4} tokens x {rows:5} x {cols:5} {dtype:4}  {speed:7.1} GFLOP/s, {:5.1} % of {peak:.1}",
                100.0 * speed / peak
            );
            let (dy, mut dx) = (numbers(tokens * rows), vec![0.0; tokens * cols]);
            let (exec, into) = (Exec::default(), dense::Into::Overwrite);
            let (time, limit) = in_turn(
                &mut || {
                    linear_backward(&dy, weight, &exec, black_box(&mut dx), into)
                        .expect("sizes fit")
                },
                &mut || square_products(&a, &b, black_box(&mut square), threads),
            );
            let speed = 2e-9 * (tokens * rows * cols) as f64 / time;
            let peak = 2e-9 * (SIZE * SIZE * SIZE * threads) as f64 / limit;
            println!(
                "backward {tokens:4} tokens x {rows:5} x {cols:5} {dtype:4}  {speed:7.1} GFLOP/s, {:5.1} % of {peak:.1}",
                100.0 * speed / peak
            );
        }
    }
}

fn decode(threads: usize) {
    const BYTES: usize = 256 << 20;
    let cols = 576;
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let rows = BYTES / dtype.size() / cols;
        let bytes = stored(rows * cols, dtype);
        let weight = MatView::new(&bytes, dtype, rows, cols).expect("sizes fit");
        let (x, mut out) = (numbers(cols), vec![0.0; rows]);
        let (time, limit) = in_turn(
            &mut || {
                linear(&x, weight, None, black_box(&mut out), &Exec::default()).expect("sizes fit")
            },
            &mut || {
                let sums: u64 = bytes.par_chunks(1 << 20).map(sum).reduce(|| 0, u64::wrapping_add);
                black_box(sums);
            },
        );
        let (speed, peak) = (1e-9 * bytes.len() as f64 / time, 1e-9 * bytes.len() as f64 / limit);
        println!(
            "linear      1 token x {rows:7} x {cols} {dtype:4}  {speed:7.1} GB/s, {:5.1} % of {peak:.1} ({threads} threads)",
            100.0 * speed / peak
        );
    }
}

/// Reads every byte.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 16];
    for chunk in bytes.chunks_exact(128) {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            *lane = lane.wrapping_add(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn rest() {
    let spec = AttentionSpec {
        heads: 9,
        kv_heads: 3,
        qk_dim: 64,
        v_dim: 64,
        scale: 0.125,
        softcap: None,
        window: None,
    };
    let tokens = 512;
    let (q, k, v) = (numbers(tokens * 576), numbers(tokens * 192), numbers(tokens * 192));
    let kv = KeyValues {
        keys: &k,
        values: &v,
        count: tokens,
        key_strides: (192, 64),
        value_strides: (192, 64),
    };
    let mut out = vec![0.0; tokens * 576];
    let (mut gate, up) = (numbers(tokens * 1536), numbers(tokens * 1536));
    let (attended, gated) = in_turn(
        &mut || attention(&q, kv, &spec, &Exec::default(), black_box(&mut out)).expect("sizes fit"),
        &mut || Activation::Silu.gate(black_box(&mut gate), &up),
    );
    let d_out = numbers(tokens * 576);
    let mut back = || {
        let gradients = attention_backward([&q, &k, &v], &d_out, &d_out, &spec, &Exec::default());
        black_box(gradients.expect("sizes fit"));
    };
    let (attended_back, _) = in_turn(&mut back, &mut || ());
    println!("attention 512 tokens, 9 heads of 64   {:7.2} ms", 1e3 * attended);
    println!("attention backward, the same          {:7.2} ms", 1e3 * attended_back);
    println!("silu gate 512 tokens x 1536           {:7.2} ms", 1e3 * gated);
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads, {ROUNDS} rounds in turn, medians");
    prefill(threads);
    decode(threads);
    rest();
}
