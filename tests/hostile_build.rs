//! Damaged inputs of a build: exit code, message, and nothing left behind.

#[allow(dead_code)]
mod cli;
#[allow(dead_code)]
mod hostile;

use std::fs;

use hostile::{Build, UP, entries, join};
use serde_json::{Value, json};

/// The place where the recipe names its first expert.
const FIRST: &str = "recipe.yaml:3:19  experts[0].source_model";

/// The place where the recipe names its base.
const BASE: &str = "recipe.yaml:1:13  base_model";

#[test]
fn the_undamaged_build_works_and_says_nothing() {
    let found = Build::new().builds();
    assert_eq!(found.stderr, "");
}

#[test]
fn truncated_shard() {
    let build = Build::new();
    let path = build.path("prose/model.safetensors");
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 10).unwrap();
    let found = len - 10;
    build.refused(3, &["prose/model.safetensors", "expected", &found.to_string(), FIRST, "hint: "]);
    fs::File::options().write(true).open(&path).unwrap().set_len(5).unwrap();
    build.refused(3, &["prose/model.safetensors", "5 bytes", FIRST, "hint: "]);
    fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    build.refused(3, &["prose/model.safetensors", FIRST, "hint: "]);
}

#[test]
fn header_length_beyond_the_file() {
    let build = Build::new();
    let path = build.path("base/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    for len in [bytes.len() as u64, 1 << 40, u64::MAX] {
        bytes[..8].copy_from_slice(&len.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        build.refused(3, &["base/model.safetensors", &len.to_string(), "expected", BASE, "hint: "]);
    }
}

#[test]
fn overlapping_offsets() {
    let build = Build::new();
    build.tensors("code", |t| {
        let other = t.header["model.layers.1.mlp.up_proj.weight"]["data_offsets"].clone();
        t.header[UP]["data_offsets"] = other;
    });
    build.refused(
        3,
        &[
            "code/model.safetensors",
            ".mlp.up_proj.weight",
            "expected",
            "found",
            "experts[1].source_model",
        ],
    );
}

#[test]
fn offsets_out_of_range() {
    let build = Build::new();
    build.tensors("code", |t| {
        let far = t.data.len() as u64 + 1000;
        t.header[UP]["data_offsets"] = json!([far, far + 344 * 128 * 2]);
    });
    build.refused(
        3,
        &["code/model.safetensors", UP, "expected", "found", "experts[1].source_model"],
    );
    let build = Build::new();
    build.tensors("code", |t| t.header[UP]["data_offsets"] = json!([100, 50]));
    build.refused(3, &["code/model.safetensors", UP, "expected", "found"]);
}

#[test]
fn duplicate_names() {
    let build = Build::new();
    let tensors = hostile::Tensors::read(&build.path("prose/model.safetensors"));
    let header = Value::Object(tensors.header).to_string();
    let twice = header.replacen("model.layers.3.mlp.up_proj.weight", UP, 1);
    assert_ne!(twice, header);
    build.write("prose/model.safetensors", join(&twice, &tensors.data));
    build.refused(3, &["prose/model.safetensors", UP, "found", FIRST]);
}

#[test]
fn wrong_dtypes() {
    for (dtype, width, says) in
        [("I8", 2, "quantised"), ("F8_E4M3", 2, "quantised"), ("I16", 1, "hint: ")]
    {
        for (model, place) in [("prose", FIRST), ("base", BASE)] {
            let build = Build::new();
            build.tensors(model, |t| {
                t.header[UP]["dtype"] = json!(dtype);
                t.header[UP]["shape"] = json!([344, 128 * width]);
            });
            let file = format!("{model}/model.safetensors");
            build.refused(
                3,
                &["unsupported dtype", &file, UP, "F32, BF16 or F16", dtype, says, place],
            );
        }
    }
}

/// A dense merge of two of the models.
const DENSE: &str =
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: prose}, {model: code}]\n";

#[test]
fn dense_merges_lose_no_weight_of_another_dtype() {
    for (dtype, bytes, says) in [
        ("F64", 8, "dtype=torch.bfloat16"),
        ("F8_E4M3", 1, "quantised"),
        ("I32", 4, "GPTQ"),
        ("U8", 1, "GPTQ"),
    ] {
        let build = Build::of(DENSE);
        build.tensors("code", |t| {
            t.header[UP]["dtype"] = json!(dtype);
            t.header[UP]["shape"] = json!([344, 128 * 2 / bytes]);
        });
        let says = ["code/model.safetensors", UP, "F32, BF16 or F16", dtype, says, "models[1]"];
        build.refused(3, &says);
    }
}

#[test]
fn tensors_that_are_no_weights_are_copied() {
    let build = Build::of(DENSE);
    build.all(|build, model| {
        build.tensors(model, |t| {
            for (name, dtype, shape) in [("model.steps", "I64", 2), ("model.mask", "BOOL", 7)] {
                t.add(name, &[8]);
                t.header[name]["dtype"] = json!(dtype);
                t.header[name]["shape"] = json!([shape]);
                let start = t.range(name).start;
                t.data.truncate(start + if dtype == "I64" { 16 } else { 7 });
                t.header[name]["data_offsets"][1] = json!(t.data.len());
                t.data[start] = 1;
            }
        });
    });
    build.builds();
    let out = hostile::Tensors::read(&build.out().join("model.safetensors"));
    assert_eq!(
        out.data[out.range("model.steps")],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(out.data[out.range("model.mask")], [1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        (&out.header["model.steps"]["dtype"], out.range("model.steps").start),
        (&json!("I64"), 0)
    );
    // Where they differ, nobody knows what their mean would be.
    std::fs::remove_dir_all(build.out()).unwrap();
    build.tensors("code", |t| {
        let start = t.range("model.steps").start;
        t.data[start] = 2;
    });
    let apart = ["model.steps", "prose", "code", "other numbers", "models[1]"];
    build.refused(2, &apart);
    build.tensors("code", |t| {
        t.header["model.steps"]["dtype"] = json!("F32");
        t.header["model.steps"]["shape"] = json!([4]);
    });
    build.refused(3, &["model.steps", "I64 [2]", "expected"]);
    let path = build.path("prose").display().to_string();
    let verified = cli::run(&["verify", "--json", &path]).json();
    assert_eq!(verified["extra_tensors"], json!(["model.mask", "model.steps"]));
    let file = build.path("prose.gguf").display().to_string();
    let notes = cli::run(&["export", "--json", &path, "--gguf", &file]).json()["notes"].to_string();
    assert!(notes.contains("`model.steps`") && notes.contains("`model.mask`"), "{notes}");
}

#[test]
fn missing_shard_named_by_the_index() {
    let build = Build::new();
    let folder = build.path("prose");
    let tensors = hostile::Tensors::read(&folder.join("model.safetensors"));
    fs::rename(folder.join("model.safetensors"), folder.join("model-00001-of-00002.safetensors"))
        .unwrap();
    let shard = |name: &String| {
        json!(if name == UP {
            "model-00002-of-00002.safetensors"
        } else {
            "model-00001-of-00002.safetensors"
        })
    };
    let names = tensors.header.keys().filter(|n| *n != "__metadata__");
    let map: serde_json::Map<String, Value> = names.map(|n| (n.clone(), shard(n))).collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    build.write("prose/model.safetensors.index.json", index.to_string());
    build.refused(
        3,
        &[
            "model-00002-of-00002.safetensors",
            "prose/model.safetensors.index.json",
            UP,
            "no such file",
            FIRST,
            "hint: ",
        ],
    );
}

#[test]
fn missing_tensors() {
    for (model, tensor, place) in [
        ("prose", UP, FIRST),
        ("base", UP, BASE),
        ("base", "model.layers.4.self_attn.q_proj.weight", BASE),
        ("base", "model.embed_tokens.weight", BASE),
        ("base", "model.norm.weight", BASE),
    ] {
        let build = Build::new();
        build.tensors(model, |t| t.rename(tensor, &format!("{tensor}s")));
        build.refused(3, &["tensor is missing", model, tensor, place, "hint: "]);
    }
}

#[test]
fn a_misspelt_tensor_is_suggested() {
    let build = Build::new();
    build.tensors("prose", |t| t.rename(UP, &format!("{UP}s")));
    build.refused(3, &["tensor is missing", UP, &format!("is there: `{UP}s`")]);
}

#[test]
fn extra_tensors_are_named_in_a_warning() {
    for model in ["base", "prose"] {
        let build = Build::new();
        build.tensors(model, |t| t.add("model.layers.0.mlp.extra.weight", &[2, 3]));
        let found = build.builds();
        assert!(found.stderr.contains("model.layers.0.mlp.extra.weight"), "{}", found.stderr);
        assert!(found.stderr.contains(model), "{}", found.stderr);
    }
}

#[test]
fn weights_that_are_not_finite() {
    const NAN: u16 = 0x7fc0;
    const INF: u16 = 0x7f80;
    for (model, tensor, bits, place) in [
        ("base", "model.layers.5.self_attn.o_proj.weight", NAN, BASE),
        ("base", "model.norm.weight", INF, BASE),
        ("prose", UP, INF, FIRST),
        ("prose", "model.layers.5.mlp.down_proj.weight", NAN, FIRST),
    ] {
        let build = Build::new();
        build.tensors(model, |t| t.poke(tensor, 77, bits));
        let file = format!("{model}/model.safetensors");
        build.refused(3, &["not finite", &file, tensor, "77", place, "hint: "]);
    }
}

#[test]
fn a_base_that_is_not_finite_is_found_by_the_probe_too() {
    for mode in ["auto", "hidden", "cheap_embed"] {
        let build = Build::new().with("gate_mode: random", &format!("gate_mode: {mode}"));
        build.tensors("base", |t| {
            for i in 0..1024 * 128 {
                t.poke("model.embed_tokens.weight", i, 0x7fc0);
            }
        });
        build.refused(3, &["base/model.safetensors", "model.embed_tokens.weight", "finite", BASE]);
    }
}

#[test]
fn mismatched_shapes() {
    for (model, tensor, place) in [
        ("prose", UP, FIRST),
        ("base", UP, BASE),
        ("base", "model.layers.1.self_attn.k_proj.weight", BASE),
    ] {
        let build = Build::new();
        build.tensors(model, |t| {
            let shape = t.header[tensor]["shape"].as_array_mut().unwrap();
            shape[0] = json!(shape[0].as_u64().unwrap() / 2);
            shape[1] = json!(shape[1].as_u64().unwrap() * 2);
        });
        let file = format!("{model}/model.safetensors");
        build.refused(3, &["wrong shape", &file, tensor, "expected", "found", place]);
    }
}

#[test]
fn damaged_configs() {
    let build = Build::new();
    build.write("prose/config.json", "{");
    build.refused(3, &["prose/config.json", "JSON", FIRST]);
    fs::remove_file(build.path("prose/config.json")).unwrap();
    build.refused(3, &["prose/config.json", "missing", FIRST]);
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!("128")),
        ("hidden_size", Value::Null),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(7)),
        ("vocab_size", json!(-1)),
        ("rms_norm_eps", json!("x")),
    ] {
        let build = Build::new().with("gate_mode: random", "gate_mode: hidden");
        build.json("base/config.json", |c| c[key] = value.clone());
        let found = build.run();
        assert!([2, 3].contains(&found.code), "{key} {value}: {}\n{}", found.code, found.stderr);
        build.refused(found.code, &["expected"]);
        assert!(
            found.stderr.contains(key) || found.stderr.contains("head_dim"),
            "{key} {value}\n{}",
            found.stderr
        );
    }
}

#[test]
fn sources_of_other_sizes() {
    for (key, value, word) in [
        ("hidden_size", 64, "another size"),
        ("num_hidden_layers", 5, "another size"),
        ("vocab_size", 1000, "vocabulary"),
        ("intermediate_size", 100, "another size"),
    ] {
        let build = Build::new();
        build.json("code/config.json", |c| c[key] = json!(value));
        let found = format!("{key} {value}");
        build.refused(
            2,
            &[
                word,
                "first",
                "base",
                "second",
                "code",
                &found,
                "recipe.yaml:5:19  experts[1].source_model",
                "hint: ",
            ],
        );
    }
}

#[test]
fn attention_bias_cannot_go_into_mixtral() {
    let build = Build::new().with("gate_mode", "architecture: mixtral\ngate_mode");
    build.all(|build, model| {
        build.json(&format!("{model}/config.json"), |c| c["attention_bias"] = json!(true));
        build.tensors(model, |t| {
            for layer in 0..6 {
                for name in ["q", "k", "v", "o"] {
                    let name = format!("model.layers.{layer}.self_attn.{name}_proj");
                    let rows = t.header[&format!("{name}.weight")]["shape"][0].as_u64().unwrap();
                    t.add(&format!("{name}.bias"), &[rows as usize]);
                }
            }
        });
    });
    build.refused(2, &["bias", "mixtral", "base", "recipe.yaml:1:13", "hint: "]);
}

#[test]
fn gemma_cannot_go_into_mixtral() {
    for architecture in ["", "architecture: mixtral\n"] {
        let build = Build::new().with("gate_mode", &format!("{architecture}gate_mode"));
        build.all(|build, model| {
            build.json(&format!("{model}/config.json"), |c| c["model_type"] = json!("gemma2"));
        });
        build.refused(2, &["gemma2", "mixtral", "base", "recipe.yaml:1:13", "hint: "]);
    }
}

#[test]
fn tokenizers_that_differ() {
    let differ = |build: &Build| {
        build.json("prose/tokenizer.json", |t| {
            let vocab = t["model"]["vocab"].as_object_mut().unwrap();
            let names: Vec<String> = vocab.keys().skip(500).take(2).cloned().collect();
            let (a, b) = (vocab[&names[0]].clone(), vocab[&names[1]].clone());
            vocab.insert(names[0].clone(), b);
            vocab.insert(names[1].clone(), a);
        });
    };
    let build = Build::new();
    differ(&build);
    build.refused(
        2,
        &["different vocabularies", "base", "prose", "token", FIRST, "tokenizer: base"],
    );
    let build = Build::new().with("gate_mode", "tokenizer: base\ngate_mode");
    differ(&build);
    build.builds();
    let build = Build::new();
    build.write("prose/tokenizer.json", "{");
    build.refused(3, &["prose/tokenizer.json", FIRST]);
}

#[test]
fn an_adapter_that_does_not_fit() {
    let adapter = moe_merge_testkit::repository("recipes/smollm2/rust").canonicalize().unwrap();
    let build = Build::new()
        .with("source_model: prose", &format!("source_model: prose+{}", adapter.display()));
    build.refused(
        3,
        &[
            "adapter_model.safetensors",
            "mlp.",
            "expected",
            "found",
            "recipe.yaml:3:19  experts[0].source_model",
        ],
    );
    let build = Build::new().with("source_model: prose", "source_model: prose+code");
    build.refused(3, &["adapter_config.json", FIRST]);
    let build = Build::new().with("source_model: prose", "source_model: prose+nowhere");
    build.refused(3, &["nowhere", FIRST]);
}

#[test]
fn sources_that_do_not_exist() {
    let build = Build::new().with("source_model: prose", "source_model: pose");
    build.refused(3, &["source not found", "pose", "did you mean", "prose`?", FIRST]);
    let build = Build::new().with("base_model: base", "base_model: bse");
    build.refused(3, &["source not found", "bse", "did you mean", "base`?", BASE]);
    let build = Build::new().with("source_model: prose", "source_model: some-org/some-model");
    build.refused(3, &["source not found", "some-org/some-model", "Hub cache", FIRST]);
    let build = Build::new().with("source_model: prose", "source_model: prose/config.json");
    build.refused(3, &["not a model", "prose/config.json", FIRST, "hint: "]);
    let build = Build::new().with("source_model: prose", "source_model: empty");
    fs::create_dir(build.path("empty")).unwrap();
    build.refused(3, &["no weights", "empty", FIRST, "hint: "]);
}

#[test]
fn a_damaged_gguf() {
    let gguf = fs::read(moe_merge_testkit::repository("checkpoint/tests/data/tiny.gguf")).unwrap();
    let build = Build::new().with("source_model: prose", "source_model: prose.gguf");
    build.write("prose.gguf", &gguf[..gguf.len() / 2]);
    build.refused(3, &["prose.gguf", "expected", "found", FIRST, "hint: "]);
    build.write("prose.gguf", &gguf[..100]);
    build.refused(3, &["prose.gguf", "expected", "found", FIRST, "hint: "]);
    build.write("prose.gguf", &gguf);
    build.refused(2, &["base", "prose.gguf", FIRST, "expected", "found"]);
}

#[test]
fn the_output_is_there_already() {
    let build = Build::new();
    fs::create_dir(build.out()).unwrap();
    build.write("out/mine.txt", "mine");
    build.refused(2, &["exists", "out", "--force"]);
    build.refused_with(&["--force"], 2, &["no model folder", "out", "hint: "]);
    assert_eq!(entries(&build.out()).len(), 1);
    fs::remove_dir_all(build.out()).unwrap();
    build.write("out", "a file");
    build.refused(2, &["exists", "out"]);
    build.refused_with(&["--force"], 2, &["out", "a file"]);
    assert_eq!(fs::read(build.out()).unwrap(), b"a file");
    fs::remove_file(build.out()).unwrap();
    build.builds();
    build.refused(2, &["exists", "out", "--force"]);
    let again = cli::run(&build.args(&["--force"]));
    assert_eq!(again.code, 0, "{}", again.stderr);
}

#[test]
fn the_output_would_replace_a_source() {
    let build = Build::new();
    let args = [
        build.args(&["--force"])[0].clone(),
        "--force".into(),
        "--out".into(),
        build.path("prose").into(),
    ];
    let before = entries(&build.path("prose"));
    let found = cli::run(&args);
    found.fails(3, &["sources", "prose", "--out"]);
    assert_eq!(entries(&build.path("prose")), before);
}
