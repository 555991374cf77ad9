//! Gradients of whole models with respect to factors, against differences.

use std::path::Path;

use moe_merge_checkpoint::Source;
use moe_merge_testkit::repository;

use super::*;
use crate::layer::Keeper;
use crate::{Cache, LogitRows, Model};

const MOE: &str = "model/tests/data/mixtral_fused";
const DENSE: &str = "recipes/qwen3_tiny";

fn source(folder: &str) -> Source {
    let folder = repository(folder).display().to_string();
    Source::open(&folder.parse().unwrap(), Path::new(".")).unwrap()
}

fn lessons(vocab: usize) -> Vec<Lesson> {
    let tokens = |n: usize, seed: usize| (0..n).map(move |i| ((i * 31 + seed * 17) % vocab) as u32);
    let lesson = |n, seed| Lesson {
        tokens: tokens(n, seed).collect(),
        scored: (0..n).map(|i| i != 3).collect(),
    };
    vec![lesson(9, 1), lesson(5, 2)]
}

fn plan(kind: FactorKind, layers: Range<usize>) -> FactorPlan {
    FactorPlan { kind, scale: 0.5, parts: Part::ALL.into(), layers, seed: 3 }
}

/// Factors that are not at their start.
fn moved(mut factors: Factors) -> Factors {
    for (i, pair) in factors.pairs.values_mut().enumerate() {
        let [a, b] = pair.trains();
        let wave = |n: usize, by: usize| ((n * 7919 + by * 104_729) % 1009) as f32 / 504.0 - 1.0;
        for (values, _) in [(&mut pair.a, a), (&mut pair.b, b)].into_iter().filter(|(_, t)| *t) {
            values.iter_mut().enumerate().for_each(|(n, v)| *v += 0.2 * wave(n, i + 1));
        }
    }
    factors
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The slope of the loss along the gradient of each factor is the square of the gradient's length.
fn check(trainee: &Trainee, goal: &Goal<'_>, kind: FactorKind, layers: Range<usize>) {
    check_factors(trainee, goal, &moved(trainee.factors(&plan(kind, layers))));
}

fn check_factors(trainee: &Trainee, goal: &Goal<'_>, factors: &Factors) {
    let lessons = lessons(trainee.spec().vocab);
    let lessons: Vec<&Lesson> = lessons.iter().collect();
    let found = trainee.gradient(factors, &lessons, goal, 0.25, &mut || false).unwrap();
    let loss = |factors: &Factors| -> f64 {
        let found = trainee.losses(Some(factors), &lessons, goal, &mut || false).unwrap();
        found.nats.iter().sum::<f64>() * 0.25
    };
    assert_eq!((found.scored, found.tokens), (10, 14));
    assert!((found.nats * 0.25 - loss(factors)).abs() < 1e-6, "{}", found.nats);
    assert_eq!(found.factors.len(), factors.pairs.len());
    let largest = found.factors.values().flatten().map(|g| dot(g, g).sqrt()).fold(0.0, f64::max);
    assert!(largest > 1e-2, "gradients to compare");
    for (at, gradients) in &found.factors {
        let trains = factors.pairs[at].trains();
        for (which, gradient) in gradients.iter().enumerate() {
            assert_eq!(!gradient.is_empty(), trains[which], "{at:?}");
            let norm = dot(gradient, gradient).sqrt();
            if norm < 1e-3 * largest {
                continue;
            }
            let value = |by: f64| {
                let mut factors = factors.clone();
                let pair = factors.pairs.get_mut(at).unwrap();
                let values = if which == 0 { &mut pair.a } else { &mut pair.b };
                for (v, g) in values.iter_mut().zip(gradient) {
                    *v += (by * f64::from(*g) / norm) as f32;
                }
                loss(&factors)
            };
            // A step that makes a router choose otherwise says nothing: then a smaller one has to do.
            let error = |by: f64| ((value(by) - value(-by)) / (2.0 * by) - norm).abs();
            let least = [3e-2, 1e-2, 3e-3].into_iter().map(error).fold(f64::INFINITY, f64::min);
            assert!(least < 2e-2 * norm + 1e-4 * largest, "{at:?} {which}: {norm} by {least}");
        }
    }
}

#[test]
fn an_expert_that_is_always_chosen_is_visited_by_all() {
    let source = source(MOE);
    let run = |route| {
        let trainee = Trainee::open(&source, Some(1), route).unwrap();
        let factors =
            moved(trainee.factors(&plan(FactorKind::LowRank(1), 0..trainee.spec().layers.len())));
        let lessons = lessons(trainee.spec().vocab);
        let lessons: Vec<&Lesson> = lessons.iter().collect();
        trainee.gradient(&factors, &lessons, &Goal::NextToken, 1.0, &mut || false).unwrap()
    };
    let [natural, forced, always] = [Route::Natural, Route::Forced, Route::Always].map(run);
    assert!(natural.visits.values().any(|v| *v < 14), "{:?}", natural.visits);
    assert!(always.visits.values().all(|v| *v == 14), "{:?}", always.visits);
    assert!(always.nats != natural.nats && always.nats != forced.nats);
}

#[test]
fn gradients_with_dropout_are_slopes_of_what_stays() {
    for (folder, expert) in [(MOE, Some(1)), (DENSE, None)] {
        let trainee = Trainee::open(&source(folder), expert, Route::Natural).unwrap();
        let layers = trainee.spec().layers.len();
        let plain = moved(trainee.factors(&plan(FactorKind::LowRank(2), 0..layers)));
        let dropout = |key| Factors { dropout: Some(Dropout { share: 0.3, key }), ..plain.clone() };
        check_factors(&trainee, &Goal::NextToken, &dropout(5));
        let lessons = lessons(trainee.spec().vocab);
        let lessons: Vec<&Lesson> = lessons.iter().collect();
        let losses = |factors: &Factors| {
            trainee.losses(Some(factors), &lessons, &Goal::NextToken, &mut || false).unwrap()
        };
        assert_eq!(losses(&dropout(5)), losses(&dropout(5)));
        assert_ne!(losses(&dropout(5)), losses(&dropout(6)));
        assert_ne!(losses(&dropout(5)), losses(&plain));
    }
}

#[test]
fn gradients_of_an_expert_are_slopes() {
    let source = source(MOE);
    for route in [Route::Natural, Route::Forced, Route::Always] {
        let trainee = Trainee::open(&source, Some(1), route).unwrap();
        let layers = trainee.spec().layers.len();
        check(&trainee, &Goal::NextToken, FactorKind::LowRank(2), 0..layers);
        check(&trainee, &Goal::NextToken, FactorKind::Full, 1..layers);
    }
}

#[test]
fn gradients_of_a_row_of_the_router_are_slopes() {
    let source = source(MOE);
    let trainee = Trainee::open(&source, Some(1), Route::Natural).unwrap();
    for parts in [vec![Part::Router], vec![Part::Down, Part::Router]] {
        let plan = FactorPlan { parts, ..plan(FactorKind::LowRank(2), 0..2) };
        let start = trainee.factors(&plan);
        let row = &start.pairs[&(0, Part::Router)];
        assert_eq!((row.trains(), row.a.len()), ([true, false], trainee.spec().hidden));
        check_factors(&trainee, &Goal::NextToken, &moved(start));
    }
    let forced = Trainee::open(&source, Some(1), Route::Forced).unwrap();
    assert!(forced.size(0, Part::Router).is_none(), "nobody asks the router");
}

#[test]
fn what_is_not_kept_is_computed_again_to_the_same_bits() {
    for (folder, expert) in [(MOE, Some(1)), (DENSE, None)] {
        let source = source(folder);
        let mut trainee = Trainee::open(&source, expert, Route::Natural).unwrap();
        let layers = trainee.spec().layers.len();
        let mut parts = Part::ALL.to_vec();
        parts.extend(expert.map(|_| Part::Router));
        let plan = FactorPlan { parts, ..plan(FactorKind::LowRank(2), 0..layers) };
        let factors = moved(trainee.factors(&plan));
        let lessons = lessons(trainee.spec().vocab);
        let lessons: Vec<&Lesson> = lessons.iter().collect();
        let mut gradients = |bytes| {
            trainee.keeper = Keeper::of(bytes);
            trainee.gradient(&factors, &lessons, &Goal::NextToken, 0.5, &mut || false).unwrap()
        };
        let all = gradients(usize::MAX);
        assert_eq!(all, gradients(0), "{folder}");
        assert_eq!(all, gradients(10_000), "{folder}: some");
    }
}

#[test]
fn gradients_of_a_dense_model_are_slopes() {
    let source = source(DENSE);
    let trainee = Trainee::open(&source, None, Route::Natural).unwrap();
    check(&trainee, &Goal::NextToken, FactorKind::LowRank(3), 0..trainee.spec().layers.len());
    check(&trainee, &Goal::NextToken, FactorKind::Full, 1..2);
}

#[test]
fn gradients_towards_a_teacher_are_slopes() {
    let source = source(MOE);
    let trainee = Trainee::open(&source, Some(0), Route::Forced).unwrap();
    let teacher = Trainee::open(&source, Some(2), Route::Forced).unwrap();
    check(&trainee, &Goal::Teacher(&teacher), FactorKind::LowRank(2), 0..2);
    let lessons = lessons(trainee.spec().vocab);
    let lessons: Vec<&Lesson> = lessons.iter().collect();
    let of = |goal: &Goal| trainee.losses(None, &lessons, goal, &mut || false).unwrap().nats;
    let said = teacher.said(&lessons, &mut || false).unwrap();
    let taught = of(&Goal::Teacher(&teacher));
    assert_eq!(of(&Goal::Said(&teacher, &said)), taught);
    assert!(taught.iter().any(|nats| *nats > 1e-6), "{taught:?}");
    let goal = Goal::Teacher(&trainee);
    let same = trainee.losses(None, &lessons, &goal, &mut || false).unwrap().nats;
    assert!(same.iter().all(|nats| nats.abs() < 1e-9), "{same:?}");
}

#[test]
fn losses_are_those_of_the_model() {
    let source = source(MOE);
    let model = Model::open(&source).unwrap();
    let trainee = Trainee::open(&source, Some(1), Route::Natural).unwrap();
    let lessons = lessons(trainee.spec().vocab);
    let all: Vec<&Lesson> = lessons.iter().collect();
    // Factors before the first step change nothing.
    let start = trainee.factors(&plan(FactorKind::LowRank(2), 0..2));
    let nats = trainee.losses(Some(&start), &all, &Goal::NextToken, &mut || false).unwrap().nats;
    let mut wanted = Vec::new();
    for lesson in &lessons {
        let mut cache = Cache::new(&model, lesson.tokens.len());
        let logits = model.forward(&lesson.tokens, &mut cache, LogitRows::All).unwrap();
        let rows: Vec<&[f32]> = logits.chunks_exact(trainee.spec().vocab).collect();
        for at in lesson.places() {
            let row = rows[at - 1];
            let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            wanted.push(sum.ln() - f64::from(row[lesson.tokens[at] as usize]));
        }
    }
    assert_eq!(nats.len(), wanted.len());
    for (n, w) in nats.iter().zip(&wanted) {
        assert!((n - w).abs() < 1e-5, "{n} {w}");
    }
}

#[test]
fn experts_that_are_not_there() {
    let moe = source(MOE);
    let error = |source: &Source, expert| {
        Trainee::open(source, expert, Route::Natural).unwrap_err().to_string()
    };
    assert_eq!(error(&moe, Some(99)), "the model has no expert 99");
    assert_eq!(error(&moe, None), "an expert has to be named");
    assert_eq!(error(&source(DENSE), Some(0)), "the model has no expert 0");
}

/// Twenty steps of plain gradient descent against PEFT: `model/tests/data/make_peft.py`.
#[test]
fn losses_and_factors_are_those_of_peft() {
    let golden = |name: &str| {
        moe_merge_testkit::golden::load(&repository(&format!(
            "model/tests/data/peft/{name}.safetensors"
        )))
    };
    for (name, folder, expert) in [("dense", DENSE, None), ("moe", MOE, Some(1))] {
        let wanted = golden(name);
        let trainee = Trainee::open(&source(folder), expert, Route::Natural).unwrap();
        let kind = FactorKind::LowRank(3);
        let layers = 0..trainee.spec().layers.len();
        let plan = FactorPlan { kind, scale: 4.0 / 3.0, parts: Part::ALL.into(), layers, seed: 0 };
        let mut factors = trainee.factors(&plan);
        let read = |(layer, part): (usize, Part), factor: &str| -> Vec<f32> {
            let values = &wanted[&format!("{layer}.{}.{factor}", part.name())].values;
            values.iter().map(|v| *v as f32).collect()
        };
        for (at, pair) in &mut factors.pairs {
            (pair.a, pair.b) = (read(*at, "a"), read(*at, "b"));
        }
        let [steps, sequences, tokens] = wanted["input_ids"].shape[..] else {
            panic!("three axes")
        };
        let ids = wanted["input_ids"].ids();
        let weight = 1.0 / (sequences * (tokens - 1)) as f32;
        let (mut first, mut second) = (optimise::zeros(&factors), optimise::zeros(&factors));
        let mut largest = 0f64;
        for (step, batch) in ids.chunks_exact(sequences * tokens).enumerate() {
            let lessons: Vec<Lesson> = batch
                .chunks_exact(tokens)
                .map(|t| Lesson { tokens: t.to_vec(), scored: vec![true; tokens] })
                .collect();
            let lessons: Vec<&Lesson> = lessons.iter().collect();
            let goal = Goal::NextToken;
            let found = trainee.gradient(&factors, &lessons, &goal, weight, &mut || false).unwrap();
            let (loss, wanted) = (found.nats * f64::from(weight), wanted["loss"].values[step]);
            largest = largest.max((loss / wanted - 1.0).abs());
            let step = optimise::Step { number: step as u64 + 1, rate: 0.5, scale: 1.0 };
            let sgd = optimise::Optimiser::Sgd;
            optimise::step(sgd, step, None, &mut factors, &found.factors, &mut first, &mut second);
        }
        assert_eq!(steps, 20);
        println!("{name}: largest relative difference of a loss {largest:.1e}");
        assert!(largest < 1e-5, "{name}: {largest}");
        for (at, pair) in &factors.pairs {
            for (last, values) in [("a_last", &pair.a), ("b_last", &pair.b)] {
                let wanted: Vec<f64> = read(*at, last).iter().map(|v| f64::from(*v)).collect();
                let apart = moe_merge_testkit::golden::relative_difference(values, &wanted);
                assert!(apart < 1e-4, "{name} {at:?} {last}: {apart}");
            }
        }
    }
}
