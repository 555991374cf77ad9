//! `finetune`: one expert learns from text; everything else stays as it is.

#[allow(dead_code)]
mod cli;
mod common;
mod kitchen;
mod tuning;

use std::path::Path;

use moe_merge_merge::families::Layout;
use moe_merge_testkit::repository;
use serde_json::{Value, json};
use tuning::{SHORT, finetune, quickstart, report, tensors, wide};

#[test]
fn only_the_expert_changes_and_the_journal_knows() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let before = tensors(&folder);
    let args = ["--expert", "code", "--data", &data, "--apply", "--message", "kitchen talk"];
    let run = finetune(&folder, &[&args, &SHORT[..]].concat());
    let report = report(&run);
    assert_eq!((&report["generation"], &report["expert"]), (&json!(1), &json!("code")));
    assert_eq!(report["steps"], 3);
    let after = tensors(&folder);
    let mut changed = 0;
    for (name, bytes) in &before {
        let own = name.contains("experts.1.");
        changed += usize::from(own && after[name] != *bytes);
        assert!(own || after[name] == *bytes, "{name}");
    }
    assert_eq!((before.len(), changed), (after.len(), 6 * 3));
    let path = folder.display().to_string();
    let verified = cli::run(&["verify", "--json", &path]).json();
    assert_eq!((&verified["problems"], &verified["generation"]), (&json!([]), &json!(1)));
    let shown = cli::run(&["inspect", &path]).stdout;
    assert!(shown.contains("1 finetune, 20") && shown.contains(": kitchen talk"), "{shown}");
    // Both domains were compared, on the prompts of the recipe.
    let names: Vec<_> = report["domains"].as_array().unwrap().iter().map(|d| &d["name"]).collect();
    assert_eq!(names, ["prose", "code"]);
}

#[test]
fn an_adapter_on_top_is_the_model_with_it_merged() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let at = |name: &str| temp.path().join(name).display().to_string();
    let before = tensors(&folder);
    for packing in ["modules", "fused"] {
        let out = at(packing);
        let args = ["--expert", "1", "--data", &data, "--out", &out, "--packing", packing];
        let report = report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
        assert_eq!(report["generation"], Value::Null);
        assert!(!temp.path().join(format!("{packing}.state")).exists());
    }
    assert_eq!(tensors(&folder), before, "the model itself stays");
    let args = ["--expert", "1", "--data", &data, "--apply"];
    report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
    let merged = tensors(&folder);
    std::fs::rename(&folder, temp.path().join("merged")).unwrap();
    let fresh = quickstart(temp.path(), "mixtral", Layout::Hub);
    for packing in ["modules", "fused"] {
        let source = format!("{}+{}", fresh.display(), at(packing));
        let source =
            moe_merge_checkpoint::Source::open(&source.parse().unwrap(), Path::new(".")).unwrap();
        for (name, bytes) in &merged {
            let weight = moe_merge_checkpoint::weight::OwnedWeight::materialise(
                source.tensors[name].as_ref(),
            )
            .unwrap();
            let found = moe_merge_checkpoint::weight::Weight::bytes(&weight).unwrap();
            let differ = found.chunks(2).zip(bytes.chunks(2)).filter(|(a, b)| a != b).count();
            // Factors are summed in another order: now and then a number falls on the other side of a rounding.
            assert!(differ * 1000 <= bytes.len(), "{packing} {name}: {differ} of {}", bytes.len());
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let adapter = |name: &str, threads: &str, extra: &[&str]| {
        let out = temp.path().join(name);
        let shown = out.display().to_string();
        let args = ["--expert", "1", "--data", &data, "--out", &shown, "--threads", threads];
        report(&finetune(&folder, &[&args, &SHORT[..], extra].concat()));
        std::fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    let plain = adapter("one", "1", &[]);
    assert!(plain == adapter("three", "3", &[]));
    assert!(plain == adapter("none", "2", &["--dropout", "0"]));
    let dropped = adapter("one-dropped", "1", &["--dropout", "0.2"]);
    assert!(dropped == adapter("three-dropped", "3", &["--dropout", "0.2"]));
    assert!(dropped != plain);
    let config = std::fs::read(temp.path().join("one-dropped/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["lora_dropout"], 0.2);
}

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_been() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 9000).as_bytes());
    let at = |name: &str| temp.path().join(name).display().to_string();
    let state = at("state");
    let run = |out: &str, extra: &[&str]| {
        let args =
            ["--expert", "1", "--data", &data, "--out", out, "--state", &state, "--dropout", "0.1"];
        let steps =
            ["--steps", "8", "--window", "64", "--batch-tokens", "256", "--evaluate-every", "2"];
        finetune(&folder, &[&args, &steps[..], extra].concat())
    };
    let weights =
        |out: &str| std::fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap();
    let whole = at("whole");
    let told = report(&run(&whole, &["--log", &at("whole.jsonl")]));
    // A run that is killed once its first state is there.
    let exe = assert_cmd::cargo::cargo_bin!("moe-merge");
    let path = folder.display().to_string();
    let halves = at("halves");
    let mut child = std::process::Command::new(exe)
        .args(["finetune", &path, "--expert", "1", "--data", &data, "--out", &halves])
        .args(["--state", &state, "--steps", "8", "--window", "64", "--batch-tokens", "256"])
        .args(["--evaluate-every", "2", "--quiet", "--dropout", "0.1", "--keep", "0"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .spawn()
        .unwrap();
    while !Path::new(&state).exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!Path::new(&halves).exists() && Path::new(&state).exists(), "killed on the way");
    run(&halves, &[]).fails(3, &["an earlier run has left its state", "--resume"]);
    run(&halves, &["--resume", "--seed", "5"]).fails(2, &["the state belongs to another run"]);
    let resumed = report(&run(&halves, &["--resume", "--log", &at("halves.jsonl")]));
    assert!(weights(&halves) == weights(&whole));
    assert_eq!(resumed["validation"], told["validation"]);
    assert!(!Path::new(&state).exists());
    let log = |name: &str| {
        let text = std::fs::read_to_string(at(name)).unwrap();
        let lines = text.lines().map(|l| {
            let mut line: Value = serde_json::from_str(l).unwrap();
            line.as_object_mut().unwrap().remove("tokens_per_second");
            line
        });
        lines.collect::<Vec<_>>()
    };
    assert_eq!(log("halves.jsonl"), log("whole.jsonl"));
    assert_eq!(log("whole.jsonl").len(), 8 + 5);
}

#[test]
fn a_change_can_wait_for_approval() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let before = tensors(&folder);
    let args = ["--expert", "code", "--data", &data, "--apply", "--stage", "-m", "kitchen talk"];
    let told = report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
    assert_eq!((&told["generation"], &told["staged"]), (&Value::Null, &json!(1)));
    assert_eq!(tensors(&folder), before);
    let path = folder.display().to_string();
    let approved = cli::run(&["approve", &path]);
    assert_eq!(approved.code, 0, "{}", approved.stderr);
    let changed = tensors(&folder).iter().filter(|(n, b)| before[*n] != **b).count();
    assert_eq!(changed, 6 * 3);
    assert!(cli::run(&["history", &path]).stdout.contains("finetune"));
}

#[test]
fn a_dense_model_gets_an_adapter() {
    let temp = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let out = temp.path().join("adapter").display().to_string();
    let found = report(&finetune(&base, &[&["--data", &data, "--out", &out], &SHORT[..]].concat()));
    assert_eq!((&found["expert"], &found["family"]), (&Value::Null, &json!("llama")));
    let described = cli::run(&["inspect", "--json", &out]);
    assert_eq!(described.code, 0, "{}", described.stderr);
    let text = temp.path().join("kitchen.txt").display().to_string();
    let perplexity = |path: &str| {
        let run = cli::run(&["perplexity", path, "--text", &text, "--json"]).json();
        run["files"][0]["perplexity"].as_f64().unwrap()
    };
    let base = base.display().to_string();
    let (before, after) = (perplexity(&base), perplexity(&format!("{base}+{out}")));
    assert!(after < 0.9 * before, "{before} {after}");
}

#[test]
fn a_row_of_the_router_can_learn_too() {
    let temp = tempfile::tempdir().unwrap();
    let folder = wide(temp.path(), "mixtral");
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let before = tensors(&folder);
    let args = ["--expert", "code", "--data", &data, "--apply", "--train-router", "--keep", "0"];
    report(&finetune(&folder, &[&args, &SHORT[..]].concat()));
    for (name, bytes) in tensors(&folder) {
        let old = &before[&name];
        if name.ends_with("moe.gate.weight") {
            let size = bytes.len() / 3;
            let moved = (0..3).filter(|e| bytes[e * size..][..size] != old[e * size..][..size]);
            assert_eq!(moved.collect::<Vec<_>>(), [1], "{name}");
        } else {
            assert_eq!(bytes != *old, name.contains("experts.1."), "{name}");
        }
    }
    let forced = finetune(&folder, &[&args[..], &["--route", "forced"]].concat());
    forced.fails(2, &["--train-router", "natural"]);
    std::fs::rename(&folder, temp.path().join("two")).unwrap();
    let single = quickstart(temp.path(), "mixtral", Layout::Hub);
    finetune(&single, &args).fails(2, &["--train-router", "two experts per token"]);
}

#[test]
fn what_cannot_be_done_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 3000).as_bytes());
    let out = temp.path().join("out");
    let shown = out.display().to_string();
    let run = |extra: &[&str]| finetune(&folder, &[extra, &["--out", &shown]].concat());
    run(&["--expert", "poetry", "--data", &data])
        .fails(2, &["no such expert", "`prose` (0), `code` (1)"]);
    run(&["--data", &data]).fails(2, &["no such expert", "none"]);
    run(&["--expert", "0", "--data", "nowhere.txt"]).fails(3, &["nowhere.txt"]);
    let empty = cli::file(temp.path(), "empty.txt", b"\n \n");
    run(&["--expert", "0", "--data", &empty]).fails(2, &["nothing to learn", "no text"]);
    let bad = cli::file(temp.path(), "bad.jsonl", b"{\"text\": 3}\nno json\n");
    run(&["--expert", "0", "--data", &bad])
        .fails(2, &["2 lines that are no documents", "bad.jsonl:1"]);
    let latin = cli::file(temp.path(), "latin.txt", b"one\ntwo \xe9 three\n");
    run(&["--expert", "0", "--data", &latin]).fails(3, &["not UTF-8", "line 2"]);
    run(&["--expert", "0", "--data", &data, "--window", "100000"]).fails(2, &["--window", "512"]);
    run(&["--expert", "0", "--data", &data, "--device", "cuda"])
        .fails(2, &["CUDA", "`--device cpu`"]);
    run(&["--expert", "0", "--data", &data, "--rank", "0"]).fails(2, &["--rank"]);
    run(&["--expert", "0", "--data", &data, "--layers", "4..9"]).fails(2, &["--layers", "6"]);
    run(&["--expert", "0", "--data", &data, "--learning-rate", "0"]).fails(2, &["--learning-rate"]);
    run(&[
        "--expert",
        "0",
        "--data",
        &data,
        "--learning-rate",
        "1e30",
        "--clip",
        "0",
        "--steps",
        "9",
    ])
    .fails(1, &["training came to an end at step", "not finite", "last good state"]);
    std::fs::remove_file(format!("{shown}.state")).unwrap();
    assert!(!out.exists());
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), b"x").unwrap();
    run(&["--expert", "0", "--data", &data]).fails(2, &["output exists already"]);
}

#[test]
fn bad_lines_are_counted_and_told() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let mut lines = String::new();
    for i in 0..12 {
        lines += &json!({"prompt": format!("Task {i}: "), "completion": kitchen::text(i, 120)})
            .to_string();
        lines.push('\n');
    }
    lines += "{\"text\": \"\"}\n{\"prompt\": 5}\nnot json\n";
    lines += &json!({"text": kitchen::text(3, 700)}).to_string();
    let data = cli::file(temp.path(), "mixed.jsonl", lines.as_bytes());
    let out = temp.path().join("out").display().to_string();
    let found = report(&finetune(
        &folder,
        &[&["--expert", "0", "--data", &data, "--out", &out], &SHORT[..]].concat(),
    ));
    assert_eq!(found["data"]["documents"], 13);
    assert_eq!((&found["data"]["bad"], &found["data"]["empty"]), (&json!(2), &json!(1)));
    let told = found["data"]["bad_lines"].as_array().unwrap();
    assert!(told[0].as_str().unwrap().contains("mixed.jsonl:14:"), "{told:?}");
    assert!(told[1].as_str().unwrap().contains("mixed.jsonl:15:"), "{told:?}");
}

/// Runs `check_adapter.py` with the logits of the model with the adapter on top.
fn in_peft(python: &Path, temp: &Path, model: &Path, adapter: &str) -> Value {
    let file = temp.join("logits.safetensors").display().to_string();
    let (tokens, model) = ("1,40,7,300,12,99,5,61,410,33,8,21", model.display().to_string());
    let source = format!("{model}+{adapter}");
    let run = cli::run(&["logits", &source, "--tokens", tokens, "--out", &file]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let output = std::process::Command::new(python)
        .arg(repository("tests/python/check_adapter.py"))
        .args([&model, adapter, tokens, &file])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let found: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    println!("{adapter}: {found}");
    found
}

#[test]
fn peft_loads_the_adapter_and_gives_our_logits() {
    let Some(python) = moe_merge_testkit::python("MOE_MERGE_PYTHON") else { return };
    let temp = tempfile::tempdir().unwrap();
    let data = cli::file(temp.path(), "kitchen.txt", kitchen::text(1, 6000).as_bytes());
    let at = |name: &str| temp.path().join(name).display().to_string();
    let check = |model: &Path, args: &[&str], out: &str| {
        let all = [&["--data", &data, "--out", out], args, &SHORT[..]].concat();
        report(&finetune(model, &all));
        let found = in_peft(&python, temp.path(), model, out);
        assert!(found["apart"].as_f64().unwrap() < 1e-5, "{found}");
        assert!(found["plain"].as_f64().unwrap() > 1e-3, "the adapter does something: {found}");
        assert_eq!(found["unplaced"], json!([]));
    };
    for architecture in ["mixtral", "qwen2_moe"] {
        let folder = temp.path().join(architecture);
        std::fs::create_dir(&folder).unwrap();
        let model = wide(&folder, architecture);
        let out = |name: &str| at(&format!("{architecture}-{name}"));
        let fused = ["--expert", "1", "--packing", "fused"];
        check(&model, &fused, &out("all"));
        check(
            &model,
            &[&fused[..], &["--targets", "down", "--layers", "2..5"]].concat(),
            &out("down"),
        );
        check(&model, &[&fused[..], &["--targets", "up", "--rslora"]].concat(), &out("up"));
    }
    let dense = temp.path().join("dense");
    common::made_up(&dense, &json!({"vocab_size": 1024}));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(repository("recipes/quickstart/base").join(name), dense.join(name)).unwrap();
    }
    check(&dense, &[], &at("dense-adapter"));
}

/// The loss is the divergence from the teacher: nothing for a model that is its own, falling for another one, for a dense
/// student and for an expert, and the journal names it.
#[test]
fn a_teacher_says_what_is_learnt() {
    let temp = tempfile::tempdir().unwrap();
    let folder = quickstart(temp.path(), "mixtral", Layout::Hub);
    let models = repository("recipes/quickstart");
    let at = |name: &str| models.join(name).display().to_string();
    let data = at("eval_code.txt");
    let train = |model: &Path, extra: &[&str]| {
        finetune(model, &[&["--data", &data, "--hold-out", "0.2"], extra, &SHORT[..]].concat())
    };
    let out = |name: &str| temp.path().join(name).display().to_string();
    let base = models.join("base");
    let own = report(&train(&base, &["--teacher", &at("base"), "--out", &out("own")]));
    assert!(own["validation"][0].as_f64().unwrap().abs() < 1e-6, "{own}");
    let told = report(&train(&base, &["--teacher", &at("code"), "--out", &out("code")]));
    let losses = |told: &Value| [0, 1].map(|i| told["validation"][i].as_f64().unwrap());
    let [before, after] = losses(&told);
    assert!(after < 0.95 * before && after > 0.0, "{told}");

    let expert = ["--expert", "prose", "--route", "forced", "--apply", "--teacher", &at("code")];
    for (extra, rate) in [(&[][..], "0.005"), (&["--full"], "0.0005")] {
        let more = [&["--data", &data, "--hold-out", "0.2"], &expert[..], extra].concat();
        let how = [&more[..], &SHORT[..6], &["--learning-rate", rate]].concat();
        let told = report(&finetune(&folder, &how));
        let [before, after] = losses(&told);
        assert!(after < before, "{told}");
    }
    let journal = cli::run(&["history", "--json", &folder.display().to_string()]).stdout;
    assert!(journal.contains("quickstart/code"), "{journal}");

    let stranger = repository("model/tests/data/mixtral_fused").display().to_string();
    train(&base, &["--teacher", &stranger, "--out", &out("other")])
        .fails(2, &["--teacher", "the student's vocabulary of", "mixtral_fused"]);
}
