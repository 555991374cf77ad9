use super::*;
use crate::RouterError;
use crate::estimators::corpus::{Corpus, accuracy, largest_difference};
use crate::samples::{Example, Sign};

fn exact() -> Options {
    Options { tolerance: 1e-9, max_iterations: 2000, ..Options::default() }
}

#[test]
fn separable_data_are_separated_and_the_forecast_is_honest() {
    let corpus = Corpus::new(4, 4, 10, 24, 1.0);
    let fit = fit(&corpus.samples(), &Options::default()).unwrap();
    assert_eq!(accuracy(&fit, &corpus.samples()), 1.0);
    let held_out = fit.held_out.unwrap();
    assert_eq!(held_out.folds, 4);
    assert!(held_out.mean_accuracy() > 0.9, "{held_out:?}");
    assert!(held_out.nll < 0.5 * 4f64.ln());
    assert!((held_out.load.iter().sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn noise_is_forecast_as_noise() {
    let fit = fit(&Corpus::new(4, 6, 12, 24, 0.0).samples(), &Options::default()).unwrap();
    let held_out = fit.held_out.unwrap();
    assert!(held_out.mean_accuracy() < 0.45, "{held_out:?}");
    assert!(held_out.nll > 0.9 * 4f64.ln(), "{held_out:?}");
}

#[test]
fn rows_sum_to_zero() {
    let fit = fit(&Corpus::new(3, 3, 9, 16, 0.7).samples(), &Options::default()).unwrap();
    for k in 0..16 {
        assert!((0..3).map(|e| fit.gate.row(e)[k]).sum::<f32>().abs() < 1e-6);
    }
}

#[test]
fn order_of_prompts_changes_nothing() {
    let mut corpus = Corpus::new(3, 4, 9, 16, 0.5);
    let first = fit(&corpus.samples(), &Options::default()).unwrap();
    corpus.prompts.reverse();
    corpus.prompts.swap(2, 7);
    assert_eq!(first, fit(&corpus.samples(), &Options::default()).unwrap());
}

#[test]
fn permuted_labels_permute_rows() {
    let mut corpus = Corpus::new(3, 4, 9, 16, 0.5);
    let first = fit(&corpus.samples(), &exact()).unwrap();
    corpus.prompts.iter_mut().for_each(|p| p.0 = (p.0 + 1) % 3);
    let second = fit(&corpus.samples(), &exact()).unwrap();
    assert_eq!(first.penalty, second.penalty);
    // The temperature comes from fits in f32, whose sums run in another order now.
    let scale = (first.temperature / second.temperature) as f32;
    for e in 0..3 {
        let moved: Vec<f32> = second.gate.row((e + 1) % 3).iter().map(|v| v * scale).collect();
        assert!(largest_difference(first.gate.row(e), &moved) < 1e-5);
    }
    let (a, b) = (first.held_out.unwrap(), second.held_out.unwrap());
    assert!((a.nll - b.nll).abs() < 1e-2);
}

#[test]
fn duplicated_prompts_change_nothing_but_a_warning() {
    let mut corpus = Corpus::new(3, 3, 9, 16, 0.5);
    let first = fit(&corpus.samples(), &Options::default()).unwrap();
    let copies: Vec<_> = corpus.prompts.iter().filter(|p| p.0 == 1).cloned().collect();
    corpus.prompts.extend(copies);
    let second = fit(&corpus.samples(), &Options::default()).unwrap();
    assert_eq!(second.warnings, [Warning::DuplicatePrompts { expert: 1, dropped: 3 }]);
    assert_eq!((first.gate, first.held_out), (second.gate, second.held_out));
}

#[test]
fn an_expert_with_more_text_weighs_no_more() {
    // One feature, classes at +1 and -1 with 3 and 30 tokens: balanced, so no logit at 0 and equal and opposite rows.
    let prompts = vec![(0, vec![1.0f32; 3]), (1, vec![-1.0f32; 30])];
    let corpus = Corpus { hidden: 1, prompts };
    let options = Options { penalty_without_held_out: 0.1, ..exact() };
    let fit = fit(&corpus.samples(), &options).unwrap();
    assert!(fit.held_out.is_none());
    let w = f64::from(fit.gate.rows[0]);
    assert_eq!(fit.gate.rows[1], -fit.gate.rows[0]);
    // Rows (w, -w): the objective ln(1 + exp(-2w)) + 0.2 w² has its minimum where 2 / (1 + exp(2w)) = 0.4 w.
    assert!((2.0 / (1.0 + (2.0 * w).exp()) - 0.4 * w).abs() < 1e-7, "{w}");
}

#[test]
fn thread_count_changes_no_bit() {
    let corpus = Corpus::new(4, 5, 60, 32, 0.4);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fit(&corpus.samples(), &Options::default()).unwrap())
    };
    let (one, two) = (run(1), run(2));
    assert_eq!(one, two);
    let bits = |f: &Fit| f.gate.rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&one), bits(&two));
}

#[test]
fn the_span_of_the_tokens_loses_nothing() {
    let corpus = Corpus::new(3, 2, 8, 120, 0.5);
    let table = Table::new(&corpus.samples()).unwrap();
    let targets: Vec<Target> =
        table.prompts.iter().flat_map(|p| std::iter::repeat_n(p.target, p.rows.len())).collect();
    let weights = Folds::new(&table, 8).weights(&table, None);
    let dual = Features::new(&table).unwrap();
    let primal = Features::whole(&table);
    assert!(dual.span.is_some() && dual.width <= table.rows());
    let of = |features: &Features| {
        let start = vec![0.0; 3 * features.width];
        let solver = solve(&table, &targets, features, &weights, start, 0.01, &exact()).unwrap();
        features.expand(solver.point(), 120)
    };
    for (a, b) in of(&dual).iter().zip(of(&primal)) {
        assert!((a - b).abs() < 1e-8, "{a} {b}");
    }
}

#[test]
fn negatives_push_their_tokens_away() {
    let corpus = Corpus::new(3, 3, 9, 16, 0.6);
    let probe: Vec<f32> = corpus.prompts[0].1.iter().map(|v| v + 0.3).collect();
    let without = fit(&corpus.samples(), &Options::default()).unwrap();
    let mut samples = corpus.samples();
    samples.examples.push(Example { expert: 0, sign: Sign::Negative, inputs: &probe });
    let with = fit(&samples, &Options::default()).unwrap();
    let share = |f: &Fit| {
        let s = f.gate.logits(&probe[..16]);
        let sum: f64 = s.iter().map(|v| v.exp()).sum();
        s[0].exp() / sum
    };
    assert!(share(&with) < share(&without));
}

#[test]
fn experts_with_the_same_prompts_get_the_same_row() {
    let mut corpus = Corpus::new(3, 3, 9, 16, 0.8);
    let twins: Vec<_> =
        corpus.prompts.iter().filter(|p| p.0 == 0).map(|p| (1, p.1.clone())).collect();
    corpus.prompts.retain(|p| p.0 != 1);
    corpus.prompts.extend(twins);
    let fit = fit(&corpus.samples(), &Options::default()).unwrap();
    assert_eq!(fit.warnings, [Warning::SamePrompts { a: 0, b: 1 }]);
    assert_eq!(fit.gate.row(0), fit.gate.row(1));
    assert!(fit.gate.rows.iter().all(|v| v.is_finite()));
    // Equal text is held out together, so the forecast cannot have seen it: both share their tokens.
    let h = fit.held_out.unwrap();
    assert!(h.nll > 0.5 * 2f64.ln());
}

#[test]
fn one_expert_repeated_gives_a_zero_gate() {
    let base = Corpus::new(1, 3, 9, 16, 0.8);
    for experts in [2, 64] {
        let prompts =
            (0..experts).flat_map(|e| base.prompts.iter().map(move |p| (e, p.1.clone()))).collect();
        let fit = fit(&Corpus { hidden: 16, prompts }.samples(), &Options::default()).unwrap();
        assert!(fit.gate.rows.iter().all(|v| v.abs() < 1e-9), "{experts}");
        assert_eq!(fit.warnings.len(), experts * (experts - 1) / 2);
    }
}

#[test]
fn single_prompts_are_said() {
    let fit_of = |prompts| fit(&Corpus::new(2, prompts, 9, 16, 0.8).samples(), &Options::default());
    let fit = fit_of(1).unwrap();
    assert!(fit.held_out.is_none());
    assert_eq!((fit.penalty, fit.temperature), (0.03, 1.0));
    let expected = [
        Warning::SinglePrompt { expert: 0 },
        Warning::SinglePrompt { expert: 1 },
        Warning::NoHeldOut { penalty: 0.03 },
    ];
    assert_eq!(fit.warnings, expected);
    assert_eq!(fit_of(2).unwrap().held_out.unwrap().folds, 2);
}

#[test]
fn logits_stay_within_the_bound() {
    let corpus = Corpus::new(2, 3, 9, 16, 4.0);
    let options = Options { penalties: vec![1e-9], ..Options::default() };
    let fit = fit(&corpus.samples(), &options).unwrap();
    let largest = corpus
        .prompts
        .iter()
        .flat_map(|p| p.1.chunks_exact(16).flat_map(|z| fit.gate.logits(z)).collect::<Vec<_>>())
        .fold(0f64, |m, v| m.max(v.abs()));
    assert!(largest <= LOGIT_BOUND * 1.00001);
    if fit.warnings.iter().any(|w| matches!(w, Warning::LogitsBounded { .. })) {
        assert!(largest > LOGIT_BOUND * 0.999);
    }
}

#[test]
fn what_is_wrong_is_said() {
    let good = [1.0f32, 2.0, 3.0, 4.0];
    let bad = [1.0f32, 2.0, f32::INFINITY, 4.0];
    let of = |list: &[(usize, &[f32])], experts| {
        let examples = list
            .iter()
            .map(|&(expert, inputs)| Example { expert, sign: Sign::Positive, inputs })
            .collect();
        fit(&Samples { experts, hidden: 2, examples }, &Options::default()).unwrap_err()
    };
    assert_eq!(of(&[(0, &good)], 1), RouterError::TooFewExperts { experts: 1 });
    assert_eq!(of(&[(0, &good)], 2), RouterError::NoPrompts { expert: 1 });
    assert_eq!(of(&[(0, &good), (1, &[])], 2), RouterError::NoTokens { expert: 1 });
    assert_eq!(
        of(&[(0, &good), (1, &good), (1, &bad)], 2),
        RouterError::NotFinite { expert: 1, prompt: 1, token: 1 }
    );
    assert_eq!(of(&[(0, &[0.0; 2]), (1, &[0.0; 2])], 2), RouterError::AllZero);
    assert!(matches!(of(&[(0, &good[..3])], 2), RouterError::Shape { .. }));
    assert_eq!(of(&[(2, &good)], 2), RouterError::NoSuchExpert { expert: 2, experts: 2 });
}

#[test]
fn many_experts() {
    let corpus = Corpus::new(64, 2, 4, 96, 1.0);
    let fit = fit(&corpus.samples(), &Options::default()).unwrap();
    assert!(accuracy(&fit, &corpus.samples()) > 0.95);
    assert_eq!(fit.held_out.unwrap().folds, 2);
}
