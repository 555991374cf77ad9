//! Dense merges against mergekit 0.1.5 (`golden/dense`).

use std::path::Path;

use moe_merge_checkpoint::{Dtype, Source, SourceRef};
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_testkit::{golden, shared};

fn merged(path: &Path) -> Source {
    let text = fs_err::read_to_string(path).unwrap();
    let Recipe::Dense(dense) = recipe::parse(&text, path).unwrap() else { panic!("{path:?}") };
    moe_merge_merge::dense(&dense, path.parent().unwrap()).unwrap()
}

/// Recipes whose result has to be equal bit for bit: copies, and one rounding of an f32 result.
const EXACT: &[&str] = &["passthrough", "linear_bf16", "linear_f32_out_f16"];

#[test]
fn every_recipe() {
    let Some(folder) = shared("golden/dense") else { return };
    let mut recipes: Vec<_> = fs_err::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    recipes.sort();
    let mut compared = 0;
    for path in recipes {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let result = merged(&path);
        let expected = golden::load(&folder.join(format!("out_{name}/model.safetensors")));
        let names: Vec<_> = result.tensors.keys().collect();
        assert_eq!(names, expected.keys().collect::<Vec<_>>(), "{name}");
        let mut worst = 0f64;
        for (tensor, reference) in &expected {
            let weight = &result.tensors[tensor];
            assert_eq!(weight.shape(), reference.shape, "{name} {tensor}");
            let values = weight.to_f32().unwrap();
            let difference = golden::relative_difference(&values, &reference.values);
            if name == "arcee_fusion" {
                fused(&folder, tensor, &values, &reference.values);
                continue;
            }
            worst = worst.max(difference);
            let bound = if EXACT.contains(&name.as_str()) { 0.0 } else { golden::MERGE_F32 };
            assert!(difference <= bound, "{name} {tensor}: {difference:e}");
        }
        let config =
            fs_err::read_to_string(folder.join(format!("out_{name}/config.json"))).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        for key in ["num_hidden_layers", "model_type", "tie_word_embeddings"] {
            assert_eq!(result.config.0.get(key), config.get(key), "{name} {key}");
        }
        println!("{name}: {worst:e}");
        compared += 1;
    }
    assert_eq!(compared, 31);
}

/// `arcee_fusion` decides by differences of nearly equal numbers: single ones at the threshold may fall to either side.
fn fused(folder: &Path, tensor: &str, found: &[f32], expected: &[f64]) {
    let one = |model: &str| golden::load(&folder.join(model).join("model.safetensors"));
    let (base, other) = (one("base"), one("a"));
    let (base, other) = (&base[tensor].values, &other[tensor].values);
    let scale = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    let near = |a: f64, b: f64| (a - b).abs() <= golden::MERGE_F32 * scale;
    let mut flipped = 0;
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        if !near(f.into(), e) {
            assert!(near(f.into(), base[i]) || near(f.into(), other[i]), "{tensor} {i}: {f}");
            flipped += 1;
        }
    }
    assert!(flipped <= 1.max(found.len() / 1000), "{tensor}: {flipped} of {}", found.len());
}

#[test]
fn out_dtype_is_the_dtype_of_the_weights() {
    let Some(folder) = shared("golden/dense") else { return };
    for (name, dtype) in
        [("linear_bf16", Dtype::BF16), ("linear_f32_out_f16", Dtype::F16), ("linear", Dtype::F32)]
    {
        let result = merged(&folder.join(format!("{name}.yaml")));
        assert!(result.tensors.values().all(|w| w.dtype() == dtype), "{name}");
        assert_eq!(result.config.dtype(), Some(dtype), "{name}");
    }
}

#[test]
fn passthrough_keeps_the_bytes_in_place() {
    let Some(folder) = shared("golden/dense") else { return };
    let result = merged(&folder.join("passthrough.yaml"));
    let open = |name: &str| Source::open(&name.parse::<SourceRef>().unwrap(), &folder).unwrap();
    let b = open("b");
    let (ours, theirs) = (
        &result.tensors["model.layers.5.mlp.up_proj.weight"],
        &b.tensors["model.layers.3.mlp.up_proj.weight"],
    );
    assert!(ours.bytes().is_some());
    assert_eq!(ours.bytes(), theirs.bytes());
}

#[test]
fn rows_in_any_order_are_the_same_rows() {
    let Some(folder) = shared("golden/dense") else { return };
    for name in [
        "ties",
        "slerp",
        "linear",
        "task_arithmetic",
        "sce",
        "arcee_fusion",
        "nuslerp_base_rows",
        "karcher",
        "breadcrumbs_ties",
        "ramplus_tl",
        "model_stock_filter",
    ] {
        let result = merged(&folder.join(format!("{name}.yaml")));
        let weight = &result.tensors["model.layers.1.mlp.down_proj.weight"];
        let all = merged(&folder.join(format!("{name}.yaml"))).tensors
            ["model.layers.1.mlp.down_proj.weight"]
            .to_f32()
            .unwrap();
        for row in (0..weight.rows()).rev() {
            let mut values = vec![0.0; weight.cols()];
            weight.read_rows(row..row + 1, &mut values).unwrap();
            assert_eq!(values, all[row * weight.cols()..(row + 1) * weight.cols()], "{name} {row}");
        }
    }
}

/// A file of its own beside nothing else, with the folder of models as an absolute path in the text.
fn nested(text: &str, folder: &Path) -> Result<Source, moe_merge_merge::MergeError> {
    let text = text.replace("DIR", &folder.display().to_string());
    let Recipe::Dense(dense) = recipe::parse(&text, "nested.yaml".as_ref())? else {
        panic!("dense")
    };
    moe_merge_merge::dense(&dense, folder)
}

#[test]
fn a_recipe_within_a_recipe() {
    let Some(folder) = shared("golden/dense") else { return };
    let text = "merge_method: passthrough
models:
  - model:
      merge_method: linear
      models:
        - {model: a, parameters: {weight: 1.0}}
        - {model: b, parameters: {weight: 0.5}}
        - {model: c, parameters: {weight: 0.25}}
";
    let inline = nested(text, &folder).unwrap();
    let file =
        nested("merge_method: passthrough\nmodels: [{model: linear.yaml}]\n", &folder).unwrap();
    let plain = merged(&folder.join("linear.yaml"));
    for (name, weight) in &plain.tensors {
        let expected = weight.to_f32().unwrap();
        assert_eq!(inline.tensors[name].to_f32().unwrap(), expected, "{name}");
        assert_eq!(file.tensors[name].to_f32().unwrap(), expected, "{name}");
    }
    assert!(file.files.iter().any(|f| f.ends_with("linear.yaml")));
}

#[test]
fn ties_and_task_arithmetic_meet_at_density_one() {
    let Some(folder) = shared("golden/dense") else { return };
    let text = |method: &str| {
        format!(
            "merge_method: {method}\nbase_model: ./base\nmodels: [{{model: base}}, {{model: DIR/a, \
             parameters: {{weight: 0.7}}}}]\nparameters: {{normalize: false}}\n"
        )
    };
    let (a, b) = (
        nested(&text("ties"), &folder).unwrap(),
        nested(&text("task_arithmetic"), &folder).unwrap(),
    );
    for (name, weight) in &a.tensors {
        assert_eq!(weight.to_f32().unwrap(), b.tensors[name].to_f32().unwrap(), "{name}");
    }
}

#[test]
fn mistakes_that_show_only_with_the_models() {
    let Some(folder) = shared("golden/dense") else { return };
    let cases: &[(&str, &str)] = &[
        ("merge_method: linear\nmodels: [{model: a}]\n", "needs the parameter `weight`"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\n",
            "cannot be computed",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {t: 0.5}\n",
            "wrong number of models",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 9]}]}]\n",
            "beyond the model's layers",
        ),
        (
            "merge_method: slerp\nbase_model: c\nparameters: {t: 0.5}\nslices: [{sources: [{model: a, layer_range: [0, 2]}, \
             {model: b, layer_range: [0, 2]}]}]\n",
            "not among the sources",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: ../moe/qwen3/base, parameters: {weight: 1}}]\n",
            "different",
        ),
        ("merge_method: passthrough\nmodels: [{model: nowhere.yaml}]\n", "recipe not found"),
        (
            "merge_method: passthrough\nmodels: [{model: ../moe/mixtral_hidden.yaml}]\n",
            "a MoE recipe cannot be a source",
        ),
    ];
    for (text, expected) in cases {
        let error = nested(text, &folder).map(|s| s.label).unwrap_err();
        assert!(error.to_string().contains(expected), "{text}\n{error:?}");
    }
}

#[test]
fn a_recipe_that_names_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let one = "merge_method: passthrough\nmodels: [{model: two.yaml}]\n";
    fs_err::write(folder.path().join("one.yaml"), one).unwrap();
    fs_err::write(folder.path().join("two.yaml"), one.replace("two", "one")).unwrap();
    let path = folder.path().join("one.yaml");
    let Ok(Recipe::Dense(dense)) = recipe::parse(one, &path) else { panic!("dense") };
    let error = moe_merge_merge::dense(&dense, folder.path()).map(|s| s.label).unwrap_err();
    assert!(error.to_string().contains("names itself"), "{error:?}");
    assert!(format!("{error:?}").contains("one.yaml -> two.yaml -> one.yaml"), "{error:?}");
}
