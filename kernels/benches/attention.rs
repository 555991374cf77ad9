//! Attention of SmolLM2's shape: a whole prompt, and one token over caches of several lengths.
//!
//! `cargo bench -p moe-merge-kernels --bench attention`

mod limits;

use std::hint::black_box;

use limits::flops::f32_limit;
use limits::reading::read;
use limits::shapes::{numbers, variants};
use limits::{Bar, Bench, GBS, GFLOPS, Side, pool};
use moe_merge_kernels::{AttentionSpec, KeyValues, attention, attention_backward};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;

const SPEC: AttentionSpec = AttentionSpec {
    heads: HEADS,
    kv_heads: KV_HEADS,
    qk_dim: DIM,
    v_dim: DIM,
    scale: 0.125,
    softcap: None,
    window: None,
};

/// Products of queries with keys and of probabilities with values, of the keys that are seen.
fn seen_flops(tokens: usize) -> f64 {
    (tokens * (tokens + 1) / 2 * HEADS * 2 * 2 * DIM) as f64
}

fn prompt(bench: &mut Bench, tokens: usize) {
    let width = KV_HEADS * DIM;
    let (q, k, v) =
        (numbers(tokens * HEADS * DIM), numbers(tokens * width), numbers(tokens * width));
    let kv = KeyValues {
        keys: &k,
        values: &v,
        count: tokens,
        key_strides: (width, DIM),
        value_strides: (width, DIM),
    };
    let (mut out, d_out) = (vec![0.0; q.len()], numbers(q.len()));
    let exec = variants()[0].exec;
    let (limit, pool) = (f32_limit(exec.isa), pool(1));
    bench.against(
        ("attention", &format!("{tokens} tokens")),
        1,
        (GFLOPS, limit.name),
        Bar::None,
        [
            Side::new(seen_flops(tokens), || {
                pool.install(|| attention(&q, kv, &SPEC, black_box(&mut out), &exec))
                    .expect("sizes fit");
            }),
            Side::new(limit.flops, || pool.install(|| limit.run())),
        ],
    );
    bench.against(
        ("attention", &format!("backward, {tokens} tokens")),
        1,
        (GFLOPS, limit.name),
        Bar::None,
        [
            // Scores again, and the gradients of probabilities, values, queries and keys.
            Side::new(2.5 * seen_flops(tokens), || {
                let run = || attention_backward([&q, &k, &v], &out, &d_out, &SPEC, &exec);
                black_box(pool.install(run).expect("sizes fit"));
            }),
            Side::new(limit.flops, || pool.install(|| limit.run())),
        ],
    );
}

/// One token over a cache `[kv_heads, count, dim]`, of as many layers as are larger than the caches of the processor.
fn token(bench: &mut Bench, count: usize) {
    let floats = KV_HEADS * count * DIM;
    let layers = (64usize << 20).div_ceil(8 * floats);
    let (q, cache) = (numbers(HEADS * DIM), numbers(2 * floats * layers));
    let mut out = vec![0.0; q.len()];
    let (exec, pool) = (variants()[0].exec, pool(1));
    let bytes = size_of_val(&cache[..]) as f64;
    bench.against(
        ("attention", &format!("1 token over {count}")),
        1,
        (GBS, "xor over the same cache"),
        Bar::None,
        [
            Side::new(bytes, || {
                pool.install(|| {
                    for layer in cache.chunks_exact(2 * floats) {
                        let (keys, values) = layer.split_at(floats);
                        let strides = (DIM, count * DIM);
                        let kv = KeyValues {
                            keys,
                            values,
                            count,
                            key_strides: strides,
                            value_strides: strides,
                        };
                        attention(&q, kv, &SPEC, black_box(&mut out), &exec).expect("sizes fit");
                    }
                });
            }),
            Side::new(bytes, || pool.install(|| read(limits::bytes_of(&cache)))),
        ],
    );
}

fn main() {
    let mut bench = Bench::default();
    for tokens in [512, 2048] {
        prompt(&mut bench, tokens);
    }
    for count in [256, 1024, 8192] {
        token(&mut bench, count);
    }
    bench.finish();
}
