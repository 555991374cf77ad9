//! Changes that wait for approval: prepared beside the model, live only when somebody says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::generation::{Settings, commit};
use moe_merge_checkpoint::manifest::{FileRecord, Manifest, SourceRecord, hash_files};
use moe_merge_checkpoint::write::{
    OutTensor, ShardName, ShardPlan, Watch, write_json, write_shards,
};
use moe_merge_checkpoint::{
    Change, CheckpointError, Interrupt, NewTensors, Source, WeightRef, weights_in,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::effect::{Effect, Watched, evaluation_texts, prompt_texts};
use crate::error::AdaptError;
use crate::moe::Moe;

/// Where changes wait, seen from the model folder.
const PROPOSALS: &str = ".moe-merge/proposals";

/// What is in the folder of one.
const NAME: &str = "proposal.json";

/// A change that waits.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Proposal {
    /// The generation that it would become.
    pub generation: u32,
    /// The generation that it changes.
    pub parent: u32,
    /// `swap`, `add`, `drop`.
    pub action: String,
    /// Why, in the words of who staged it.
    pub message: Option<String>,
    /// Who staged it, if the environment told.
    pub user: Option<String>,
    /// Parameters, as the journal will have them.
    pub details: Value,
    /// What it does to evaluation text.
    pub effect: Option<Effect>,
    /// Its files.
    shards: Vec<Shard>,
    remove: Vec<String>,
    config: Option<Map<String, Value>>,
    experts: Option<Vec<String>>,
    sources: Option<Vec<SourceRecord>>,
    gate_mode: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Shard {
    role: String,
    file: FileRecord,
}

/// What staging or approving did.
#[derive(Debug, Clone, Serialize)]
pub struct ProposalReport {
    /// The folder.
    pub folder: PathBuf,
    /// The generation that it is, or would become.
    pub generation: u32,
    /// The generation before.
    pub parent: u32,
    /// Whether it is live now.
    pub live: bool,
    /// What it does to evaluation text.
    pub effect: Option<Effect>,
    /// Bytes that were written.
    pub bytes_written: u64,
    /// Seconds in all.
    pub seconds: f64,
    /// Limits of the folder's settings that it breaks.
    pub refused: Vec<String>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Measures what a change does: on the evaluation text of the folder's settings, else on stored prompts.
///
/// # Errors
/// Text that cannot be read; what running the model meets.
pub(crate) fn effect(
    moe: &Moe,
    change: &Change<'_>,
    watched: Watched,
    prompts: Option<&Path>,
    interrupt: &Interrupt,
) -> Result<(Option<Effect>, Vec<String>), AdaptError> {
    let settings = Settings::load(&moe.source.path)?;
    let (texts, notes) = match (prompts, settings.evaluation.is_empty()) {
        (None, false) => (evaluation_texts(moe, &settings)?, Vec::new()),
        (file, _) => {
            // Text in a file may be for an expert that is new, or goes.
            let after = change.experts.as_ref().filter(|n| n.len() >= moe.names.len());
            let names = after.unwrap_or(&moe.names);
            prompt_texts(moe, names, file, crate::effect::FORECAST_TOKENS)?
        }
    };
    if texts.is_empty() {
        return Ok((None, notes));
    }
    let after = applied(&moe.source, change);
    let effect = Effect::measure(&moe.source, &after, watched, &texts, interrupt)?;
    Ok((Some(effect), notes))
}

/// The model as a change makes it, in memory.
pub(crate) fn applied(source: &Source, change: &Change<'_>) -> Source {
    let mut after = source.clone();
    for name in &change.remove {
        after.tensors.remove(name);
    }
    for (name, weight) in change.tensors.iter().flat_map(|group| &group.tensors) {
        after.tensors.insert(name.clone(), weight.clone());
    }
    if let Some(config) = &change.config {
        after.config.0 = config.clone();
    }
    after
}

/// Measures what a change does to stored text, and writes it beside the model, where it waits for [`approve`].
///
/// # Errors
/// Text that cannot be read, what running the model and writing meet; then nothing is left.
pub fn propose(
    moe: &Moe,
    change: &Change<'_>,
    interrupt: &Interrupt,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ProposalReport, AdaptError> {
    let nobody = Watched { before: None, after: None };
    let (effect, notes) = effect(moe, change, nobody, None, interrupt)?;
    let mut report = stage(moe, change, effect, Watch { interrupt, progress })?;
    report.warnings.splice(0..0, notes);
    Ok(report)
}

/// Writes a change beside the model, where it waits. One that waited for the same generation gives way.
///
/// # Errors
/// What writing meets; then nothing is left.
pub(crate) fn stage(
    moe: &Moe,
    change: &Change<'_>,
    effect: Option<Effect>,
    watch: Watch<'_>,
) -> Result<ProposalReport, AdaptError> {
    let clock = Instant::now();
    let folder = &moe.source.path;
    let parent = moe.generation();
    let at = place(folder, parent + 1);
    let beside = folder.join(PROPOSALS).join(format!(".new-{}", std::process::id()));
    let written = write(&beside, change, parent, effect.clone(), watch);
    let finished = written.and_then(|bytes| {
        let replaced = at.exists();
        if replaced {
            fs::remove_dir_all(&at).map_err(|e| CheckpointError::io("removing", &at, e))?;
        }
        fs::rename(&beside, &at).map_err(|e| CheckpointError::io("staging", &at, e))?;
        Ok((bytes, replaced))
    });
    let (bytes_written, replaced) = finished.inspect_err(|_| {
        let _ = fs::remove_dir_all(&beside);
    })?;
    let mut warnings = Vec::new();
    if replaced {
        warnings.push(format!("another change waited for generation {}: it is gone", parent + 1));
    }
    let refused = broken(&Settings::load(folder)?, effect.as_ref());
    Ok(ProposalReport {
        folder: folder.clone(),
        generation: parent + 1,
        parent,
        live: false,
        effect,
        bytes_written,
        seconds: clock.elapsed().as_secs_f64(),
        refused,
        warnings,
    })
}

fn write(
    folder: &Path,
    change: &Change<'_>,
    parent: u32,
    effect: Option<Effect>,
    watch: Watch<'_>,
) -> Result<u64, AdaptError> {
    fs::create_dir_all(folder).map_err(|e| CheckpointError::io("creating a folder", folder, e))?;
    let plan = |NewTensors { role, tensors }: &NewTensors| {
        let tensor = |(name, weight): &(String, WeightRef)| OutTensor {
            name: name.clone(),
            weight: weight.clone(),
            dtype: weight.dtype(),
        };
        ShardPlan::new(ShardName::ByContent(role.clone()), tensors.iter().map(tensor).collect())
    };
    let plans: Vec<ShardPlan> = change.tensors.iter().map(plan).collect();
    let written = write_shards(folder, &plans, watch)?;
    let shards: Vec<Shard> = change
        .tensors
        .iter()
        .zip(written)
        .map(|(group, shard)| Shard { role: group.role.clone(), file: shard.file })
        .collect();
    let bytes = shards.iter().map(|s| s.file.size).sum();
    let proposal = Proposal {
        generation: parent + 1,
        parent,
        action: change.action.to_owned(),
        message: change.message.map(str::to_owned),
        user: std::env::var("USER").ok().filter(|name| !name.is_empty()),
        details: change.details.clone(),
        effect,
        shards,
        remove: change.remove.clone(),
        config: change.config.clone(),
        experts: change.experts.clone(),
        sources: change.sources.clone(),
        gate_mode: change.gate_mode.clone(),
    };
    write_json(folder, NAME, &serde_json::to_value(&proposal).unwrap_or_default())?;
    Ok(bytes)
}

fn place(folder: &Path, generation: u32) -> PathBuf {
    folder.join(PROPOSALS).join(generation.to_string())
}

/// Changes that wait, by the generation that they would become.
///
/// # Errors
/// [`CheckpointError::Malformed`] for one that cannot be read.
pub fn proposals(folder: &Path) -> Result<Vec<Proposal>, AdaptError> {
    let listed = fs::read_dir(folder.join(PROPOSALS)).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> =
        listed.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.into_iter().map(|n| load(folder, n)).collect()
}

fn load(folder: &Path, generation: u32) -> Result<Proposal, AdaptError> {
    let path = place(folder, generation).join(NAME);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let waiting = proposals(folder)?.iter().map(|p| p.generation.to_string()).collect();
            let path = folder.to_owned();
            return Err(AdaptError::NothingStaged { path, wanted: generation, waiting });
        }
        Err(e) => return Err(CheckpointError::io("reading", &path, e).into()),
    };
    serde_json::from_slice(&text).map_err(|e| {
        CheckpointError::Malformed {
            what: "a staged change cannot be read".into(),
            file: path,
            tensor: None,
            expected: "what this program writes there".into(),
            found: e.to_string(),
            hint: Some("stage it again".into()),
        }
        .into()
    })
}

/// Limits that a change breaks, in words.
fn broken(settings: &Settings, effect: Option<&Effect>) -> Vec<String> {
    let limits = &settings.thresholds;
    let any = limits.perplexity_rise.is_some() || limits.routing_moved.is_some();
    let Some(effect) = effect else {
        let nothing = "there are thresholds, and no evaluation text to hold the change against";
        return if any { vec![nothing.to_owned()] } else { Vec::new() };
    };
    let mut broken = Vec::new();
    for domain in &effect.domains {
        let name = &domain.domain;
        let mut hold = |what: &str, found: f64, limit: Option<f64>| {
            if let Some(limit) = limit.filter(|limit| found.is_nan() || found > *limit) {
                broken.push(format!(
                    "{what} of `{name}`: {:.2} %, at most {:.2} % allowed",
                    100.0 * found,
                    100.0 * limit
                ));
            }
        };
        hold("perplexity rises on the text", domain.rise(), limits.perplexity_rise);
        hold("first choices that move on the text", domain.moved, limits.routing_moved);
    }
    broken
}

/// What a person asks for.
#[derive(Debug, Clone)]
pub struct ApproveRequest {
    /// The model's folder.
    pub folder: PathBuf,
    /// The generation that the change would become; the only one that waits, by default.
    pub generation: Option<u32>,
    /// Why, for the journal; by default what was said when it was staged.
    pub message: Option<String>,
    /// Raised to stop.
    pub interrupt: Interrupt,
}

impl ApproveRequest {
    /// The change that it means.
    fn proposal(&self) -> Result<Proposal, AdaptError> {
        if let Some(generation) = self.generation {
            return load(&self.folder, generation);
        }
        let mut waiting = proposals(&self.folder)?;
        match waiting.len() {
            1 => Ok(waiting.remove(0)),
            _ => Err(AdaptError::NothingStaged {
                path: self.folder.clone(),
                wanted: Manifest::load(&self.folder)?.map_or(0, |m| m.generation) + 1,
                waiting: waiting.iter().map(|p| p.generation.to_string()).collect(),
            }),
        }
    }
}

/// Makes a staged change live, if it keeps within the limits of the folder's settings.
///
/// # Errors
/// [`AdaptError::NothingStaged`], [`AdaptError::Refused`] if it breaks a limit, [`CheckpointError::Outdated`] if the
/// model was changed since, [`CheckpointError::Malformed`] if the staged files are not as they were written.
pub fn approve(
    request: &ApproveRequest,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ProposalReport, AdaptError> {
    let clock = Instant::now();
    let folder = &request.folder;
    let proposal = request.proposal()?;
    let refused = broken(&Settings::load(folder)?, proposal.effect.as_ref());
    if !refused.is_empty() {
        return Err(AdaptError::Refused { path: folder.clone(), limits: refused });
    }
    let tensors = proposal.tensors(folder, &request.interrupt)?;
    let mut details = proposal.details.clone();
    if let Value::Object(details) = &mut details {
        details.insert("effect".into(), serde_json::to_value(&proposal.effect).unwrap_or_default());
        details.insert("staged_by".into(), proposal.user.clone().into());
        details.insert("staged_message".into(), proposal.message.clone().into());
    }
    let change = Change {
        action: &proposal.action,
        message: request.message.as_deref().or(proposal.message.as_deref()),
        tensors,
        remove: proposal.remove.clone(),
        config: proposal.config.clone(),
        experts: proposal.experts.clone(),
        sources: proposal.sources.clone(),
        gate_mode: proposal.gate_mode.clone(),
        details,
        parent: Some(proposal.parent),
        approved: true,
    };
    let watch = Watch { interrupt: &request.interrupt, progress };
    let made = commit(folder, &change, watch)?;
    discard(folder, proposal.generation)?;
    Ok(ProposalReport {
        folder: folder.clone(),
        generation: made.number,
        parent: made.parent,
        live: true,
        effect: proposal.effect,
        bytes_written: made.bytes_written,
        seconds: clock.elapsed().as_secs_f64(),
        refused: Vec::new(),
        warnings: made.notes,
    })
}

impl Proposal {
    /// The new tensors, after a look at whether their files are as they were written.
    fn tensors(&self, folder: &Path, interrupt: &Interrupt) -> Result<Vec<NewTensors>, AdaptError> {
        let at = place(folder, self.generation);
        if let Some(shard) = self.shards.iter().find(|s| s.file.name.contains(['/', '\\'])) {
            return Err(CheckpointError::Malformed {
                what: "a staged change names a file outside its folder".into(),
                file: at.join(NAME),
                tensor: None,
                expected: "names without folders".into(),
                found: format!("`{}`", shard.file.name),
                hint: Some("do not use this folder unless you know where it comes from".into()),
            }
            .into());
        }
        let paths: Vec<PathBuf> = self.shards.iter().map(|s| at.join(&s.file.name)).collect();
        let found = hash_files(&paths, interrupt)?;
        let mut tensors = Vec::new();
        for (shard, path) in self.shards.iter().zip(paths) {
            let hash = found.get(&path).map(|f| f.blake3.clone()).unwrap_or_default();
            if hash != shard.file.blake3 {
                return Err(CheckpointError::Malformed {
                    what: "a staged file is not as it was written".into(),
                    file: path,
                    tensor: None,
                    expected: format!("hash {}", shard.file.blake3),
                    found: format!("hash {hash}"),
                    hint: Some("stage the change again".into()),
                }
                .into());
            }
            tensors.push(NewTensors { role: shard.role.clone(), tensors: weights_in(&path)? });
        }
        Ok(tensors)
    }
}

/// Takes a staged change back.
///
/// # Errors
/// [`AdaptError::NothingStaged`], [`CheckpointError::Io`].
pub fn discard(folder: &Path, generation: u32) -> Result<(), AdaptError> {
    load(folder, generation)?;
    let at = place(folder, generation);
    fs::remove_dir_all(&at).map_err(|e| CheckpointError::io("removing", &at, e))?;
    let _ = fs::remove_dir(folder.join(PROPOSALS));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effect::DomainEffect;
    use moe_merge_checkpoint::generation::Thresholds;

    #[test]
    fn limits_are_held_against_every_domain() {
        let domain = |name: &str, after: f64, moved: f64| DomainEffect {
            domain: name.into(),
            perplexity: [10.0, after],
            moved,
            ..DomainEffect::default()
        };
        let domains = vec![domain("prose", 10.1, 0.3), domain("code", 9.0, 0.0)];
        let effect = Effect { domains, seconds: 0.0 };
        let limits = |perplexity_rise, routing_moved| Settings {
            thresholds: Thresholds { perplexity_rise, routing_moved },
            ..Settings::default()
        };
        let broken = |settings: &Settings| broken(settings, Some(&effect)).len();
        assert_eq!(broken(&limits(None, None)), 0);
        assert_eq!(broken(&limits(Some(0.02), Some(0.3))), 0);
        assert_eq!(broken(&limits(Some(0.005), Some(0.2))), 2);
        assert_eq!(super::broken(&limits(Some(1.0), None), None).len(), 1);
        assert_eq!(super::broken(&Settings::default(), None).len(), 0);
    }
}
