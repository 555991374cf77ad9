//! What a model is made of, from headers and config alone.

use std::collections::BTreeMap;
use std::path::Path;

use moe_merge_kernels::Dtype;

use crate::config_json::ConfigJson;
use crate::source::Source;

/// How the weights of experts are laid out on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertLayout {
    /// There are no experts.
    Dense,
    /// One tensor for each expert.
    Hub,
    /// All experts of a layer in one tensor.
    Fused,
}

impl ExpertLayout {
    /// `dense`, `hub` or `fused`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Hub => "hub",
            Self::Fused => "fused",
        }
    }
}

/// What the tensors of a file are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Everything that every token goes through.
    Shared,
    /// One expert.
    Expert(usize),
    /// Routers.
    Router,
    /// Several of them.
    Mixed,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shared => f.write_str("shared"),
            Self::Expert(expert) => write!(f, "expert {expert}"),
            Self::Router => f.write_str("routers"),
            Self::Mixed => f.write_str("mixed"),
        }
    }
}

impl Role {
    /// The role of a tensor by its name.
    fn of(tensor: &str) -> Self {
        const ROUTERS: [&str; 5] = [
            ".block_sparse_moe.gate.weight",
            ".block_sparse_moe.router.layer.weight",
            ".mlp.gate.weight",
            ".mlp.gate.e_score_correction_bias",
            ".mlp.shared_expert_gate.weight",
        ];
        if ROUTERS.iter().any(|r| tensor.ends_with(r)) {
            return Self::Router;
        }
        let number = tensor.split_once(".experts.").and_then(|(_, rest)| rest.split('.').next());
        number.and_then(|n| n.parse().ok()).map_or(Self::Shared, Self::Expert)
    }
}

/// Tensors of one dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// How many.
    pub tensors: usize,
    /// Their bytes in that dtype.
    pub bytes: u64,
}

/// One file with weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSummary {
    /// Its name without folders.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Tensors that come from it.
    pub tensors: usize,
    /// What they are for; none if no tensor was traced to it.
    pub role: Option<Role>,
}

/// What a model is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// `model_type` of the config.
    pub family: String,
    /// Its class in transformers.
    pub architecture: Option<String>,
    /// How its experts lie on disk.
    pub layout: ExpertLayout,
    /// Sizes by their names in the config, those that it has.
    pub sizes: Vec<(&'static str, u64)>,
    /// Experts in a layer.
    pub experts: Option<usize>,
    /// Experts that each token goes through.
    pub experts_per_token: Option<usize>,
    /// Tensors.
    pub tensors: usize,
    /// Numbers in them.
    pub parameters: u64,
    /// Bytes in their dtypes.
    pub bytes: u64,
    /// The same by dtype.
    pub dtypes: BTreeMap<Dtype, Share>,
    /// Files with weights.
    pub files: Vec<FileSummary>,
}

impl Summary {
    /// The sizes of a config that a summary shows.
    pub const SIZES: [&'static str; 9] = [
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ];

    /// Looks at names, shapes and dtypes; reads no weight.
    pub fn of(source: &Source) -> Self {
        let config = &source.config;
        let mut summary = Self {
            family: config.model_type().to_owned(),
            architecture: architecture(config),
            layout: ExpertLayout::Dense,
            sizes: Self::SIZES
                .into_iter()
                .filter_map(|key| Some((key, config.get(key)?.as_u64()?)))
                .collect(),
            experts: ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"]
                .into_iter()
                .find_map(|key| config.usize(key))
                .filter(|&experts| experts > 0),
            experts_per_token: ["num_experts_per_tok", "moe_k"]
                .into_iter()
                .find_map(|key| config.usize(key)),
            tensors: source.tensors.len(),
            parameters: 0,
            bytes: 0,
            dtypes: BTreeMap::new(),
            files: Vec::new(),
        };
        let mut by_file: BTreeMap<_, (usize, Option<Role>)> = BTreeMap::new();
        for (name, weight) in &source.tensors {
            let bytes = weight.size_in(weight.dtype());
            summary.parameters += weight.len() as u64;
            summary.bytes += bytes;
            let share = summary.dtypes.entry(weight.dtype()).or_default();
            share.tensors += 1;
            share.bytes += bytes;
            let (file, stored) = weight.origin();
            let role = Role::of(name);
            if matches!(role, Role::Expert(_)) && summary.layout != ExpertLayout::Fused {
                let fused = !matches!(Role::of(&stored), Role::Expert(_));
                summary.layout = if fused { ExpertLayout::Fused } else { ExpertLayout::Hub };
            }
            let entry = by_file.entry(file).or_insert((0, Some(role)));
            entry.0 += 1;
            if entry.1 != Some(role) {
                entry.1 = Some(Role::Mixed);
            }
        }
        summary.files = source
            .files
            .iter()
            .map(|file| {
                let (tensors, role) = by_file.get(file).copied().unwrap_or_default();
                FileSummary { name: file_name(file), bytes: length(file), tensors, role }
            })
            .collect();
        summary
    }
}

fn architecture(config: &ConfigJson) -> Option<String> {
    Some(config.get("architectures")?.as_array()?.first()?.as_str()?.to_owned())
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned()
}

fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |m| m.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_come_from_names() {
        let cases = [
            ("model.layers.0.block_sparse_moe.experts.3.w1.weight", Role::Expert(3)),
            ("model.layers.11.mlp.experts.10.up_proj.weight", Role::Expert(10)),
            ("model.layers.0.block_sparse_moe.gate.weight", Role::Router),
            ("model.layers.0.mlp.gate.weight", Role::Router),
            ("model.layers.0.mlp.gate_proj.weight", Role::Shared),
            ("model.layers.0.mlp.experts.gate_up_proj", Role::Shared),
            ("model.embed_tokens.weight", Role::Shared),
        ];
        for (name, role) in cases {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }

    #[test]
    fn the_tiny_base_is_dense() {
        let Some(path) = moe_merge_testkit::shared("models/tiny/base") else { return };
        let source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
        let summary = Summary::of(&source);
        assert_eq!((summary.family.as_str(), summary.layout), ("llama", ExpertLayout::Dense));
        assert_eq!((summary.experts, summary.tensors), (None, 56));
        assert_eq!(summary.bytes, 2 * summary.parameters);
        assert_eq!(summary.dtypes[&Dtype::BF16].tensors, 56);
        assert_eq!(summary.files[0].name, "model.safetensors");
        assert_eq!((summary.files[0].tensors, summary.files[0].role), (56, Some(Role::Shared)));
        assert!(summary.sizes.contains(&("hidden_size", 128)));
    }
}
