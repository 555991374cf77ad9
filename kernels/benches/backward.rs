//! Gradients: through a linear layer, and through a whole MoE block.
//!
//! `cargo bench -p moe-merge-kernels --bench backward`

mod limits;

use std::hint::black_box;

use limits::flops::f32_limit;
use limits::reading::file_map;
use limits::shapes::{Blocks, EXPERTS, HIDDEN, INTER, TOP_K, expert_flops, matrix, numbers};
use limits::{Bar, Bench, Clock, GFLOPS, Side, pool, threads_text, two_threads};
use moe_merge_kernels::{Activation, Dtype, Exec, MoeBlock, dense, linear_backward};

const TOKENS: usize = 512;

fn layer(bench: &mut Bench, dtype: Dtype, rows: usize, cols: usize, threads: usize) {
    let map = file_map(rows * cols * dtype.size(), dtype);
    let weight = matrix(&map, dtype, rows, cols);
    let (dy, mut dx) = (numbers(TOKENS * rows), vec![0.0; TOKENS * cols]);
    let exec = Exec::fast();
    let (limit, pool) = (f32_limit(exec.isa), pool(threads));
    bench.against(
        (
            "backward",
            &format!("{TOKENS} tokens x {rows} x {cols} {dtype}, {}", threads_text(threads)),
        ),
        threads,
        (GFLOPS, limit.name),
        Bar::None,
        [
            Side::new((2 * TOKENS * rows * cols) as f64, || {
                let dx = black_box(&mut dx);
                pool.install(|| linear_backward(&dy, weight, dx, dense::Into::Overwrite, &exec))
                    .expect("sizes fit");
            }),
            Side::new(limit.flops * threads as f64, || pool.install(|| limit.run())),
        ],
    );
}

/// Gradients of input and routing weights, with gate and up of the way forward: five products for its three.
fn block(bench: &mut Bench, threads: usize) {
    let exec = Exec::fast();
    let blocks = Blocks::new(1);
    let experts = blocks.experts(0);
    let (x, d_out) = (numbers(TOKENS * HIDDEN), numbers(TOKENS * HIDDEN));
    let (mut out, mut d_x) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let routing = blocks.routing(&x, TOP_K, &exec).expect("sizes fit");
    let (limit, pool) = (f32_limit(exec.isa), pool(threads));
    let name =
        format!("MoE block, {TOKENS} tokens, top-{TOP_K} of {EXPERTS}, {}", threads_text(threads));
    let mut sides = [
        Side::new(5.0 / 3.0 * expert_flops(TOKENS * TOP_K), || {
            let d_x = Some(black_box(&mut d_x[..]));
            let (routing, exec) = (&routing, &exec);
            let (activation, lora) = (Activation::Silu, None);
            let block = MoeBlock { x: &x, routing, experts: &experts, activation, lora, exec };
            let run = || block.backward(block.inner()?, &d_out, d_x);
            black_box(pool.install(run).expect("sizes fit"));
        }),
        Side::new(limit.flops * threads as f64, || pool.install(|| limit.run())),
        Side::new(expert_flops(TOKENS * TOP_K), || {
            let run = || blocks.layer(&x, &experts, TOP_K, black_box(&mut out), &exec);
            pool.install(run).expect("sizes fit");
        }),
    ];
    let Some(rounds) = bench.in_turn(("backward", &name), Clock::of(threads), &mut sides) else {
        return;
    };
    let (speed, peak) = (1e-9 * rounds.speed(0), 1e-9 * rounds.speed(1));
    let what = format!("backward {name}: {speed:.1} of {peak:.1} GFLOP/s ({})", limit.name);
    bench.line(&what, rounds.ratio(0, 1), Bar::None, rounds.spread(1));
    let times = 5.0 / 3.0 * rounds.ratio(2, 0);
    bench.note(format!(
        "  its time is {times:.1} times that of the forward pass, {}",
        exec.isa.name()
    ));
}

fn main() {
    let mut bench = Bench::default();
    for threads in if two_threads() { vec![1, 2] } else { vec![1] } {
        layer(&mut bench, Dtype::BF16, INTER, HIDDEN, threads);
        layer(&mut bench, Dtype::BF16, HIDDEN, INTER, threads);
        block(&mut bench, threads);
    }
    layer(&mut bench, Dtype::F32, INTER, HIDDEN, 1);
    bench.finish();
}
