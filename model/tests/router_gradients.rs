//! Gradients with respect to router weights: against torch's autograd (`data/make_gradients.py` made the files), and against
//! differences of the loss.

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::Source;
use moe_merge_model::router_training::{
    Gates, Objective, RouterGradient, RouterTraining, TrainingError, TrainingText, router_gradient,
    stored_gates,
};
use moe_merge_testkit::golden;

/// Against torch: share of the largest number of a layer's gradient. Everything is f32 on both sides.
const GRADIENT_F32: f64 = 2e-4;

fn source(path: &Path) -> Source {
    let name = path.display().to_string();
    Source::open(&name.parse().unwrap(), Path::new(".")).unwrap()
}

fn data(name: &str) -> PathBuf {
    moe_merge_testkit::repository("model/tests/data").join(name)
}

/// The checkpoint of this name, from the shared reference data or from ours.
fn checkpoint(name: &str) -> Option<Source> {
    if data(name).exists() {
        return Some(source(&data(name)));
    }
    Some(source(&moe_merge_testkit::shared(&format!("golden/arch/{name}"))?))
}

fn text(tokens: &[u32]) -> TrainingText<'_> {
    TrainingText { tokens, expert: None, held_out: false, skip: 0 }
}

fn torch(name: &str) {
    let Some(source) = checkpoint(name) else { return };
    let expected = golden::load(&data("gradients").join(format!("{name}.safetensors")));
    let tokens = expected["input_ids"].ids();
    let gates = stored_gates(&source).unwrap();
    let options = RouterTraining { z_loss: 0.0, ..options() };
    let found = router_gradient(&source, &gates, &[text(&tokens)], &options).unwrap();
    let loss = expected["loss"].values[0];
    assert!((found.loss - loss).abs() < 1e-4 * loss, "{name}: loss {} {loss}", found.loss);
    assert_eq!(found.gates.len(), expected.len() - 2, "{name}: layers with a router");
    for (layer, gradient) in &found.gates {
        let wanted = &expected[&format!("layer_{layer}")].values;
        let difference = golden::relative_difference(gradient, wanted);
        assert!(difference < GRADIENT_F32, "{name} layer {layer}: {difference:e}");
    }
}

fn options() -> RouterTraining {
    RouterTraining { window: 64, ..RouterTraining::default() }
}

#[test]
fn torch_mixtral() {
    torch("mixtral");
    torch("mixtral_fused");
}

#[test]
fn torch_qwen() {
    torch("qwen2_moe");
    torch("qwen2_moe_mixed");
    torch("qwen3_moe");
}

#[test]
fn torch_olmoe() {
    torch("olmoe");
}

#[test]
fn torch_deepseek() {
    torch("deepseek_v2");
    torch("deepseek_v2_yarn");
}

#[test]
fn torch_granite_and_ernie() {
    torch("granitemoeshared");
    torch("ernie4_5_moe");
}

/// Slope of the loss along `direction` by central differences.
fn slope(gates: &Gates, direction: &Gates, by: f32, loss: &dyn Fn(&Gates) -> f64) -> f64 {
    let moved = |by: f32| {
        let mut gates = gates.clone();
        for (layer, values) in &mut gates {
            values.iter_mut().zip(&direction[layer]).for_each(|(w, d)| *w += by * d);
        }
        loss(&gates)
    };
    (moved(by) - moved(-by)) / (2.0 * f64::from(by))
}

/// The gradient along itself, and along directions that have nothing to do with it.
fn differences(name: &str, options: &RouterTraining, (steps, tolerance): (&[f32], f64)) {
    let Some(source) = checkpoint(name) else { return };
    let gates = stored_gates(&source).unwrap();
    let vocab = 30;
    let tokens: [Vec<u32>; 2] =
        [3, 8].map(|s| (0..17).map(|i| 1 + (i * i * s + i) % vocab).collect());
    let texts = [0, 1].map(|e| TrainingText {
        tokens: &tokens[e],
        expert: Some(e),
        held_out: e == 1,
        skip: 1,
    });
    let at = |gates: &Gates| -> RouterGradient {
        router_gradient(&source, gates, &texts, options).unwrap()
    };
    let found = at(&gates);
    assert_eq!(found.by_expert.len(), 2);
    let norm =
        found.gates.values().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt() as f32;
    assert!(norm > 1e-4, "{name}: a gradient to compare");
    let along = found.gates.iter().map(|(l, g)| (*l, g.iter().map(|g| g / norm).collect()));
    let mut directions: Vec<Gates> = vec![along.collect()];
    for seed in 1..4 {
        let wave = |(l, g): (&usize, &Vec<f32>)| {
            let root = (g.len() as f32).sqrt();
            (*l, (0..g.len()).map(|i| ((i * seed + l) as f32 * 1.7).sin() / root).collect())
        };
        directions.push(found.gates.iter().map(wave).collect());
    }
    for (i, direction) in directions.iter().enumerate() {
        let products = found.gates.iter().flat_map(|(l, g)| g.iter().zip(&direction[l]));
        let product: f64 = products.map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let error = |by: f32| {
            let slope = slope(&gates, direction, by, &|gates| at(gates).loss);
            (product - slope).abs() / f64::from(norm)
        };
        // A step that makes a choice flip says nothing: then a smaller one has to do.
        let least = steps.iter().map(|by| error(*by)).fold(f64::INFINITY, f64::min);
        assert!(least < tolerance, "{name} direction {i}: {product} differs by {least:e}");
    }
}

/// With all experts chosen no choice can flip between the two ends of a difference.
const SMOOTH: (&[f32], f64) = (&[2e-3], 5e-3);

/// With fewer it can; smaller steps leave more of the rounding in the slope.
const CHOOSING: (&[f32], f64) = (&[2e-3, 1e-3, 5e-4, 2e-4], 3e-2);

#[test]
fn differences_of_the_next_token_loss() {
    for name in
        ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared", "ernie4_5_moe", "deepseek_v2"]
    {
        differences(name, &RouterTraining { top_k: Some(4), ..options() }, SMOOTH);
        differences(name, &options(), CHOOSING);
    }
}

#[test]
fn differences_of_the_divergence_from_the_oracle() {
    for name in ["mixtral", "qwen2_moe", "granitemoeshared"] {
        let options = RouterTraining { objective: Objective::Distil, ..options() };
        differences(name, &options, CHOOSING);
        differences(name, &RouterTraining { top_k: Some(4), ..options }, SMOOTH);
    }
}

#[test]
fn differences_of_the_penalties() {
    for name in ["mixtral", "olmoe"] {
        let options =
            RouterTraining { load_balance: 3.0, z_loss: 0.5, top_k: Some(4), ..options() };
        differences(name, &options, SMOOTH);
    }
}

/// One expert per token with weight 1: the loss does not depend on the gates, unless training passes visit more.
#[test]
fn one_expert_with_weight_one_is_refused() {
    let Some(source) = checkpoint("mixtral_top1") else { return };
    let gates = stored_gates(&source).unwrap();
    let tokens: Vec<u32> = (1..20).collect();
    let run =
        |options: &RouterTraining| router_gradient(&source, &gates, &[text(&tokens)], options);
    assert!(matches!(run(&options()), Err(TrainingError::NoGradient { .. })));
    let found = run(&RouterTraining { z_loss: 1.0, ..options() }).unwrap();
    assert!(found.gates.values().flatten().any(|g| *g != 0.0));
    differences("mixtral_top1", &RouterTraining { top_k: Some(3), ..options() }, SMOOTH);
}

#[test]
fn dense_models_and_bad_options_are_refused() {
    let Some(dense) = moe_merge_testkit::shared("golden/arch/llama") else { return };
    let dense = source(&dense);
    assert!(stored_gates(&dense).unwrap().is_empty());
    let tokens = [1, 2, 3];
    let error = router_gradient(&dense, &Gates::new(), &[text(&tokens)], &options()).unwrap_err();
    assert!(matches!(error, TrainingError::NoGradient { .. }), "{error:?}");
    let source = source(&data("mixtral_fused"));
    let gates = stored_gates(&source).unwrap();
    let parameter = |options: RouterTraining| match router_gradient(
        &source,
        &gates,
        &[text(&tokens)],
        &options,
    ) {
        Err(TrainingError::Parameter { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let base = options();
    assert_eq!(
        parameter(RouterTraining { learning_rate: f64::NAN, ..base.clone() }),
        "learning_rate"
    );
    assert_eq!(parameter(RouterTraining { anchor: -1.0, ..base.clone() }), "anchor");
    assert_eq!(parameter(RouterTraining { window: 1, ..base.clone() }), "window");
    assert_eq!(parameter(RouterTraining { window: 129, ..base.clone() }), "window");
    assert_eq!(parameter(RouterTraining { top_k: Some(4), ..base.clone() }), "top_k");
    assert_eq!(parameter(RouterTraining { patience: 0, ..base.clone() }), "patience");
    // Eight experts in four groups, two of which a token may choose from.
    let grouped = checkpoint("deepseek_v2_yarn").unwrap();
    let wide = RouterTraining { top_k: Some(5), ..base.clone() };
    let of_grouped = stored_gates(&grouped).unwrap();
    let error = router_gradient(&grouped, &of_grouped, &[text(&tokens)], &wide).unwrap_err();
    assert!(matches!(error, TrainingError::Parameter { name: "top_k", .. }), "{error:?}");
    let refused = |text: TrainingText<'_>, options: &RouterTraining| {
        router_gradient(&source, &gates, &[text], options).unwrap_err()
    };
    let labelled = TrainingText { expert: Some(3), ..text(&tokens) };
    assert!(matches!(refused(labelled, &base), TrainingError::Text { .. }));
    let distil = RouterTraining { objective: Objective::Distil, ..base.clone() };
    assert!(matches!(refused(text(&tokens), &distil), TrainingError::Text { .. }));
    assert!(matches!(refused(text(&[1, 99]), &base), TrainingError::Model(_)));
    let mut few = gates.clone();
    few.remove(&1);
    let error = router_gradient(&source, &few, &[text(&tokens)], &base).unwrap_err();
    assert!(matches!(error, TrainingError::State { .. }), "{error:?}");
}
