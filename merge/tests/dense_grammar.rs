//! The recipe language of dense merges: gradients, precedence, slices, dtypes, vocabularies, stages.

mod models;

use std::path::Path;

use models::{TinyModel, values};
use moe_merge_checkpoint::{Dtype, Source};
use moe_merge_merge::MergeError;
use moe_merge_merge::recipe::{self, Recipe};
use serde_json::json;

fn merge(folder: &Path, text: &str) -> Result<Source, MergeError> {
    let Recipe::Dense(recipe) = recipe::parse(text, &folder.join("recipe.yaml"))? else {
        panic!("dense")
    };
    moe_merge_merge::dense(&recipe, folder)
}

fn up(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj.weight")
}

fn q(layer: usize) -> String {
    format!("model.layers.{layer}.self_attn.q_proj.weight")
}

/// Two models of four layers: all ones, and all `1 + scale`, so that `linear` without `normalize` reads the weights off.
fn ones(folder: &Path, layers: usize) {
    for name in ["a", "b"] {
        TinyModel::new(layers).filled(1.0).write(&folder.join(name));
    }
}

/// The weight that `parameters` of the recipe's levels give model `a`, where `b` has none.
fn weight_of(folder: &Path, own: &str, global: &str, tensor: &str) -> f32 {
    let text = format!(
        "merge_method: linear\nmodels:\n- {{model: a, parameters: {{{own}}}}}\n- {{model: b, parameters: {{weight: 0}}}}\n\
         parameters: {{normalize: false{global}}}\n"
    );
    values(&merge(folder, &text).unwrap(), tensor)[0]
}

#[test]
fn gradients_over_layers() {
    let folder = tempfile::tempdir().unwrap();
    ones(folder.path(), 4);
    let at = |weight: &str, tensor: &str| {
        weight_of(folder.path(), &format!("weight: {weight}"), "", tensor)
    };
    assert_eq!(at("[0.5]", &up(2)), 0.5);
    let four: Vec<f32> = (0..4).map(|l| at("[1, 2, 4, 8]", &up(l))).collect();
    assert_eq!(four, [1.0, 2.0, 4.0, 8.0]);
    assert_eq!((at("[1, 4]", &up(0)), at("[1, 4]", &up(3))), (1.0, 4.0));
    assert_eq!(at("[1, 4]", &up(1)), 2.0);
    // Everything outside of the layers, the final norm and the head too, takes the first entry.
    for name in ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"] {
        assert_eq!(at("[3, 4]", name), 3.0, "{name}");
    }
    assert_eq!(at("'1e-1'", &up(0)), 0.1);
    assert_eq!(at("true", &up(0)), 1.0);
    let filtered =
        "[{filter: self_attn, value: [1, 0]}, {filter: layers.2., value: 5}, {value: 7}]";
    assert_eq!((at(filtered, &q(3)), at(filtered, &up(2)), at(filtered, &up(1))), (0.0, 5.0, 7.0));
    assert_eq!(at("{filter: '*', value: 2}", &up(1)), 2.0);
    ones(folder.path(), 1);
    assert_eq!(at("[1, 4]", &up(0)), 4.0);
}

#[test]
fn a_gradient_begins_anew_in_every_slice() {
    let folder = tempfile::tempdir().unwrap();
    ones(folder.path(), 4);
    let source = |from: usize, to: usize| {
        format!(
            "{{sources: [{{model: a, layer_range: [{from}, {to}]}}, {{model: b, layer_range: [{from}, {to}], parameters: {{weight: 0}}}}]}}"
        )
    };
    let text = format!(
        "merge_method: linear\nslices: [{}, {}]\nparameters: {{normalize: false, weight: [1, 3]}}\n",
        source(0, 3),
        source(1, 3)
    );
    let merged = merge(folder.path(), &text).unwrap();
    let found: Vec<f32> = (0..5).map(|l| values(&merged, &up(l))[0]).collect();
    assert_eq!(found, [1.0, 2.0, 3.0, 1.0, 3.0]);
    assert_eq!(merged.config.usize("num_hidden_layers"), Some(5));
    assert_eq!(values(&merged, "lm_head.weight")[0], 1.0);
}

/// One level of parameters: not there, there, or there with a filter that does not match.
const STATES: [Option<bool>; 3] = [None, Some(true), Some(false)];

#[test]
fn precedence_of_all_levels() {
    let folder = tempfile::tempdir().unwrap();
    ones(folder.path(), 2);
    let written = |state: Option<bool>, value: usize| match state {
        None => String::new(),
        Some(true) => format!("weight: {value}"),
        Some(false) => format!("weight: [{{filter: nowhere, value: {value}}}]"),
    };
    let mut seen = 0;
    for source in STATES {
        for slice in STATES {
            for module in STATES {
                for global in STATES {
                    let levels = [(source, 2), (slice, 3), (module, 4), (global, 5)];
                    let expected =
                        levels.iter().find(|(s, _)| *s == Some(true)).map(|(_, v)| *v as f32);
                    let text = format!(
                        "merge_method: linear\nmodules:\n  default:\n    parameters: {{{}}}\n    slices:\n    - parameters: {{{}}}\n      \
                         sources:\n      - {{model: a, layer_range: [0, 2], parameters: {{{}}}}}\n\
                         parameters: {{normalize: false{}}}\n",
                        written(module, 4),
                        written(slice, 3),
                        written(source, 2),
                        if global.is_some() {
                            format!(", {}", written(global, 5))
                        } else {
                            String::new()
                        },
                    );
                    match (merge(folder.path(), &text), expected) {
                        (Ok(merged), Some(expected)) => {
                            assert_eq!(values(&merged, &up(1))[0], expected, "{text}")
                        }
                        (Err(error), None) => assert!(
                            error.to_string().contains("needs the parameter `weight`"),
                            "{error}"
                        ),
                        (found, _) => panic!("{text}\n{found:?}"),
                    }
                    seen += 1;
                }
            }
        }
    }
    assert_eq!(seen, 81);
}

#[test]
fn filters_see_source_numbers_for_models_and_output_numbers_for_the_merge() {
    let folder = tempfile::tempdir().unwrap();
    ones(folder.path(), 4);
    let text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n\
                - sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: layers.1., value: 2}, {value: 1}]}}]\n";
    let merged = merge(folder.path(), text).unwrap();
    let found: Vec<f32> = (0..6).map(|l| values(&merged, &up(l))[0]).collect();
    assert_eq!(found, [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]);
    let text = "merge_method: slerp\nbase_model: a\nslices:\n- sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]\n\
                parameters: {t: [{filter: layers.1., value: 1}, {value: 0}]}\n";
    TinyModel::new(4).filled(3.0).write(&folder.path().join("b"));
    let merged = merge(folder.path(), text).unwrap();
    assert_eq!([0, 1].map(|l| values(&merged, &up(l))[0]), [1.0, 3.0]);
}

#[test]
fn dtypes_are_promoted_and_rounded_once() {
    let folder = tempfile::tempdir().unwrap();
    let third = 1.0 / 3.0f32;
    for (name, dtype) in [("a", Dtype::F16), ("b", Dtype::BF16), ("c", Dtype::F32)] {
        TinyModel::new(1).filled(third).dtype(dtype).write(&folder.path().join(name));
    }
    let text = |extra: &str, models: &str| {
        let models: String = models
            .chars()
            .map(|m| format!("- {{model: {m}, parameters: {{weight: 1}}}}\n"))
            .collect();
        format!("merge_method: linear\nmodels:\n{models}{extra}")
    };
    let dtype = |extra: &str, models: &str| {
        merge(folder.path(), &text(extra, models)).unwrap().tensors[&up(0)].dtype()
    };
    assert_eq!(dtype("", "ab"), Dtype::F32);
    assert_eq!(dtype("", "aa"), Dtype::F16);
    assert_eq!(dtype("dtype: bfloat16\n", "abc"), Dtype::BF16);
    assert_eq!(dtype("dtype: torch.float16\n", "abc"), Dtype::F16);
    assert_eq!(dtype("out_dtype: bfloat16\n", "cc"), Dtype::BF16);
    assert_eq!(dtype("dtype: bfloat16\ncompute: float32\n", "ab"), Dtype::BF16);
    let mean = (half::f16::from_f32(third).to_f32() + third) / 2.0;
    let found =
        values(&merge(folder.path(), &text("out_dtype: bfloat16\n", "ac")).unwrap(), &up(0))[0];
    assert_eq!(found, half::bf16::from_f32(mean).to_f32());
}

#[test]
fn a_head_of_its_own_is_announced() {
    let folder = tempfile::tempdir().unwrap();
    for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
        TinyModel::new(1).filled(1.0).tied(first).write(&folder.path().join("a"));
        TinyModel::new(1).filled(3.0).tied(second).write(&folder.path().join("b"));
        let text =
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n";
        let merged = merge(folder.path(), text).unwrap();
        let written = merged.tensors.contains_key("lm_head.weight");
        assert_eq!(written, !(first && second));
        let tied = merged.config.bool("tie_word_embeddings").unwrap_or(false);
        assert_eq!(tied, !written, "{first} {second}");
        if written {
            assert_eq!(values(&merged, "lm_head.weight")[0], 2.0);
        }
    }
}

fn vocabularies(folder: &Path) {
    // Rows are 10 * model + number of the token in that model.
    let rows =
        |base: f32, n: usize| -> Vec<f32> { (0..n).flat_map(|r| [base + r as f32; 8]).collect() };
    let tokens = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    for (name, first, words, special) in [
        ("base", 0.0, tokens(&["a", "b", "c"]), vec!["<s>"]),
        ("x", 10.0, tokens(&["b", "a", "x"]), vec!["<s>"]),
        ("z", 20.0, tokens(&["c", "x", "z"]), vec!["<s>", "<z>"]),
    ] {
        let n = words.len() + special.len();
        TinyModel::new(1)
            .filled(1.0)
            .tied(true)
            .vocabulary(&words, &special)
            .embedding(rows(first, n))
            .write(&folder.join(name));
    }
}

fn rows(merged: &Source) -> Vec<f32> {
    values(merged, "model.embed_tokens.weight")
        .chunks(8)
        .map(|row| {
            assert!(row.iter().all(|v| *v == row[0]));
            row[0]
        })
        .collect()
}

const LAST: &str = "merge_method: linear\nbase_model: base\nmodels:\n- {model: base, parameters: {weight: 0}}\n\
                    - {model: x, parameters: {weight: 0}}\n- {model: z, parameters: {weight: 1}}\n";

#[test]
fn a_union_of_vocabularies() {
    let folder = tempfile::tempdir().unwrap();
    vocabularies(folder.path());
    let merged = merge(folder.path(), &format!("{LAST}tokenizer_source: union\n")).unwrap();
    // a b c <s> | x z <z>, in the rows of model `z`: base's a and b, its own c and <s>, x, z, <z>.
    assert_eq!(rows(&merged), [0.0, 1.0, 20.0, 23.0, 21.0, 22.0, 24.0]);
    assert_eq!(merged.config.usize("vocab_size"), Some(7));
    let file = merged.side_file("tokenizer.json").unwrap().read().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
    let added: Vec<(u64, &str, bool)> = json["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| {
            (
                t["id"].as_u64().unwrap(),
                t["content"].as_str().unwrap(),
                t["special"].as_bool().unwrap(),
            )
        })
        .collect();
    assert_eq!(added, [(3, "<s>", true), (4, "x", false), (5, "z", false), (6, "<z>", true)]);
    assert_eq!(json["model"]["vocab"], json!({"a": 0, "b": 1, "c": 2}));
    // A union with nothing new is the base's own file, byte for byte.
    let alone = "merge_method: linear\nbase_model: base\nmodels: [{model: base, parameters: {weight: 1}}]\ntokenizer: {}\n";
    let alone = merge(folder.path(), alone).unwrap();
    let stored = fs_err::read(folder.path().join("base/tokenizer.json")).unwrap();
    assert_eq!(alone.side_file("tokenizer.json").unwrap().read().unwrap(), stored);
    assert_eq!(rows(&alone), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn rows_by_rule_without_a_base() {
    let folder = tempfile::tempdir().unwrap();
    vocabularies(folder.path());
    let text = "merge_method: linear\nmodels:\n- {model: z, parameters: {weight: 1}}\n- {model: base, parameters: {weight: 0}}\n\
                - {model: x, parameters: {weight: 0}}\ntokenizer: {source: union, pad_to_multiple_of: 5}\n";
    let merged = merge(folder.path(), text).unwrap();
    // c x z <s> <z> | a b: the mean over `base` and `x` for what `z` lacks; padding is the mean of all rows.
    let real = [20.0, 21.0, 22.0, 23.0, 24.0, (0.0 + 11.0) / 2.0, (1.0 + 10.0) / 2.0];
    let mean = real.iter().sum::<f32>() / 7.0;
    let found = rows(&merged);
    assert_eq!(found[..7], real);
    assert!(found[7..].iter().all(|r| (r - mean).abs() < 1e-5) && found.len() == 10);
    assert_eq!(merged.config.usize("vocab_size"), Some(10));
}

#[test]
fn rows_that_the_recipe_chooses() {
    let folder = tempfile::tempdir().unwrap();
    vocabularies(folder.path());
    let text = format!(
        "{LAST}tokenizer:\n  source: base\n  tokens:\n    a: {{source: x}}\n    b: {{source: {{kind: zero}}}}\n    \
         c: {{source: {{model: x, token: x}}, force: true}}\n    new: {{source: {{kind: model_token, model: base, token_id: 1}}}}\n    none:\n"
    );
    let merged = merge(folder.path(), &text).unwrap();
    assert_eq!(rows(&merged), [11.0, 0.0, 12.0, 23.0, 1.0, 0.0]);
    let of_model = merge(folder.path(), &format!("{LAST}tokenizer: {{source: x}}\n")).unwrap();
    assert_eq!(rows(&of_model), [1.0, 0.0, 21.0, 23.0]);
    for (wrong, expected) in [
        ("tokens: {a: {source: z}}", "a token of `z`"),
        ("tokens: {a: {source: {model: z, token_id: 99}}}", "a number below 5"),
    ] {
        let error = merge(folder.path(), &format!("{LAST}tokenizer: {{{wrong}}}\n")).unwrap_err();
        assert!(format!("{error:?}").contains(expected), "{error:?}");
    }
    let error = merge(folder.path(), LAST).unwrap_err();
    assert!(
        error.to_string().contains("different shapes")
            && format!("{error:?}").contains("source: union")
    );
}

#[test]
fn vocabularies_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    vocabularies(folder.path());
    let text = format!("{LAST}tokenizer: {{}}\n");
    let path = folder.path().join("z/tokenizer.json");
    let stored = fs_err::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"c\":0", "\"c\":4000000000", "the number 4000000000"),
        ("\"vocab\"", "\"vocabulary\"", "no `model.vocab`"),
        ("{", "[", "cannot be read"),
    ] {
        assert!(stored.contains(from), "{stored}");
        fs_err::write(&path, stored.replacen(from, to, 1)).unwrap();
        let error = merge(folder.path(), &text).unwrap_err();
        assert!(format!("{error} {error:?}").contains(expected), "{error:?}");
    }
    fs_err::write(&path, stored).unwrap();
    let config = folder.path().join("z/config.json");
    let changed =
        fs_err::read_to_string(&config).unwrap().replace("\"vocab_size\":5", "\"vocab_size\":9");
    fs_err::write(&config, changed).unwrap();
    let error = merge(folder.path(), &text).unwrap_err();
    assert!(error.to_string().contains("does not fit the vocabulary"), "{error:?}");
    fs_err::remove_file(folder.path().join("base/tokenizer.json")).unwrap();
    let error = merge(folder.path(), &text).unwrap_err();
    assert!(error.to_string().contains("no tokenizer to start from"), "{error:?}");
}

#[test]
fn permuted_numbers_merge_as_if_they_were_aligned() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, words: [&str; 3], rows: [f32; 3]| {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let embedding = rows.iter().flat_map(|r| [*r; 8]).collect();
        TinyModel::new(1)
            .filled(1.0)
            .tied(true)
            .vocabulary(&words, &[])
            .embedding(embedding)
            .write(&folder.path().join(name));
    };
    write("p", ["a", "b", "c"], [1.0, 2.0, 3.0]);
    write("q", ["c", "a", "b"], [30.0, 10.0, 20.0]);
    let text = "merge_method: linear\nbase_model: p\nmodels: [{model: p}, {model: q}]\nparameters: {weight: 1}\ntokenizer: {}\n";
    assert_eq!(rows(&merge(folder.path(), text).unwrap()), [5.5, 11.0, 16.5]);
}

#[test]
fn chat_templates() {
    let folder = tempfile::tempdir().unwrap();
    for (name, template) in [
        ("a", "one {{ messages }} of them"),
        ("b", "two {{ messages }} of them"),
        ("c", " two {{ messages }} of them\n"),
    ] {
        TinyModel::new(1).filled(1.0).write(&folder.path().join(name));
        let config = json!({"tokenizer_class": "X", "chat_template": template}).to_string();
        fs_err::write(folder.path().join(name).join("tokenizer_config.json"), config).unwrap();
    }
    let template = |wanted: &str| {
        let text = format!(
            "merge_method: linear\nmodels: [{{model: a}}, {{model: b}}, {{model: c}}]\nparameters: {{weight: 1}}\n{wanted}"
        );
        let merged = merge(folder.path(), &text).unwrap();
        let file = merged.side_file("tokenizer_config.json").unwrap().read().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(json["tokenizer_class"], "X");
        json["chat_template"].as_str().unwrap().to_owned()
    };
    assert_eq!(template(""), "one {{ messages }} of them");
    assert_eq!(template("chat_template: auto\n"), "two {{ messages }} of them");
    assert!(template("chat_template: chatml\n").contains("<|im_start|>"));
    assert_eq!(
        template("chat_template: '{{ messages[0].content }} my own'\n"),
        "{{ messages[0].content }} my own"
    );
}

#[test]
fn stages_name_each_other() {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in [("a", 1.0), ("b", 3.0), ("c", 10.0)] {
        TinyModel::new(2).filled(value).write(&folder.path().join(name));
    }
    let half = |name: &str, x: &str, y: &str| {
        format!(
            "{name}merge_method: linear\nmodels: [{{model: {x}}}, {{model: {y}}}]\nparameters: {{weight: 1}}\n"
        )
    };
    // The result stands first, and its stages in any order behind it.
    let text = format!(
        "{}---\n{}---\n{}",
        half("", "first", "second"),
        half("name: second\n", "first", "c"),
        half("name: first\n", "a", "b"),
    );
    assert_eq!(values(&merge(folder.path(), &text).unwrap(), &up(1))[0], (2.0 + 6.0) / 2.0);
    // All named: the last one.
    let named = format!(
        "{}---\n{}---\n",
        half("name: first\n", "a", "b"),
        half("name: second\n", "first", "c")
    );
    assert_eq!(values(&merge(folder.path(), &named).unwrap(), &up(1))[0], 6.0);
    for (text, expected) in [
        (
            format!("{}---\n{}", half("name: x\n", "w", "a"), half("name: w\n", "x", "a")),
            "names itself",
        ),
        (format!("{}---\n{}", half("", "a", "b"), half("", "a", "b")), "no `name`"),
        (
            format!("{}---\n{}", half("name: x\n", "a", "b"), half("name: x\n", "a", "b")),
            "have the name `x`",
        ),
        (
            format!(
                "{}---\nmerge_method: liner\nname: x\nmodels: [{{model: a}}]\n",
                half("", "x", "b")
            ),
            "unknown `merge_method`",
        ),
    ] {
        let errors = recipe::parse(&text, "stages.yaml".as_ref()).map(|_| ()).unwrap_err();
        assert!(errors.0.iter().any(|e| e.what.contains(expected)), "{text}\n{errors:#?}");
    }
}

#[test]
fn a_stage_can_be_an_expert() {
    let text = "name: soup\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n---\n\
                base_model: base\nexperts:\n- {source_model: soup, positive_prompts: [x]}\n- {source_model: c, positive_prompts: [w]}\n";
    let Ok(Recipe::Moe(moe)) = recipe::parse(text, "moe.yaml".as_ref()) else { panic!("moe") };
    assert!(
        matches!(&moe.experts[0].source.kind, recipe::SourceKind::Inline(r) if matches!(**r, Recipe::Dense(_)))
    );
}
