//! `merge-tensors`, `layershuffle`, `tokensurgeon`.

#[allow(dead_code)]
mod cli;
mod common;

use std::path::Path;

use cli::run;
use common::{logits, made_up, open};
use moe_merge_checkpoint::Source;
use moe_merge_model::{Model, Tokenizer};
use moe_merge_testkit::repository;
use serde_json::{Value, json};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn ok(args: &[&str]) -> Value {
    let run = run(&[args, &["--json"]].concat());
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

fn of(source: &Source, name: &str) -> Vec<f32> {
    source.weight(name).unwrap().to_f32().unwrap()
}

fn tensors(path: &Path, all: &[(&str, &[f32])]) {
    let bytes: Vec<(&str, Vec<u8>)> =
        all.iter().map(|(n, v)| (*n, v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = bytes.iter().map(|(name, bytes)| {
        let (dtype, shape) = (safetensors::Dtype::F32, vec![bytes.len() / 4]);
        (*name, safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn an_arc_between_nearly_opposite_directions_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    tensors(&at("a.safetensors"), &[("x", &[1.0, 2.0]), ("y", &[1.0, 2.0]), ("z", &[3.0, 1.0])]);
    tensors(
        &at("b.safetensors"),
        &[("x", &[-1.0, -2.01]), ("y", &[-1.0, 2.0]), ("z", &[-3.0, -1.0])],
    );
    let recipe = text(&at("recipe.yaml"));
    let models = "models:\n- {model: a.safetensors, parameters: {weight: 1}}\n\
                  - {model: b.safetensors, parameters: {weight: 1}}\n";
    std::fs::write(&recipe, format!("merge_method: nuslerp\n{models}")).unwrap();
    let report = ok(&["merge-tensors", &recipe, "--out", &text(&at("out.safetensors"))]);
    let told = report["warnings"].as_array().unwrap();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0]
            .as_str()
            .unwrap()
            .starts_with("2 tensors, `x` first: nuslerp between nearly opposite")
    );
}

#[test]
fn files_of_tensors() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    tensors(&at("a.safetensors"), &[("both", &[1.0, 2.0]), ("layers.3.only_a", &[5.0])]);
    tensors(&at("b.safetensors"), &[("both", &[3.0, 6.0]), ("only_b", &[7.0, 9.0])]);
    let recipe = text(&at("recipe.yaml"));
    std::fs::write(
        &recipe,
        "merge_method: linear\nmodels:\n- {model: a.safetensors, parameters: {weight: [3, 100]}}\n\
         - {model: b.safetensors, parameters: {weight: 1}}\n",
    )
    .unwrap();
    let out = text(&at("out.safetensors"));
    let args = ["merge-tensors", &recipe, "--out", &out];
    run(&args).fails(3, &["tensor is missing", "only_a", "b.safetensors"]);
    assert!(!at("out.safetensors").exists());
    let report = ok(&[&args[..], &["--skip-missing"]].concat());
    assert_eq!(report["tensors"], 1);
    assert!(report["warnings"][0].as_str().unwrap().contains("2 names left out"));
    let found = Source::open_tensors(&at("out.safetensors")).unwrap();
    // The first value of a gradient everywhere: (3 a + b) / 4.
    assert_eq!(of(&found, "both"), [1.5, 3.0]);
    run(&[&args[..], &["-u"]].concat()).fails(2, &["exists already"]);
    assert_eq!(ok(&[&args[..], &["-u", "--force"]].concat())["tensors"], 3);
    let found = Source::open_tensors(&at("out.safetensors")).unwrap();
    assert_eq!(of(&found, "only_b"), [7.0, 9.0]);
    assert_eq!(of(&found, "layers.3.only_a"), [5.0]);
    let left: Vec<_> =
        std::fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
    // A base that lacks a name has nothing to compare with.
    std::fs::write(
        &recipe,
        "merge_method: task_arithmetic\nbase_model: a.safetensors\nmodels:\n\
         - {model: b.safetensors, parameters: {weight: 1}}\n",
    )
    .unwrap();
    run(&[&args[..], &["-u", "--force"]].concat()).fails(3, &["only_b", "a.safetensors"]);
    run(&["merge-tensors", &recipe, "--out", &text(&at("a.safetensors")), "-i", "--force"])
        .fails(3, &["replace one of its own sources"]);
    std::fs::write(&recipe, "merge_method: linear\nmodels: [{model: c.safetensors}]\n").unwrap();
    run(&args).fails(3, &["source not found", "recipe.yaml:2"]);
    run(&["merge-tensors", &text(&repository("recipes/quickstart.yaml")), "--out", &out])
        .fails(2, &["no experts"]);
}

#[test]
fn shuffled_layers_are_those_of_the_models() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a"), temp.path().join("b"));
    let first = made_up(&a, &json!({"num_hidden_layers": 6}));
    let second = made_up(
        &b,
        &json!({"num_hidden_layers": 6, "tie_word_embeddings": false, "rms_norm_eps": 1e-5}),
    );
    // Told apart by one norm.
    let mut all: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, weight) in &second.tensors {
        let values: Vec<f32> = weight.to_f32().unwrap().iter().map(|v| v + 1.0).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        all.push((name.clone(), weight.shape().to_vec(), bytes));
    }
    let views = all.iter().map(|(n, s, b)| {
        (n, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, s.clone(), b).unwrap())
    });
    std::fs::write(b.join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    let second = open(&b);
    let (a, b, out) = (text(&a), text(&b), temp.path().join("out"));
    let report = ok(&["layershuffle", &a, &b, "--out", &text(&out), "--seed", "3"]);
    let found = open(&out);
    let mut from = [0, 0];
    let recipe = report["recipe"].as_str().unwrap();
    for layer in 0..6 {
        let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
        let which = usize::from(of(&found, &name) == of(&second, &name));
        assert_eq!(of(&found, &name), of([&first, &second][which], &name));
        from[which] += 1;
        let line = recipe.lines().nth(2 + layer).unwrap();
        assert!(line.contains([&a, &b][which].as_str()) && line.contains(&format!("[{layer}, ")));
    }
    assert!(from[0] > 0 && from[1] > 0, "{from:?}");
    // The recipe alone gives the same model.
    let printed = run(&["layershuffle", &a, &b, "--seed", "3"]);
    assert_eq!((printed.code, printed.stdout.as_str()), (0, recipe));
    let file = temp.path().join("printed.yaml");
    std::fs::write(&file, recipe).unwrap();
    let again = temp.path().join("again");
    ok(&[text(&file).as_str(), "--out", &text(&again)]);
    let bytes = |p: &Path| std::fs::read(p.join("model.safetensors")).unwrap();
    assert_eq!(bytes(&out), bytes(&again));
    // Any layers, as many as the weights say.
    let random = temp.path().join("random");
    ok(&["layershuffle", &a, &b, "--weights", "0.5,1", "--full-random", "--out", &text(&random)]);
    let config = open(&random).config;
    assert_eq!(config.usize("num_hidden_layers"), Some(9));
    run(&["layershuffle", &a, &b, "--weights", "1"]).fails(2, &["one weight for each model"]);
    run(&["layershuffle", &a, &b, "--weights", "0,0"]).fails(2, &["no model has a weight"]);
}

/// The quickstart's base with the vocabulary in another order, and with tokens of its own instead of some.
fn other_vocabulary(temp: &Path, replaced: usize) -> (std::path::PathBuf, Vec<usize>) {
    let base = repository("recipes/quickstart/base");
    let folder = temp.join(format!("other-{replaced}"));
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(&base).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let file = folder.join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let size = open(&base).weight("model.embed_tokens.weight").unwrap().rows();
    let special: Vec<usize> = json["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].as_u64().unwrap() as usize)
        .collect();
    // Plain tokens go the other way round; special ones stay.
    let plain: Vec<usize> = (0..size).filter(|i| !special.contains(i)).collect();
    let mut order: Vec<usize> = (0..size).collect();
    plain.iter().zip(plain.iter().rev()).for_each(|(to, from)| order[*to] = *from);
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    let mut renamed = serde_json::Map::new();
    let mut left = replaced;
    for (token, id) in vocabulary.iter() {
        let old = id.as_u64().unwrap() as usize;
        let new = order.iter().position(|o| *o == old).unwrap();
        // Long tokens only: bytes have to stay.
        let changed = left > 0 && token.chars().count() > 3 && !special.contains(&old);
        left -= usize::from(changed);
        let name = if changed { format!("{token}ZQ") } else { token.clone() };
        renamed.insert(name, json!(new));
    }
    *vocabulary = renamed;
    if replaced > 0 {
        json["model"]["merges"] = json!([]);
    }
    std::fs::write(&file, json.to_string()).unwrap();
    // The donor's rows follow its tokens.
    let source = open(&base);
    let views: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .tensors
        .iter()
        .map(|(name, weight)| {
            let mut values = weight.to_f32().unwrap();
            if name.contains("embed_tokens") {
                let (old, width) = (values.clone(), weight.cols());
                for (to, from) in order.iter().enumerate() {
                    let row = &old[from * width..(from + 1) * width];
                    // Another space: a rotation would do; a scale is enough to tell the two apart.
                    values[to * width..(to + 1) * width]
                        .iter_mut()
                        .zip(row)
                        .for_each(|(v, r)| *v = 2.0 * r);
                }
            }
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.clone(), weight.shape().to_vec(), bytes)
        })
        .collect();
    let views = views.iter().map(|(n, s, b)| {
        (n, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, s.clone(), b).unwrap())
    });
    let old: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().map(|e| e.path()).collect();
    for path in old.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        std::fs::remove_file(path).unwrap();
    }
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    (folder, order)
}

#[test]
fn the_same_tokens_in_another_order_are_the_same_model() {
    let temp = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let (donor, order) = other_vocabulary(temp.path(), 0);
    let out = temp.path().join("out");
    let report = ok(&["tokensurgeon", &text(&base), &text(&donor), "--out", &text(&out)]);
    assert_eq!((&report["made"], &report["padding"]), (&json!(0), &json!(0)));
    let (own, found) = (open(&base), open(&out));
    assert_eq!(report["shared"], order.len());
    let name = "model.embed_tokens.weight";
    let (old, new, width) = (of(&own, name), of(&found, name), own.weight(name).unwrap().cols());
    for (to, from) in order.iter().enumerate() {
        assert_eq!(new[to * width..(to + 1) * width], old[from * width..(from + 1) * width]);
    }
    // The same text, through either tokenizer.
    let said = "the station, 12 + 5";
    let [a, b] = [&own, &found].map(|s| Tokenizer::from_source(s).unwrap().encode(said).unwrap());
    assert_ne!(a, b);
    let (x, y) =
        (logits(&Model::open(&own).unwrap(), &a), logits(&Model::open(&found).unwrap(), &b));
    let (rows, most) = (order.len(), x.iter().fold(0f32, |m, v| m.max(v.abs())));
    for position in 0..a.len() {
        for (to, from) in order.iter().enumerate() {
            let gap = y[position * rows + to] - x[position * rows + from];
            assert!(gap.abs() <= 1e-5 * most, "{gap} of {most}");
        }
    }
    assert_eq!(run(&["verify", &text(&out)]).code, 0);
}

#[test]
fn tokens_that_the_model_lacks() {
    let temp = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let (donor, order) = other_vocabulary(temp.path(), 30);
    let own = open(&base);
    let name = "model.embed_tokens.weight";
    let (old, width) = (of(&own, name), own.weight(name).unwrap().cols());
    let length = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    for method in ["omp", "subword", "mean", "zero"] {
        let out = temp.path().join(method);
        let args = [
            "tokensurgeon",
            &text(&base),
            &text(&donor),
            "--out",
            &text(&out),
            "--method",
            method,
            "-k",
            "32",
        ];
        let report = ok(&args);
        assert_eq!(report["made"], 30, "{method}");
        let new = of(&open(&out), name);
        let differs = |to: usize| {
            let (new, old) = (
                &new[to * width..(to + 1) * width],
                &old[order[to] * width..(order[to] + 1) * width],
            );
            let gap: Vec<f32> = new.iter().zip(old).map(|(a, b)| a - b).collect();
            (length(&gap) / length(old), length(new))
        };
        let made: Vec<(f64, f64)> = (0..order.len()).map(differs).filter(|d| d.0 > 0.0).collect();
        assert_eq!(made.len(), 30);
        let far = made.iter().map(|m| m.0).sum::<f64>() / 30.0;
        match method {
            // The donor's space is the own one, but for a factor: a sum that comes near there comes near here.
            "omp" => {
                let left = report["left"][0][1].as_f64().unwrap();
                assert!(far < 0.8 && (far - left).abs() < 0.02, "{far} {left}");
            }
            "zero" => assert!(made.iter().all(|m| m.1 == 0.0)),
            "mean" => assert!(made.iter().all(|m| (m.1 - made[0].1).abs() < 1e-6)),
            _ => assert!(far < 2.0 && made.iter().any(|m| (m.1 - made[0].1).abs() > 1e-3)),
        }
        assert_eq!(run(&["verify", &text(&out)]).code, 0);
        let said = run(&["generate", &text(&out), "--prompt", "the", "--max-new-tokens", "3"]);
        assert_eq!(said.code, 0, "{}", said.stderr);
    }
    let again = temp.path().join("again");
    ok(&[
        "tokensurgeon",
        &text(&base),
        &text(&donor),
        "--out",
        &text(&again),
        "-k",
        "32",
        "--threads",
        "1",
    ]);
    let bytes = |p: &Path| std::fs::read(p.join("model.safetensors")).unwrap();
    assert_eq!(bytes(&again), bytes(&temp.path().join("omp")));
    let place = text(&temp.path().join("no"));
    run(&["tokensurgeon", &text(&base), &text(&donor), "--out", &place, "-k", "0"])
        .fails(2, &["`--k`"]);
    let bare = temp.path().join("bare");
    made_up(&bare, &json!({}));
    run(&["tokensurgeon", &text(&base), &text(&bare), "--out", &place]).fails(3, &["tokenizer"]);
    assert!(!temp.path().join("no").exists());
}
