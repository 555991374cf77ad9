//! The methods that choose by chance: what they keep, how often, and that nothing but the seed decides.

mod tensors;

use tensors::{Case, normal};

const ROWS: usize = 200;
const COLS: usize = 500;
const N: usize = ROWS * COLS;

/// The task vector itself: base zero, weight one, nothing restored.
fn sparse(method: &str, delta: &[f32], density: f64, epsilon: f64, seed: u64) -> Case {
    Case::new(method, &[ROWS, COLS], &[&vec![0.0; delta.len()], delta])
        .base(0)
        .seed(seed)
        .own(1, "weight", 1.0)
        .own(1, "density", density)
        .own_if(1, "epsilon", epsilon)
        .global("rescale", 0.0)
        .global("normalize", 0.0)
}

fn mask(values: &[f32]) -> Vec<bool> {
    values.iter().map(|v| *v != 0.0).collect()
}

fn correlation(a: &[bool], b: &[bool]) -> f64 {
    let share = |m: &[bool]| m.iter().filter(|k| **k).count() as f64 / m.len() as f64;
    let (p, q) = (share(a), share(b));
    let both = a.iter().zip(b).filter(|(x, y)| **x && **y).count() as f64 / a.len() as f64;
    (both - p * q) / (p * (1.0 - p) * q * (1.0 - q)).sqrt()
}

#[test]
fn the_share_that_is_kept_is_the_density() {
    let delta = normal(3, 0, N);
    for method in ["dare_linear", "dare_ties", "della", "della_linear"] {
        for density in [0.2, 0.5, 0.8] {
            let out = sparse(method, &delta, density, 0.1, 1).run();
            let kept = mask(&out).iter().filter(|k| **k).count() as f64 / N as f64;
            let sigma = (density * (1.0 - density) / N as f64).sqrt();
            assert!((kept - density).abs() < 5.0 * sigma, "{method} {density}: {kept}");
            for (o, d) in out.iter().zip(&delta) {
                assert!(*o == 0.0 || o.to_bits() == d.to_bits(), "{method}");
            }
        }
    }
}

#[test]
fn restoring_keeps_the_sum_of_absolute_values() {
    let delta = normal(4, 0, N);
    let total = |v: &[f32]| v.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    for method in ["dare_linear", "dare_ties", "della", "della_linear"] {
        let out = sparse(method, &delta, 0.3, 0.1, 1).global("rescale", 1.0).run();
        let ratio = total(&out) / total(&delta);
        assert!((ratio - 1.0).abs() < 1e-5, "{method}: {ratio}");
    }
}

#[test]
fn the_mean_over_seeds_is_the_density_times_the_change() {
    const SEEDS: u64 = 400;
    const SMALL: usize = 500;
    let (a, b) = (normal(5, 0, SMALL), normal(5, 1, SMALL));
    let (density, weights) = (0.4f64, [0.7f64, -0.3]);
    let mut sums = vec![0f64; SMALL];
    for seed in 0..SEEDS {
        let mut case =
            Case::new("dare_linear", &[SMALL], &[&vec![0.0; SMALL], &a, &b]).base(0).seed(seed);
        for (m, w) in weights.iter().enumerate() {
            case = case.own(m + 1, "weight", *w).own(m + 1, "density", density);
        }
        for (s, v) in sums.iter_mut().zip(case.global("rescale", 0.0).run()) {
            *s += f64::from(v);
        }
    }
    let spread = density * (1.0 - density) / SEEDS as f64;
    for (i, sum) in sums.iter().enumerate() {
        let parts = [weights[0] * f64::from(a[i]), weights[1] * f64::from(b[i])];
        let expected = density * (parts[0] + parts[1]);
        let sigma = (spread * (parts[0].powi(2) + parts[1].powi(2))).sqrt();
        assert!((sum / SEEDS as f64 - expected).abs() < 5.0 * sigma + 1e-6, "{i}");
    }
}

#[test]
fn masks_of_models_tensors_and_seeds_have_nothing_in_common() {
    let delta = vec![1.0; N];
    let plain = |seed: u64, name: &str| {
        mask(&sparse("dare_linear", &delta, 0.5, 0.0, seed).name(name).run())
    };
    let first = plain(0, "model.layers.0.mlp.up_proj.weight");
    assert_eq!(first, plain(0, "model.layers.0.mlp.up_proj.weight"));
    // Two models in one merge, told apart by their signs and sizes.
    let second = vec![3.0; N];
    let mut both =
        Case::new("dare_linear", &[ROWS, COLS], &[&vec![0.0; N], &delta, &second]).base(0);
    for m in 1..3 {
        both = both.own(m, "weight", 1.0).own(m, "density", 0.5);
    }
    let both = both.global("rescale", 0.0).run();
    let one: Vec<bool> = both.iter().map(|v| *v == 1.0 || *v == 4.0).collect();
    let other: Vec<bool> = both.iter().map(|v| *v >= 3.0).collect();
    let bound = 5.0 / (N as f64).sqrt();
    for (what, a, b) in [
        ("seeds", &first, &plain(1, "model.layers.0.mlp.up_proj.weight")),
        ("tensors", &first, &plain(0, "model.layers.1.mlp.up_proj.weight")),
        ("models", &one, &other),
    ] {
        let found = correlation(a, b);
        assert!(found.abs() < bound, "{what}: {found}");
    }
    // Neither do neighbours, in a row and in a column.
    for step in [1, COLS] {
        let found = correlation(&first[step..], &first[..N - step]);
        assert!(found.abs() < bound, "{step}: {found}");
    }
}

#[test]
fn della_keeps_by_rank() {
    let delta = normal(6, 0, N);
    let (density, epsilon) = (0.5, 0.3);
    let kept = mask(&sparse("della_linear", &delta, density, epsilon, 2).run());
    let mut deciles = [[0u64; 2]; 10];
    for row in 0..ROWS {
        let values = &delta[row * COLS..(row + 1) * COLS];
        let mut order: Vec<usize> = (0..COLS).collect();
        order.sort_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()));
        for (rank, i) in order.into_iter().enumerate() {
            let decile = &mut deciles[rank * 10 / COLS];
            decile[0] += 1;
            decile[1] += u64::from(kept[row * COLS + i]);
        }
    }
    // Chances rise in a straight line; the middle of the first tenth lies at 0.05, that of the last at 0.95.
    let mut chi2 = 0.0;
    for (d, [all, kept]) in deciles.iter().enumerate() {
        let p = density - epsilon + 2.0 * epsilon * (d as f64 + 0.5) / 10.0;
        let n = *all as f64;
        chi2 += (*kept as f64 - n * p).powi(2) / (n * p * (1.0 - p));
    }
    // The 99.99 % quantile for ten degrees of freedom.
    assert!(chi2 < 35.6, "{chi2}");
}

#[test]
fn neither_threads_nor_the_order_of_reading_decide() {
    // Large enough for several segments.
    const ROWS: usize = 1100;
    const N: usize = ROWS * COLS;
    let delta = normal(7, 0, N);
    for method in ["dare_ties", "della", "ties", "sce", "karcher", "model_stock", "arcee_fusion"] {
        let make = || {
            let (base, other) = (normal(8, 0, N), normal(8, 1, N));
            let models: &[&[f32]] = &[&base, &delta, &other];
            let models = if method == "arcee_fusion" { &models[..2] } else { models };
            let mut case = Case::new(method, &[ROWS, COLS], models).seed(3);
            if method != "karcher" {
                case = case.base(0);
            }
            for m in 0..models.len() {
                case = case
                    .own_if(m, "weight", 0.5)
                    .own_if(m, "density", 0.6)
                    .own_if(m, "epsilon", 0.2);
            }
            case.global_if("select_topk", 0.3).weight().unwrap()
        };
        let outside = make();
        outside.prepare().unwrap();
        let expected = outside.to_f32().unwrap();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let weight = make();
            let inside = pool.install(|| weight.to_f32().unwrap());
            assert!(
                inside.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{method}"
            );
        }
        let mut row = vec![0.0; COLS];
        for r in [ROWS - 1, 0, 77] {
            outside.read_rows(r..r + 1, &mut row).unwrap();
            assert_eq!(row, expected[r * COLS..(r + 1) * COLS], "{method}");
        }
    }
}
