//! A whole MoE layer, from the router to the combined output: 512 tokens, and one.
//!
//! `cargo bench -p moe-merge-kernels --bench moe`

mod limits;

use std::hint::black_box;

use limits::reading::read;
use limits::shapes::{
    Blocks, EXPERTS, HIDDEN, LAYERS, TOP_K, Variant, expert_flops, numbers, variants,
};
use limits::{Bar, Bench, Clock, GBS, GFLOPS, Side, pool, threads_text, two_threads};

const TOKENS: usize = 512;

/// How much faster two threads must be for the limit to count as doubled.
const DOUBLED: f64 = 1.8;

fn against_limit(bench: &mut Bench, blocks: &Blocks, variant: &Variant, tokens: usize) {
    let (x, mut out) = (numbers(tokens * HIDDEN), vec![0.0; tokens * HIDDEN]);
    let experts = blocks.experts(0);
    let (limit, pool) = (variant.limit(), pool(1));
    let bar = if variant.dots() && tokens == TOKENS { Bar::AtLeast(0.65, 0.85) } else { Bar::None };
    bench.against(
        ("moe", &format!("{tokens} tokens, top-{TOP_K} of {EXPERTS}, {}", variant.name)),
        1,
        (GFLOPS, limit.name),
        bar,
        [
            Side::new(expert_flops(tokens * TOP_K), || {
                pool.install(|| {
                    let out = black_box(&mut out);
                    blocks.layer(&x, &experts, TOP_K, out, &variant.exec).expect("sizes fit");
                });
            }),
            Side::new(limit.flops, || pool.install(|| limit.run())),
        ],
    );
}

fn sparse_over_dense(bench: &mut Bench, blocks: &Blocks) {
    let variant = variants()[0];
    let x = numbers(TOKENS * HIDDEN);
    let (mut first, mut second) = (vec![0.0; TOKENS * HIDDEN], vec![0.0; TOKENS * HIDDEN]);
    let (experts, pool) = (blocks.experts(0), pool(1));
    let run = |top_k, out: &mut [f32]| {
        pool.install(|| blocks.layer(&x, &experts, top_k, out, &variant.exec)).expect("sizes fit");
    };
    let mut sides =
        [Side::new(1.0, || run(TOP_K, &mut first)), Side::new(1.0, || run(EXPERTS, &mut second))];
    let name = format!("time of top-{TOP_K} over all {EXPERTS}, {}", variant.name);
    if let Some(rounds) = bench.in_turn(("moe", &name), Clock::Processor, &mut sides) {
        let bar = Bar::AtMost(0.6, 0.52);
        // Time over time is the inverse of speed over speed.
        bench.line(&format!("moe {name}"), rounds.ratio(1, 0), bar, rounds.spread(1));
    }
}

fn two_over_one(bench: &mut Bench, blocks: &Blocks) {
    let variant = variants()[0];
    let x = numbers(TOKENS * HIDDEN);
    let (mut first, mut second) = (vec![0.0; TOKENS * HIDDEN], vec![0.0; TOKENS * HIDDEN]);
    let (experts, one, two, limit) = (blocks.experts(0), pool(1), pool(2), variant.limit());
    let run = |pool: &rayon::ThreadPool, out: &mut [f32]| {
        pool.install(|| blocks.layer(&x, &experts, TOP_K, out, &variant.exec)).expect("sizes fit");
    };
    let mut sides = [
        Side::new(1.0, || run(&two, &mut first)),
        Side::new(1.0, || run(&one, &mut second)),
        Side::new(2.0, || two.install(|| limit.run())),
        Side::new(1.0, || one.install(|| limit.run())),
    ];
    let name = format!("{TOKENS} tokens, 2 threads over 1, {}", variant.name);
    let Some(rounds) = bench.in_turn(("moe", &name), Clock::Wall, &mut sides) else { return };
    let (ratio, limit) = (rounds.ratio(0, 1), rounds.ratio(2, 3));
    let what = format!("moe {name} (registers alone: {limit:.2})");
    let bar = if limit >= DOUBLED { Bar::AtLeast(1.6, 1.9) } else { Bar::AtLeast(0.9, 0.9) };
    bench.line(&what, ratio, bar, rounds.spread(2).max(rounds.spread(3)));
    if limit < DOUBLED {
        bench.note(format!("  (bar 1.6 not judged: it needs a limit that grows by {DOUBLED})"));
    }
}

/// One token through the MoE blocks of all layers: the bytes of the experts it visits, over reading them.
fn decode(bench: &mut Bench, threads: usize) {
    let blocks = Blocks::new(LAYERS);
    let (x, mut out) = (numbers(HIDDEN), vec![0.0; HIDDEN]);
    let layers: Vec<_> = (0..LAYERS).map(|l| blocks.experts(l)).collect();
    let pool = pool(threads);
    for variant in variants().iter().take(4) {
        let chosen = blocks.routing(&x, TOP_K, &variant.exec).expect("sizes fit").ids;
        let bytes = (LAYERS * TOP_K * Blocks::EXPERT) as f64;
        let bar = match (threads, variant.name) {
            (1, "avx512" | "avx2") => Bar::AtLeast(0.7, 0.85),
            (1, _) => Bar::AtLeast(0.75, 0.9),
            _ => Bar::None,
        };
        bench.against(
            (
                "moe",
                &format!("1 token, {LAYERS} layers, {}, {}", variant.name, threads_text(threads)),
            ),
            threads,
            (GBS, "xor over the same experts"),
            bar,
            [
                Side::new(bytes, || {
                    pool.install(|| {
                        for experts in &layers {
                            blocks
                                .layer(&x, experts, TOP_K, black_box(&mut out), &variant.exec)
                                .expect("sizes fit");
                        }
                    });
                }),
                Side::new(bytes, || {
                    pool.install(|| {
                        for experts in &layers {
                            for &e in &chosen {
                                let expert = experts[e as usize];
                                for part in [expert.gate, expert.up, expert.down] {
                                    read(part.bytes());
                                }
                            }
                        }
                    });
                }),
            ],
        );
    }
}

fn main() {
    let mut bench = Bench::default();
    let blocks = Blocks::new(1);
    for variant in variants() {
        against_limit(&mut bench, &blocks, &variant, TOKENS);
    }
    for tokens in [128, 32] {
        against_limit(&mut bench, &blocks, &variants()[0], tokens);
    }
    sparse_over_dense(&mut bench, &blocks);
    if two_threads() {
        two_over_one(&mut bench, &blocks);
    }
    decode(&mut bench, 1);
    if two_threads() {
        decode(&mut bench, 2);
    }
    bench.finish();
}
