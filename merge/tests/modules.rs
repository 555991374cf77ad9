//! Models of several modules: nothing is lost, each has its own layers, parameters and slices. Goldens: mergekit 0.1.5 on the
//! same recipes and full sets of tensors, every number of `a` 1 and every number of `b` 3.

mod models;

use std::path::Path;

use models::{values, write_model};
use moe_merge_checkpoint::{Explain, Source};
use moe_merge_merge::MergeError;
use moe_merge_merge::recipe::{self, Recipe};
use serde_json::{Value, json};

fn merge(folder: &Path, text: &str) -> Result<Source, MergeError> {
    let Recipe::Dense(recipe) = recipe::parse(text, &folder.join("recipe.yaml"))? else {
        panic!("dense")
    };
    moe_merge_merge::dense(&recipe, folder)
}

fn text_layer(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj.weight")
}

fn block(layer: usize) -> String {
    format!("visual.blocks.{layer}.mlp.fc1.weight")
}

/// Names of a `qwen2_vl` of two text layers and four vision blocks.
fn qwen2_vl_names() -> Vec<String> {
    let loose = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "visual.patch_embed.proj.weight",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.weight",
        "visual.merger.mlp.2.weight",
    ];
    let loose = loose.map(str::to_owned).into_iter();
    loose.chain((0..2).map(text_layer)).chain((0..4).map(block)).collect()
}

/// Two models with these tensors, `a` of ones and `b` of threes.
fn two(folder: &Path, config: &Value, names: &[String]) {
    for (name, value) in [("a", 1.0), ("b", 3.0)] {
        let tensors: Vec<_> = names.iter().map(|n| (n.clone(), vec![value; 2])).collect();
        write_model(&folder.join(name), config, &tensors);
    }
}

fn qwen2_vl(folder: &Path) {
    let config = json!({
        "model_type": "qwen2_vl", "num_hidden_layers": 2, "vocab_size": 2, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}, "vision_config": {"depth": 4},
    });
    two(folder, &config, &qwen2_vl_names());
}

fn t5(folder: &Path) {
    let config = json!({
        "model_type": "t5", "num_layers": 2, "num_decoder_layers": 3, "is_encoder_decoder": true,
        "tie_word_embeddings": true,
    });
    let norms = ["encoder", "decoder"].map(|m| format!("{m}.final_layer_norm.weight"));
    let layers = |module: &str, count| {
        let name = |l| format!("{module}.block.{l}.layer.0.SelfAttention.q.weight");
        (0..count).map(name).collect::<Vec<_>>()
    };
    let names = [vec!["shared.weight".to_owned()], norms.to_vec(), layers("encoder", 2)].concat();
    two(folder, &config, &[names, layers("decoder", 3)].concat());
}

fn first(merged: &Source, names: impl IntoIterator<Item = String>) -> Vec<f32> {
    names.into_iter().map(|n| values(merged, &n)[0]).collect()
}

/// Fields and hint of an error as a person reads them.
fn told(error: &MergeError) -> String {
    let fields = error.fields().into_iter().map(|(k, v)| format!("{k}: {v}\n"));
    format!("{error}\n{}hint: {}", fields.collect::<String>(), error.hint().unwrap_or_default())
}

#[test]
fn a_whole_model_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    qwen2_vl(folder.path());
    let text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n";
    let merged = merge(folder.path(), text).unwrap();
    let mut expected = qwen2_vl_names();
    expected.sort();
    let found: Vec<_> = merged.tensors.keys().cloned().collect();
    assert_eq!(found, expected);
    assert!(found.iter().all(|n| values(&merged, n) == [2.0, 2.0]));
    assert!(merged.notes.is_empty(), "{:?}", merged.notes);
}

#[test]
fn gradients_run_over_the_layers_of_each_module() {
    let folder = tempfile::tempdir().unwrap();
    qwen2_vl(folder.path());
    let text = "merge_method: linear\nparameters: {normalize: false}\nmodels:\n\
                - {model: a, parameters: {weight: [2, 5]}}\n- {model: b, parameters: {weight: 0}}\n";
    let merged = merge(folder.path(), text).unwrap();
    assert_eq!(first(&merged, (0..2).map(text_layer)), [2.0, 5.0]);
    assert_eq!(first(&merged, (0..4).map(block)), [2.0, 3.0, 4.0, 5.0]);
    let merger = ["ln_q", "mlp.0", "mlp.2"].map(|m| format!("visual.merger.{m}.weight"));
    assert_eq!(first(&merged, merger), [2.0; 3]);
}

#[test]
fn the_first_of_t5s_blocks_has_the_positions_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let bias = |module: &str, l: usize| {
        format!("{module}.block.{l}.layer.0.SelfAttention.relative_attention_bias.weight")
    };
    let up =
        |module: &str, l: usize| format!("{module}.block.{l}.layer.1.DenseReluDense.wo.weight");
    let config = json!({"model_type": "t5", "num_layers": 3, "num_decoder_layers": 2});
    let mut names = vec!["shared.weight".to_owned(), bias("encoder", 0), bias("decoder", 0)];
    names.extend((0..3).map(|l| up("encoder", l)));
    names.extend((0..2).map(|l| up("decoder", l)));
    two(folder.path(), &config, &names);
    let text = "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  shared: {models: [{model: a}, {model: b}]}\n  \
                decoder: {models: [{model: a}, {model: b}]}\n  encoder:\n    slices:\n    \
                - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [0, 2]}]\n    \
                - sources: [{model: b, layer_range: [0, 1]}]\n";
    let found: Vec<_> = merge(folder.path(), text).unwrap().tensors.into_keys().collect();
    // Not of the third block, although that was the first one.
    assert_eq!(found, {
        names.sort();
        names.clone()
    });
    // Where each block has its own, it moves with its block.
    names.push(bias("encoder", 1));
    two(folder.path(), &config, &names);
    let text = "merge_method: passthrough\nmodules:\n  encoder:\n    slices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n";
    let merged = merge(folder.path(), text).unwrap();
    assert!(merged.tensors.contains_key(&bias("encoder", 0)), "{:?}", merged.tensors.keys());
    assert!(!merged.tensors.contains_key(&bias("encoder", 1)));
}

/// Slices in one module, whole models in the others, and parameters of every level.
const MODULES: &str = "merge_method: linear
modules:
  text_decoder:
    slices:
    - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - {model: b, layer_range: [0, 2]}
    - parameters: {weight: 0.3}
      sources:
      - {model: b, layer_range: [1, 2]}
      - {model: a, layer_range: [0, 1], parameters: {weight: 0.8}}
    parameters: {weight: 0.5}
  vision_tower:
    models:
    - {model: a, parameters: {weight: [0, 1]}}
    - {model: b, parameters: {weight: [1, 0]}}
  multi_modal_projector:
    models: [{model: a}, {model: b}]
parameters: {normalize: false, weight: 0.25}
dtype: float32
";

#[test]
fn golden_modules_of_qwen2_5_vl() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen2_5_vl", "vision_config": {"depth": 4},
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    });
    two(folder.path(), &config, &qwen2_vl_names());
    let merged = merge(folder.path(), MODULES).unwrap();
    assert_eq!(first(&merged, (0..3).map(text_layer)), [1.7, 2.4, 1.7]);
    // Where weights are no powers of two the last bit may differ.
    let vision =
        first(&merged, (0..4).map(block)).into_iter().zip([3.0, 2.333_333_5, 1.666_666_7, 1.0]);
    assert!(vision.into_iter().all(|(a, b): (f32, f32)| (a - b).abs() < 1e-6));
    for (name, expected) in [
        ("model.embed_tokens.weight", 1.7),
        ("model.norm.weight", 1.7),
        ("lm_head.weight", 1.7),
        ("visual.patch_embed.proj.weight", 3.0),
        ("visual.merger.ln_q.weight", 1.0),
        ("visual.merger.mlp.0.weight", 1.0),
        ("visual.merger.mlp.2.weight", 1.0),
    ] {
        assert_eq!(values(&merged, name), [expected; 2], "{name}");
    }
    assert_eq!(merged.tensors.len(), 7 + 3 + 4);
    // mergekit leaves `layer_types` at two.
    let kinds = ["full_attention", "sliding_attention", "sliding_attention"];
    let text = json!({"num_hidden_layers": 3, "layer_types": kinds});
    assert_eq!(merged.config.at("text_config"), Some(&text));
    assert_eq!(merged.config.at("vision_config.depth"), Some(&json!(4)));
    assert_eq!(merged.config.get("num_hidden_layers"), None);
}

#[test]
fn golden_encoder_and_decoder() {
    let folder = tempfile::tempdir().unwrap();
    t5(folder.path());
    let text =
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [0, 0.25, 1]}\n";
    let merged = merge(folder.path(), text).unwrap();
    let layer = |m: &'static str| move |l| format!("{m}.block.{l}.layer.0.SelfAttention.q.weight");
    assert_eq!(first(&merged, (0..2).map(layer("encoder"))), [1.0, 3.0]);
    assert_eq!(first(&merged, (0..3).map(layer("decoder"))), [1.0, 1.5, 3.0]);
    let loose = ["encoder.final_layer_norm", "decoder.final_layer_norm", "shared"];
    assert_eq!(first(&merged, loose.map(|n| format!("{n}.weight"))), [1.0; 3]);
    assert_eq!(merged.config.bool("tie_word_embeddings"), Some(true));
    let shorter = "merge_method: passthrough\nmodules:\n  shared: {models: [{model: a}]}\n  decoder: {models: [{model: a}]}\n  \
                   encoder: {slices: [{sources: [{model: b, layer_range: [1, 2]}]}]}\n";
    let merged = merge(folder.path(), shorter).unwrap();
    let layers = ["num_layers", "num_decoder_layers"].map(|k| merged.config.usize(k));
    assert_eq!(layers, [Some(1), Some(3)]);
    assert_eq!(merged.tensors.len(), 1 + 2 + 1 + 3);
}

#[test]
fn what_the_configuration_says_of_the_head() {
    let folder = tempfile::tempdir().unwrap();
    let (embedding, head) =
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight");
    let text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n";
    let tied = |config: Value, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        two(folder.path(), &config, &names);
        let config = merge(folder.path(), text).unwrap().config;
        let keys = ["tie_word_embeddings", "text_config.tie_word_embeddings"];
        keys.map(|k| config.at(k).and_then(Value::as_bool))
    };
    let silent = || json!({"model_type": "gemma3", "text_config": {}});
    assert_eq!(tied(silent(), &[embedding]), [Some(true), None]);
    assert_eq!(tied(silent(), &[embedding, head]), [Some(false), None]);
    let nested = json!({"model_type": "gemma3", "text_config": {"tie_word_embeddings": true}});
    assert_eq!(tied(nested.clone(), &[embedding]), [Some(true); 2]);
    assert_eq!(tied(nested, &[embedding, head]), [Some(false); 2]);
    // Of one part: silence means what its family takes it for, unless there is a head.
    let one = || json!({"model_type": "gemma2"});
    let (embedding_of_one, head_of_one) = ("model.embed_tokens.weight", "lm_head.weight");
    assert_eq!(tied(one(), &[embedding_of_one]), [None, None]);
    assert_eq!(tied(one(), &[embedding_of_one, head_of_one]), [Some(false), None]);
    // Only one model has a head: the embedding stands for that of the other.
    let config = silent();
    two(folder.path(), &config, &[embedding.to_owned()]);
    let own = [(embedding.to_owned(), vec![3.0; 2]), (head.to_owned(), vec![5.0; 2])];
    write_model(&folder.path().join("b"), &config, &own);
    assert_eq!(values(&merge(folder.path(), text).unwrap(), head), [3.0; 2]);
}

#[test]
fn a_module_that_is_not_named_is_left_out_and_told() {
    let folder = tempfile::tempdir().unwrap();
    qwen2_vl(folder.path());
    let text = "merge_method: passthrough\nmodules:\n  text_decoder: {slices: [{sources: [{model: b, layer_range: [0, 1]}]}]}\n  \
                multi_modal_projector: {models: [{model: a}]}\n";
    let merged = merge(folder.path(), text).unwrap();
    let vision = |n: &&String| n.starts_with("visual.") && !n.contains("merger");
    assert_eq!(merged.tensors.keys().find(vision), None);
    assert_eq!(merged.tensors.len(), 3 + 1 + 3);
    let note = "the recipe does not name the module `vision_tower`: its 5 tensors are left out";
    assert_eq!(merged.notes, [note]);
    assert_eq!(merged.config.usize("num_hidden_layers"), Some(1));
}

#[test]
fn names_that_the_family_does_not_have() {
    let folder = tempfile::tempdir().unwrap();
    qwen2_vl(folder.path());
    let text = |modules: &str| format!("merge_method: passthrough\nmodules: {{{modules}}}\n");
    for (recipe, expected) in [
        (
            text("vision_towr: {models: [{model: a}]}"),
            "`qwen2_vl` has no module `vision_towr`\nrecipe: RECIPE:2:11  modules.vision_towr\n\
             expected: one of `text_decoder`, `multi_modal_projector`, `vision_tower`\n\
             hint: did you mean `vision_tower`?",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n"
                .into(),
            "`slices` does not say which module it is about\nrecipe: RECIPE:1:1\n\
             expected: `modules`, with those that are wanted of `text_decoder`, `multi_modal_projector`, `vision_tower`\n\
             found: `qwen2_vl` with 3 modules\n\
             hint: write `modules: {text_decoder: {slices: …}, multi_modal_projector: {models: …}, …}`",
        ),
        (
            text("vision_tower: {slices: [{sources: [{model: a, layer_range: [0, 5]}]}]}"),
            "`layer_range` goes beyond the model's layers\n\
             recipe: RECIPE:2:54  modules.vision_tower.slices[0].sources[0].model\n\
             expected: layers within [0, 4)\nfound: [0, 5)\nhint: ",
        ),
    ] {
        let error = merge(folder.path(), &recipe).unwrap_err();
        let file = folder.path().join("recipe.yaml");
        assert_eq!(told(&error).replace(&file.display().to_string(), "RECIPE"), expected);
    }
    let alone = folder.path().join("alone");
    fs_err::create_dir(&alone).unwrap();
    two(
        &alone,
        &json!({"model_type": "llama", "num_hidden_layers": 2}),
        &[text_layer(0), text_layer(1)],
    );
    let error = merge(&alone, &text("text_decoder: {models: [{model: a}]}")).unwrap_err();
    assert!(told(&error).contains("expected: `default`, the only module there is"), "{error:?}");
    assert_eq!(merge(&alone, &text("default: {models: [{model: a}]}")).unwrap().tensors.len(), 2);
}

#[test]
fn unknown_families_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let names = |layers: usize| -> Vec<String> {
        let name = |module: &str, l| format!("model.{module}.layers.{l}.fc1.weight");
        let encoder = (0..layers).map(|l| name("encoder", l));
        let decoder = (0..2).map(|l| name("decoder", l));
        encoder.chain(decoder).chain(["model.shared.weight".to_owned()]).collect()
    };
    let config = json!({"model_type": "bart", "num_hidden_layers": 2, "encoder_layers": 3, "decoder_layers": 2});
    two(folder.path(), &config, &names(3));
    let models =
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n";
    let whole = merge(folder.path(), models).unwrap();
    assert_eq!(whole.tensors.len(), names(3).len());
    let text = "merge_method: passthrough\nmodules:\n  model.encoder.layers: {slices: [{sources: [{model: b, layer_range: [1, 3]}]}]}\n  \
                default: {models: [{model: a}]}\n  model.decoder.layers: {models: [{model: a}]}\n";
    let merged = merge(folder.path(), text).unwrap();
    let counts = ["encoder_layers", "decoder_layers", "num_hidden_layers"];
    assert_eq!(counts.map(|k| merged.config.usize(k)), [Some(2), Some(2), Some(2)]);
    // No key holds three layers: a person is told.
    let config = json!({"model_type": "bart", "num_hidden_layers": 2});
    two(folder.path(), &config, &names(3));
    let merged = merge(folder.path(), text).unwrap();
    assert!(merged.notes[0].contains("`model.encoder.layers` has 2 layers instead of 3"));
    // One stack of layers, more of them than the configuration counts: as before, but told.
    let names: Vec<_> = (0..3).map(text_layer).collect();
    two(folder.path(), &json!({"model_type": "llama", "num_hidden_layers": 2}), &names);
    let merged = merge(folder.path(), models).unwrap();
    assert_eq!(merged.tensors.len(), 2);
    assert!(merged.notes[0].contains("beyond them are left out, `model.layers.2."), "{merged:?}");
}

#[test]
fn methods_that_look_at_text_want_whole_models() {
    let folder = tempfile::tempdir().unwrap();
    qwen2_vl(folder.path());
    let text = "merge_method: regmean\nmodules:\n  text_decoder: {models: [{model: a}, {model: b}]}\n  vision_tower: {models: [{model: a}, {model: b}]}\n";
    let told_of = told(&merge(folder.path(), text).unwrap_err());
    assert!(
        told_of.contains("`regmean` runs whole models") && told_of.contains("`linear`"),
        "{told_of}"
    );
    let text = "merge_method: regmean\nmodels: [{model: a}, {model: b}]\n";
    let told_of = told(&merge(folder.path(), text).unwrap_err());
    assert!(told_of.contains("qwen2_vl") && told_of.contains("by weights alone"), "{told_of}");
}

#[test]
fn unknown_families_merge_a_tensor_among_the_models_that_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let write = |model_type: &str| {
        let config = json!({"model_type": model_type, "num_hidden_layers": 1});
        let names = |own: &[&str]| {
            ["embed", "h.0.w"].iter().chain(own).map(|n| (*n).to_owned()).collect::<Vec<_>>()
        };
        for (model, value, own) in
            [("a", 1.0, &["h.0.q", "x"][..]), ("b", 3.0, &["h.0.q"]), ("c", 8.0, &["y"])]
        {
            let tensors: Vec<_> = names(own).into_iter().map(|n| (n, vec![value; 2])).collect();
            write_model(&folder.path().join(model), &config, &tensors);
        }
    };
    write("foo");
    let linear = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}, {model: c}]\n";
    let merged = merge(folder.path(), linear).unwrap();
    // Golden: mergekit 0.1.5 on the same models.
    let expected = [("embed", 4.0), ("h.0.q", 2.0), ("h.0.w", 4.0), ("x", 1.0), ("y", 8.0)];
    assert_eq!(merged.tensors.len(), expected.len());
    for (name, value) in expected {
        assert_eq!(values(&merged, name), [value; 2], "{name}");
    }
    let note = merged.notes.join("; ");
    assert!(note.contains("not all models have `x` and 2 tensors more"), "{note}");
    // What two of two are needed for is copied from the one that has it; a base is needed in any case.
    let two = |method: &str| {
        let own = "parameters: {t: 0.25}\nmodels: [{model: a}, {model: c}]\n";
        merge(folder.path(), &format!("merge_method: {method}\nbase_model: a\n{own}"))
    };
    let slerp = two("slerp").unwrap();
    assert_eq!((values(&slerp, "x"), values(&slerp, "y")), (vec![1.0; 2], vec![8.0; 2]));
    let error = two("nearswap").unwrap_err();
    assert!(told(&error).contains("y") && told(&error).contains("missing"), "{}", told(&error));
    let nuslerp =
        "merge_method: nuslerp\nparameters: {weight: 1}\nmodels: [{model: b}, {model: c}]\n";
    let merged = merge(folder.path(), nuslerp).unwrap();
    assert_eq!((values(&merged, "h.0.q"), values(&merged, "y")), (vec![3.0; 2], vec![8.0; 2]));
    // A llama without a tensor is a broken one.
    write("llama");
    let error = merge(folder.path(), linear).unwrap_err();
    assert!(told(&error).contains("missing"), "{}", told(&error));
}
