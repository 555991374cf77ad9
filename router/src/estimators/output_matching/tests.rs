use super::*;

fn noise(count: usize, seed: u64) -> Vec<f32> {
    crate::estimators::random::gate(1, count, seed, 0).rows
}

/// Outputs `[tokens, experts, width]` as products about their mean.
fn products(outputs: &[f32], experts: usize, width: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for token in outputs.chunks_exact(experts * width) {
        let mean: Vec<f32> = (0..width)
            .map(|k| (0..experts).map(|e| token[e * width + k]).sum::<f32>() / experts as f32)
            .collect();
        let at = |e: usize, k: usize| f64::from(token[e * width + k] - mean[k]);
        for a in 0..experts {
            for b in 0..experts {
                all.push((0..width).map(|k| at(a, k) * at(b, k)).sum::<f64>() as f32);
            }
        }
    }
    all
}

struct Made {
    inputs: Vec<f32>,
    products: Vec<f32>,
    tokens: Vec<Wanted>,
}

fn made(n: usize, experts: usize, hidden: usize) -> Made {
    let outputs = noise(n * experts * 3, 2);
    Made {
        inputs: noise(n * hidden, 1),
        products: products(&outputs, experts, 3),
        tokens: (0..n)
            .map(|t| Wanted {
                expert: t % experts,
                against: t % 7 == 6,
                weight: 1.0 + (t % 3) as f64,
            })
            .collect(),
    }
}

impl Made {
    fn comparison(&self, experts: usize, hidden: usize, top_k: usize) -> Comparison<'_> {
        Comparison {
            experts,
            hidden,
            top_k,
            inputs: &self.inputs,
            outputs: &self.products,
            tokens: &self.tokens,
            anchor: None,
        }
    }
}

#[test]
fn errors_of_outputs_by_hand() {
    // Outputs 0, 2 and 4 on a line; expert 0 is right, and the two best logits are equal: the output is 1 instead of 0.
    let p = products(&[0.0, 2.0, 4.0], 3, 1);
    let mut work = Work::new(3);
    work.logits = vec![1.0, 1.0, 0.0];
    assert!((work.output_error(&p, 0, 2) - 1.0).abs() < 1e-6);
    // d/ds of (2 p_1)², p_1 = 1/2, dp_1/ds_1 = 1/4: 2 · 1 · 2 · 1/4 = 1.
    let gradient = work.gradient.clone();
    assert!((gradient[1] - 1.0).abs() < 1e-6 && (gradient[0] + 1.0).abs() < 1e-6);
    assert_eq!(gradient[2], 0.0);
    work.logits = vec![1.0, 1.0, 0.0];
    assert!((work.output_error(&p, 2, 1) - 16.0).abs() < 1e-5, "the lower number wins a tie");
}

#[test]
fn gradient_against_finite_differences() {
    for top_k in [1, 2, 3] {
        let (n, experts, hidden) = (40, 3, 5);
        let made = made(n, experts, hidden);
        let anchor_input = noise(hidden, 9);
        let mut comparison = made.comparison(experts, hidden, top_k);
        comparison.anchor = Some(Anchor { input: &anchor_input, weights: &[0.7, 0.3, 0.0] });
        let options = MatchOptions { penalty: 0.01, ..MatchOptions::default() };
        let problem = Problem::new(&comparison, &options).unwrap();
        let w: Vec<f64> = noise(experts * hidden, 5).iter().map(|&v| f64::from(v)).collect();
        let found = problem.evaluate(&w).unwrap().gradient;
        for k in 0..w.len() {
            let step = 1e-3;
            let at = |by: f64| {
                let mut w = w.clone();
                w[k] += by;
                problem.evaluate(&w).unwrap().value
            };
            let expected = (at(step) - at(-step)) / (2.0 * step);
            assert!(
                (found[k] - expected).abs() < 2e-3 * (1.0 + expected.abs()),
                "{k}: {} {expected}",
                found[k]
            );
        }
    }
}

#[test]
fn the_expert_that_costs_least_wins_where_labels_cannot_tell() {
    // One input for all tokens; half are of expert 0, half of expert 1, and expert 2's output lies between the two.
    let inputs = vec![1.0f32; 20];
    let p = products(&[0.0, 10.0, 5.0], 3, 1).repeat(20);
    let tokens: Vec<Wanted> =
        (0..20).map(|t| Wanted { expert: t % 2, against: false, weight: 1.0 }).collect();
    let comparison = Comparison {
        experts: 3,
        hidden: 1,
        top_k: 1,
        inputs: &inputs,
        outputs: &p,
        tokens: &tokens,
        anchor: None,
    };
    let start = Gate { experts: 3, hidden: 1, rows: vec![0.0, 0.0, 0.1] };
    let options = MatchOptions { cross_entropy: 0.0, ..MatchOptions::default() };
    let fit = fit(&comparison, &start, &options).unwrap();
    assert!((fit.error[1] - 25.0 / 62.5).abs() < 1e-6, "{:?}", fit.error);
}

#[test]
fn matching_lowers_the_error_and_threads_change_nothing() {
    let (experts, hidden) = (3, 8);
    let made = made(600, experts, hidden);
    let comparison = made.comparison(experts, hidden, 2);
    let start = crate::estimators::random::gate(experts, hidden, 3, 0);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit(&comparison, &start, &MatchOptions::default()).unwrap())
    };
    let one = run(1);
    assert_eq!(one, run(3));
    assert!(one.error[1] < one.error[0]);
    let columns = |k: usize| (0..experts).map(|e| one.gate.rows[e * hidden + k]).sum::<f32>();
    assert!((0..hidden).all(|k| columns(k).abs() < 1e-5));
}

#[test]
fn an_anchor_is_routed_as_asked() {
    let (experts, hidden) = (3, 8);
    let made = made(300, experts, hidden);
    let mut comparison = made.comparison(experts, hidden, 2);
    let input: Vec<f32> = noise(hidden, 4).iter().map(|v| 4.0 * v).collect();
    comparison.anchor = Some(Anchor { input: &input, weights: &[0.0, 0.9, 0.1] });
    let start = Gate { experts, hidden, rows: vec![0.0; experts * hidden] };
    let gate = fit(&comparison, &start, &MatchOptions::default()).unwrap().gate;
    let logits = gate.logits(&input);
    assert!((logits[1] - logits[2] - 9f64.ln()).abs() < 0.4, "{logits:?}");
    assert!(logits[0] < logits[2] - 1.0, "{logits:?}");
}

#[test]
fn sizes_and_numbers_are_checked() {
    let mut made = made(10, 3, 4);
    let start = Gate { experts: 3, hidden: 4, rows: vec![0.0; 12] };
    let options = MatchOptions::default();
    let wrong = Comparison { outputs: &made.products[1..], ..made.comparison(3, 4, 2) };
    assert!(matches!(fit(&wrong, &start, &options), Err(RouterError::Shape { .. })));
    made.inputs[5] = f32::NAN;
    let error = fit(&made.comparison(3, 4, 2), &start, &options).unwrap_err();
    assert!(matches!(error, RouterError::NotFinite { token: 1, .. }), "{error:?}");
}
