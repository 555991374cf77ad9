//! `add`, `drop`, `extract`, `diff`, and routers that are fitted with a change.

mod change;
#[allow(dead_code)]
mod cli;
mod common;

use std::path::Path;

use change::{
    INDEX, dense, files, model_files, moe, pairs, swapped, tensors, text, verified, with,
};
use common::layouts::{ALL, lay_out};
use moe_merge_merge::families::Layout;
use moe_merge_model::Model;
use serde_json::{Value, json};

const TOKENS: [u32; 12] = [1, 17, 40, 99, 3, 250, 12, 77, 8, 140, 61, 5];

fn run(args: &[&str]) -> Value {
    cli::run(&[args, &["--json", "--quiet"]].concat()).json()
}

/// Rows of the router of a layer, bytes of each.
fn router(folder: &Path, layer: usize, experts: usize) -> Vec<Vec<u8>> {
    let bytes = &tensors(folder)[&format!("model.layers.{layer}.block_sparse_moe.gate.weight")];
    bytes.chunks(bytes.len() / experts).map(<[u8]>::to_vec).collect()
}

#[test]
fn an_expert_comes_and_goes() {
    for how in ALL {
        let temp = tempfile::tempdir().unwrap();
        let folder = lay_out(moe(temp.path(), how.name, how.layout, ""), *how);
        let path = text(&folder);
        let (before, on_disk) = (tensors(&folder), model_files(&folder));
        let gates = router(&folder, 2, 2);

        let math = text(&dense("math"));
        let plan = run(&["add", &path, "--with", &math, "--dry-run"]);
        assert_eq!(plan["generation"], Value::Null);
        assert_eq!(model_files(&folder), on_disk);
        let report = run(&["add", &path, "--with", &math, "--message", "sums"]);
        assert_eq!(
            (&report["expert"], &report["name"]),
            (&json!(2), &json!("math")),
            "{}",
            how.name
        );
        let after = tensors(&folder);
        assert_eq!(after.len(), before.len() + 18);
        for (name, bytes) in before.iter().filter(|(name, _)| !name.contains("gate.weight")) {
            assert_eq!(after[name], *bytes, "{} {name}", how.name);
        }
        for (ours, theirs) in pairs(2, 0..6) {
            assert_eq!(after[&ours], tensors(&dense("math"))[&theirs], "{} {ours}", how.name);
        }
        assert_eq!(router(&folder, 2, 3)[..2], gates[..]);
        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["num_local_experts"], 3);
        let found = cli::run(&["verify", "--json", &path]).json();
        assert_eq!(
            (&found["problems"], &found["extra_tensors"]),
            (&json!([]), &json!([])),
            "{}",
            how.name
        );

        // The first one goes: the others move up, and nothing of it is left in what loaders read.
        let report = run(&["drop", &path, "--expert", "0"]);
        assert_eq!(report["generation"], json!(2));
        let now = tensors(&folder);
        for (old, new) in [(1, 0), (2, 1)] {
            for ((ours, _), (theirs, _)) in pairs(new, 0..6).into_iter().zip(pairs(old, 0..6)) {
                assert_eq!(now[&ours], after[&theirs], "{} {ours}", how.name);
            }
        }
        assert_eq!(router(&folder, 2, 2)[..], router_of(&after, 2, 3)[1..]);
        let gone = &before[&pairs(0, 0..1)[0].0];
        for (name, hash) in model_files(&folder) {
            let bytes = std::fs::read(folder.join(&name)).unwrap();
            let found = bytes.windows(gone.len()).any(|w| w == &gone[..]);
            assert!(!found, "{}: {name} {hash} still holds the dropped expert", how.name);
        }
        verified(&folder, 2);
        Model::open(&common::open(&folder)).unwrap();

        let back = run(&["rollback", &path, "--to", "0"]);
        assert_eq!(back["generation"], json!(3));
        assert_eq!(model_files(&folder), on_disk, "{}", how.name);
        verified(&folder, 3);
    }
}

fn router_of(tensors: &change::Tensors, layer: usize, experts: usize) -> Vec<Vec<u8>> {
    let bytes = &tensors[&format!("model.layers.{layer}.block_sparse_moe.gate.weight")];
    bytes.chunks(bytes.len() / experts).map(<[u8]>::to_vec).collect()
}

/// Adding an expert and dropping it again is no change of what the model computes.
#[test]
fn every_family_adds_and_drops() {
    for family in ["mixtral", "granitemoeshared", "ernie4_5_moe", "deepseek"] {
        let temp = tempfile::tempdir().unwrap();
        let folder = moe(temp.path(), "moe", Layout::Hub, &format!("architecture: {family}\n"));
        let path = text(&folder);
        let logits = || common::logits(&Model::open(&common::open(&folder)).unwrap(), &TOKENS);
        let (before, values) = (tensors(&folder), logits());
        run(&["add", &path, "--with", &text(&dense("math"))]);
        verified(&folder, 1);
        let three = logits();
        assert_eq!(three.len(), values.len());
        run(&["drop", &path, "--expert", "math"]);
        verified(&folder, 2);
        assert_eq!(logits(), values, "{family}");
        assert_eq!(tensors(&folder), before, "{family}");
        run(&["drop", &path, "--expert", "prose"]);
        verified(&folder, 3);
        assert_eq!(logits().len(), values.len());
        cli::run(&["drop", &path, "--expert", "code"])
            .fails(2, &["at least one expert", "extract"]);
    }
}

#[test]
fn fewer_experts_than_a_token_visits() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let config = folder.join("config.json");
    let text_of = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text_of.replace("\"num_experts_per_tok\": 1", "\"num_experts_per_tok\": 2"),
    )
    .unwrap();
    let report = run(&["drop", &text(&folder), "--expert", "1"]);
    assert!(report["warnings"].to_string().contains("`num_experts_per_tok` is 1 now"), "{report}");
    let now: Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    assert_eq!((&now["num_experts_per_tok"], &now["num_local_experts"]), (&json!(1), &json!(1)));
}

#[test]
fn an_expert_becomes_a_dense_model() {
    let temp = tempfile::tempdir().unwrap();
    for family in ["mixtral", "deepseek", "granitemoeshared", "ernie4_5_moe"] {
        let name = format!("{family}-moe");
        let folder = moe(temp.path(), &name, Layout::Hub, &format!("architecture: {family}\n"));
        let report = run(&["extract", &text(&folder), "--expert", "code"]);
        let out = temp.path().join(format!("{name}-code"));
        assert_eq!((&report["output"], &report["family"]), (&json!(out), &json!("llama")));
        // The base with the expert's MLPs.
        let mut expected = tensors(&dense("base"));
        for (name, bytes) in tensors(&dense("code")) {
            if name.contains(".mlp.") {
                expected.insert(name, bytes);
            }
        }
        assert_eq!(tensors(&out), expected, "{family}");
        let found = cli::run(&["verify", "--json", &text(&out)]).json();
        assert_eq!(found["problems"], json!([]));
        let logits =
            |folder: &Path| common::logits(&Model::open(&common::open(folder)).unwrap(), &TOKENS);
        let base = temp.path().join("expected");
        let _ = std::fs::remove_dir_all(&base);
        std::fs::create_dir(&base).unwrap();
        std::fs::copy(dense("base").join("config.json"), base.join("config.json")).unwrap();
        let views: Vec<_> = expected
            .iter()
            .map(|(name, bytes)| {
                let shape = common::open(&out).tensors[name].shape().to_vec();
                let dtype = safetensors::Dtype::BF16;
                (name, safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap())
            })
            .collect();
        std::fs::write(
            base.join("model.safetensors"),
            safetensors::serialize(views, None).unwrap(),
        )
        .unwrap();
        assert_eq!(logits(&out), logits(&base), "{family}");
        cli::run(&["extract", &text(&folder), "--expert", "code"])
            .fails(2, &["output exists already", "--force"]);
    }
    let olmoe = temp.path().join("olmoe");
    let config = json!({"model_type": "olmoe", "num_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 4});
    common::made_up(&olmoe, &config);
    cli::run(&["extract", &text(&olmoe), "--expert", "0"])
        .fails(2, &["no dense family has its layers", "olmoe"]);
    assert!(!temp.path().join("olmoe-0").exists());
}

#[test]
fn names_have_to_differ() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let (path, before) = (text(&folder), files(&folder));
    let code = text(&dense("code"));
    cli::run(&["add", &path, "--with", &code])
        .fails(2, &["an expert is called `code` already", "--name NAME"]);
    cli::run(&["drop", &path, "--expert", "math"]).fails(2, &["no expert is called `math`"]);
    assert_eq!(files(&folder), before);
    let report = run(&["add", &path, "--with", &code, "--name", "code2"]);
    assert_eq!(report["experts"], json!(["prose", "code", "code2"]));
    let shown = cli::run(&["inspect", &path]).stdout;
    assert!(shown.contains("expert 2: code (") || shown.contains("expert 2: code"), "{shown}");
}

#[test]
fn what_differs_between_generations() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let path = text(&folder);
    let before = tensors(&folder);
    swapped(&folder, "1", &text(&dense("math")), &["--layers", "0..2"]);
    let found = run(&["diff", &path, "0", "1"]);
    assert_eq!(found["tensors"].as_array().unwrap().len(), 6);
    assert_eq!(found["same"], json!(before.len() - 6));
    let group = &found["groups"][0];
    assert_eq!((&group["name"], &group["changed"]), (&json!("expert 1"), &json!(6)));
    // Against the numbers themselves.
    let name = "model.layers.0.block_sparse_moe.experts.1.w1.weight";
    let (a, b) = (&before[name], &tensors(&dense("math"))["model.layers.0.mlp.gate_proj.weight"]);
    let numbers = |bytes: &[u8]| -> Vec<f64> {
        let bits = |c: &[u8]| u32::from(u16::from_le_bytes([c[0], c[1]])) << 16;
        bytes.chunks(2).map(|c| f64::from(f32::from_bits(bits(c)))).collect()
    };
    let (a, b) = (numbers(a), numbers(b));
    let square = |v: f64| v * v;
    let between: f64 = a.iter().zip(&b).map(|(a, b)| square(b - a)).sum();
    let expected = (between / a.iter().map(|a| square(*a)).sum::<f64>()).sqrt();
    let tensor = &found["tensors"][0];
    assert_eq!(tensor["tensor"], name);
    assert!(
        (tensor["difference"].as_f64().unwrap() - expected).abs() < 1e-9,
        "{tensor} {expected}"
    );

    run(&["drop", &path, "--expert", "0"]);
    let found = run(&["diff", &path, "0"]);
    assert_eq!(found["to"], json!(2));
    assert_eq!(found["config"][0]["key"], "num_local_experts");
    let text = cli::run(&["diff", &path, "0", "2"]).stdout;
    assert!(text.contains("`num_local_experts` 2 -> 1") && text.contains("expert 1"), "{text}");
    let same = run(&["diff", &path, "1", "1"]);
    assert_eq!((&same["tensors"], &same["same"]), (&json!([]), &json!(before.len())));
    cli::run(&["diff", &path, "0", "9"]).fails(2, &["no such generation"]);
}

const PROSE: [&str; 4] = [
    "the mill seemed gentle when the bells rang, and Mara wandered home",
    "that winter the station was quiet; nobody remembered the letter",
    "the old inn near the river looked stubborn in the morning light",
    "Petra rested by the crooked workshop and felt lonely long ago",
];
const CODE: [&str; 4] = [
    "pub fn split_depth(depth: i32) -> i32 { let mut start = depth; start }",
    "fn main() { let values = vec![1, 2, 3]; for v in values { print(v); } }",
    "impl Parser { fn next(&mut self) -> Option<usize> { self.at += 1; None } }",
    "self.build(step, step)?; let start = 64; Ok(step)",
];
const MATH: [&str; 4] = [
    "17 * 9 = 153, so 153 / 17 = 9.\n16 + 55 = 71. Then 71 - 55 = 16.\n",
    "Sequence: 1, 2, 3, 4, 5. The difference is 1 and the next term is 6.\n",
    "Solve 9x + 4 = 22. Subtract 4: 9x = 18. Divide by 9: x = 2.\n",
    "The sum of 41, 58 and 7 is 106; the mean of 82 and 116 is 99.\n",
];

/// A new expert with a fitted row gets its text, and the others keep theirs; their rows are not touched.
#[test]
fn a_new_row_finds_its_text() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let path = text(&folder);
    let both = json!({"prose": PROSE, "code": CODE}).to_string();
    let both = cli::file(temp.path(), "both.json", both.as_bytes());
    run(&["calibrate", &path, "--prompts", &both]);
    let gates = router(&folder, 3, 2);
    let all = json!({"prose": PROSE, "code": CODE, "math": MATH}).to_string();
    let all = cli::file(temp.path(), "all.json", all.as_bytes());
    let math = text(&dense("math"));
    let report = run(&["add", &path, "--with", &math, "--calibrate", "--prompts", &all]);
    assert_eq!(router(&folder, 3, 3)[..2], gates[..], "the old rows stay");
    let effect = &report["effect"]["domains"];
    let domain = |name: &str| {
        let all = effect.as_array().unwrap();
        all.iter().find(|d| d["domain"] == name).unwrap().clone()
    };
    let first = |name: &str| domain(name)["first"][1].as_f64().unwrap();
    assert!(first("math") > 0.6, "{effect}");
    assert!(first("prose") < 0.3 && first("code") < 0.3, "{effect}");
    let perplexity = |at: usize| domain("math")["perplexity"][at].as_f64().unwrap();
    assert!(perplexity(1) < perplexity(0), "the new expert helps on its own text: {effect}");
    verified(&folder, 2);

    // The same with all rows.
    run(&["rollback", &path]);
    let report = run(&["add", &path, "--with", &math, "--calibrate", "all", "--prompts", &all]);
    assert_ne!(router(&folder, 3, 3)[..2], gates[..]);
    assert_eq!(report["experts"], json!(["prose", "code", "math"]));
    verified(&folder, 4);

    // Without text there is nothing to fit to.
    let bare = moe(temp.path(), "bare", Layout::Hub, "");
    std::fs::remove_file(bare.join("moe-merge.yaml")).unwrap();
    let _ = std::fs::remove_file(bare.join("mergekit_moe_config.yml"));
    let before = files(&bare);
    cli::run(&["swap", &text(&bare), "--expert", "0", "--with", &math, "--calibrate"])
        .fails(2, &["no text to fit the routers to", "--prompts FILE"]);
    assert_eq!(files(&bare), before);
}

/// A swap that also fits the rows is one generation, and one rollback.
#[test]
fn a_swap_with_new_rows_is_one_generation() {
    let temp = tempfile::tempdir().unwrap();
    let folder = moe(temp.path(), "moe", Layout::Hub, "");
    let (before, on_disk) = (tensors(&folder), model_files(&folder));
    let prompts = json!({"prose": MATH, "code": CODE}).to_string();
    let prompts = cli::file(temp.path(), "prompts.json", prompts.as_bytes());
    let report =
        swapped(&folder, "prose", &text(&dense("math")), &["--calibrate", "--prompts", &prompts]);
    assert_eq!(report["generation"], json!(1));
    assert_eq!(report["calibrated"]["rows"], "new");
    let now = tensors(&folder);
    let expected = with(&before, &tensors(&dense("math")), &pairs(0, 0..6));
    for (name, bytes) in &now {
        let is_router = name.contains("gate.weight");
        assert_eq!(expected[name] != *bytes, is_router, "{name}");
        if is_router {
            let half = bytes.len() / 2;
            assert_eq!(expected[name][half..], bytes[half..], "the other row stays");
        }
    }
    verified(&folder, 1);
    run(&["rollback", &text(&folder)]);
    assert_eq!(model_files(&folder), on_disk);
    assert!(folder.join(INDEX).exists());
}

/// Families whose experts come with shared ones, dense first layers, other names, other scores.
#[test]
fn models_of_other_programs_of_every_family() {
    let families = [
        json!({"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}),
        json!({"model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}),
        json!({"model_type": "qwen3_moe", "num_experts": 3, "num_local_experts": 3,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": [1]}),
        json!({"model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
        json!({"model_type": "deepseek", "n_routed_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1}),
        json!({"model_type": "deepseek_v2", "n_routed_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24,
            "v_head_dim": 16, "routed_scaling_factor": 2.5, "topk_method": "greedy"}),
        json!({"model_type": "ernie4_5_moe", "moe_num_experts": 3, "moe_k": 2,
            "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
        json!({"model_type": "granitemoeshared", "num_local_experts": 3, "num_experts_per_tok": 2,
            "shared_intermediate_size": 48}),
    ];
    let temp = tempfile::tempdir().unwrap();
    for family in families {
        let name = family["model_type"].as_str().unwrap();
        let folder = temp.path().join(name);
        common::made_up(&folder, &family);
        let path = text(&folder);
        let (before, on_disk) = (tensors(&folder), model_files(&folder));
        let logits = || {
            common::logits(&Model::open(&common::open(&folder)).unwrap(), &TOKENS.map(|t| t % 96))
        };
        let first = logits();

        // Expert 2 in the place of expert 0: both are the same then.
        run(&["swap", &path, "--expert", "0", "--with", &format!("{path}#2"), "--no-forecast"]);
        verified(&folder, 1);
        assert_ne!(logits(), first, "{name}");
        let found = run(&["diff", &path, "0", "1"]);
        let groups: Vec<&str> = found["groups"]
            .as_array()
            .unwrap()
            .iter()
            .map(|g| g["name"].as_str().unwrap())
            .collect();
        let expected = if name == "granitemoeshared" { "experts" } else { "expert 0" };
        assert_eq!(groups, [expected], "{name}");
        run(&["rollback", &path]);
        assert_eq!((logits(), model_files(&folder)), (first.clone(), on_disk.clone()), "{name}");

        let report =
            run(&["add", &path, "--with", &format!("{path}#1"), "--name", "twin", "--no-forecast"]);
        assert_eq!(report["experts"], json!(["0", "1", "2", "twin"]), "{name}");
        verified(&folder, 3);
        assert_eq!(logits().len(), first.len());
        // Without the first expert, the twin is the third.
        run(&["drop", &path, "--expert", "0", "--no-forecast"]);
        verified(&folder, 4);
        let report = run(&["drop", &path, "--expert", "twin", "--no-forecast"]);
        assert_eq!(report["experts"], json!(["1", "2"]), "{name}");
        verified(&folder, 5);
        let two = logits();
        assert!(two.iter().all(|v| v.is_finite()) && two != first, "{name}");
        run(&["rollback", &path, "--to", "0"]);
        assert_eq!((tensors(&folder), model_files(&folder)), (before, on_disk), "{name}");
        verified(&folder, 6);
    }
}
