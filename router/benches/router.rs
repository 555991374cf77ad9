//! Time to fit a router, as tokens, features and experts grow.
//!
//! `cargo bench -p moe-merge-router`, or `cargo bench -p moe-merge-router -- 128 576` for those hidden sizes only. Every
//! time is also a multiple of one pass over the features, measured in turn in the same process: the product `X · Wᵀ`
//! of all tokens with all rows of a gate, in f64, on one thread. Logistic regression makes hundreds of such passes;
//! the closed forms make few, and factorise matrices of features by features or tokens by tokens.

use std::hint::black_box;
use std::time::Instant;

use moe_merge_kernels::dense::{Dense, Into, matmul};
use moe_merge_router::estimators::{lda, logistic, mean, ridge};
use moe_merge_router::{Example, Fit, Options, RouterError, Samples, Sign};
use rayon::prelude::*;

type Estimate = fn(&Samples<'_>, &Options) -> Result<Fit, RouterError>;

const ESTIMATORS: [(&str, Estimate); 4] =
    [("mean", mean::fit), ("ridge", ridge::fit), ("lda", lda::fit), ("logistic", logistic::fit)];

/// Rounds of a case that takes long; a short one is repeated until this many seconds have passed.
const ROUNDS: usize = 3;
const SECONDS: f64 = 0.3;

/// Prompts of each expert: a direction all tokens share, one per expert, one per prompt, and noise.
struct Corpus {
    experts: usize,
    hidden: usize,
    prompts: Vec<(usize, Vec<f32>)>,
}

impl Corpus {
    fn new(tokens: usize, hidden: usize, experts: usize) -> Self {
        let mut state = 1;
        let mut noise = |n: usize| -> Vec<f32> { (0..n).map(|_| uniform(&mut state)).collect() };
        let common = noise(hidden);
        let per_expert = (tokens / experts).max(2);
        let count = (per_expert / 2).clamp(2, 6);
        let mut prompts = Vec::new();
        for expert in 0..experts {
            let own = noise(hidden);
            for p in 0..count {
                let of_prompt = noise(hidden);
                let length = per_expert * (p + 1) / count - per_expert * p / count;
                let mut inputs = noise(length * hidden);
                for (i, v) in inputs.iter_mut().enumerate() {
                    let k = i % hidden;
                    *v += common[k] + 0.4 * own[k] + 0.3 * of_prompt[k];
                }
                prompts.push((expert, inputs));
            }
        }
        Self { experts, hidden, prompts }
    }

    fn samples(&self) -> Samples<'_> {
        let examples = self
            .prompts
            .iter()
            .map(|(expert, inputs)| Example { expert: *expert, sign: Sign::Positive, inputs })
            .collect();
        Samples { experts: self.experts, hidden: self.hidden, examples }
    }

    fn tokens(&self) -> usize {
        self.prompts.iter().map(|p| p.1.len() / self.hidden).sum()
    }
}

/// In [-1.7, 1.7), variance 1 (splitmix64).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 3f32.sqrt()
}

/// One pass over the features.
struct Pass {
    x: Vec<f64>,
    w: Vec<f64>,
    out: Vec<f64>,
    tokens: usize,
    experts: usize,
}

impl Pass {
    fn new(corpus: &Corpus) -> Self {
        let (tokens, experts) = (corpus.tokens(), corpus.experts);
        let x: Vec<f64> = corpus.prompts.iter().flat_map(|p| &p.1).map(|&v| v.into()).collect();
        let w = x[..corpus.hidden].repeat(experts);
        Self { x, w, out: vec![0.0; tokens * experts], tokens, experts }
    }

    fn run(&mut self) {
        let hidden = self.w.len() / self.experts;
        let x = Dense::new(&self.x, self.tokens, hidden).expect("sizes fit");
        let w = Dense::new(&self.w, self.experts, hidden).expect("sizes fit");
        matmul(x, w.transposed(), black_box(&mut self.out), Into::Overwrite).expect("sizes fit");
    }
}

/// Medians of `work` and of a pass, in turn.
fn in_turn(work: &mut dyn FnMut(), pass: &mut Pass) -> (f64, f64) {
    let seconds = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    pass.run();
    let (mut times, mut passes, start) = (Vec::new(), Vec::new(), Instant::now());
    while times.len() < ROUNDS || start.elapsed().as_secs_f64() < SECONDS {
        times.push(seconds(work));
        passes.push(seconds(&mut || pass.run()));
        if start.elapsed().as_secs_f64() > 10.0 * SECONDS {
            break;
        }
    }
    (median(times), median(passes))
}

fn case(tokens: usize, hidden: usize, experts: usize) {
    let corpus = Corpus::new(tokens, hidden, experts);
    let (samples, mut pass) = (corpus.samples(), Pass::new(&corpus));
    print!("{:6} {hidden:6} {experts:7}", corpus.tokens());
    for (_, estimate) in ESTIMATORS {
        let mut work = || {
            black_box(estimate(&samples, &Options::default()).expect("the corpus is sound"));
        };
        let (time, pass) = in_turn(&mut work, &mut pass);
        print!("  {:9.2} ms {:7.0} x", 1e3 * time, time / pass);
    }
    println!();
}

fn layers(count: usize) {
    let corpus = Corpus::new(1000, 576, 4);
    let (samples, mut pass) = (corpus.samples(), Pass::new(&corpus));
    println!("{count} layers side by side, hidden 576, 4 experts, {} tokens:", corpus.tokens());
    for (name, estimate) in ESTIMATORS {
        let mut work = || {
            (0..count).into_par_iter().for_each(|_| {
                black_box(estimate(&samples, &Options::default()).expect("the corpus is sound"));
            });
        };
        let (time, pass) = in_turn(&mut work, &mut pass);
        let ratio = time / pass / count as f64;
        println!("  {name:8}  {time:7.3} s, {ratio:5.0} x a pass over each layer");
    }
}

fn main() {
    let chosen: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    println!(
        "{} threads; x: multiples of one product X·Wᵀ in f64 on one thread",
        rayon::current_num_threads()
    );
    if chosen.is_empty() || chosen.contains(&576) {
        layers(30);
    }
    print!("tokens hidden experts");
    ESTIMATORS.iter().for_each(|(name, _)| print!("  {name:>22}"));
    println!();
    for hidden in [128, 576, 2048, 4096] {
        if !chosen.is_empty() && !chosen.contains(&hidden) {
            continue;
        }
        for tokens in [500, 1000, 4000] {
            for experts in [4, 16, 128] {
                case(tokens, hidden, experts);
            }
        }
    }
}
