//! Adapters against PEFT's own merges; the data is made by `data/make_adapters.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::{ConfigJson, Dtype, Source, WeightRef, adapter};
use moe_merge_testkit::{golden, shared};
use proptest::prelude::*;

/// PEFT adds the same products in another order.
const RELATIVE: f64 = 2e-7;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/adapters").join(name)
}

fn base(name: &str) -> Source {
    let source = format!("{}", data(name).display()).parse().unwrap();
    Source::open(&source, Path::new("/")).unwrap()
}

fn cases() -> BTreeMap<String, (String, Vec<String>)> {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data("cases.json")).unwrap()).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    json.as_object()
        .unwrap()
        .iter()
        .map(|(case, v)| {
            let changed = v["changed"].as_array().unwrap().iter().map(text).collect();
            (case.clone(), (text(&v["base"]), changed))
        })
        .collect()
}

#[test]
fn every_kind_equals_peft() {
    let mut worst = (0.0, String::new());
    for (case, (base_name, changed)) in cases() {
        let before = base(&base_name);
        let after = adapter::apply(before.clone(), &data(&case))
            .unwrap_or_else(|e| panic!("{case}: {e:?}"));
        let expected = golden::load(&data(&case).join("merged.safetensors"));
        for (name, weight) in &after.tensors {
            let values = weight.to_f32().unwrap();
            if changed.contains(name) {
                let off = golden::relative_difference(&values, &expected[name].values);
                if off > worst.0 {
                    worst = (off, format!("{case} {name}"));
                }
                assert!(off <= RELATIVE, "{case}: {name} is off by {off:e}");
            } else {
                assert_eq!(values, before.tensors[name].to_f32().unwrap(), "{case}: {name}");
            }
        }
        assert!(changed.iter().all(|name| after.tensors.contains_key(name)), "{case}");
        assert_eq!(after.files.len(), before.files.len() + 2, "{case}");
        assert_eq!(
            after.notes.iter().any(|n| n.contains("tied")),
            base_name == "llama_tied",
            "{case}: {:?}",
            after.notes
        );
    }
    println!("largest difference: {:e} in {}", worst.0, worst.1);
}

#[test]
fn any_block_of_rows_has_the_same_bits() {
    for (case, (base_name, changed)) in cases() {
        let after = adapter::apply(base(&base_name), &data(&case)).unwrap();
        for name in changed {
            let weight = &after.tensors[&name];
            let (rows, cols) = (weight.rows(), weight.cols());
            let whole = weight.to_f32().unwrap();
            for step in [1, 3, 7] {
                weight.release();
                for from in (0..rows).step_by(step) {
                    let to = rows.min(from + step);
                    let mut block = vec![0.0; (to - from) * cols];
                    weight.read_rows(from..to, &mut block).unwrap();
                    assert_eq!(block, whole[from * cols..to * cols], "{case} {name} {from}..{to}");
                }
            }
        }
    }
}

#[test]
fn experts_packed_by_old_peft_give_the_same_weights() {
    const EXPERTS: usize = 3;
    const RANK: usize = 2;
    let stored = golden::load(&data("packed_experts/adapter_model.safetensors"));
    let mut old: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in &stored {
        let experts = name.contains("experts");
        let twin =
            if name.contains("lora_A") { ("lora_A", "lora_B") } else { ("lora_B", "lora_A") };
        let from = &stored[&if experts { name.replace(twin.0, twin.1) } else { name.clone() }];
        let (rows, cols) = (from.shape[0], from.shape[1]);
        // Old A has row e·r + j where new B has column j·E + e, and the other way round.
        let value = |e: usize, j: usize, i: usize| match name.contains("lora_A") {
            true => from.values[i * cols + j * EXPERTS + e],
            false => from.values[(e * RANK + j) * cols + i],
        };
        let (shape, values): (Vec<usize>, Vec<f64>) = match (experts, name.contains("lora_A")) {
            (false, _) => (tensor.shape.clone(), tensor.values.clone()),
            (true, true) => (
                vec![cols, rows],
                (0..cols * rows)
                    .map(|k| value(k / rows / RANK, k / rows % RANK, k % rows))
                    .collect(),
            ),
            (true, false) => (
                vec![cols, rows],
                (0..cols * rows)
                    .map(|k| value(k % rows % EXPERTS, k % rows / EXPERTS, k / rows))
                    .collect(),
            ),
        };
        let bytes = values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect();
        old.push((name.clone(), shape, bytes));
    }
    let views = old.iter().map(|(name, shape, bytes)| {
        let f32 = safetensors::Dtype::F32;
        (name, safetensors::tensor::TensorView::new(f32, shape.clone(), bytes).unwrap())
    });
    let dir = tempfile::tempdir().unwrap();
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
    std::fs::copy(
        data("packed_experts/adapter_config.json"),
        dir.path().join("adapter_config.json"),
    )
    .unwrap();
    let after = adapter::apply(base("mixtral"), dir.path()).unwrap();
    for (name, expected) in golden::load(&data("packed_experts/merged.safetensors")) {
        let off =
            golden::relative_difference(&after.tensors[&name].to_f32().unwrap(), &expected.values);
        assert!(off <= RELATIVE, "{name} is off by {off:e}");
    }
}

fn smollm2() -> Source {
    let mut tensors: BTreeMap<String, WeightRef> = BTreeMap::new();
    for layer in 0..30 {
        for (part, shape) in
            [("gate_proj", [1536, 576]), ("up_proj", [1536, 576]), ("down_proj", [576, 1536])]
        {
            let name = format!("model.layers.{layer}.mlp.{part}.weight");
            tensors.insert(name.clone(), Arc::new(OwnedWeight::zeros(&name, &shape, Dtype::F32)));
        }
    }
    Source {
        label: "smollm2".into(),
        path: "smollm2".into(),
        config: ConfigJson::default(),
        tensors,
        other: Vec::new(),
        files: Vec::new(),
        side: Vec::new(),
        notes: Vec::new(),
    }
}

#[test]
fn real_adapters_map_every_tensor() {
    for name in ["rust", "arithmetic", "kjv"] {
        let Some(dir) = shared(&format!("adapters/{name}")) else { return };
        let info = adapter::describe(&dir).unwrap();
        assert_eq!((info.rank, info.modules.len(), info.tensors), (8, 90, 180));
        assert_eq!(info.ranks, [8]);
        let after = adapter::apply(smollm2(), &dir).unwrap();
        let touched = after.tensors.values().filter(|w| w.bytes().is_none()).count();
        assert_eq!(touched, 90, "{name}");
        let factors = golden::load(&dir.join("adapter_model.safetensors"));
        let key =
            |part: &str| format!("base_model.model.model.layers.29.mlp.up_proj.lora_{part}.weight");
        let (a, b) = (&factors[&key("A")], &factors[&key("B")]);
        let dense: Vec<f64> = (0..1536 * 576)
            .map(|i| (0..8).map(|j| b.row(i / 576)[j] * a.row(j)[i % 576]).sum::<f64>() * 2.0)
            .collect();
        let found = after.tensors["model.layers.29.mlp.up_proj.weight"].to_f32().unwrap();
        let off = golden::relative_difference(&found, &dense);
        assert!(off < RELATIVE, "{name} is off by {off:e}");
        assert_eq!(after.label, format!("smollm2+{}", dir.display()));
    }
}

/// A folder with a linear adapter for one weight `w.weight`.
fn adapter_dir(alpha: f64, a: &[f32], b: &[f32], rank: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (a_bytes, b_bytes) = (bytes(a), bytes(b));
    let view = |shape: Vec<usize>, bytes| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap()
    };
    let tensors = [
        ("base_model.model.w.lora_A.weight", view(vec![rank, a.len() / rank], &a_bytes)),
        ("base_model.model.w.lora_B.weight", view(vec![b.len() / rank, rank], &b_bytes)),
    ];
    let file = dir.path().join("adapter_model.safetensors");
    std::fs::write(&file, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let config = format!(r#"{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {alpha}}}"#);
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    dir
}

fn one_weight(values: &[f32], rows: usize, cols: usize) -> Source {
    let weight = OwnedWeight::from_f32("w.weight", values, &[rows, cols], Dtype::F32);
    let mut source = smollm2();
    source.tensors = [("w.weight".to_owned(), Arc::new(weight) as WeightRef)].into();
    source
}

fn numbers(n: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-2f32..2.0, n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn equals_the_dense_sum(
        (rows, cols, rank, w, a, b) in (1usize..5, 1usize..70, 1usize..4).prop_flat_map(|(m, n, r)| {
            (Just(m), Just(n), Just(r), numbers(m * n), numbers(r * n), numbers(m * r))
        }),
        alpha in 0.25f64..4.0,
    ) {
        let dir = adapter_dir(alpha, &a, &b, rank);
        let after = adapter::apply(one_weight(&w, rows, cols), dir.path()).unwrap();
        let scale = alpha / rank as f64;
        let expected: Vec<f64> = (0..rows * cols).map(|i| {
            let delta: f64 = (0..rank)
                .map(|j| f64::from(b[i / cols * rank + j]) * f64::from(a[j * cols + i % cols]))
                .sum();
            f64::from(w[i]) + scale * delta
        }).collect();
        let found = after.tensors["w.weight"].to_f32().unwrap();
        prop_assert!(found.iter().zip(&expected).all(|(f, e)| (f64::from(*f) - e).abs() < 2e-5));

        let idle = adapter_dir(0.0, &a, &b, rank);
        let before = one_weight(&w, rows, cols);
        let after = adapter::apply(before.clone(), idle.path()).unwrap();
        prop_assert_eq!(after.tensors["w.weight"].bytes(), before.tensors["w.weight"].bytes());
    }
}
