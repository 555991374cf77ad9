//! What is compared: the tensors of two checkpoints, and where each stands in an adapter.

use std::sync::Arc;

use moe_merge_checkpoint::weight::Stacked;
use moe_merge_checkpoint::{CheckpointError, Source, WeightRef};

use super::{ExtractOptions, Packing};
use crate::error::MergeError;
use crate::experts::{ExpertLayer, expert_called, expert_layers};
use crate::families::{Matrix, dense_name, is_derived};

/// How the change of a tensor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As a pair of factors.
    Linear,
    /// As a pair of factors, with rows and columns exchanged.
    Embedding,
    /// As it is in the tuned model.
    Whole,
}

/// The place of an expert's pair among those of all experts of a layer, for [`Packing::Fused`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub layer: usize,
    pub part: Part,
    pub expert: usize,
    pub experts: usize,
}

/// One of the two fused parameters of a layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// `gate_up_proj [E, 2I, H]`
    GateUp,
    /// `down_proj [E, H, I]`
    Down,
}

impl Part {
    pub const fn name(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        }
    }
}

/// A tensor of both models.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    /// The module, by its name in the base.
    pub module: String,
    pub form: Form,
    pub base: WeightRef,
    pub tuned: WeightRef,
    /// Bias of the module in the tuned model, if it changed.
    pub bias: Option<WeightRef>,
    /// Where it goes in a packed adapter.
    pub slot: Option<Slot>,
    /// One of several experts, whose factors have one rank.
    pub expert: bool,
}

/// All pairs, with what a person should know about the rest.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    pub list: Vec<Pair>,
    pub notes: Vec<String>,
    /// Whether the head is the embedding in both models.
    pub tied: bool,
}

pub(super) const HEAD: &str = "lm_head.weight";

/// Families whose linear layers are stored `[in, out]`.
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// Finds what is compared.
pub(super) fn pairs(
    base: &Source,
    tuned: &Source,
    options: &ExtractOptions,
) -> Result<Pairs, MergeError> {
    if CONV1D_MODELS.contains(&base.config.model_type()) {
        return Err(CheckpointError::Unsupported {
            what: "linear layers of this family are stored the other way round".into(),
            file: base.path.clone(),
            hint: format!(
                "`{}` has no experts; use mergekit-extract-lora",
                base.config.model_type()
            ),
        }
        .into());
    }
    let mut found = match &options.expert {
        Some(expert) => of_expert(base, tuned, expert, options.packing)?,
        None => of_model(base, tuned, options)?,
    };
    found.list.retain(|p| options.filter.chooses(&p.module));
    if found.list.is_empty() && !options.filter.is_empty() {
        return Err(MergeError::Argument {
            what: "no module is left to be compared".into(),
            name: "--include, --exclude".into(),
            expected: "a pattern that names one of the modules".into(),
            found: options.filter.to_string(),
            hint: Some(format!("`moe-merge inspect {}` shows what is there", base.label)),
        });
    }
    Ok(found)
}

/// Whether two weights are the same bytes, as far as that can be told without computing anything.
pub(super) fn same_bytes(a: &WeightRef, b: &WeightRef) -> bool {
    a.dtype() == b.dtype()
        && a.shape() == b.shape()
        && matches!((a.bytes(), b.bytes()), (Some(a), Some(b)) if a == b)
}

fn of_model(base: &Source, tuned: &Source, options: &ExtractOptions) -> Result<Pairs, MergeError> {
    same_family(base, tuned)?;
    let layers = match options.packing {
        Packing::Modules => Vec::new(),
        Packing::Fused => expert_layers(base)?,
    };
    let tied = |s: &Source| {
        s.config.bool("tie_word_embeddings") == Some(true) || !s.tensors.contains_key(HEAD)
    };
    let mut found = Pairs { tied: tied(base) && tied(tuned), ..Pairs::default() };
    // PEFT would add the factors to the embedding alone, or, merging them, to the one matrix twice.
    let embed_lora = options.embed_lora && !found.tied;
    if options.embed_lora && found.tied {
        let note =
            "embedding and head are one matrix, which is stored whole in spite of `--embed-lora`";
        found.notes.push(note.into());
    }
    let mut other = Vec::new();
    for (name, weight) in &base.tensors {
        let Some(module) = name.strip_suffix(".weight") else {
            // A bias goes with its module.
            let has_module = name
                .strip_suffix(".bias")
                .is_some_and(|m| base.tensors.contains_key(&format!("{m}.weight")));
            if !has_module && !same_bytes(weight, tuned_weight(tuned, name)?) {
                other.push(name);
            }
            continue;
        };
        let packed = !layers.is_empty() && module.contains(".mlp.experts.")
            || module.contains(".block_sparse_moe.experts.") && !layers.is_empty();
        // What is left out need not even be comparable.
        if packed || name == HEAD && tied(base) || !options.filter.chooses(module) {
            continue;
        }
        found.list.push(pair(base, tuned, module, embed_lora)?);
    }
    if tied(base) && !tied(tuned) {
        let embedding = base.tensors.keys().find(|n| n.ends_with("embed_tokens.weight"));
        let head = embedding.map(|e| -> Result<Pair, MergeError> {
            let (base, tuned) = (base.weight(e)?.clone(), tuned.weight(HEAD)?.clone());
            let module = "lm_head".to_owned();
            Ok(Pair { form: Form::Whole, ..linear(module, base, tuned) })
        });
        found.list.extend(head.transpose()?);
    }
    for layer in &layers {
        found.list.extend(packed(base, tuned, layer, layer, None)?);
    }
    if !other.is_empty() {
        found.notes.push(format!(
            "{} changed too, which no adapter can carry: {}",
            count(other.len(), "tensor"),
            some(&other)
        ));
    }
    let known = |n: &&String| base.tensors.contains_key(*n) || *n == HEAD || is_derived(n);
    let unknown: Vec<&String> = tuned.tensors.keys().filter(|n| !known(n)).collect();
    if !unknown.is_empty() {
        found.notes.push(format!(
            "`{}` has {} that the base lacks: {}",
            tuned.label,
            count(unknown.len(), "tensor"),
            some(&unknown)
        ));
    }
    Ok(found)
}

fn same_family(base: &Source, tuned: &Source) -> Result<(), MergeError> {
    let (ours, theirs) = (base.config.model_type(), tuned.config.model_type());
    if ours == theirs {
        return Ok(());
    }
    Err(MergeError::Incompatible {
        what: "the two models are of different families".into(),
        first: base.label.clone(),
        second: tuned.label.clone(),
        expected: format!("model_type `{ours}`"),
        found: format!("model_type `{theirs}`"),
        hint: "`--expert N` compares an expert of a MoE with the MLPs of a dense model".into(),
        recipe: None,
    })
}

fn tuned_weight<'s>(tuned: &'s Source, name: &str) -> Result<&'s WeightRef, MergeError> {
    let embedding = || tuned.tensors.iter().find(|(n, _)| n.ends_with("embed_tokens.weight"));
    match tuned.tensors.get(name) {
        None if name == HEAD => match embedding() {
            Some((_, weight)) => Ok(weight),
            None => Ok(tuned.weight(name)?),
        },
        _ => Ok(tuned.weight(name)?),
    }
}

fn linear(module: String, base: WeightRef, tuned: WeightRef) -> Pair {
    Pair { module, form: Form::Linear, base, tuned, bias: None, slot: None, expert: false }
}

/// The module `module` of both models.
fn pair(base: &Source, tuned: &Source, module: &str, embed_lora: bool) -> Result<Pair, MergeError> {
    let name = format!("{module}.weight");
    let (ours, theirs) = (base.weight(&name)?.clone(), tuned_weight(tuned, &name)?.clone());
    let embedding = module.ends_with("embed_tokens");
    if ours.shape() != theirs.shape() {
        return Err(MergeError::Incompatible {
            what: format!("`{name}` has different shapes in the two models"),
            first: base.label.clone(),
            second: tuned.label.clone(),
            expected: format!("{:?}", ours.shape()),
            found: format!("{:?}", theirs.shape()),
            hint: match embedding || name == HEAD {
                true => "the vocabularies differ: `--exclude '(embed_tokens|lm_head)$'` leaves \
                         them out"
                    .into(),
                false => "take a base and its fine-tune".into(),
            },
            recipe: None,
        });
    }
    let router = [".mlp.gate", ".block_sparse_moe.gate", ".router.layer"];
    let whole = ours.shape().len() != 2
        || router.iter().any(|r| module.ends_with(r))
        || (embedding || name == HEAD) && !embed_lora;
    let form = match (whole, embedding) {
        (true, _) => Form::Whole,
        (false, true) => Form::Embedding,
        (false, false) => Form::Linear,
    };
    let bias = format!("{module}.bias");
    let bias = match base.tensors.get(&bias) {
        None => None,
        Some(ours) => {
            let theirs = tuned.weight(&bias)?;
            theirs.expect_shape(ours.shape(), "as in the base model")?;
            (!same_bytes(ours, theirs)).then(|| theirs.clone())
        }
    };
    let expert = module.contains(".experts.");
    Ok(Pair { form, bias, expert, ..linear(module.to_owned(), ours, theirs) })
}

/// Where the three matrices of one expert are, or of the MLP of a dense model.
enum Side {
    Moe(Vec<ExpertLayer>, usize),
    Dense,
}

impl Side {
    fn new(source: &Source, expert: &str) -> Result<Self, MergeError> {
        let layers = expert_layers(source)?;
        let Some(first) = layers.first() else { return Ok(Self::Dense) };
        let expert = expert_called(source, first.experts, expert)?;
        Ok(Self::Moe(layers, expert))
    }

    fn layers(&self) -> Option<Vec<usize>> {
        match self {
            Self::Moe(layers, _) => Some(layers.iter().map(|l| l.layer).collect()),
            Self::Dense => None,
        }
    }

    fn weight<'s>(
        &self,
        source: &'s Source,
        layer: usize,
        matrix: Matrix,
    ) -> Result<(String, &'s WeightRef), MergeError> {
        let name = match self {
            Self::Moe(layers, expert) => match layers.iter().find(|l| l.layer == layer) {
                Some(l) => l.matrix(*expert, matrix),
                None => dense_name(layer, matrix),
            },
            Self::Dense => dense_name(layer, matrix),
        };
        let weight = source.weight(&name)?;
        Ok((name, weight))
    }
}

fn of_expert(
    base: &Source,
    tuned: &Source,
    expert: &str,
    packing: Packing,
) -> Result<Pairs, MergeError> {
    let (ours, theirs) = (Side::new(base, expert)?, Side::new(tuned, expert)?);
    let Some(layers) = ours.layers().or_else(|| theirs.layers()) else {
        return Err(MergeError::Argument {
            what: "neither model has experts".into(),
            name: "--expert".into(),
            expected: "a mixture of experts as base, as tuned model, or as both".into(),
            found: format!("`{}`, `{}`", base.config.model_type(), tuned.config.model_type()),
            hint: Some("leave `--expert` out to compare whole models".into()),
        });
    };
    let mut found = Pairs::default();
    match (&ours, packing) {
        (Side::Moe(layers, expert), Packing::Fused) => {
            let dense: Vec<ExpertLayer> = Vec::new();
            let (others, other) = match &theirs {
                Side::Moe(layers, expert) => (layers, *expert),
                Side::Dense => (&dense, 0),
            };
            for layer in layers {
                let other_layer = others.iter().find(|l| l.layer == layer.layer);
                let which = Some((*expert, other_layer.map(|_| other)));
                found.list.extend(packed(base, tuned, layer, other_layer.unwrap_or(layer), which)?);
            }
        }
        (Side::Dense, Packing::Fused) => {
            return Err(MergeError::Argument {
                what: "a dense base has no fused experts".into(),
                name: "--packing fused".into(),
                expected: "a mixture of experts as base".into(),
                found: format!("model_type `{}`", base.config.model_type()),
                hint: Some("leave `--packing` out".into()),
            });
        }
        (_, Packing::Modules) => {
            for layer in layers {
                for matrix in Matrix::ALL {
                    let (name, weight) = ours.weight(base, layer, matrix)?;
                    let (_, other) = theirs.weight(tuned, layer, matrix)?;
                    other.expect_shape(weight.shape(), "as in the base model")?;
                    let module = name.trim_end_matches(".weight").to_owned();
                    let pair = linear(module, weight.clone(), other.clone());
                    found.list.push(Pair { expert: true, ..pair });
                }
            }
        }
    }
    found.notes.extend(elsewhere(base, tuned, expert));
    Ok(found)
}

/// The pairs of a layer for fused parameters; `which`: one expert of the base, and of the tuned model (its MLP where that
/// is dense), instead of all of both.
fn packed(
    base: &Source,
    tuned: &Source,
    layer: &ExpertLayer,
    other: &ExpertLayer,
    which: Option<(usize, Option<usize>)>,
) -> Result<Vec<Pair>, MergeError> {
    let experts: Vec<(usize, Option<usize>)> = match which {
        Some(which) => vec![which],
        None => (0..layer.experts).map(|e| (e, Some(e))).collect(),
    };
    let mut found = Vec::new();
    for (expert, other_expert) in experts {
        let ours = |m| Ok::<_, MergeError>(layer.weight(base, expert, m)?.clone());
        let theirs = |m| match other_expert {
            Some(e) => Ok::<_, MergeError>(other.weight(tuned, e, m)?.clone()),
            None => Ok(tuned.weight(&dense_name(layer.layer, m))?.clone()),
        };
        for (part, matrices) in
            [(Part::GateUp, &[Matrix::Gate, Matrix::Up][..]), (Part::Down, &[Matrix::Down][..])]
        {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for &matrix in matrices {
                let (ours, theirs) = (ours(matrix)?, theirs(matrix)?);
                theirs.expect_shape(ours.shape(), "as in the base model")?;
                a.push(ours);
                b.push(theirs);
            }
            let slot = Slot { layer: layer.layer, part, expert, experts: layer.experts };
            let module =
                format!("model.layers.{}.mlp.experts.{expert}.{}", layer.layer, part.name());
            let pair = linear(module, stacked(a), stacked(b));
            found.push(Pair { slot: Some(slot), expert: true, ..pair });
        }
    }
    Ok(found)
}

fn stacked(mut parts: Vec<WeightRef>) -> WeightRef {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let rows = parts.iter().map(|p| p.rows()).sum();
    let shape = vec![rows, parts[0].cols()];
    Arc::new(Stacked::new(parts, shape))
}

/// A note about changes that an adapter of one expert does not carry.
fn elsewhere(base: &Source, tuned: &Source, expert: &str) -> Option<String> {
    let mlp = |n: &str| n.contains(".mlp.") || n.contains(".block_sparse_moe.");
    let changed: Vec<&String> = base
        .tensors
        .iter()
        .filter(|(n, w)| !mlp(n) && tuned.tensors.get(*n).is_some_and(|t| !same_bytes(w, t)))
        .map(|(n, _)| n)
        .collect();
    (!changed.is_empty()).then(|| {
        format!(
            "{} outside of expert `{expert}` changed too and {} left out: {}",
            count(changed.len(), "tensor"),
            if changed.len() == 1 { "is" } else { "are" },
            some(&changed)
        )
    })
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn some(names: &[&String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
