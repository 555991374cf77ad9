//! A model folder: which files it consists of, and what is wrong when it is none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config_json::ConfigJson;
use crate::error::CheckpointError;
use crate::generation::journal::JOURNAL_NAME;
use crate::generation::switch::{PENDING, View};
use crate::shard::{self, OtherTensor};
use crate::source::{SIDE_FILES, SideContent, SideFile};
use crate::weight::WeightRef;
use crate::{file, index};

/// Longest `config.json` that is read: bounds the memory of its tree.
const MAX_CONFIG: u64 = 8 << 20;

/// The only shard of a small model.
const SINGLE: &str = "model.safetensors";

/// The weights of a PEFT adapter, which are no model.
const ADAPTER: &str = "adapter_model.safetensors";

/// Shards and what is known of them without opening one.
pub(crate) struct Shards {
    /// In the order of their names.
    pub files: Vec<PathBuf>,
    /// The index, if there is one.
    pub index: Option<(PathBuf, index::Index)>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Weights and other tensors of all shards.
#[derive(Default)]
pub(crate) struct Tensors {
    pub weights: BTreeMap<String, WeightRef>,
    pub other: Vec<OtherTensor>,
    pub notes: Vec<String>,
}

/// `config.json` of the folder.
pub(crate) fn config(folder: &Path) -> Result<ConfigJson, CheckpointError> {
    // While a change is under way, the one that goes with the weights that loaders see.
    let staged = View::of(folder)?.config();
    if staged.exists()
        && let Ok(config) = config_at(&staged)
    {
        return Ok(config);
    }
    config_at(&folder.join("config.json"))
}

/// A `config.json`.
pub(crate) fn config_at(path: &Path) -> Result<ConfigJson, CheckpointError> {
    let malformed = |what: &str, found: String, hint: &str| CheckpointError::Malformed {
        what: what.into(),
        file: path.to_owned(),
        tensor: None,
        expected: "a JSON object with `model_type`".into(),
        found,
        hint: Some(hint.into()),
    };
    let again = "download or copy the file again";
    if !path.exists() {
        let found = match path.symlink_metadata() {
            Ok(_) => "a link to nothing",
            Err(_) => "no such file",
        };
        let hint =
            "a model folder needs the `config.json` that transformers writes beside the weights";
        return Err(malformed("config.json is missing", found.into(), hint));
    }
    let bytes = file::read(path, MAX_CONFIG)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|e| malformed("config.json is not JSON", e.to_string(), again))?;
    let serde_json::Value::Object(map) = value else {
        let found = match value {
            serde_json::Value::Array(_) => "a list",
            serde_json::Value::String(_) => "a text",
            _ => "a single value",
        };
        return Err(malformed("config.json is not an object", found.into(), again));
    };
    let config = ConfigJson(map);
    if config.model_type().is_empty() {
        let found = match config.0.get("model_type") {
            None => "no `model_type`".to_owned(),
            Some(value) => format!("`model_type`: {value}"),
        };
        let hint = "add the `model_type` of the architecture, such as `llama`";
        return Err(malformed("config.json does not say the architecture", found, hint));
    }
    Ok(config)
}

/// Finds the shards of the folder: those of the index, or `model.safetensors`, or whatever else there is.
pub(crate) fn shards(folder: &Path) -> Result<Shards, CheckpointError> {
    let mut notes = Vec::new();
    let index_path = folder.join(index::NAME);
    let single = folder.join(SINGLE);
    let has_index = index_path.symlink_metadata().is_ok();
    // As transformers does: the one file wins over an index. A change that is under way also relies on it.
    if single.symlink_metadata().is_ok() {
        if has_index {
            let index = index::parse(&file::read(&index_path, index::MAX_INDEX)?, &index_path);
            if !index.is_ok_and(|i| i.shards().into_iter().all(|shard| shard == SINGLE)) {
                notes.push(format!(
                    "{}: there is an index of other files beside `{SINGLE}`; `{SINGLE}` is read, as transformers does",
                    folder.display()
                ));
            }
        }
        return Ok(Shards { files: vec![single], index: None, notes });
    }
    if has_index {
        let index = index::parse(&file::read(&index_path, index::MAX_INDEX)?, &index_path)?;
        let names = index.shards();
        if let Some(missing) = names.iter().find(|name| !folder.join(name).exists()) {
            return Err(missing_shard(&index, &index_path, missing));
        }
        let files = names.into_iter().map(|name| folder.join(name)).collect();
        return Ok(Shards { files, index: Some((index_path, index)), notes });
    }
    let names = without_index(folder)?;
    notes.push(format!(
        "{}: there is no `{}`; read {}",
        folder.display(),
        index::NAME,
        list(names.iter().map(String::as_str), 4)
    ));
    Ok(Shards { files: names.iter().map(|n| folder.join(n)).collect(), index: None, notes })
}

fn missing_shard(index: &index::Index, path: &Path, shard: &str) -> CheckpointError {
    let needed = index.weight_map.iter().filter(|(_, s)| *s == shard).map(|(t, _)| t.as_str());
    let names: Vec<&str> = needed.collect();
    CheckpointError::Malformed {
        what: format!("shard `{shard}` is missing"),
        file: path.to_owned(),
        tensor: names.first().map(|t| (*t).to_owned()),
        expected: format!(
            "`{}`, which holds {} tensor{}: {}",
            path.with_file_name("").join(shard).display(),
            names.len(),
            if names.len() == 1 { "" } else { "s" },
            list(names.iter().copied(), 4)
        ),
        found: "no such file".into(),
        hint: Some(
            "the download is not complete; fetch the shard, or the whole model, again".into(),
        ),
    }
}

/// The first `most` of `names` in backticks, and how many more there are.
fn list<'a>(names: impl ExactSizeIterator<Item = &'a str>, most: usize) -> String {
    let more = names.len().saturating_sub(most);
    let shown: Vec<String> = names.take(most).map(|n| format!("`{n}`")).collect();
    match more {
        0 => shown.join(", "),
        _ => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Names of the files in a folder, sorted; folders and names that are no text are left out.
fn names_in(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let io = |e| CheckpointError::io("listing", folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if let Ok(name) = entry.file_name().into_string()
            && !entry.path().is_dir()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Safetensors files of a folder that has neither an index nor `model.safetensors`.
fn without_index(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let names = names_in(folder)?;
    let shards: Vec<&String> =
        names.iter().filter(|n| n.ends_with(".safetensors") && *n != ADAPTER).collect();
    if shards.is_empty() {
        return Err(no_weights(folder, &names));
    }
    let numbered = shards.iter().filter_map(|n| Some((numbered(n)?, *n)));
    let mut sets = BTreeMap::<(&str, u32), BTreeMap<u32, &String>>::new();
    for ((stem, number, count), name) in numbered {
        sets.entry((stem, count)).or_default().insert(number, name);
    }
    let model = sets.iter().find(|((stem, _), _)| *stem == "model").or_else(|| sets.iter().next());
    let Some(((stem, count), set)) = model else {
        return Ok(shards.into_iter().cloned().collect());
    };
    if let Some(absent) = (1..=*count).find(|number| !set.contains_key(number)) {
        return Err(CheckpointError::Malformed {
            what: "a shard is missing".into(),
            file: folder.to_owned(),
            tensor: None,
            expected: format!("`{stem}-{absent:05}-of-{count:05}.safetensors`"),
            found: list(set.values().map(|n| n.as_str()), 4),
            hint: Some(
                "the download is not complete; fetch the shard, or the whole model, again".into(),
            ),
        });
    }
    Ok(set.values().map(|n| (*n).clone()).collect())
}

/// `model-00002-of-00004.safetensors` as (`model`, 2, 4).
fn numbered(name: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (number, count) = (number.parse().ok()?, count.parse().ok()?);
    (1 <= number && number <= count).then_some((stem, number, count))
}

/// Says what a folder without weights holds instead.
fn no_weights(folder: &Path, names: &[String]) -> CheckpointError {
    let ends = |suffixes: &[&str]| {
        names.iter().find(|n| suffixes.iter().any(|s| n.ends_with(s))).map(String::as_str)
    };
    let has = |name: &str| names.iter().any(|n| n == name);
    let shown = folder.display();
    let (what, hint) = if has("adapter_config.json") || has(ADAPTER) {
        (
            "folder holds an adapter, not a model",
            format!("write `BASE+{shown}`, with the adapter's base model"),
        )
    } else if let Some(name) = ends(&[".gguf"]) {
        (
            "folder holds a GGUF file, no safetensors",
            format!("name the file itself: `{}`", folder.join(name).display()),
        )
    } else if let Some(name) = ends(&[".bin", ".pt", ".pth", ".ckpt"]) {
        (
            "weights are a PyTorch pickle, which can run code when it is read",
            format!(
                "`{name}` can be converted where you trust it: `python -c \"from transformers import \
                 AutoModelForCausalLM as M; M.from_pretrained('{shown}').save_pretrained('{shown}-safetensors')\"`"
            ),
        )
    } else if let Some(name) = ends(&[".h5", ".msgpack", ".onnx", ".npz", ".tflite"]) {
        (
            "weights are in a format that cannot be read",
            format!("`{name}` has to be converted to safetensors"),
        )
    } else {
        (
            "folder holds no weights",
            "a model folder has `model.safetensors`, or shards and `model.safetensors.index.json`, \
             beside `config.json`"
                .to_owned(),
        )
    };
    CheckpointError::Unsupported { what: what.into(), file: folder.to_owned(), hint }
}

/// What tells one state of a folder from another: a new index is a new file.
pub(crate) type Stamp = Vec<Option<(u64, u64, Option<std::time::SystemTime>)>>;

/// The files that a change of the model replaces.
pub(crate) fn stamp(folder: &Path) -> Stamp {
    stamp_of(folder, &[index::NAME, SINGLE, "config.json"])
}

fn stamp_of(folder: &Path, names: &[&str]) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    names
        .iter()
        .map(|name| {
            let meta = std::fs::metadata(folder.join(name)).ok()?;
            Some((meta.ino(), meta.len(), meta.modified().ok()))
        })
        .collect()
}

/// What changes with every step of a change that a reader could trip over. Going back brings the very files of before, but makes
/// the journal longer; and what one change has staged, the next one stages anew.
pub(crate) fn changes(folder: &Path) -> Stamp {
    [stamp(folder), stamp_of(folder, &[JOURNAL_NAME, PENDING])].concat()
}

/// Opens all shards and holds them against the index.
///
/// A tensor may be in two shards if the index names the last of them: a change has put a new value beside the old one,
/// and every loader keeps the last.
pub(crate) fn tensors(shards: &Shards) -> Result<Tensors, CheckpointError> {
    let mut tensors = Tensors::default();
    let mut found_in = BTreeMap::<String, &Path>::new();
    let mut earlier = BTreeMap::<String, &Path>::new();
    for path in &shards.files {
        let opened = shard::open(path)?;
        let names =
            opened.weights.iter().map(|(n, _)| n).chain(opened.other.iter().map(|o| &o.name));
        for name in names {
            if let Some(before) = found_in.insert(name.clone(), path) {
                earlier.insert(name.clone(), before);
            }
        }
        for (name, weight) in opened.weights {
            if earlier.contains_key(&name) {
                tensors.other.retain(|other| other.name != name);
            }
            tensors.weights.insert(name, Arc::new(weight) as WeightRef);
        }
        for other in opened.other {
            if earlier.contains_key(&other.name) {
                tensors.weights.remove(&other.name);
                tensors.other.retain(|o| o.name != other.name);
            }
            tensors.other.push(other);
        }
    }
    for (name, before) in earlier {
        let last = found_in.get(&name).copied().unwrap_or(before);
        let listed = shards.index.as_ref().and_then(|(path, index)| {
            Some(path.with_file_name("").join(index.weight_map.get(&name)?))
        });
        if listed.is_none_or(|listed| listed != last) {
            return Err(in_two(&name, before, last));
        }
    }
    if let Some((path, index)) = &shards.index {
        against_index(path, index, &found_in, &mut tensors.notes)?;
    }
    Ok(tensors)
}

fn in_two(tensor: &str, first: &Path, second: &Path) -> CheckpointError {
    CheckpointError::Malformed {
        what: "tensor is in two shards".into(),
        file: second.to_owned(),
        tensor: Some(tensor.to_owned()),
        expected: "each tensor in one shard".into(),
        found: format!("also in `{}`", first.display()),
        hint: Some(
            "shards of two models are mixed in this folder, or it was written badly; download it again".into(),
        ),
    }
}

fn against_index(
    path: &Path,
    index: &index::Index,
    found_in: &BTreeMap<String, &Path>,
    notes: &mut Vec<String>,
) -> Result<(), CheckpointError> {
    let folder = path.with_file_name("");
    for (tensor, shard) in &index.weight_map {
        let expected = folder.join(shard);
        let found = found_in.get(tensor);
        if found.is_some_and(|f| **f == expected) {
            continue;
        }
        return Err(CheckpointError::Malformed {
            what: "tensor is not in the shard that the index names".into(),
            file: expected,
            tensor: Some(tensor.clone()),
            expected: format!("the tensor, by `{}`", path.display()),
            found: match found {
                Some(other) => format!("it is in `{}`", other.display()),
                None => "no such tensor in any shard".into(),
            },
            hint: Some("index and shards are of two versions; download the model again".into()),
        });
    }
    let unlisted: BTreeSet<&str> = found_in
        .keys()
        .map(String::as_str)
        .filter(|name| !index.weight_map.contains_key(*name))
        .collect();
    if !unlisted.is_empty() {
        let names: Vec<&str> = unlisted.into_iter().collect();
        notes.push(format!(
            "{}: {} tensor{} of the shards not listed, read nevertheless: {}",
            path.display(),
            names.len(),
            if names.len() == 1 { "" } else { "s" },
            list(names.iter().copied(), 4)
        ));
    }
    Ok(())
}

/// All weights of one safetensors file under the names that they have there; nothing but its header is read.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
pub fn weights_in(file: &Path) -> Result<Vec<(String, WeightRef)>, CheckpointError> {
    let weights = shard::open(file)?.weights;
    Ok(weights.into_iter().map(|(name, weight)| (name, Arc::new(weight) as WeightRef)).collect())
}

/// Tokenizer and generation files, and a note for each that is a link to nothing.
pub(crate) fn side_files(folder: &Path, notes: &mut Vec<String>) -> Vec<SideFile> {
    let mut side = Vec::new();
    for name in SIDE_FILES {
        let path = folder.join(name);
        if path.is_file() {
            side.push(SideFile { name: (*name).to_owned(), content: SideContent::File(path) });
        } else if path.symlink_metadata().is_ok() {
            notes.push(format!("{}: no file, or a link to nothing; left out", path.display()));
        }
    }
    side
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_shards() {
        assert_eq!(numbered("model-00002-of-00004.safetensors"), Some(("model", 2, 4)));
        assert_eq!(numbered("model.fp16-00001-of-00001.safetensors"), Some(("model.fp16", 1, 1)));
        for name in [
            "model.safetensors",
            "model-5-of-4.safetensors",
            "a-of-4.safetensors",
            "model-1-of-2.bin",
        ] {
            assert_eq!(numbered(name), None, "{name}");
        }
    }

    #[test]
    fn lists_are_cut() {
        assert_eq!(list(["a"].into_iter(), 2), "`a`");
        assert_eq!(list(["a", "b", "c", "d"].into_iter(), 2), "`a`, `b` and 2 more");
    }
}
