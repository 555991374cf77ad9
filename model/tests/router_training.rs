//! Runs of router-only training.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{Explain, Source};
use moe_merge_kernels::Dtype;
use moe_merge_model::Tokenizer;
use moe_merge_model::router_training::{
    Gates, Objective, Progress, RouterTraining, Stopped, Trained, TrainingError, TrainingState,
    TrainingText, TrainingWatcher, router_gradient, stored_gates, train_routers,
};
use serde_json::json;

fn open(path: &Path) -> Source {
    Source::open(&path.display().to_string().parse().unwrap(), Path::new(".")).unwrap()
}

fn fused() -> Source {
    open(&moe_merge_testkit::repository("model/tests/data/mixtral_fused"))
}

/// Lets a run go on; may stop it at a step, or in the middle of one.
#[derive(Default)]
struct Watch {
    stop_at: Option<u64>,
    /// Interrupted at the question of this number.
    give_up: Option<usize>,
    questions: usize,
    told: Vec<u64>,
    speed: f64,
}

impl TrainingWatcher for Watch {
    fn progress(&mut self, progress: &Progress<'_>) -> ControlFlow<()> {
        self.told.push(progress.state.step);
        self.speed = progress.tokens_per_second;
        let step = progress.state.step;
        assert_eq!(progress.evaluation.is_some(), step.is_multiple_of(3) || step == progress.steps);
        match self.stop_at {
            Some(step) if progress.state.step >= step => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }

    fn interrupted(&mut self) -> bool {
        self.questions += 1;
        Some(self.questions) == self.give_up
    }
}

fn texts() -> Vec<Vec<u32>> {
    (0..8u32)
        .map(|s| (0..14 + s).map(|i| 1 + (i * i * (s + 2) + 3 * i + s) % 30).collect())
        .collect()
}

/// Texts of three experts, or of two and nobody; the last three are held out.
fn labelled(texts: &[Vec<u32>], unknown: bool) -> Vec<TrainingText<'_>> {
    let text = |(i, tokens)| TrainingText {
        tokens,
        expert: (!unknown || i % 3 != 2).then_some(i % 3),
        held_out: i >= 5,
        skip: 1,
    };
    texts.iter().map(Vec::as_slice).enumerate().map(text).collect()
}

fn options() -> RouterTraining {
    RouterTraining {
        steps: 9,
        batch_tokens: 40,
        window: 9,
        load_balance: 0.01,
        z_loss: 0.001,
        anchor: 0.01,
        evaluate_every: 3,
        patience: 100,
        seed: 7,
        ..RouterTraining::default()
    }
}

fn run(
    source: &Source,
    state: TrainingState,
    options: &RouterTraining,
    watch: &mut Watch,
) -> Trained {
    let distil = options.objective == Objective::Distil;
    train_routers(source, state, &labelled(&texts(), !distil), options, watch).unwrap()
}

fn bits(gates: &Gates) -> Vec<u32> {
    gates.values().flatten().map(|w| w.to_bits()).collect()
}

#[test]
fn a_run_that_was_stopped_goes_on_as_if_it_had_not() {
    let source = fused();
    let start = || TrainingState::new(stored_gates(&source).unwrap());
    for objective in [Objective::NextToken, Objective::Distil] {
        let options = RouterTraining { objective, ..options() };
        let mut watch = Watch::default();
        let whole = run(&source, start(), &options, &mut watch);
        assert_eq!((whole.stopped, whole.state.step), (Stopped::Finished, 9));
        assert_eq!(watch.told, (0..=9).collect::<Vec<_>>());
        assert_eq!((whole.state.losses.len(), whole.state.evaluations.len()), (9, 4));
        assert!(watch.speed > 0.0 && whole.unused_texts.is_empty());
        assert_ne!(bits(&whole.state.gates), bits(&start().gates));
        for (stop_at, give_up) in
            [(Some(0), None), (Some(4), None), (Some(6), None), (None, Some(1)), (None, Some(23))]
        {
            let mut watch = Watch { stop_at, give_up, ..Watch::default() };
            let part = run(&source, start(), &options, &mut watch);
            assert_eq!(part.stopped, Stopped::Interrupted);
            assert!(part.state.step < 9);
            let saved = serde_json::to_string(&part.state).unwrap();
            let state: TrainingState = serde_json::from_str(&saved).unwrap();
            assert_eq!(state, part.state);
            let rest = run(&source, state, &options, &mut Watch::default());
            assert_eq!(rest, whole, "stopped at {:?} or {:?}", stop_at, give_up);
        }
        let again = run(&source, whole.state.clone(), &options, &mut Watch::default());
        assert_eq!(again, whole, "nothing is left to do");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let source = fused();
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let start = TrainingState::new(stored_gates(&source).unwrap());
        pool.install(|| run(&source, start, &options(), &mut Watch::default()))
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(5));
}

#[test]
fn a_state_fits_only_what_it_was_begun_with() {
    let source = fused();
    let texts = texts();
    let start = TrainingState::new(stored_gates(&source).unwrap());
    let mut watch = Watch { stop_at: Some(2), ..Watch::default() };
    let state = run(&source, start, &options(), &mut watch).state;
    let refused = |options: &RouterTraining, texts: &[TrainingText<'_>]| {
        let error = train_routers(&source, state.clone(), texts, options, &mut Watch::default());
        match error.unwrap_err() {
            TrainingError::State { what, .. } => what,
            other => panic!("{other:?}"),
        }
    };
    let longer = RouterTraining { steps: 10, ..options() };
    assert_eq!(refused(&longer, &labelled(&texts, true)), "options");
    assert_eq!(refused(&options(), &labelled(&texts, true)[1..]), "digest of the texts");
    // A new run from its gates is free.
    let fresh = TrainingState::new(state.gates);
    assert_eq!(run(&source, fresh, &longer, &mut Watch::default()).state.step, 10);
}

#[test]
fn patience_ends_a_run_and_the_best_gates_are_kept() {
    let source = fused();
    let start = TrainingState::new(stored_gates(&source).unwrap());
    // Steps so large that the held-out loss can only rise after a while.
    let options =
        RouterTraining { learning_rate: 50.0, steps: 300, patience: 2, anchor: 0.0, ..options() };
    let trained = run(&source, start, &options, &mut Watch::default());
    assert_eq!(trained.stopped, Stopped::NoGain);
    let state = &trained.state;
    let least = state.evaluations.iter().map(|e| e.loss).fold(f32::INFINITY, f32::min);
    let best = state.evaluations.iter().find(|e| e.loss == least).unwrap();
    assert_eq!(best.step, state.best_step);
    assert_eq!(state.step, state.best_step + 6);
    assert_ne!(state.best, state.gates);
    // The best gates have the loss that was noted.
    let texts = texts();
    let held: Vec<_> = labelled(&texts, true).into_iter().filter(|t| t.held_out).collect();
    let options = RouterTraining { load_balance: 0.0, z_loss: 0.0, ..options };
    let found = router_gradient(&source, &state.best, &held, &options).unwrap();
    assert!((found.loss - f64::from(least)).abs() < 1e-5, "{} {least}", found.loss);
    assert_eq!(best.by_expert.len(), found.by_expert.len());
}

#[test]
fn the_anchor_holds_the_gates() {
    let source = fused();
    let gates = stored_gates(&source).unwrap();
    let moved = |anchor: f64| {
        let options = RouterTraining { anchor, steps: 30, ..options() };
        let state = TrainingState::new(gates.clone());
        let end = run(&source, state, &options, &mut Watch::default()).state.gates;
        let pairs = gates.values().flatten().zip(end.values().flatten());
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    };
    let (free, held) = (moved(0.0), moved(100.0));
    assert!(held < 0.7 * free, "{held} {free}");
}

#[test]
fn numbers_that_are_not_finite_stop_the_run_with_the_last_good_state() {
    let mut source = fused();
    let name = "model.layers.1.input_layernorm.weight";
    let start = TrainingState::new(stored_gates(&source).unwrap());
    let bad = OwnedWeight::from_f32(name, &[f32::NAN; 16], &[16], Dtype::F32);
    source.tensors.insert(name.into(), Arc::new(bad));
    let texts = texts();
    let run = |state: TrainingState, held_out: bool| {
        let texts: Vec<_> =
            labelled(&texts, true).into_iter().filter(|t| held_out || !t.held_out).collect();
        train_routers(&source, state, &texts, &options(), &mut Quiet).unwrap_err()
    };
    for held_out in [true, false] {
        let error = run(start.clone(), held_out);
        let TrainingError::NotFinite { step: 0, what, state } = &error else { panic!("{error:?}") };
        assert_eq!(what, "a router logit of layer 1");
        assert_eq!((state.step, &state.gates), (0, &start.gates));
        assert!(error.hint().is_some() && error.to_string().contains("step 0"));
    }
    let mut gates = start.gates.clone();
    gates.get_mut(&0).unwrap()[3] = f32::INFINITY;
    assert!(matches!(run(TrainingState::new(gates), false), TrainingError::State { .. }));
}

/// Lets everything go on.
struct Quiet;

impl TrainingWatcher for Quiet {
    fn progress(&mut self, _: &Progress<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

#[test]
fn short_texts_are_reported_and_without_texts_there_is_no_run() {
    let source = fused();
    let start = || TrainingState::new(stored_gates(&source).unwrap());
    let texts = [vec![1, 5, 6, 7], vec![1], vec![]];
    let text = |tokens| TrainingText { tokens, expert: Some(0), held_out: false, skip: 1 };
    let all: Vec<_> = texts.iter().map(|t| text(t)).collect();
    let options = RouterTraining { steps: 2, ..options() };
    let trained = train_routers(&source, start(), &all, &options, &mut Quiet).unwrap();
    assert_eq!(trained.unused_texts, [1, 2]);
    // Without held-out texts the last gates are the best.
    assert_eq!((trained.state.best_step, &trained.state.best), (2, &trained.state.gates));
    let error = train_routers(&source, start(), &all[1..], &options, &mut Quiet).unwrap_err();
    assert!(matches!(error, TrainingError::Text { .. }), "{error:?}");
}

const DOMAINS: [&str; 4] = ["prose", "code", "math", "facts"];

/// The four tiny experts in a Mixtral, with random gates.
fn tiny() -> Option<(Source, Vec<Vec<u32>>)> {
    let root = moe_merge_testkit::shared("models/tiny")?;
    let mut moe = open(&root.join("base"));
    let tokenizer = Tokenizer::from_source(&moe).unwrap();
    moe.tensors.retain(|name, _| !name.contains(".mlp."));
    for (e, domain) in DOMAINS.iter().enumerate() {
        for (name, weight) in open(&root.join(domain)).tensors {
            let Some((layer, part)) = name.split_once(".mlp.") else { continue };
            let part = match part {
                "gate_proj.weight" => "w1",
                "up_proj.weight" => "w3",
                _ => "w2",
            };
            let name = format!("{layer}.block_sparse_moe.experts.{e}.{part}.weight");
            moe.tensors.insert(name, weight);
        }
    }
    for layer in 0..6 {
        let values: Vec<f32> =
            (0..4 * 128).map(|i| ((i * 7919 + layer * 104_729) as f32).sin() * 0.02).collect();
        let name = format!("model.layers.{layer}.block_sparse_moe.gate.weight");
        let gate = OwnedWeight::from_f32(&name, &values, &[4, 128], Dtype::F32);
        moe.tensors.insert(name, Arc::new(gate));
    }
    for (key, value) in [
        ("model_type", json!("mixtral")),
        ("num_local_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
    ] {
        moe.config.0.insert(key.into(), value);
    }
    let texts = DOMAINS
        .iter()
        .map(|domain| {
            let text = std::fs::read_to_string(root.join(format!("eval_{domain}.txt"))).unwrap();
            let mut tokens = vec![1];
            tokens.extend(tokenizer.encode(&text).unwrap());
            tokens.truncate(6000);
            tokens
        })
        .collect();
    Some((moe, texts))
}

#[test]
fn loss_on_text_that_was_not_trained_on_falls() {
    let Some((source, tokens)) = tiny() else { return };
    let mut texts = Vec::new();
    let held: Vec<Vec<u32>> = tokens.iter().map(|t| [&t[..1], &t[4000..4256]].concat()).collect();
    for (e, (tokens, held)) in tokens.iter().zip(&held).enumerate() {
        let text =
            TrainingText { tokens: &tokens[..4000], expert: Some(e), held_out: false, skip: 1 };
        texts.push(text);
        texts.push(TrainingText { tokens: held, held_out: true, ..text });
    }
    for objective in [Objective::NextToken, Objective::Distil] {
        let options = RouterTraining {
            steps: 12,
            batch_tokens: 384,
            window: 96,
            objective,
            evaluate_every: 6,
            patience: 100,
            ..RouterTraining::default()
        };
        let start = TrainingState::new(stored_gates(&source).unwrap());
        let state = train_routers(&source, start, &texts, &options, &mut Quiet).unwrap().state;
        let held: Vec<f32> = state.evaluations.iter().map(|e| e.loss).collect();
        println!("{objective:?}: {held:?}");
        let (first, last) = (held[0], held[held.len() - 1]);
        match objective {
            Objective::NextToken => assert!(last < first - 0.05, "{held:?}"),
            Objective::Distil => assert!(last < 0.7 * first, "{held:?}"),
        }
        assert_eq!(state.evaluations[0].by_expert.len(), 4);
    }
}
