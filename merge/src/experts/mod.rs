//! The routed experts of a MoE checkpoint, by the names of their tensors.

mod assign;
mod inputs;
mod neurons;
mod similarity;

use std::collections::BTreeSet;

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_model::Spec;
use moe_merge_model::spec::{ExpertNames, MoeMlp};

use crate::documents::expert_names;
use crate::error::MergeError;
use crate::families::Matrix;
use crate::plan::Role;

pub use inputs::{ExpertMatch, LayerMatch};
pub(crate) use inputs::{MoeInputs, filter_names};
pub(crate) use similarity::weight_distances;

/// The routed experts of one layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ExpertLayer {
    /// The layer.
    pub layer: usize,
    /// Experts there are.
    pub experts: usize,
    /// Experts that a token visits.
    pub top_k: usize,
    names: ExpertNames,
    selection_bias: Option<&'static str>,
}

impl ExpertLayer {
    fn new(layer: usize, moe: &MoeMlp) -> Self {
        Self {
            layer,
            experts: moe.experts,
            top_k: moe.router.top_k,
            names: moe.names,
            selection_bias: moe.selection_bias,
        }
    }

    /// Name of the router, `[experts, hidden]`.
    pub fn router(&self) -> String {
        format!("model.layers.{}.{}", self.layer, self.names.router())
    }

    /// Name of the bias on the choice of experts, `[1, experts]`, in families that have one.
    pub fn selection_bias(&self) -> Option<String> {
        self.selection_bias.map(|name| format!("model.layers.{}.{name}", self.layer))
    }

    /// Name of one matrix of one expert.
    pub fn matrix(&self, expert: usize, matrix: Matrix) -> String {
        let [gate, up, down] = self.names.expert(expert).unwrap_or_default();
        let name = match matrix {
            Matrix::Gate => gate,
            Matrix::Up => up,
            Matrix::Down => down,
        };
        format!("model.layers.{}.{name}", self.layer)
    }

    /// One matrix of one expert.
    pub fn weight<'s>(
        &self,
        source: &'s Source,
        expert: usize,
        matrix: Matrix,
    ) -> Result<&'s WeightRef, MergeError> {
        Ok(source.weight(&self.matrix(expert, matrix))?)
    }
}

/// The layers of `source` that have routed experts; none in a dense model.
///
/// # Errors
/// [`MergeError::Model`] for a family that is not known, [`MergeError::Incompatible`] for one that keeps all experts of a
/// layer in one tensor.
pub(crate) fn expert_layers(source: &Source) -> Result<Vec<ExpertLayer>, MergeError> {
    let spec = Spec::of(source)?;
    if spec.moe_layers().any(|(_, moe)| moe.names.expert(0).is_none()) {
        return Err(MergeError::Incompatible {
            what: format!("`{}` keeps all experts of a layer in one tensor", spec.family),
            first: source.label.clone(),
            second: "output family of experts with tensors of their own".into(),
            expected: "one tensor for each matrix of an expert, or transformers 5's own layout".into(),
            found: format!("model_type `{}`", spec.family),
            hint: "use a MoE of the families mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek, ernie4_5_moe".into(),
            recipe: None,
        });
    }
    Ok(spec.moe_layers().map(|(layer, moe)| ExpertLayer::new(layer, moe)).collect())
}

/// The expert that a person calls `text`: by its name in the manifest, else by its number from 0.
///
/// # Errors
/// [`MergeError::Argument`] with the names there are.
pub(crate) fn expert_called(
    source: &Source,
    experts: usize,
    text: &str,
) -> Result<usize, MergeError> {
    let names = expert_names(&source.path, experts)?;
    let by_number = || text.parse().ok().filter(|n| *n < experts);
    names.iter().position(|n| n == text).or_else(by_number).ok_or_else(|| {
        let list = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
        MergeError::Argument {
            what: format!("`{}` has no such expert", source.label),
            name: "--expert".into(),
            expected: format!("one of {list}, or a number from 0 to {}", experts.saturating_sub(1)),
            found: format!("`{text}`"),
            hint: Some("`moe-merge inspect` lists the experts of a model".into()),
        }
    })
}

/// Which file each tensor of a MoE goes to.
#[derive(Debug)]
pub(crate) struct ExpertRoles {
    /// Experts of a layer.
    pub count: usize,
    routers: BTreeSet<String>,
}

impl ExpertRoles {
    /// Of a model with routed experts that have tensors of their own; `None` for every other.
    pub fn of(source: &Source) -> Option<Self> {
        let layers = expert_layers(source).ok()?;
        let count = layers.first()?.experts;
        let routers = layers.iter().flat_map(|l| [Some(l.router()), l.selection_bias()]);
        Some(Self { count, routers: routers.flatten().collect() })
    }

    /// The role of the tensor `name`.
    pub fn role(&self, name: &str) -> Role {
        let expert = || name.split_once(".experts.")?.1.split('.').next()?.parse().ok();
        match expert() {
            Some(expert) => Role::Expert(expert),
            None if self.routers.contains(name) || name.ends_with(".shared_expert_gate.weight") => {
                Role::Router
            }
            None => Role::Shared,
        }
    }
}
