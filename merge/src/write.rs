//! From a plan to a folder.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use moe_merge_checkpoint::manifest::{
    FileRecord, MANIFEST_VERSION, Manifest, SourceRecord, TOOL_VERSION, hash_files,
};
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::{
    OutTensor, SHARD_LIMIT, ShardName, ShardPlan, Watch, WrittenShard, split, write_file,
    write_index, write_json, write_logged,
};
use moe_merge_checkpoint::{CheckpointError, Dtype, Source, Staging, WeightRef};
use serde_json::{Map, Value};

use crate::card::{self, Dialect};
use crate::config_out::{dense_config, generation_config};
use crate::error::MergeError;
use crate::experts::ExpertRoles;
use crate::plan::{Assembly, Content, Gates, Plan, PlannedTensor, Role};

/// How the output came to be, for its manifest and its card.
#[derive(Debug, Clone, Default)]
pub struct Provenance {
    /// Name of the output, the card's title.
    pub name: String,
    /// The recipe as written.
    pub recipe: Option<String>,
    /// Whose recipe language that is.
    pub dialect: Dialect,
    /// How the routers were made.
    pub gate_mode: Option<String>,
    /// How experts were fitted to the base's attention, if they were.
    pub align: Option<String>,
    /// Seed of everything random.
    pub seed: u64,
    /// Lines of Markdown for the card: predicted load, perplexity.
    pub report: Vec<String>,
    /// What the output is, for the card; by default what it is made by.
    pub title: Option<String>,
    /// Names of the experts of a merge of MoE models; their numbers by default.
    pub experts: Vec<String>,
    /// `license` of the card's header, if known.
    pub license: Option<String>,
    /// Bytes of a shard's tensors, at most: [`SHARD_LIMIT`] by default.
    pub shard_limit: Option<u64>,
}

impl Provenance {
    fn shard_limit(&self) -> u64 {
        self.shard_limit.unwrap_or(SHARD_LIMIT)
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Every file but those below `.moe-merge`, sorted by name.
    pub files: Vec<FileRecord>,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes a MoE into `staging`, ready to be published.
///
/// The weight files of the sources are hashed while the shards are written.
///
/// # Errors
/// [`MergeError::Checkpoint`]: no room (found before the first byte where it can be), a weight that is not finite, an
/// interruption, a target that holds one of the sources, gates of the wrong size.
pub fn write(
    assembly: &Assembly,
    plan: &Plan,
    gates: &Gates,
    provenance: &Provenance,
    staging: &Staging,
    watch: Watch<'_>,
) -> Result<Written, MergeError> {
    gates.check(plan)?;
    let sources = assembly.sources();
    let shards = moe_shards(plan, gates, provenance.shard_limit());
    let (shards, sources) = write_and_hash(&shards, &sources, plan.disk_bytes, staging, watch)?;
    let dir = staging.path();
    let mut files = vec![write_index(dir, &shards)?];
    files.extend(shards.into_iter().map(|s| s.file));
    let title = format!("{} of {} experts", assembly.family.name(), assembly.experts.len());
    let config = plan.config.clone();
    let manifest = Manifest {
        family: assembly.family.name().into(),
        experts: assembly.experts.iter().map(|e| e.name.clone()).collect(),
        ..manifest(provenance, sources)
    };
    finish(staging, &assembly.base, config, &title, provenance, manifest, files)
}

/// Writes a merged model into `staging`: the tensors of `source` as they are or as they are computed, rounded to `dtype`, and
/// those that are no weights.
/// A dense model is cut into shards as usual, a MoE by role, as [`write()`] does it.
///
/// * `inputs`: what went in, for manifest and card, each with its role
///
/// # Errors
/// As [`write()`].
pub fn write_dense(
    source: &Source,
    inputs: &[(String, &Source)],
    dtype: Option<Dtype>,
    provenance: &Provenance,
    staging: &Staging,
    watch: Watch<'_>,
) -> Result<Written, MergeError> {
    let tensors: Vec<OutTensor> = source
        .tensors
        .iter()
        .map(|(name, weight)| OutTensor {
            name: name.clone(),
            weight: weight.clone(),
            dtype: dtype.unwrap_or(weight.dtype()),
        })
        .collect();
    let buffers = source.other.iter().filter_map(|b| b.bytes());
    let bytes: u64 = tensors.iter().map(OutTensor::size).sum::<u64>()
        + buffers.map(|b| b.len() as u64).sum::<u64>();
    let experts = ExpertRoles::of(source);
    let limit = provenance.shard_limit();
    let mut shards = match &experts {
        Some(experts) => by_role(tensors.into_iter().map(|t| (experts.role(&t.name), t)), limit),
        None => numbered(tensors, limit),
    };
    if let Some(first) = shards.first_mut() {
        first.buffers.clone_from(&source.other);
    }
    let single = matches!(&shards[..], [shard] if matches!(shard.name, ShardName::Fixed(_)));
    let (shards, sources) = write_and_hash(&shards, inputs, bytes, staging, watch)?;
    let mut files = Vec::new();
    if !single {
        files.push(write_index(staging.path(), &shards)?);
    }
    files.extend(shards.into_iter().map(|s| s.file));
    let config = dense_config(&source.config, dtype);
    let mut manifest = Manifest { family: "dense".into(), ..manifest(provenance, sources) };
    if let Some(experts) = experts {
        manifest.family = source.config.model_type().into();
        manifest.experts = match provenance.experts.len() == experts.count {
            true => provenance.experts.clone(),
            false => (0..experts.count).map(|e| e.to_string()).collect(),
        };
    }
    let title = if manifest.experts.is_empty() { "dense merge" } else { "merge of MoE models" };
    let title = provenance.title.as_deref().unwrap_or(title);
    finish(staging, source, config, title, provenance, manifest, files)
}

/// What tensors that were computed tell about their numbers: each remark once, with the first tensor it is about.
pub fn remarks<'a>(tensors: impl Iterator<Item = (&'a str, &'a WeightRef)>) -> Vec<String> {
    let mut found: BTreeMap<String, (usize, &str)> = BTreeMap::new();
    for (name, weight) in tensors {
        if let Some(remark) = weight.remark() {
            found.entry(remark).or_insert((0, name)).0 += 1;
        }
    }
    let line = |(remark, (count, first)): (String, (usize, &str))| match count {
        1 => format!("`{first}`: {remark}"),
        _ => format!("{count} tensors, `{first}` first: {remark}"),
    };
    found.into_iter().map(line).collect()
}

/// As the usual tools cut and name them.
fn numbered(tensors: Vec<OutTensor>, limit: u64) -> Vec<ShardPlan> {
    let parts = split(tensors, limit);
    let count = parts.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    parts
        .into_iter()
        .enumerate()
        .map(|(i, tensors)| ShardPlan::new(ShardName::Fixed(name(i)), tensors))
        .collect()
}

/// One shard per role, cut at the limit.
fn moe_shards(plan: &Plan, gates: &Gates, limit: u64) -> Vec<ShardPlan> {
    let tensors = plan.tensors.iter().map(|tensor| {
        let weight = numbers(tensor, gates);
        (tensor.role, OutTensor { name: tensor.name.clone(), weight, dtype: tensor.dtype })
    });
    by_role(tensors, limit)
}

fn by_role(tensors: impl Iterator<Item = (Role, OutTensor)>, limit: u64) -> Vec<ShardPlan> {
    let mut roles: BTreeMap<Role, Vec<OutTensor>> = BTreeMap::new();
    for (role, tensor) in tensors {
        roles.entry(role).or_default().push(tensor);
    }
    let mut shards = Vec::new();
    for (role, tensors) in roles {
        let parts = split(tensors, limit);
        let many = parts.len() > 1;
        for (i, tensors) in parts.into_iter().enumerate() {
            let stem = if many { format!("{}-{:05}", role.stem(), i + 1) } else { role.stem() };
            shards.push(ShardPlan::new(ShardName::ByContent(stem), tensors));
        }
    }
    shards
}

/// The weight of a planned tensor; [`Gates::check`] has seen that the gates are there.
pub(crate) fn numbers(tensor: &PlannedTensor, gates: &Gates) -> WeightRef {
    let values = match &tensor.content {
        Content::Weight(weight) => return weight.clone(),
        Content::Router(layer) => &gates.layers[*layer],
        Content::SharedGate(layer) => match &gates.shared {
            Some(shared) => &shared[*layer],
            None => return Arc::new(OwnedWeight::zeros(&tensor.name, &tensor.shape, tensor.dtype)),
        },
    };
    Arc::new(OwnedWeight::from_f32(&tensor.name, values, &tensor.shape, Dtype::F32))
}

/// Writes the shards while the files of the sources are hashed beside it.
fn write_and_hash(
    shards: &[ShardPlan],
    sources: &[(String, &Source)],
    needed: u64,
    staging: &Staging,
    watch: Watch<'_>,
) -> Result<(Vec<WrittenShard>, Vec<SourceRecord>), MergeError> {
    let files: Vec<PathBuf> = sources.iter().flat_map(|(_, s)| s.files.iter().cloned()).collect();
    staging.protect(&files)?;
    staging.need(needed)?;
    let hashing_stops = watch.interrupt.child();
    let (written, hashed) = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| hash_files(&files, &hashing_stops));
        let written = write_logged(staging.path(), shards, staging.log(), watch);
        if written.is_err() {
            // Nobody will ask for the hashes: what is being written is lost.
            hashing_stops.trigger();
        }
        (written, hashing.join().unwrap_or(Err(CheckpointError::Interrupted)))
    });
    let (written, hashed) = (written?, hashed?);
    let records = sources
        .iter()
        .map(|(role, source)| SourceRecord {
            role: role.clone(),
            label: card::public_label(source),
            files: source.files.iter().filter_map(|f| hashed.get(f).cloned()).collect(),
        })
        .collect();
    Ok((written, records))
}

fn manifest(provenance: &Provenance, sources: Vec<SourceRecord>) -> Manifest {
    Manifest {
        version: MANIFEST_VERSION,
        tool_version: TOOL_VERSION.into(),
        generation: 0,
        family: String::new(),
        experts: Vec::new(),
        gate_mode: provenance.gate_mode.clone(),
        align: provenance.align.clone(),
        seed: provenance.seed,
        recipe_blake3: provenance
            .recipe
            .as_ref()
            .map(|r| moe_merge_checkpoint::manifest::hash_bytes(r.as_bytes())),
        sources,
        files: Vec::new(),
    }
}

/// Configuration, side files, recipe, card, manifest.
fn finish(
    staging: &Staging,
    base: &Source,
    config: Map<String, Value>,
    title: &str,
    provenance: &Provenance,
    mut manifest: Manifest,
    mut files: Vec<FileRecord>,
) -> Result<Written, MergeError> {
    let dir = staging.path();
    files.push(write_json(dir, "config.json", &Value::Object(config))?);
    for side in &base.side {
        files.push(write_file(dir, &side.name, &side.read()?)?);
    }
    if base.side_file("generation_config.json").is_none() {
        let settings = Value::Object(generation_config(&base.config));
        files.push(write_json(dir, "generation_config.json", &settings)?);
    }
    if let Some(recipe) = &provenance.recipe {
        files.push(write_file(dir, "moe-merge.yaml", recipe.as_bytes())?);
        if let Some(name) = provenance.dialect.file_name() {
            files.push(write_file(dir, name, recipe.as_bytes())?);
        }
    }
    let text = card::card(title, base, provenance, &manifest);
    files.push(write_file(dir, "README.md", text.as_bytes())?);
    manifest.files = files;
    manifest.write(dir)?;
    let bytes = manifest.files.iter().map(|f| f.size).sum();
    Ok(Written { files: manifest.files, bytes })
}

#[cfg(test)]
mod tests;
