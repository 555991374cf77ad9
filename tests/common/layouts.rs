//! Folders as other programs lay them out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use moe_merge_merge::families::Layout;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Where tensors lie.
#[derive(Debug, Clone, Copy)]
pub struct Files {
    /// What the folder is called.
    pub name: &'static str,
    /// How experts lie in tensors.
    pub layout: Layout,
    /// File of the shared tensors and of every second layer's, file of the others; the same for one file.
    pub files: [&'static str; 2],
    /// Whether there is an index.
    pub index: bool,
}

const fn files(name: &'static str, layout: Layout, files: [&'static str; 2], index: bool) -> Files {
    Files { name, layout, files, index }
}

const ONE: [&str; 2] = ["model.safetensors"; 2];
const TWO: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Ours, and those of others.
pub const ALL: &[Files] = &[
    files("roles", Layout::Hub, [""; 2], true),
    files("numbered", Layout::Hub, TWO, true),
    files("single", Layout::Hub, ONE, false),
    files("late names", Layout::Hub, ["shared.safetensors", "weights.safetensors"], true),
    files("roles fused", Layout::Fused, [""; 2], true),
    files("numbered fused", Layout::Fused, TWO, true),
    files("single fused", Layout::Fused, ONE, false),
];

/// Lays the tensors of a folder that was built here out anew, as another program would have: without history.
pub fn lay_out(built: PathBuf, how: Files) -> PathBuf {
    if how.files[0].is_empty() {
        return built;
    }
    let shards: Vec<PathBuf> = super::open(&built).files;
    let bytes: Vec<Vec<u8>> = shards.iter().map(|s| std::fs::read(s).unwrap()).collect();
    let mut parts: BTreeMap<&str, Vec<(String, TensorView<'_>)>> = BTreeMap::new();
    for shard in &bytes {
        for (name, view) in safetensors::SafeTensors::deserialize(shard).unwrap().tensors() {
            let layer = name.strip_prefix("model.layers.").and_then(|r| r.split('.').next());
            let part = layer.map_or(0, |l| l.parse::<usize>().unwrap() % 2);
            parts.entry(how.files[part]).or_default().push((name, view));
        }
    }
    let mut map = serde_json::Map::new();
    for (file, tensors) in parts {
        map.extend(tensors.iter().map(|(name, _)| (name.clone(), json!(file))));
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let bytes = safetensors::serialize(tensors, Some(metadata)).unwrap();
        std::fs::write(built.join(file), bytes).unwrap();
    }
    shards.iter().for_each(|s| std::fs::remove_file(s).unwrap());
    std::fs::remove_dir_all(built.join(".moe-merge")).unwrap();
    let index = built.join("model.safetensors.index.json");
    std::fs::remove_file(&index).unwrap();
    if how.index {
        let text = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        std::fs::write(index, text).unwrap();
    }
    built
}
