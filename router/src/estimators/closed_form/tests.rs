use super::*;
use crate::estimators::corpus::{Corpus, accuracy, largest_difference};
use crate::estimators::{lda, mean, random, ridge};
use crate::samples::{Example, Sign};
use crate::symmetric::{Symmetric, tile_rows};

type Estimate = fn(&Samples<'_>, &Options) -> Result<Fit, RouterError>;

const ALL: [(&str, Estimate); 3] = [("mean", mean::fit), ("ridge", ridge::fit), ("lda", lda::fit)];

/// Both sides of `2 tokens = hidden`.
const SIZES: [usize; 2] = [16, 260];

fn run(estimate: Estimate, corpus: &Corpus) -> Fit {
    estimate(&corpus.samples(), &Options::default()).unwrap()
}

#[test]
fn separable_data_are_separated_and_the_forecast_is_honest() {
    for hidden in [24, 500] {
        let corpus = Corpus::new(4, 4, 10, hidden, 1.0);
        for (name, estimate) in ALL {
            let fit = run(estimate, &corpus);
            // Means and discriminants would need a bias for classes at unequal distances from the middle.
            let least = if name == "ridge" { 1.0 } else { 0.98 };
            assert!(accuracy(&fit, &corpus.samples()) >= least, "{name} {hidden}");
            let held_out = fit.held_out.unwrap();
            assert_eq!(held_out.folds, 4);
            assert!(held_out.mean_accuracy() > 0.9, "{name} {hidden} {held_out:?}");
            assert!(held_out.nll < 0.5 * 4f64.ln(), "{name} {hidden} {held_out:?}");
        }
    }
}

#[test]
fn an_affine_copy_of_separable_data_is_separated() {
    let mut corpus = Corpus::new(3, 4, 30, 24, 1.5);
    let shift = random::gate(1, 24, 9, 0);
    for (_, values) in &mut corpus.prompts {
        for (i, v) in values.iter_mut().enumerate() {
            *v = *v * 0.01 * (1 + i % 24) as f32 + 0.1 * shift.rows[i % 24];
        }
    }
    for (name, estimate) in [ALL[1], ALL[2]] {
        let fit = run(estimate, &corpus);
        assert_eq!(accuracy(&fit, &corpus.samples()), 1.0, "{name}");
    }
    // A scaled copy routes the same.
    let plain = Corpus::new(3, 4, 30, 24, 0.5);
    let mut turned = Corpus::new(3, 4, 30, 24, 0.5);
    turned.prompts.iter_mut().for_each(|p| p.1.iter_mut().for_each(|v| *v *= -64.0));
    for (name, estimate) in ALL {
        let (a, b) = (run(estimate, &plain), run(estimate, &turned));
        let back: Vec<f32> = b.gate.rows.iter().map(|v| v * -64.0).collect();
        assert!(largest_difference(&a.gate.rows, &back) < 1e-5, "{name}");
    }
}

#[test]
fn noise_is_forecast_as_noise() {
    let corpus = Corpus::new(4, 6, 12, 24, 0.0);
    for (name, estimate) in ALL {
        let held_out = run(estimate, &corpus).held_out.unwrap();
        assert!(held_out.mean_accuracy() < 0.45, "{name} {held_out:?}");
        assert!(held_out.nll > 0.9 * 4f64.ln(), "{name} {held_out:?}");
    }
}

#[test]
fn order_of_prompts_and_copies_of_them_change_nothing() {
    for hidden in SIZES {
        for (name, estimate) in ALL {
            let mut corpus = Corpus::new(3, 4, 9, hidden, 0.5);
            let first = run(estimate, &corpus);
            corpus.prompts.reverse();
            corpus.prompts.swap(2, 7);
            assert_eq!(first, run(estimate, &corpus), "{name}");
            let copies: Vec<_> = corpus.prompts.iter().filter(|p| p.0 == 1).cloned().collect();
            corpus.prompts.extend(copies);
            let second = run(estimate, &corpus);
            let copies = Warning::DuplicatePrompts { expert: 1, dropped: 4 };
            assert_eq!(second.warnings, [&[copies][..], &first.warnings[..]].concat(), "{name}");
            assert_eq!((first.gate, first.held_out), (second.gate, second.held_out), "{name}");
        }
    }
}

#[test]
fn permuted_labels_permute_rows_which_sum_to_zero() {
    for hidden in SIZES {
        for (name, estimate) in ALL {
            let mut corpus = Corpus::new(3, 4, 9, hidden, 0.5);
            let first = run(estimate, &corpus);
            let largest = first.gate.rows.iter().fold(0f32, |m, v| m.max(v.abs()));
            for k in 0..hidden {
                let sum = (0..3).map(|e| first.gate.row(e)[k]).sum::<f32>();
                assert!(sum.abs() < 1e-6 * largest, "{name}");
            }
            corpus.prompts.iter_mut().for_each(|p| p.0 = (p.0 + 1) % 3);
            let second = run(estimate, &corpus);
            assert_eq!(first.penalty == 0.0, name == "mean");
            assert!((first.penalty - second.penalty).abs() <= 1e-9 * first.penalty, "{name}");
            for e in 0..3 {
                let moved = second.gate.row((e + 1) % 3);
                // Held-out logits are those of f32 coordinates, which the order of classes moves in the last bit.
                assert!(largest_difference(first.gate.row(e), moved) < 1e-4, "{name} {hidden}");
            }
            let (a, b) = (first.held_out.unwrap(), second.held_out.unwrap());
            assert!((a.nll - b.nll).abs() < 1e-5, "{name}");
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    for hidden in [150, 700] {
        let corpus = Corpus::new(4, 5, 15, hidden, 0.4);
        for (name, estimate) in ALL {
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| run(estimate, &corpus))
            };
            let (one, three) = (on(1), on(3));
            assert_eq!(one, three, "{name}");
            let bits = |f: &Fit| f.gate.rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&one), bits(&three), "{name}");
        }
    }
}

/// A corpus with a negative prompt, its table, and its features with and without the span.
fn both_forms(hidden: usize, estimate: impl Fn(&ClosedForm) -> Vec<f64>) -> [Vec<f64>; 2] {
    let corpus = Corpus::new(3, 3, 8, hidden, 0.5);
    let negative = random::gate(9, hidden, 5, 0).rows;
    let mut samples = corpus.samples();
    samples.examples.push(Example { expert: 0, sign: Sign::Negative, inputs: &negative });
    let of = |dual: bool| {
        let table = Table::new(&samples).unwrap();
        let features =
            if dual { Features::in_span(&table).unwrap() } else { Features::whole(&table) };
        assert_eq!(dual, features.span.is_some());
        let form = ClosedForm::of(table, features, &Options::default(), Grams::Needed).unwrap();
        let rows = estimate(&form);
        form.features.expand(&rows, hidden)
    };
    [of(false), of(true)]
}

fn agree(a: &[f64], b: &[f64]) {
    let scale = a.iter().fold(0f64, |m, v| m.max(v.abs()));
    assert!(scale > 0.0 && a.len() == b.len());
    let difference = a.iter().zip(b).fold(0f64, |m, (x, y)| m.max((x - y).abs()));
    assert!(difference <= 1e-9 * scale, "{difference:.1e} of {scale:.1e}");
}

#[test]
fn dual_and_primal_agree() {
    // 90 tokens. The dual form is used from 180 features on.
    for hidden in [20, 130, 200, 400] {
        for penalty in [0.003, 1.0, 30.0] {
            let [primal, dual] =
                both_forms(hidden, |f| ridge::rows(f.all(), &f.groups, 3, penalty).unwrap());
            agree(&primal, &dual);
        }
        let [primal, dual] = both_forms(hidden, |f| {
            let shrinkage = lda::intensity(f).unwrap();
            assert!(shrinkage > 0.01 && shrinkage < 0.99, "{shrinkage}");
            lda::rows(f, f.all(), shrinkage).unwrap()
        });
        agree(&primal, &dual);
    }
}

#[test]
fn both_forms_of_ridge_are_the_one_over_tokens() {
    // W = Aᵀ (K + penalty / weight)⁻¹ T with K = X Xᵀ: the textbook's dual, token by token.
    for hidden in [20, 90, 200] {
        let corpus = Corpus::new(3, 3, 9, hidden, 0.5);
        let form = ClosedForm::new(&corpus.samples(), &Options::default(), Grams::Needed).unwrap();
        let n = form.table.rows();
        let x: Vec<f64> = form.table.x.iter().map(|&v| f64::from(v)).collect();
        let weights = form.folds.weights(&form.table, None);
        let dot = |a: usize, b: usize| -> f64 {
            (0..hidden).map(|k| x[a * hidden + k] * x[b * hidden + k]).sum()
        };
        let kernel = Symmetric::from_tiles(n, |i, k| {
            let diagonal = |r, c| if r == c { 0.1 / weights[r] } else { 0.0 };
            tile_rows(i, n)
                .flat_map(|r| tile_rows(k, n).map(move |c| (r, c)))
                .map(|(r, c)| dot(r, c) + diagonal(r, c))
                .collect()
        });
        let label = |i: usize| form.groups.iter().position(|g| g.rows.contains(&i)).unwrap();
        let targets: Vec<f64> =
            (0..3 * n).map(|at| f64::from(u8::from(label(at % n) == at / n)) - 1.0 / 3.0).collect();
        let factors = kernel.cholesky().unwrap().solve(&targets).unwrap(); // [experts, n]
        let wanted: Vec<f64> = (0..3 * hidden)
            .map(|at| {
                let (e, k) = (at / hidden, at % hidden);
                (0..n).map(|i| factors[e * n + i] * x[i * hidden + k]).sum()
            })
            .collect();
        let found = ridge::rows(form.all(), &form.groups, 3, 0.1).unwrap();
        agree(&form.features.expand(&found, hidden), &wanted);
    }
}

#[test]
fn moments_of_a_fold_are_the_weighted_sums_over_its_rows() {
    let corpus = Corpus::new(3, 4, 8, 70, 0.5);
    let negative: Vec<f32> = corpus.prompts[4].1.iter().map(|v| v + 0.25).collect();
    let mut samples = corpus.samples();
    samples.examples.push(Example { expert: 2, sign: Sign::Negative, inputs: &negative });
    let form = ClosedForm::new(&samples, &Options::default(), Grams::Needed).unwrap();
    assert_eq!((form.moments.len(), form.groups.len()), (5, 4));
    for (fit, moments) in form.moments.iter().enumerate() {
        let fold = (fit < form.folds.count).then_some(fit);
        let weights = form.folds.weights(&form.table, fold);
        let mut gram = vec![0.0; 70 * 70];
        let mut sums = vec![0.0; 4 * 70];
        for (i, x) in form.features.x64.chunks_exact(70).enumerate() {
            let g = form.groups.iter().position(|g| g.rows.contains(&i)).unwrap();
            for r in 0..70 {
                sums[g * 70 + r] += weights[i] * x[r];
                (0..70).for_each(|c| gram[r * 70 + c] += weights[i] * x[r] * x[c]);
            }
        }
        let found = moments.gram.as_ref().unwrap().full();
        assert!(found.iter().zip(&gram).all(|(a, b)| (a - b).abs() < 1e-13));
        for (g, weight) in moments.weights.iter().enumerate() {
            let means = &moments.means[g * 70..(g + 1) * 70];
            let sums = &sums[g * 70..(g + 1) * 70];
            assert!(means.iter().zip(sums).all(|(m, s)| (weight * m - s).abs() < 1e-13));
        }
        // The only negative prompt is held out with the first fold.
        assert_eq!(moments.weights[3] == 0.0, fit == 0);
    }
}

#[test]
fn negatives_push_their_tokens_away() {
    for hidden in SIZES {
        let corpus = Corpus::new(3, 3, 9, hidden, 0.6);
        let probe: Vec<f32> = corpus.prompts[0].1.iter().map(|v| v + 0.3).collect();
        let mut samples = corpus.samples();
        samples.examples.push(Example { expert: 0, sign: Sign::Negative, inputs: &probe });
        for (name, estimate) in ALL {
            let share = |f: Fit| {
                let s = f.gate.logits(&probe[..hidden]);
                s[0].exp() / s.iter().map(|v| v.exp()).sum::<f64>()
            };
            let without = share(run(estimate, &corpus));
            let with = share(estimate(&samples, &Options::default()).unwrap());
            assert!(with < without, "{name} {hidden}: {with} {without}");
        }
    }
}

#[test]
fn negatives_elsewhere_leave_the_expert_its_own_tokens() {
    let corpus = Corpus::new(3, 4, 9, 24, 1.0);
    let mut samples = corpus.samples();
    let of = |e| corpus.prompts.iter().filter(move |p| p.0 == e);
    for (_, inputs) in of(1) {
        samples.examples.push(Example { expert: 0, sign: Sign::Negative, inputs });
    }
    for (name, estimate) in ALL {
        let fit = estimate(&samples, &Options::default()).unwrap();
        let least = if name == "ridge" { 1.0 } else { 0.95 };
        assert!(accuracy(&fit, &corpus.samples()) >= least, "{name}");
        assert!(fit.held_out.unwrap().mean_accuracy() > 0.9, "{name}");
    }
}

#[test]
fn experts_with_the_same_prompts_get_the_same_row() {
    let mut corpus = Corpus::new(3, 3, 9, 16, 0.8);
    let twins: Vec<_> =
        corpus.prompts.iter().filter(|p| p.0 == 0).map(|p| (1, p.1.clone())).collect();
    corpus.prompts.retain(|p| p.0 != 1);
    corpus.prompts.extend(twins);
    for (name, estimate) in ALL {
        let fit = run(estimate, &corpus);
        assert_eq!(fit.warnings, [Warning::SamePrompts { a: 0, b: 1 }], "{name}");
        assert_eq!(fit.gate.row(0), fit.gate.row(1), "{name}");
        assert!(fit.held_out.unwrap().nll > 0.5 * 2f64.ln(), "{name}");
    }
}

#[test]
fn one_expert_repeated_gives_a_zero_gate() {
    for hidden in SIZES {
        let base = Corpus::new(1, 3, 9, hidden, 0.8);
        for experts in [2, 9] {
            let repeat = |e| base.prompts.iter().map(move |p| (e, p.1.clone()));
            let corpus = Corpus { hidden, prompts: (0..experts).flat_map(repeat).collect() };
            for (name, estimate) in ALL {
                let fit = run(estimate, &corpus);
                assert!(fit.gate.rows.iter().all(|v| v.abs() < 1e-9), "{name} {experts}");
            }
        }
    }
}

#[test]
fn classes_without_any_spread_are_separated() {
    let prompts = vec![(0, vec![1.0, 0.0, 1.0, 0.0]), (1, vec![0.0, 1.0])];
    let corpus = Corpus { hidden: 2, prompts };
    for (name, estimate) in ALL {
        let fit = run(estimate, &corpus);
        assert_eq!(accuracy(&fit, &corpus.samples()), 1.0, "{name}");
    }
}

#[test]
fn single_prompts_are_said_and_answered_with_care() {
    let corpus = Corpus::new(2, 1, 9, 16, 0.8);
    for (name, estimate) in ALL {
        let fit = run(estimate, &corpus);
        assert!(fit.held_out.is_none());
        let expected = [
            Warning::SinglePrompt { expert: 0 },
            Warning::SinglePrompt { expert: 1 },
            Warning::NoHeldOut { penalty: fit.penalty },
        ];
        assert_eq!(fit.warnings, expected, "{name}");
        let logits: Vec<f64> = corpus
            .prompts
            .iter()
            .flat_map(|p| p.1.chunks_exact(16).flat_map(|z| fit.gate.logits(z)))
            .collect();
        let square = logits.iter().map(|v| v * v).sum::<f64>() / logits.len() as f64;
        assert!((square - 1.0).abs() < 1e-4, "{name} {square}");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let (good, bad) = ([1.0f32, 2.0], [1.0f32, f32::NAN]);
    for (_, estimate) in ALL {
        let of = |inputs: &[&[f32]]| {
            let examples = inputs
                .iter()
                .enumerate()
                .map(|(expert, inputs)| Example { expert, sign: Sign::Positive, inputs })
                .collect();
            let samples = Samples { experts: 2, hidden: 2, examples };
            estimate(&samples, &Options::default()).unwrap_err()
        };
        assert_eq!(of(&[&good]), RouterError::NoPrompts { expert: 1 });
        assert_eq!(of(&[&[0.0; 2], &[0.0; 2]]), RouterError::AllZero);
        let expected = RouterError::NotFinite { expert: 1, prompt: 0, token: 0 };
        assert_eq!(of(&[&good, &bad]), expected);
    }
}
