//! Models of the Hugging Face Hub: in the local cache, and with the feature `hub` downloaded into it.
//!
//! The cache's layout: `models--org--name/refs/<branch or tag>` holds a commit, `snapshots/<commit>/` links to the
//! files of that commit in `blobs/`.

use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::{file, index};

/// Where Hub models are looked for.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    /// The cache folder; `None` if there is none.
    pub cache: Option<PathBuf>,
    /// Whether a missing model may be downloaded (needs the feature `hub`).
    pub online: bool,
}

impl Hub {
    /// The cache that the Python client uses too: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`,
    /// `XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`; `HF_HUB_OFFLINE` forbids downloads.
    pub fn from_env() -> Self {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = || {
            var("HF_HOME")
                .or_else(|| Some(var("XDG_CACHE_HOME")?.join("huggingface")))
                .or_else(|| Some(var("HOME")?.join(".cache/huggingface")))
        };
        let cache = var("HF_HUB_CACHE")
            .or_else(|| var("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home()?.join("hub")));
        let offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
        Self { cache, online: !offline }
    }

    /// The snapshot of `name` (`org/name`) at `revision` (default `main`), complete.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`] if neither the cache nor, where allowed, the Hub has it;
    /// [`CheckpointError::Malformed`] if the cached snapshot lacks files.
    pub fn snapshot(
        &self,
        name: &str,
        revision: Option<&str>,
        kind: RepoKind,
    ) -> Result<Snapshot, CheckpointError> {
        let cached = match &self.cache {
            Some(cache) => find(cache, name, revision)?,
            None => None,
        };
        let missing = match &cached {
            Some(snapshot) => missing_files(&snapshot.path, kind)?,
            None => Vec::new(),
        };
        match cached {
            Some(snapshot) if missing.is_empty() => Ok(snapshot),
            #[cfg(feature = "hub")]
            _ if self.online => download(self, name, revision, kind),
            Some(snapshot) => Err(incomplete(name, &snapshot.path, &missing)),
            None => Err(not_cached(self.cache.as_deref(), name, revision)),
        }
    }
}

/// What a repository is wanted for: tells which files it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// `config.json` and weights.
    Model,
    /// `adapter_config.json` and `adapter_model.safetensors`.
    Adapter,
}

/// A commit of a repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder with the links.
    pub path: PathBuf,
    /// What a person should know about how it was chosen.
    pub note: Option<String>,
}

/// Whether `text` can be a Hub name: two parts of letters, digits, `-`, `_` and `.`, with one `/` between them.
pub fn is_name(text: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.starts_with(['.', '-'])
            && !p.ends_with(['.', '-'])
            && !p.contains("--")
            && !p.contains("..")
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// The snapshot folder of `name` in `cache`, if the repository is there at all; complete or not.
fn find(
    cache: &Path,
    name: &str,
    revision: Option<&str>,
) -> Result<Option<Snapshot>, CheckpointError> {
    let repo = cache.join(format!("models--{}", name.replace('/', "--")));
    let snapshots = repo.join("snapshots");
    let commits = folders(&snapshots);
    if commits.is_empty() {
        return Ok(None);
    }
    let wanted = revision.unwrap_or("main");
    let plain = wanted.split('/').all(|p| !p.is_empty() && p != "." && p != "..");
    let reference = repo.join("refs").join(wanted);
    if plain && reference.is_file() {
        let text = file::read(&reference, 4096)?;
        let commit = String::from_utf8_lossy(&text).trim().to_owned();
        if commits.contains(&commit) {
            return Ok(Some(Snapshot { path: snapshots.join(commit), note: None }));
        }
        // The branch is known, its files are not: as good as absent.
        return Ok(None);
    }
    let is_prefix = wanted.len() >= 4 && wanted.bytes().all(|b| b.is_ascii_hexdigit());
    let matching: Vec<&String> =
        commits.iter().filter(|c| is_prefix && c.starts_with(wanted)).collect();
    match (matching.as_slice(), revision, commits.as_slice()) {
        ([one], ..) => Ok(Some(Snapshot { path: snapshots.join(one), note: None })),
        ([], None, [only]) => Ok(Some(Snapshot {
            path: snapshots.join(only),
            note: Some(format!("{name}: the cache knows no `main`; took its only commit, {only}")),
        })),
        ([], ..) => Ok(None),
        (several, ..) => Err(CheckpointError::NotFound {
            path: PathBuf::from(format!("{name}@{wanted}")),
            hint: format!("{} commits in the cache begin so; give more of it", several.len()),
        }),
    }
}

/// Names of the folders in `parent`, sorted; none if it cannot be listed.
fn folders(parent: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Files that a snapshot should have and has not: links to nothing, shards that the index names, the config.
fn missing_files(snapshot: &Path, kind: RepoKind) -> Result<Vec<String>, CheckpointError> {
    let mut missing = Vec::new();
    let io = |e| CheckpointError::io("listing", snapshot, e);
    for entry in std::fs::read_dir(snapshot).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let concerns_us = name.ends_with(".safetensors") || name.ends_with(".json");
        if concerns_us && !entry.path().exists() {
            missing.push(name);
        }
    }
    let has = |name: &str| snapshot.join(name).exists();
    let mut need = |name: &str| {
        if !has(name) {
            missing.push(name.to_owned());
        }
    };
    match kind {
        RepoKind::Adapter => {
            need("adapter_config.json");
            if !has("adapter_model.bin") {
                need("adapter_model.safetensors");
            }
        }
        RepoKind::Model => {
            need("config.json");
            let index = snapshot.join(index::NAME);
            if index.exists() {
                let index = index::parse(&file::read(&index, index::MAX_INDEX)?, &index)?;
                index.shards().into_iter().for_each(&mut need);
            } else if !holds_weights(snapshot) {
                need("model.safetensors");
            }
        }
    }
    missing.sort();
    missing.dedup();
    Ok(missing)
}

/// Whether there are weights of any kind; those that cannot be read are refused later, with their own reason.
fn holds_weights(snapshot: &Path) -> bool {
    std::fs::read_dir(snapshot).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        [".safetensors", ".bin", ".gguf", ".pth", ".pt"].iter().any(|s| name.ends_with(s))
    })
}

fn incomplete(name: &str, snapshot: &Path, missing: &[String]) -> CheckpointError {
    CheckpointError::Malformed {
        what: format!("`{name}` is not complete in the Hub cache"),
        file: snapshot.to_owned(),
        tensor: None,
        expected: format!(
            "the file{} {}",
            if missing.len() == 1 { "" } else { "s" },
            missing.join(", ")
        ),
        found: "no such file, or a link to nothing".into(),
        hint: Some(how_to_get(name)),
    }
}

fn how_to_get(name: &str) -> String {
    if cfg!(feature = "hub") {
        format!(
            "`HF_HUB_OFFLINE` forbids the download; unset it, or run `huggingface-cli download {name}`"
        )
    } else {
        format!(
            "run `huggingface-cli download {name}` (`hf download {name}` in its newer form), or build with \
             `--features hub`"
        )
    }
}

fn not_cached(cache: Option<&Path>, name: &str, revision: Option<&str>) -> CheckpointError {
    let full = match revision {
        Some(revision) => format!("{name}@{revision}"),
        None => name.to_owned(),
    };
    let mut hint = match cache {
        Some(cache) => format!("neither a path nor in the Hub cache `{}`; ", cache.display()),
        None => "not a path, and there is no Hub cache; ".to_owned(),
    };
    let folder = cache.map(|c| c.join(format!("models--{}", name.replace('/', "--"))));
    let known = folder.map(|f| (known_refs(&f), folders(&f.join("snapshots"))));
    if let (Some((refs, commits)), Some(_)) = (known, revision)
        && !commits.is_empty()
    {
        let known: Vec<String> =
            refs.into_iter().chain(commits).map(|r| format!("`{r}`")).collect();
        hint.push_str(&format!("the cache has the revisions {}; ", known.join(", ")));
    }
    hint.push_str(&how_to_get(&full.replace('@', " --revision ")));
    CheckpointError::NotFound { path: full.into(), hint }
}

/// Branches and tags of a cached repository.
fn known_refs(repo: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(repo.join("refs"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Fetches config, index and tokenizer files first, then the shards that the index names.
#[cfg(feature = "hub")]
fn download(
    hub: &Hub,
    name: &str,
    revision: Option<&str>,
    kind: RepoKind,
) -> Result<Snapshot, CheckpointError> {
    let failed = |e: hf_hub::HFError| CheckpointError::NotFound {
        path: match revision {
            Some(revision) => format!("{name}@{revision}").into(),
            None => name.into(),
        },
        hint: format!(
            "neither a path nor in the Hub cache, and the download failed: {e}; private and gated models need \
             `HF_TOKEN`"
        ),
    };
    let mut builder = hf_hub::HFClient::builder();
    if let Some(cache) = &hub.cache {
        builder = builder.cache_dir(cache);
    }
    let client = builder.build_sync().map_err(failed)?;
    let (owner, repo) = hf_hub::split_id(name);
    let repo = client.model(owner, repo);
    let fetch = |revision: Option<&str>, files: Vec<String>| {
        repo.snapshot_download()
            .maybe_revision(revision)
            .allow_patterns(files)
            .send()
            .map_err(failed)
    };
    let small: Vec<String> = match kind {
        RepoKind::Adapter => vec!["adapter_config.json".into(), "adapter_model.safetensors".into()],
        RepoKind::Model => ["config.json", index::NAME]
            .iter()
            .chain(crate::source::SIDE_FILES)
            .map(|name| (*name).to_owned())
            .collect(),
    };
    let path = fetch(revision, small)?;
    if kind == RepoKind::Model {
        let index = path.join(index::NAME);
        let shards = if index.exists() {
            let index = index::parse(&file::read(&index, index::MAX_INDEX)?, &index)?;
            index.shards().into_iter().map(glob_literal).collect()
        } else {
            vec!["model.safetensors".to_owned()]
        };
        // By commit: the branch may move between the two requests.
        let commit = path.file_name().map(|c| c.to_string_lossy().into_owned());
        fetch(commit.as_deref().or(revision), shards)?;
    }
    let missing = missing_files(&path, kind)?;
    if missing.is_empty() {
        return Ok(Snapshot { path, note: None });
    }
    Err(CheckpointError::Malformed {
        what: format!("`{name}` on the Hub lacks files"),
        file: path,
        tensor: None,
        expected: missing.join(", "),
        found: "no such file in the repository".into(),
        hint: Some("choose a repository with safetensors weights".into()),
    })
}

/// A file name as a pattern that matches nothing else.
#[cfg(feature = "hub")]
fn glob_literal(name: &str) -> String {
    name.chars()
        .map(|c| if "*?[]{}!\\".contains(c) { format!("[{c}]") } else { c.to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["org/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d"] {
            assert!(is_name(name), "{name}");
        }
        for name in
            ["name", "a/b/c", "/a", "a/", "../a", "a/..", "./a", "a b/c", "a/b--c", "~/x", "a/-b"]
        {
            assert!(!is_name(name), "{name}");
        }
    }
}
