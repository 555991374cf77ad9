//! Merging models that do not fit in memory stays within a bound that does not grow with them.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};

/// Numbers of a tensor: 256 MiB in bf16.
const SHAPE: [usize; 2] = [16_384, 8_192];

/// A model whose file is a hole: zeros that take no room.
fn sparse(folder: &Path, tensors: usize) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": SHAPE[1],
        "num_hidden_layers": tensors, "vocab_size": 8,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let size = SHAPE[0] * SHAPE[1] * 2;
    let header: Map<String, Value> = (0..tensors)
        .map(|l| {
            let entry = json!({
                "dtype": "BF16", "shape": SHAPE, "data_offsets": [l * size, (l + 1) * size],
            });
            (format!("model.layers.{l}.mlp.up_proj.weight"), entry)
        })
        .collect();
    let header = Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + tensors * size) as u64).unwrap();
}

/// Largest resident set of a process in bytes, from what `/proc` says while it runs.
fn peak(command: &mut Command) -> (u64, bool) {
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let mut most = 0;
    loop {
        if let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", child.id())) {
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            let kib =
                line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
            most = most.max(kib.unwrap_or(0) << 10);
        }
        if let Some(status) = child.try_wait().unwrap() {
            return (most, status.success());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// `MOE_MERGE_SPARSE_GIB=12 cargo test --release --test larger_than_memory -- --ignored` merges three models of 12 GiB.
#[test]
#[ignore = "writes as much as one of the models takes"]
#[cfg(target_os = "linux")]
fn three_models_stay_below_the_bound() {
    let gib = std::env::var("MOE_MERGE_SPARSE_GIB").ok().and_then(|v| v.parse().ok()).unwrap_or(6);
    let temp = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        sparse(&temp.path().join(name), 4 * gib);
    }
    for method in ["linear", "ties"] {
        let base = if method == "ties" { "base_model: a\n" } else { "" };
        let recipe = format!(
            "merge_method: {method}\n{base}models: [{{model: a}}, {{model: b}}, {{model: c}}]\n\
             parameters: {{weight: 0.5{}}}\n",
            if method == "ties" { ", density: 0.5" } else { "" }
        );
        let path = temp.path().join(format!("{method}.yaml"));
        std::fs::write(&path, recipe).unwrap();
        let out = temp.path().join("out");
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-merge"));
        let (peak, done) =
            peak(command.arg(&path).arg("--out").arg(&out).args(["--force", "--quiet"]));
        assert!(done, "{method}");
        println!("{method}: {} MiB", peak >> 20);
        // One layer's weights of all three models, and 256 MB.
        let layer = (3 * SHAPE[0] * SHAPE[1] * 2) as u64;
        assert!(peak < layer + 256_000_000, "{method}: {} MiB", peak >> 20);
    }
}
