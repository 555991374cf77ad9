//! What the end-to-end tests share. Each of them uses its part.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use moe_merge_checkpoint::publish::{Interrupt, Replace};
use moe_merge_checkpoint::{Source, SourceRef};
use moe_merge_merge::build::{BuildOptions, Observer, Prepared, RecipeText, Stage};
use moe_merge_merge::families::Layout;
use moe_merge_merge::recipe::{self, Recipe};
use moe_merge_model::{Cache, LogitRows, Model};

/// Nobody watches.
pub struct Silent;

impl Observer for Silent {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// Builds a MoE recipe file into `out`.
pub fn build(recipe: &Path, out: &Path) -> PathBuf {
    build_text(&std::fs::read_to_string(recipe).unwrap(), recipe, out, Layout::Hub)
}

/// Builds a MoE recipe that stands at `path` (which need not exist) into `out`.
pub fn build_text(text: &str, path: &Path, out: &Path, layout: Layout) -> PathBuf {
    let recipe = match recipe::parse(text, path) {
        Ok(Recipe::Moe(recipe)) => recipe,
        other => panic!("{}: {other:?}", path.display()),
    };
    let options = BuildOptions {
        out: Some(out.to_owned()),
        replace: Replace::Never,
        layout,
        interrupt: Interrupt::default(),
    };
    let prepared = Prepared::new(&recipe, RecipeText { path, text }, options);
    let built = prepared.and_then(|p| p.build(&Silent));
    built.unwrap_or_else(|e| panic!("{}: {e:?}", path.display())).output
}

/// Opens a folder.
pub fn open(path: &Path) -> Source {
    let reference = SourceRef {
        model: path.display().to_string(),
        revision: None,
        lora: None,
        lora_revision: None,
    };
    Source::open(&reference, Path::new("")).unwrap()
}

/// Logits of all positions.
pub fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(model, tokens.len());
    model.forward(tokens, &mut cache, LogitRows::All).unwrap()
}

/// A copy of the quickstart's base below `temp`, whose files can be changed.
pub fn copy_of_base(temp: &Path) -> PathBuf {
    let (from, to) = (moe_merge_testkit::repository("recipes/quickstart/base"), temp.join("base"));
    std::fs::create_dir(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    to
}

/// The same with a SentencePiece tokenizer instead of its own.
pub fn with_sentence_piece(temp: &Path) -> PathBuf {
    let folder = copy_of_base(temp);
    let spm = moe_merge_testkit::repository("checkpoint/tests/data/spm.gguf");
    for side in open(&spm).side {
        std::fs::write(folder.join(&side.name), side.read().unwrap()).unwrap();
    }
    folder
}
