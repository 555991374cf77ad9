//! Every architecture against transformers: checkpoints and results lie in `golden/arch` and `golden/arch_v4`.

use std::collections::BTreeMap;
use std::path::Path;

use moe_merge_checkpoint::Source;
use moe_merge_kernels::{Exec, Isa};
use moe_merge_model::{Cache, LogitRows, Model, ModelError, Placement, Spec, probe};
use moe_merge_testkit::golden::{self, Golden, LOGITS_F32, relative_difference};

fn source(path: &Path) -> Source {
    let name = path.display().to_string();
    Source::open(&name.parse().unwrap(), Path::new(".")).unwrap()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32
}

fn close(what: &str, found: &[f32], expected: &[f64]) {
    let difference = relative_difference(found, expected);
    assert!(difference <= LOGITS_F32, "{what}: relative difference {difference:e}");
}

/// Logits and hidden states of each row, whole and in two pieces; greedy text token by token; the probe.
fn check(folder: &Path) {
    let name = folder.display().to_string();
    let expected = golden::load(&folder.join("expected.safetensors"));
    let source = source(folder);
    let ids = &expected["input_ids"];
    let prompts: Vec<Vec<u32>> =
        (0..ids.shape[0]).map(|row| ids.row(row).iter().map(|v| *v as u32).collect()).collect();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let exec = Exec::on(isa).unwrap();
        let model = Model::open_with(&source, exec).unwrap_or_else(|e| panic!("{name}: {e}"));
        run(&format!("{name} {}", isa.name()), &model, &prompts, &expected);
    }
    probed(&name, &source, &prompts, &expected);
    let found: BTreeMap<_, _> =
        source.tensors.iter().map(|(n, w)| (n.clone(), w.shape().to_vec())).collect();
    let spec = Spec::of(&source).unwrap();
    let listed: BTreeMap<_, _> = spec.expected_tensors().into_iter().collect();
    assert_eq!(found, listed, "{name}: tensors of the file against those of the spec");
}

fn run(name: &str, model: &Model, prompts: &[Vec<u32>], expected: &BTreeMap<String, Golden>) {
    for (row, tokens) in prompts.iter().enumerate() {
        let (hidden, logits) = model.hidden_states(tokens).unwrap();
        assert_eq!(hidden.len(), model.spec().layers.len() + 1);
        for (i, state) in hidden.iter().enumerate() {
            close(&format!("{name} hidden {i}"), state, expected[&format!("hidden_{i}")].row(row));
        }
        let wanted = expected["logits"].row(row);
        close(&format!("{name} logits"), &logits, wanted);
        let mut cache = Cache::new(model, tokens.len());
        let mut pieces = model.forward(&tokens[..11], &mut cache, LogitRows::All).unwrap();
        pieces.extend(model.forward(&tokens[11..], &mut cache, LogitRows::All).unwrap());
        close(&format!("{name} logits in two pieces"), &pieces, wanted);
    }
    greedy(name, model, &prompts[0][..8], expected);
}

fn greedy(name: &str, model: &Model, prompt: &[u32], expected: &BTreeMap<String, Golden>) {
    let wanted = expected["greedy"].ids();
    let new = if wanted[..8] == *prompt { &wanted[8..] } else { &wanted[..] };
    let mut cache = Cache::new(model, 8 + new.len());
    let mut logits = model.forward(prompt, &mut cache, LogitRows::Last).unwrap();
    for (i, token) in new.iter().enumerate() {
        assert_eq!(argmax(&logits), *token, "{name}: greedy token {i}");
        logits = model.forward(&[*token], &mut cache, LogitRows::Last).unwrap();
    }
    assert_eq!(cache.len(), 8 + new.len());
}

fn probed(name: &str, source: &Source, prompts: &[Vec<u32>], expected: &BTreeMap<String, Golden>) {
    let mut seen = 0;
    probe(source, prompts, &mut |p| {
        assert_eq!(p.layer, seen);
        seen += 1;
        for (row, stream) in p.stream.iter().enumerate() {
            let wanted = expected[&format!("hidden_{}", p.layer)].row(row);
            close(&format!("{name} probe {}", p.layer), stream, wanted);
            assert_eq!(p.router_input[row].len(), stream.len());
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, Spec::of(source).unwrap().layers.len());
}

fn check_all(root: &str, count: usize) {
    let Some(root) = moe_merge_testkit::shared(root) else { return };
    let mut folders: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    folders.sort();
    assert_eq!(folders.len(), count);
    folders.iter().for_each(|f| check(f));
}

#[test]
fn written_by_transformers_5() {
    check_all("golden/arch", 17);
}

#[test]
fn written_by_transformers_4() {
    check_all("golden/arch_v4", 9);
}

#[test]
fn limits_are_errors() {
    let Some(folder) = moe_merge_testkit::shared("golden/arch/llama") else { return };
    let model = Model::open(&source(&folder)).unwrap();
    let mut cache = Cache::new(&model, 4);
    let mut run = |tokens: &[u32]| model.forward(tokens, &mut cache, LogitRows::Last);
    assert!(matches!(
        run(&[1; 5]),
        Err(ModelError::TooLong { what: "the cache", tokens: 5, limit: 4 })
    ));
    assert!(matches!(run(&[1, 128]), Err(ModelError::Token { token: 128, vocab: 128 })));
    run(&[1; 4]).unwrap();
    assert!(matches!(run(&[1]), Err(ModelError::TooLong { tokens: 5, .. })));
    cache.clear();
    assert!(model.forward(&[1], &mut cache, LogitRows::Last).is_ok());
    let mut wide = Cache::new(&model, 1000);
    let long = model.forward(&[1; 257], &mut wide, LogitRows::Last);
    assert!(matches!(long, Err(ModelError::TooLong { what: "the context", limit: 256, .. })));
    assert!(model.hidden_states(&[1; 257]).is_err());
}

#[test]
fn routers_can_round_as_transformers_does_in_bf16() {
    // DeepSeek-V2 computes its router in f32 there, so nothing moves; elsewhere a little does.
    for (name, moves) in
        [("mixtral", true), ("qwen3_moe", true), ("olmoe", true), ("deepseek_v2", false)]
    {
        let Some(folder) = moe_merge_testkit::shared(&format!("golden/arch/{name}")) else {
            return;
        };
        let mut model = Model::open(&source(&folder)).unwrap();
        let tokens = [1, 5, 7, 9, 2, 8, 3];
        let (_, exact) = model.hidden_states(&tokens).unwrap();
        model.round_routers_like_hf();
        let (_, rounded) = model.hidden_states(&tokens).unwrap();
        let exact: Vec<f64> = exact.into_iter().map(f64::from).collect();
        let difference = relative_difference(&rounded, &exact);
        assert_eq!(difference > 0.0, moves, "{name}: {difference:e}");
        assert!(difference < 0.02, "{name}: {difference:e}");
    }
}

#[test]
fn a_missing_and_a_misshapen_tensor_are_named() {
    let Some(folder) = moe_merge_testkit::shared("golden/arch/llama") else { return };
    let good = source(&folder);
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut bad = good.clone();
    let weight = bad.tensors.remove(name).unwrap();
    let error = Model::open(&bad).unwrap_err();
    assert!(format!("{error:?}").contains(name), "{error:?}");
    let narrow = moe_merge_checkpoint::weight::RowSlice::new(weight, 0..47);
    bad.tensors.insert(name.to_owned(), std::sync::Arc::new(narrow));
    let error = Model::open(&bad).unwrap_err();
    assert!(format!("{error:?}").contains("[48, 32]"), "{error:?}");
}

#[test]
fn the_trace_is_what_the_layers_do() {
    use moe_merge_model::perplexity::Windows;
    use moe_merge_model::streamed::{TokenText, Watcher, WindowRouting, perplexities};
    struct Routed(Vec<(usize, Vec<u32>, Vec<f32>)>);
    impl Watcher for Routed {
        fn advance(&mut self, _: usize) {}
        fn routed(&mut self, w: WindowRouting<'_>) {
            let from = w.skip * w.routing.top_k;
            let (ids, weights) = (&w.routing.ids[from..], &w.routing.weights[from..]);
            self.0.push((w.text, ids.to_vec(), weights.to_vec()));
        }
        fn go_on(&mut self) -> Result<(), ModelError> {
            Ok(())
        }
    }
    for (name, layers) in [("qwen2_moe_mixed", 1), ("mixtral", 2), ("deepseek_v2", 1)] {
        let Some(folder) = moe_merge_testkit::shared(&format!("golden/arch/{name}")) else {
            return;
        };
        let source = source(&folder);
        let texts = [[1, 5, 7, 9, 2, 8, 3].as_slice(), &[4, 4, 6]];
        let texts = texts.map(|tokens| TokenText { tokens, origin: "t" });
        let mut passed = Routed(Vec::new());
        let (windows, cpu) = (Windows { window: 5, stride: None }, Placement::cpu());
        perplexities(&source, &texts, Some(1), windows, &mut passed, &cpu).unwrap();
        let (mut at, mut starts, mut seen) = (0, Vec::new(), std::collections::BTreeSet::new());
        moe_merge_model::trace::trace(&source, &texts, Some(1), 5, &cpu, &mut |w| {
            let (text, ids, weights) = &passed.0[at];
            assert_eq!((w.text, &w.routing.ids), (*text, ids), "{name}");
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
            assert!(w.routing.weights.iter().zip(weights).all(close), "{name}");
            for (row, best) in
                w.probabilities.chunks(w.experts).zip(ids.chunks(w.routing.top_k).map(|c| c[0]))
            {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{name}: {row:?}");
                assert!(row.iter().all(|p| *p <= row[best as usize]), "{name}: {row:?}, {best}");
            }
            at += 1;
            seen.insert(w.layer);
            starts.push((w.text, w.start));
            Ok(())
        })
        .unwrap();
        assert_eq!((at, seen.len()), (passed.0.len(), layers), "{name}");
        assert_eq!(starts[..3], [(0, 0), (0, 4), (1, 0)], "{name}");
    }
}

#[test]
fn a_dense_model_has_nothing_to_trace() {
    let Some(folder) = moe_merge_testkit::shared("golden/arch/llama") else { return };
    let text = moe_merge_model::streamed::TokenText { tokens: &[1], origin: "t" };
    let mut never = |_: moe_merge_model::trace::TracedWindow<'_>| panic!("no routers");
    let error = moe_merge_model::trace::trace(
        &source(&folder),
        &[text],
        None,
        8,
        &Placement::cpu(),
        &mut never,
    )
    .unwrap_err();
    assert!(error.to_string().contains("it has no experts"), "{error}");
}
