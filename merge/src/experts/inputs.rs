//! MoE checkpoints as inputs of a dense merge: experts in a common order, and all of a layer in one tensor where the
//! method looks at whole tensors.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_merge_checkpoint::weight::{OwnedWeight, PermutedRows, Stacked};
use moe_merge_checkpoint::{Source, WeightRef};
use serde::Serialize;

use super::assign::assign;
use super::neurons::matched_neurons;
use super::similarity::{activation_correlation, weight_correlation};
use super::{ExpertLayer, expert_layers};
use crate::error::MergeError;
use crate::families::Matrix;
use crate::recipe::MatchExperts;

/// How the experts of one model were put into the order of another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpertMatch {
    /// The model.
    pub model: String,
    /// The model whose order all get.
    pub reference: String,
    /// What they were compared by: `weights` or `activations`.
    pub by: &'static str,
    /// Layer by layer.
    pub layers: Vec<LayerMatch>,
}

/// The experts of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerMatch {
    /// The layer.
    pub layer: usize,
    /// `order[i]` is the model's expert that goes with expert `i` of the reference.
    pub order: Vec<usize>,
    /// Correlation of each of these pairs, -1 to 1.
    pub similarity: Vec<f64>,
}

impl LayerMatch {
    /// Whether the experts stay where they are.
    pub fn in_place(&self) -> bool {
        self.order.iter().enumerate().all(|(i, j)| i == *j)
    }
}

impl ExpertMatch {
    /// One line for a person.
    pub fn note(&self) -> String {
        let moved = self.layers.iter().filter(|l| !l.in_place()).count();
        let all = self.layers.iter().flat_map(|l| l.similarity.iter().map(move |s| (l.layer, *s)));
        let (sum, count) = all.clone().fold((0.0, 0usize), |(s, n), (_, x)| (s + x, n + 1));
        let worst = all.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0));
        let (mean, layers) = (sum / count.max(1) as f64, self.layers.len());
        let mut text = format!(
            "`{}`: experts matched to those of `{}` by their {}, in another order in {moved} of {layers} layers; \
             correlation {mean:.2} (least {:.2}, in layer {})",
            self.model, self.reference, self.by, worst.1, worst.0
        );
        if self.layers.iter().flat_map(|l| &l.similarity).all(|s| *s == 0.0) {
            text += "; the experts of one of them are all alike, so that there is nothing to match";
        } else if mean < UNRELATED {
            text += "; the experts are hardly related, and a merge of their weights may be useless";
        }
        text
    }
}

/// Mean correlation below which two sets of experts have little to do with each other.
const UNRELATED: f64 = 0.2;

/// Gives the text that experts are compared on, as tokens of the first model.
pub(crate) type Texts<'a> = dyn Fn(&Source, &Source) -> Result<Vec<Vec<u32>>, MergeError> + 'a;

/// What is done to the models of a dense merge as they are opened.
#[derive(Debug, Default)]
pub(crate) struct MoeInputs {
    /// How experts are matched.
    experts: MatchExperts,
    /// Whether the neurons of their MLPs are, after that.
    neurons: bool,
    /// Whether experts of a layer become one tensor.
    fuse: bool,
    /// The first model, whose order counts.
    reference: Option<(Source, Vec<ExpertLayer>)>,
    /// What was matched.
    pub matches: Vec<ExpertMatch>,
}

impl MoeInputs {
    pub fn new(experts: MatchExperts, neurons: bool, fuse: bool) -> Self {
        Self { experts, neurons, fuse, ..Self::default() }
    }

    /// `source` as the merge takes it; dense models and families that are not known stay as they are, but for their neurons.
    ///
    /// * `texts`: asked where experts are matched by activations
    ///
    /// # Errors
    /// [`MergeError::Argument`] if experts are to be matched in a model that has none; as [`weight_correlation`],
    /// [`activation_correlation`] and [`matched_neurons`]; what `texts` returns.
    pub fn take(&mut self, source: Source, texts: &Texts<'_>) -> Result<Source, MergeError> {
        let matching = self.experts != MatchExperts::None;
        if !(matching || self.neurons || self.fuse) {
            return Ok(source);
        }
        let layers = match expert_layers(&source) {
            Ok(layers) if layers.is_empty() && matching => return Err(no_experts(&source)),
            Ok(layers) => layers,
            Err(e) if matching => return Err(e),
            // Experts in one tensor already, or a family that is merged by the names of its tensors.
            Err(_) => Vec::new(),
        };
        let mut source = source;
        if let Some((reference, own)) = &self.reference {
            if matching {
                let scores = match self.experts {
                    MatchExperts::Activations => {
                        same_shape((reference, own), (&source, &layers))?;
                        let texts = texts(reference, &source)?;
                        Some(activation_correlation(reference, &source, &texts)?)
                    }
                    MatchExperts::None | MatchExperts::Weights => None,
                };
                let found = match_experts((reference, own), (&source, &layers), scores.as_ref())?;
                source = reordered(source, &layers, &found.layers)?;
                self.matches.push(found);
            }
            if self.neurons {
                source = matched_neurons(reference, source)?;
            }
        } else if matching || self.neurons {
            self.reference = Some((source.clone(), layers.clone()));
        }
        if self.fuse && !layers.is_empty() { fused(source, &layers) } else { Ok(source) }
    }
}

fn no_experts(source: &Source) -> MergeError {
    MergeError::Incompatible {
        what: "there are no experts to match".into(),
        first: source.label.clone(),
        second: "output family of MoE models".into(),
        expected: "a mixture of experts".into(),
        found: format!("model_type `{}`", source.config.model_type()),
        hint: "leave `match_experts` out".into(),
        recipe: None,
    }
}

fn same_shape(
    (reference, own): (&Source, &[ExpertLayer]),
    (model, layers): (&Source, &[ExpertLayer]),
) -> Result<(), MergeError> {
    let shape = |l: &[ExpertLayer]| l.iter().map(|l| (l.layer, l.experts)).collect::<Vec<_>>();
    if shape(own) == shape(layers) {
        return Ok(());
    }
    let told = |l: &[ExpertLayer]| match l.first() {
        Some(first) => format!("{} layers of {} experts", l.len(), first.experts),
        None => "no experts".into(),
    };
    Err(MergeError::Incompatible {
        what: "the models have different numbers of experts".into(),
        first: reference.label.clone(),
        second: model.label.clone(),
        expected: told(own),
        found: told(layers),
        hint: "`moe-merge shrink` merges several experts into one".into(),
        recipe: None,
    })
}

/// Finds for each expert of the reference the one of `model` that is most like it, in each layer.
///
/// * `scores`: how much alike they are, by layer; by their weights without it
///
/// # Errors
/// [`MergeError::Incompatible`] for another number of layers or experts; as [`weight_correlation`].
pub(crate) fn match_experts(
    (reference, own): (&Source, &[ExpertLayer]),
    (model, layers): (&Source, &[ExpertLayer]),
    scores: Option<&BTreeMap<usize, Vec<f64>>>,
) -> Result<ExpertMatch, MergeError> {
    same_shape((reference, own), (model, layers))?;
    let mut found = Vec::new();
    for (own, layer) in own.iter().zip(layers) {
        let score = match scores.and_then(|s| s.get(&layer.layer)) {
            Some(score) => score.clone(),
            None => weight_correlation((reference, own), (model, layer))?,
        };
        let order = assign(&score, layer.experts);
        let similarity =
            order.iter().enumerate().map(|(i, j)| score[i * layer.experts + j]).collect();
        found.push(LayerMatch { layer: layer.layer, order, similarity });
    }
    let (model, reference) = (model.label.clone(), reference.label.clone());
    let by = if scores.is_some() { "activations" } else { "weights" };
    Ok(ExpertMatch { model, reference, by, layers: found })
}

/// The same model with its experts in another order: the rows of its routers go with them.
pub(crate) fn reordered(
    mut source: Source,
    layers: &[ExpertLayer],
    orders: &[LayerMatch],
) -> Result<Source, MergeError> {
    for (layer, LayerMatch { order, .. }) in
        layers.iter().zip(orders).filter(|(_, l)| !l.in_place())
    {
        let mut moved: BTreeMap<String, WeightRef> = BTreeMap::new();
        for matrix in Matrix::ALL {
            for (to, &from) in order.iter().enumerate() {
                let weight = layer.weight(&source, from, matrix)?.clone();
                moved.insert(layer.matrix(to, matrix), weight);
            }
        }
        let router = source.weight(&layer.router())?.clone();
        expect_rows(&router, layer.experts)?;
        let rows = order.iter().map(|&e| e as u32).collect();
        moved.insert(layer.router(), Arc::new(PermutedRows::new(router, Arc::new(rows))));
        if let Some(name) = layer.selection_bias()
            && let Some(bias) = source.tensors.get(&name)
        {
            // A vector, whatever its shape: one number for each expert.
            let values = bias.to_f32()?;
            let values: Vec<f32> = order.iter().filter_map(|&e| values.get(e).copied()).collect();
            if values.len() == bias.len() {
                let bias = OwnedWeight::from_f32(&name, &values, bias.shape(), bias.dtype());
                moved.insert(name, Arc::new(bias));
            }
        }
        source.tensors.extend(moved);
    }
    Ok(source)
}

fn expect_rows(router: &WeightRef, experts: usize) -> Result<(), MergeError> {
    let width = router.cols();
    Ok(router.expect_shape(&[experts, width], "one row for each expert")?)
}

/// The same model with all experts of a layer in one tensor: `…mlp.experts.gate_up_proj [E, 2I, H]` and
/// `…mlp.experts.down_proj [E, H, I]`, as transformers 5 has them in memory.
fn fused(mut source: Source, layers: &[ExpertLayer]) -> Result<Source, MergeError> {
    for layer in layers {
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in 0..layer.experts {
            for matrix in Matrix::ALL {
                let name = layer.matrix(expert, matrix);
                let weight = source.weight(&name)?.clone();
                let first = layer.weight(&source, expert, Matrix::Gate).map(|w| w.shape().to_vec());
                if let (Matrix::Up, Ok(shape)) = (matrix, first) {
                    weight.expect_shape(&shape, "as the gate projection")?;
                }
                if matrix == Matrix::Down { down.push(weight) } else { gate_up.push(weight) }
            }
        }
        for expert in 0..layer.experts {
            for matrix in Matrix::ALL {
                source.tensors.remove(&layer.matrix(expert, matrix));
            }
        }
        for (name, parts) in [("gate_up_proj", gate_up), ("down_proj", down)] {
            let [rows, cols] = [parts[0].rows(), parts[0].cols()];
            for part in &parts {
                part.expect_shape(&[rows, cols], "as the first expert")?;
            }
            let shape = vec![layer.experts, rows * parts.len() / layer.experts, cols];
            let name = format!("model.layers.{}.mlp.experts.{name}", layer.layer);
            source.tensors.insert(name, Arc::new(Stacked::new(parts, shape)));
        }
    }
    Ok(source)
}

/// All names that a filter may find the tensor `name` by: that in its file, and that in the other layout of experts.
pub(crate) fn filter_names(name: &str) -> String {
    let Some((layer, expert)) = name.split_once(".experts.") else { return name.to_owned() };
    let module = layer.trim_end_matches(".mlp").trim_end_matches(".block_sparse_moe");
    let other = match expert {
        "gate_up_proj" => {
            "mlp.experts.gate_proj.weight mlp.experts.up_proj.weight \
             block_sparse_moe.experts.w1.weight block_sparse_moe.experts.w3.weight"
        }
        "down_proj" => "mlp.experts.down_proj.weight block_sparse_moe.experts.w2.weight",
        _ if expert.ends_with(".down_proj.weight") || expert.ends_with(".w2.weight") => {
            "mlp.experts.down_proj"
        }
        _ => "mlp.experts.gate_up_proj",
    };
    let others = other.split(' ').map(|o| format!("{module}.{o}"));
    std::iter::once(name.to_owned()).chain(others).collect::<Vec<_>>().join("\n")
}
