//! A small build whose inputs can be damaged, and what has to be left after it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::cli::{Run, run};

/// A recipe that builds: two experts, gates that need no forward pass.
pub const RECIPE: &str = r#"base_model: base
experts:
  - source_model: prose
    positive_prompts: ["the mill seemed gentle when the bells rang"]
  - source_model: code
    positive_prompts: ["pub fn split_depth(depth: i32) -> i32 {"]
gate_mode: random
experts_per_token: 2
"#;

/// One matrix that an expert gives to the output.
pub const UP: &str = "model.layers.2.mlp.up_proj.weight";

/// A folder with `base`, `prose` and `code`, and a recipe over them.
pub struct Build {
    dir: TempDir,
    recipe: String,
}

impl Build {
    /// Copies of the quickstart's models.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for model in ["base", "prose", "code"] {
            let from = moe_merge_testkit::repository("recipes/quickstart").join(model);
            copy_folder(&from, &dir.path().join(model));
        }
        Self { dir, recipe: RECIPE.to_owned() }
    }

    /// With another recipe.
    pub fn of(recipe: &str) -> Self {
        Self { recipe: recipe.to_owned(), ..Self::new() }
    }

    /// With `from` replaced by `to` in the recipe.
    pub fn with(mut self, from: &str, to: &str) -> Self {
        assert!(self.recipe.contains(from), "`{from}` is not in the recipe");
        self.recipe = self.recipe.replacen(from, to, 1);
        self
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.path(name), bytes).expect("room");
        self
    }

    /// Changes a JSON file.
    pub fn json(&self, name: &str, change: impl Fn(&mut Value)) -> &Self {
        let mut value =
            serde_json::from_slice(&fs::read(self.path(name)).expect("there")).expect("JSON");
        change(&mut value);
        self.write(name, value.to_string())
    }

    /// Changes `model.safetensors` of a model.
    pub fn tensors(&self, model: &str, change: impl Fn(&mut Tensors)) -> &Self {
        let path = self.path(model).join("model.safetensors");
        let mut tensors = Tensors::read(&path);
        change(&mut tensors);
        fs::write(path, tensors.bytes()).expect("room");
        self
    }

    /// The same for all three models.
    pub fn all(&self, change: impl Fn(&Self, &str)) -> &Self {
        ["base", "prose", "code"].into_iter().for_each(|model| change(self, model));
        self
    }

    /// Where the output goes.
    pub fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// The arguments of the build, the recipe written.
    pub fn args(&self, more: &[&str]) -> Vec<OsString> {
        self.write("recipe.yaml", &self.recipe);
        let fixed = [self.path("recipe.yaml").into(), "--out".into(), self.out().into()];
        fixed.into_iter().chain(more.iter().map(OsString::from)).collect()
    }

    pub fn run(&self) -> Run {
        run(&self.args(&[]))
    }

    /// Builds, and expects success.
    #[track_caller]
    pub fn builds(&self) -> Run {
        let found = self.run();
        assert_eq!(found.code, 0, "{}", found.stderr);
        assert!(self.out().join("config.json").is_file());
        assert!(
            !entries(self.dir()).iter().any(|n| n.starts_with('.')),
            "{:?}",
            entries(self.dir())
        );
        found
    }

    /// Builds, and expects that it ends with `code`, says all of `says`, prints nothing and leaves nothing.
    #[track_caller]
    pub fn refused(&self, code: i32, says: &[&str]) {
        self.refused_with(&[], code, says);
    }

    #[track_caller]
    pub fn refused_with(&self, more: &[&str], code: i32, says: &[&str]) {
        let args = self.args(more);
        let before = entries(self.dir());
        let found = run(&args);
        if std::env::var_os("SHOW_MESSAGES").is_some() {
            let dir = self.dir().display().to_string();
            println!("--- {code}\n{}", found.stderr.replace(&dir, "DIR"));
        }
        found.fails(code, says);
        assert!(!found.stderr.contains("panicked"), "{}", found.stderr);
        assert_eq!(entries(self.dir()), before, "something was left");
    }
}

/// Names in a folder, those of hidden files included.
pub fn entries(dir: &Path) -> BTreeSet<String> {
    let all = fs::read_dir(dir).expect("a folder").flatten();
    all.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).expect("room");
    for name in entries(from) {
        fs::copy(from.join(&name), to.join(&name)).expect("room");
    }
}

/// A safetensors file in parts.
pub struct Tensors {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Tensors {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).expect("there");
        let (len, rest) = bytes.split_at(8);
        let len = u64::from_le_bytes(len.try_into().expect("8 bytes")) as usize;
        Self {
            header: serde_json::from_slice(&rest[..len]).expect("JSON"),
            data: rest[len..].to_vec(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        join(&Value::Object(self.header.clone()).to_string(), &self.data)
    }

    pub fn range(&self, name: &str) -> std::ops::Range<usize> {
        let at =
            |i: usize| self.header[name]["data_offsets"][i].as_u64().expect("a number") as usize;
        at(0)..at(1)
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let entry = self.header.remove(from).expect("there");
        self.header.insert(to.to_owned(), entry);
    }

    /// Adds a tensor of zeros in bf16.
    pub fn add(&mut self, name: &str, shape: &[usize]) {
        let (start, len) = (self.data.len(), 2 * shape.iter().product::<usize>());
        self.data.resize(start + len, 0);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, start + len]});
        self.header.insert(name.to_owned(), entry);
    }

    /// Sets one bf16 number.
    pub fn poke(&mut self, name: &str, index: usize, bits: u16) {
        let at = self.range(name).start + 2 * index;
        self.data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }
}

/// A safetensors file of a header and data.
pub fn join(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}
