//! Many tokens through one expert, and through single products: operations per second over what registers alone give.
//!
//! `cargo bench -p moe-merge-kernels --bench prefill`

mod limits;

use std::hint::black_box;

use limits::reading::file_map;
use limits::shapes::{
    Blocks, HIDDEN, INTER, Variant, expert_flops, matrix, numbers, product, variants,
};
use limits::{Bar, Bench, GFLOPS, Side, pool};
use moe_merge_kernels::{Activation, Dtype, Isa, Routing, moe_forward};

/// Bars hold for the sets that the specification names.
fn bar(variant: &Variant, tokens: usize) -> Bar {
    match variant.exec.isa {
        Isa::Neon | Isa::Portable => Bar::None,
        _ if tokens < 64 => Bar::AtLeast(0.4, 0.7),
        _ if variant.dots() => Bar::AtLeast(0.7, 0.9),
        _ => Bar::AtLeast(0.75, 0.9),
    }
}

/// Gate, up, activation and down of one expert for `tokens` tokens.
fn expert(bench: &mut Bench, blocks: &Blocks, variant: &Variant, tokens: usize) {
    let experts = &blocks.experts(0)[..1];
    let x = numbers(tokens * HIDDEN);
    let routing = Routing { tokens, top_k: 1, ids: vec![0; tokens], weights: vec![1.0; tokens] };
    let mut out = vec![0.0; tokens * HIDDEN];
    let (limit, pool) = (variant.limit(), pool(1));
    bench.against(
        ("prefill", &format!("expert, {tokens} tokens, {}", variant.name)),
        1,
        (GFLOPS, limit.name),
        bar(variant, tokens),
        [
            Side::new(expert_flops(tokens), || {
                pool.install(|| {
                    let out = black_box(&mut out);
                    moe_forward(&x, &routing, experts, Activation::Silu, out, &variant.exec)
                        .expect("sizes fit");
                });
            }),
            Side::new(limit.flops, || pool.install(|| limit.run())),
        ],
    );
}

/// A linear layer.
fn layer(bench: &mut Bench, dtype: Dtype, variant: &Variant, [tokens, rows, cols]: [usize; 3]) {
    let map = file_map(rows * cols * dtype.size(), dtype);
    let weight = matrix(&map, dtype, rows, cols);
    let (x, mut out) = (numbers(tokens * cols), vec![0.0; tokens * rows]);
    let (limit, pool) = (variant.limit(), pool(1));
    bench.against(
        ("prefill", &format!("{tokens} tokens x {rows} x {cols} {dtype}, {}", variant.name)),
        1,
        (GFLOPS, limit.name),
        Bar::None,
        [
            Side::new((2 * tokens * rows * cols) as f64, || {
                pool.install(|| product(&x, weight, black_box(&mut out), &variant.exec));
            }),
            Side::new(limit.flops, || pool.install(|| limit.run())),
        ],
    );
}

fn main() {
    let mut bench = Bench::default();
    let blocks = Blocks::new(1);
    for variant in variants() {
        for tokens in [256, 64, 16] {
            expert(&mut bench, &blocks, &variant, tokens);
        }
    }
    for variant in variants().into_iter().take(4) {
        layer(&mut bench, Dtype::BF16, &variant, [512, INTER, HIDDEN]);
    }
    let best = variants()[0];
    for sizes in
        [[512, HIDDEN, INTER], [512, HIDDEN, HIDDEN], [512, 192, HIDDEN], [128, 4096, 4096]]
    {
        layer(&mut bench, Dtype::BF16, &best, sizes);
    }
    // Products with other dtypes are f32 multiply-adds on every set.
    if let Some(exact) = variants().iter().find(|v| !v.dots()) {
        for dtype in [Dtype::F16, Dtype::F32] {
            layer(&mut bench, dtype, exact, [512, INTER, HIDDEN]);
        }
    }
    bench.finish();
}
