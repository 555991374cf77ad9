//! Dense methods on MoE models: experts matched before they are merged, all experts of a layer as one tensor where a
//! method looks at whole tensors.

#[allow(dead_code)]
mod cli;
mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cli::run;
use common::{made_up, open};
use moe_merge_checkpoint::Source;
use moe_merge_testkit::repository;
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn families() -> [(&'static str, Value); 2] {
    [
        (
            "mixtral",
            json!({"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}),
        ),
        (
            "qwen2_moe",
            json!({"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}),
        ),
    ]
}

fn values(source: &Source) -> Tensors {
    let read = |(n, w): (&String, &moe_merge_checkpoint::WeightRef)| {
        (n.clone(), (w.shape().to_vec(), w.to_f32().unwrap()))
    };
    source.tensors.iter().map(read).collect()
}

/// Writes a folder with the configuration of `like`.
fn write(folder: &Path, like: &Path, tensors: &Tensors) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::copy(like.join("config.json"), folder.join("config.json")).unwrap();
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(n, (s, v))| (n, s, v.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, (*shape).clone(), bytes);
        (name.as_str(), view.unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn layer_of(name: &str) -> usize {
    let rest = name.split_once("layers.").map_or("0", |(_, rest)| rest);
    rest.split('.').next().unwrap().parse().unwrap()
}

/// The same model with its experts in another order, another one in each layer.
fn permuted(tensors: &Tensors, experts: usize) -> Tensors {
    let to = |layer: usize, e: usize| (e * (experts - 1) + layer) % experts;
    tensors
        .iter()
        .map(|(name, (shape, values))| {
            let layer = layer_of(name);
            if let Some((head, tail)) = name.split_once(".experts.") {
                let (e, tail) = tail.split_once('.').unwrap();
                let e = to(layer, e.parse().unwrap());
                return (format!("{head}.experts.{e}.{tail}"), (shape.clone(), values.clone()));
            }
            let mut values = values.clone();
            if name.ends_with("mlp.gate.weight") || name.ends_with("block_sparse_moe.gate.weight") {
                let (old, width) = (values.clone(), shape[1]);
                for e in 0..experts {
                    let at = to(layer, e) * width;
                    values[at..at + width].copy_from_slice(&old[e * width..(e + 1) * width]);
                }
            }
            (name.clone(), (shape.clone(), values))
        })
        .collect()
}

fn experts_of(config: &Value) -> usize {
    let count = config.get("num_local_experts").or(config.get("num_experts"));
    count.unwrap().as_u64().unwrap() as usize
}

/// Numbers that differ from `tensors` by a share of their neighbours: those `by` places away, or a multiple.
fn moved(tensors: &Tensors, share: f32, by: usize) -> Tensors {
    let mut out = tensors.clone();
    for (_, values) in out.values_mut() {
        let old = values.clone();
        let count = old.len();
        values.iter_mut().enumerate().for_each(|(i, v)| *v += share * old[(i * 7 + by) % count]);
    }
    out
}

fn merge(temp: &Path, recipe: &str) -> (PathBuf, Value) {
    let file = temp.join("recipe.yaml");
    std::fs::write(&file, recipe).unwrap();
    let out = temp.join("out");
    let paths = [&file, &out].map(|p| p.display().to_string());
    let run = run(&[paths[0].as_str(), "--out", &paths[1], "--force", "--json"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    (out, serde_json::from_str(&run.stdout).unwrap())
}

#[track_caller]
fn assert_near(found: &Tensors, expected: &Tensors, tolerance: f32, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in expected {
        assert_eq!(&found[name].0, shape, "{what} {name}");
        let scale = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        let pairs = found[name].1.iter().zip(values);
        let worst = pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= tolerance * scale, "{what} {name}: {worst} of {scale}");
    }
}

const METHODS: &[(&str, &str, f32)] = &[
    ("linear", "parameters: {weight: 0.5}", 0.0),
    ("slerp", "parameters: {t: 0.3}", 1e-6),
    ("ties", "parameters: {weight: 0.5, density: 0.6}", 1e-6),
    ("nuslerp", "parameters: {weight: 0.5}", 1e-6),
    ("karcher", "", 1e-6),
];

#[test]
fn a_permuted_copy_merges_to_the_original() {
    let temp = tempfile::tempdir().unwrap();
    for (family, config) in families() {
        let (a, b) =
            (temp.path().join(format!("{family}-a")), temp.path().join(format!("{family}-b")));
        let original = values(&made_up(&a, &config));
        let copy = permuted(&original, experts_of(&config));
        assert!(copy != original);
        write(&b, &a, &copy);
        for (method, parameters, tolerance) in METHODS {
            let base = match *method {
                "slerp" | "ties" => format!("base_model: {family}-a"),
                _ => String::new(),
            };
            let recipe = format!(
                "merge_method: {method}\n{base}\n{parameters}\nmatch_experts: weights\n\
                 models: [{{model: {family}-a}}, {{model: {family}-b}}]\n"
            );
            let (out, report) = merge(temp.path(), &recipe);
            assert_near(&values(&open(&out)), &original, *tolerance, &format!("{family} {method}"));
            let layers = report["matched_experts"][0]["layers"].as_array().unwrap();
            assert_eq!(layers.len(), 3);
            let similarity = layers.iter().flat_map(|l| l["similarity"].as_array().unwrap());
            assert!(similarity.into_iter().all(|s| s.as_f64().unwrap() > 0.9999));
        }
        // Without matching, experts of the same number are merged: the original is lost.
        let recipe = format!(
            "merge_method: linear\nparameters: {{weight: 0.5}}\n\
             models: [{{model: {family}-a}}, {{model: {family}-b}}]\n"
        );
        let (out, report) = merge(temp.path(), &recipe);
        assert!(values(&open(&out)) != original);
        assert_eq!(report.get("matched_experts"), None);
    }
}

/// The same model with the neurons of every MLP in another order, another one in each.
fn neurons_permuted(tensors: &Tensors) -> Tensors {
    let part = |name: &str, parts: &[&str]| parts.iter().any(|p| name.ends_with(p));
    let mut out = tensors.clone();
    for (name, (shape, values)) in &mut out {
        let old = values.clone();
        let rows = part(name, &[".w1.weight", ".w3.weight", "gate_proj.weight", "up_proj.weight"]);
        let columns = part(name, &[".w2.weight", "down_proj.weight"]);
        if !(rows || columns) {
            continue;
        }
        // One order for the three matrices of an MLP: they share everything before their own name.
        let mlp = name.trim_end_matches(".weight").rsplit_once('.').unwrap().0;
        let shift: usize = mlp.bytes().map(usize::from).sum();
        let count = if rows { shape[0] } else { shape[1] };
        let from = |i: usize| (count - 1 - i + shift) % count;
        let width = shape[1];
        for (i, v) in values.iter_mut().enumerate() {
            let (r, c) = (i / width, i % width);
            *v = if rows { old[from(r) * width + c] } else { old[r * width + from(c)] };
        }
    }
    out
}

/// A tokenizer of the letters from a to z.
fn letters(folder: &Path) {
    let vocab: serde_json::Map<String, Value> =
        (b'a'..=b'z').map(|b| (char::from(b).to_string(), json!(b - b'a'))).collect();
    let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": model});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

#[test]
fn permuted_experts_of_permuted_neurons_merge_to_the_original() {
    let temp = tempfile::tempdir().unwrap();
    for (family, config) in families() {
        let at = |name: &str| temp.path().join(format!("{family}-{name}"));
        let original = values(&made_up(&at("a"), &config));
        let copy = neurons_permuted(&permuted(&original, experts_of(&config)));
        write(&at("b"), &at("a"), &copy);
        ["a", "b"].iter().for_each(|name| letters(&at(name)));
        let recipe = |keys: &str| {
            format!(
                "merge_method: linear\nparameters: {{weight: 0.5}}\n{keys}models:\n\
                 - {{model: {family}-a, prompts: [thequickbrownfoxjumpsoverthelazydog, sphinxofblackquartz]}}\n\
                 - {{model: {family}-b}}\n"
            )
        };
        let keys = "match_experts: activations\nmatch_neurons: weights\n";
        let (out, report) = merge(temp.path(), &recipe(keys));
        assert_near(&values(&open(&out)), &original, 0.0, family);
        let matched = &report["matched_experts"][0];
        assert_eq!(matched["by"], "activations");
        let layers = matched["layers"].as_array().unwrap();
        let similarity = layers.iter().flat_map(|l| l["similarity"].as_array().unwrap());
        assert!(similarity.into_iter().all(|s| s.as_f64().unwrap() > 0.999));
        // Experts alone are not enough.
        let (out, _) = merge(temp.path(), &recipe("match_experts: activations\n"));
        assert!(values(&open(&out)) != original);
    }
}

#[test]
fn permuted_neurons_of_a_dense_model_merge_to_the_original() {
    let temp = tempfile::tempdir().unwrap();
    let original = values(&made_up(&temp.path().join("a"), &json!({})));
    write(&temp.path().join("b"), &temp.path().join("a"), &neurons_permuted(&original));
    let recipe = |keys: &str| {
        format!(
            "merge_method: linear\nparameters: {{weight: 0.5}}\n{keys}models: [{{model: a}}, {{model: b}}]\n"
        )
    };
    let (out, _) = merge(temp.path(), &recipe("match_neurons: weights\n"));
    assert_near(&values(&open(&out)), &original, 0.0, "dense");
    let (out, _) = merge(temp.path(), &recipe(""));
    assert!(values(&open(&out)) != original);
}

#[test]
fn a_permuted_fine_tune_merges_as_if_it_were_not() {
    let temp = tempfile::tempdir().unwrap();
    for (family, config) in families() {
        let at = |name: &str| temp.path().join(format!("{family}-{name}"));
        let base = values(&made_up(&at("base"), &config));
        let (one, two) = (moved(&base, 0.1, 3), moved(&base, -0.2, 11));
        write(&at("one"), &at("base"), &one);
        write(&at("two"), &at("base"), &two);
        write(&at("mixed"), &at("base"), &permuted(&two, experts_of(&config)));
        for (method, parameters) in [
            ("linear", "parameters: {weight: 0.5}"),
            ("ties", "parameters: {weight: 1, density: 0.5}"),
            ("model_stock", ""),
            ("dare_ties", "parameters: {weight: 0.5, density: 0.4}"),
        ] {
            let recipe = |other: &str| {
                format!(
                    "merge_method: {method}\nbase_model: {family}-base\n{parameters}\n\
                     match_experts: weights\nmodels: [{}{{model: {family}-one}}, \
                     {{model: {family}-{other}}}]\n",
                    if method == "linear" {
                        format!("{{model: {family}-base}}, ")
                    } else {
                        String::new()
                    }
                )
            };
            let expected = values(&open(&merge(temp.path(), &recipe("two")).0));
            let found = values(&open(&merge(temp.path(), &recipe("mixed")).0));
            assert_near(&found, &expected, 0.0, &format!("{family} {method}"));
            assert!(expected != base, "{family} {method}");
        }
    }
}

#[test]
fn thresholds_are_those_of_all_experts_of_a_layer() {
    let temp = tempfile::tempdir().unwrap();
    let (_, config) = &families()[0];
    let at = |name: &str| temp.path().join(name);
    let base = values(&made_up(&at("base"), config));
    // Expert 1 changes much, the others little: of a third of the layer's changes, most are its own.
    let mut tuned = moved(&base, 0.01, 3);
    let large = moved(&base, 0.5, 3);
    for (name, value) in &large {
        if name.contains(".experts.1.") {
            tuned.insert(name.clone(), value.clone());
        }
    }
    write(&at("tuned"), &at("base"), &tuned);
    let recipe = "merge_method: ties\nbase_model: base\nparameters: {weight: 1, density: 0.19}\n\
                  models: [{model: tuned}]\n";
    let found = values(&open(&merge(temp.path(), recipe).0));
    let kept = |e: usize| {
        let names = found.keys().filter(|n| n.contains(&format!(".experts.{e}.")));
        let (mut changed, mut all) = (0, 0);
        for name in names {
            let pairs = found[name].1.iter().zip(&base[name].1);
            changed += pairs.filter(|(a, b)| a != b).count();
            all += base[name].1.len();
        }
        changed as f64 / all as f64
    };
    assert!(kept(1) > 0.85, "{}", kept(1));
    assert!([0, 2, 3, 4].into_iter().all(|e| kept(e) < 0.05), "{}", kept(0));
}

#[test]
fn filters_see_both_names_of_experts() {
    let temp = tempfile::tempdir().unwrap();
    let (_, config) = &families()[0];
    let at = |name: &str| temp.path().join(name);
    let base = values(&made_up(&at("base"), config));
    let tuned = moved(&base, 0.3, 3);
    write(&at("tuned"), &at("base"), &tuned);
    for (method, base_model) in [("linear", "{model: base}, "), ("ties", "")] {
        for (filter, ends) in [
            ("w2", &["w2"][..]),
            ("down_proj", &["w2"]),
            ("gate_up_proj", &["w1", "w3"]),
            ("experts", &["w1", "w2", "w3"]),
        ] {
            let recipe = format!(
                "merge_method: {method}\nbase_model: base\nmodels: [{base_model}{{model: tuned, \
                 parameters: {{weight: [{{filter: {filter}, value: 1}}, {{value: 1e-9}}]}}}}]\n\
                 parameters: {{weight: 1e-9, normalize: {}}}\n",
                method == "linear"
            );
            let found = values(&open(&merge(temp.path(), &recipe).0));
            for (name, (_, value)) in &found {
                let tail = name.split_once(".experts.").map_or("", |(_, t)| &t[2..4]);
                let like = |other: &Tensors| {
                    let scale = value.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let pairs = value.iter().zip(&other[name].1);
                    pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs())) < 1e-5 * scale
                };
                // Of two equal weights, the mean.
                let expected = if ends.contains(&tail) { like(&tuned) } else { !like(&tuned) };
                assert!(expected, "{method} {filter} {name}");
            }
        }
    }
}

#[test]
fn both_layouts_of_experts_give_the_same() {
    let temp = tempfile::tempdir().unwrap();
    let dense = repository("recipes/quickstart/base").display().to_string();
    for (name, noise, seed) in [("base", "0", "0"), ("one", "0.1", "1"), ("two", "0.2", "2")] {
        for layout in ["hub", "fused"] {
            let out = temp.path().join(format!("{name}-{layout}")).display().to_string();
            let args = ["upcycle", &dense, "--experts", "3", "--noise", noise, "--seed", seed];
            let made = run(&[&args[..], &["--layout", layout, "--out", &out]].concat());
            assert_eq!(made.code, 0, "{}", made.stderr);
        }
    }
    for (method, parameters) in [
        ("ties", "{weight: 0.7, density: 0.3}"),
        ("task_arithmetic", "{weight: 0.5}"),
        ("model_stock", "{}"),
    ] {
        let merged = |layout: &str| {
            let recipe = format!(
                "merge_method: {method}\nbase_model: base-{layout}\nparameters: {parameters}\n\
                 match_experts: weights\nmodels: [{{model: one-{layout}}}, {{model: two-{layout}}}]\n"
            );
            values(&open(&merge(temp.path(), &recipe).0))
        };
        let (hub, fused) = (merged("hub"), merged("fused"));
        assert!(hub == fused && hub != values(&open(&temp.path().join("base-hub"))), "{method}");
    }
}

#[test]
fn what_cannot_be_matched_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let (_, config) = &families()[0];
    made_up(&temp.path().join("a"), config);
    made_up(&temp.path().join("dense"), &json!({}));
    let mut other = config.clone();
    other["num_local_experts"] = json!(4);
    made_up(&temp.path().join("four"), &other);
    let out = temp.path().join("out").display().to_string();
    let call = |models: &str, how: &str| {
        let file = temp.path().join("recipe.yaml");
        let recipe = format!(
            "merge_method: linear\nparameters: {{weight: 1}}\nmatch_experts: {how}\nmodels: [{models}]\n"
        );
        std::fs::write(&file, recipe).unwrap();
        run(&[file.display().to_string().as_str(), "--out", &out])
    };
    call("{model: a}, {model: dense}", "weights")
        .fails(2, &["no experts to match", "recipe.yaml:4"]);
    call("{model: a}, {model: four}", "weights")
        .fails(2, &["different numbers of experts", "shrink"]);
    call("{model: a}, {model: four}", "activations").fails(2, &["different numbers of experts"]);
    call("{model: a}, {model: a}", "weight")
        .fails(2, &["unknown `match_experts`", "did you mean `weights`?"]);
    assert!(!temp.path().join("out").exists());
}
