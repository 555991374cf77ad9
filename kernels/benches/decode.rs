//! One token through one large matrix: bytes per second over what reading the same file map gives.
//!
//! `cargo bench -p moe-merge-kernels --bench decode`

mod limits;

use std::hint::black_box;

use limits::reading::{BYTES, file_map, read};
use limits::shapes::{HIDDEN, INTER, Variant, matrix, numbers, product, variants};
use limits::{Bar, Bench, Clock, GBS, Side, pool, threads_text, two_threads};
use moe_merge_kernels::{Dtype, Isa};

fn bar(variant: &Variant) -> Bar {
    match variant.exec.isa {
        Isa::Avx512Bf16 => Bar::AtLeast(0.75, 0.9),
        Isa::Avx512 | Isa::Avx2 => Bar::AtLeast(0.7, 0.85),
        Isa::Neon | Isa::Portable => Bar::None,
    }
}

/// Products of one row of `cols` numbers with a matrix as large as `map`, by `threads` threads.
fn vector_products(bench: &mut Bench, map: &[u8], dtype: Dtype, cols: usize, threads: usize) {
    let rows = BYTES / (cols * dtype.size());
    let weight = matrix(map, dtype, rows, cols);
    let (x, mut out) = (numbers(cols), vec![0.0; rows]);
    let pool = pool(threads);
    let best =
        variants().into_iter().take(if threads == 1 && dtype == Dtype::BF16 { 6 } else { 1 });
    for variant in best {
        let name = format!("1 token x {cols} {dtype}, {}, {}", variant.name, threads_text(threads));
        let bytes = weight.bytes();
        bench.against(
            ("decode", &name),
            threads,
            (GBS, "xor over the same map"),
            if dtype == Dtype::BF16 && threads == 1 { bar(&variant) } else { Bar::None },
            [
                Side::new(bytes.len() as f64, || {
                    pool.install(|| product(&x, weight, black_box(&mut out), &variant.exec));
                }),
                Side::new(bytes.len() as f64, || pool.install(|| read(bytes))),
            ],
        );
    }
}

/// Two threads must not lose to one, whatever else the machine does.
fn two_over_one(bench: &mut Bench, map: &[u8]) {
    let rows = BYTES / (HIDDEN * 2);
    let weight = matrix(map, Dtype::BF16, rows, HIDDEN);
    let x = numbers(HIDDEN);
    let (mut first, mut second) = (vec![0.0; rows], vec![0.0; rows]);
    let (one, two) = (pool(1), pool(2));
    let variant = variants()[0];
    let mut sides = [
        Side::new(1.0, || two.install(|| product(&x, weight, &mut first, &variant.exec))),
        Side::new(1.0, || one.install(|| product(&x, weight, &mut second, &variant.exec))),
        Side::new(1.0, || two.install(|| read(weight.bytes()))),
        Side::new(1.0, || one.install(|| read(weight.bytes()))),
    ];
    if let Some(rounds) = bench.in_turn(("decode", "2 threads over 1"), Clock::Wall, &mut sides) {
        let reading = rounds.ratio(2, 3);
        let what = format!("decode 2 threads over 1 (reading alone: {reading:.2})");
        bench.line(&what, rounds.ratio(0, 1), Bar::AtLeast(0.9, 0.9), rounds.spread(1));
    }
}

fn main() {
    let mut bench = Bench::default();
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let map = file_map(BYTES, dtype);
        vector_products(&mut bench, &map, dtype, HIDDEN, 1);
        if dtype == Dtype::BF16 {
            vector_products(&mut bench, &map, dtype, INTER, 1);
            if two_threads() {
                vector_products(&mut bench, &map, dtype, HIDDEN, 2);
                two_over_one(&mut bench, &map);
            }
        }
    }
    bench.finish();
}
