//! The program is killed while it merges: the next run goes on from what is safe on the disk, and writes the same bytes.

#[allow(dead_code)]
mod cli;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// Tensors of 33 MiB, two in each file of weights: what is safe is noted between them, too.
const TENSORS: usize = 9;
const SHAPE: [usize; 2] = [33 * 512, 1024];

/// A model of repeated small numbers in bf16, others in each tensor.
fn model(folder: &Path, seed: u16) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": SHAPE[1],
        "num_hidden_layers": TENSORS, "vocab_size": 8,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let size = SHAPE[0] * SHAPE[1] * 2;
    let header: Map<String, Value> = (0..TENSORS)
        .map(|l| {
            let offsets = [l * size, (l + 1) * size];
            let entry = json!({ "dtype": "BF16", "shape": SHAPE, "data_offsets": offsets });
            (format!("model.layers.{l}.mlp.up_proj.weight"), entry)
        })
        .collect();
    let header = Value::Object(header).to_string();
    let mut file = fs::File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for tensor in 0..TENSORS as u16 {
        // Exponents around that of 1, any sign and mantissa.
        let numbers = (0..1u16 << 15).map(|i| {
            let word = (i ^ seed).wrapping_mul(40_503).wrapping_add(tensor * 977);
            (word & 0x807f) | 0x3f00 | (word >> 3 & 0x80)
        });
        let block: Vec<u8> = numbers.flat_map(u16::to_le_bytes).collect();
        (0..size / block.len()).for_each(|_| file.write_all(&block).unwrap());
    }
}

struct Merge {
    temp: tempfile::TempDir,
    recipe: PathBuf,
}

impl Merge {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        model(&temp.path().join("a"), 1);
        model(&temp.path().join("b"), 2);
        let merge = Self { recipe: temp.path().join("merge.yaml"), temp };
        merge.weigh(0.25);
        merge
    }

    fn weigh(&self, weight: f64) {
        let text = format!(
            "merge_method: linear\nmodels:\n- {{model: a, parameters: {{weight: {weight}}}}}\n\
             - {{model: b, parameters: {{weight: 1}}}}\n"
        );
        fs::write(&self.recipe, text).unwrap();
    }

    fn args(&self, out: &str) -> Vec<String> {
        let out = self.temp.path().join(out).display().to_string();
        let recipe = self.recipe.display().to_string();
        [&recipe, "--out", &out, "--out-shard-size", "70M"].map(String::from).to_vec()
    }

    /// Starts the merge and kills it as soon as so many parts of the output are noted as safe; whether it got so far.
    fn killed(&self, parts: usize) -> bool {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-merge"));
        let command = command.args(self.args("out")).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let clock = Instant::now();
        loop {
            // The lock of a run that was killed before goes on being used.
            let lock = self.left().into_iter().find(|name| name.ends_with(".lock"));
            let lock = lock.map(|name| fs::read_to_string(self.temp.path().join(name)));
            let text = lock.and_then(Result::ok).unwrap_or_default();
            if text.lines().count() > parts {
                break;
            }
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(clock.elapsed() < Duration::from_secs(300), "{text}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        !child.wait().unwrap().success()
    }

    /// Builds to the end; returns what was said.
    fn builds(&self, out: &str, more: &[&str]) -> String {
        let mut args = self.args(out);
        args.extend(more.iter().map(|&a| a.to_owned()));
        let run = cli::run(&args);
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    }

    /// Names and hashes of the files of weights of an output; the manifest says the same.
    fn weights(&self, out: &str) -> Vec<[String; 2]> {
        let out = self.temp.path().join(out);
        let manifest = fs::read_to_string(out.join(".moe-merge/manifest.json")).unwrap();
        let mut files: Vec<_> = fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .map(|path| {
                let hash = moe_merge_checkpoint::manifest::hash_bytes(&fs::read(&path).unwrap());
                assert!(manifest.contains(&hash), "{}", path.display());
                [path.file_name().unwrap().to_string_lossy().into_owned(), hash]
            })
            .collect();
        files.sort();
        assert_eq!(files.len(), TENSORS.div_ceil(2));
        files
    }

    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.temp.path()).unwrap().flatten();
        entries
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|n| n.starts_with('.'))
            .collect()
    }
}

#[test]
fn a_killed_merge_is_gone_on_with() {
    let merge = Merge::new();
    merge.builds("whole", &[]);
    let whole = merge.weights("whole");
    let mut went_on = 0;
    for parts in [0, 1, 2, 3, 1] {
        // Killed twice on the way.
        let killed = merge.killed(parts);
        let again = killed && merge.killed(parts + 1);
        if merge.temp.path().join("out").exists() {
            fs::remove_dir_all(merge.temp.path().join("out")).unwrap();
        }
        let said = merge.builds("out", &[]);
        went_on += usize::from(said.contains("goes on from an earlier run"));
        assert_eq!(merge.weights("out"), whole, "{parts} {killed} {again}");
        assert_eq!(merge.left(), [""; 0]);
        fs::remove_dir_all(merge.temp.path().join("out")).unwrap();
    }
    assert!(went_on >= 2, "{went_on}");
}

#[test]
fn what_another_recipe_or_other_inputs_made_is_not_gone_on_with() {
    let merge = Merge::new();
    merge.weigh(0.5);
    merge.builds("whole", &[]);
    let whole = merge.weights("whole");
    merge.weigh(0.25);
    assert!(merge.killed(1));
    merge.weigh(0.5);
    let said = merge.builds("out", &[]);
    assert!(said.contains("starts anew") && said.contains("its recipe was another"), "{said}");
    assert_eq!(merge.weights("out"), whole);
    assert_eq!(merge.left(), [""; 0]);
    fs::remove_dir_all(merge.temp.path().join("out")).unwrap();

    assert!(merge.killed(1));
    model(&merge.temp.path().join("b"), 3);
    let said = merge.builds("out", &[]);
    assert!(said.contains("starts anew") && said.contains("its inputs have changed"), "{said}");
    assert_ne!(merge.weights("out"), whole);
    fs::remove_dir_all(merge.temp.path().join("out")).unwrap();

    model(&merge.temp.path().join("b"), 2);
    assert!(merge.killed(1));
    let said = merge.builds("out", &["--no-resume"]);
    assert!(!said.contains("goes on") && !said.contains("starts anew"), "{said}");
    assert_eq!(merge.weights("out"), whole);
    assert_eq!(merge.left(), [""; 0]);
}
