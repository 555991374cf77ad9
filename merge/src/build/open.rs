//! Opening and checking everything that a recipe names, before anything is computed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use moe_merge_checkpoint::Source;
use moe_merge_router::Method;

use super::{BuildOptions, GENERALIST, Prepared, RecipeText};
use crate::card::Dialect;
use crate::error::MergeError;
use crate::evaluate::Domain;
use crate::families::{self, Request, SharedGate};
use crate::gates::TokenPrompts;
use crate::origins::Origins;
use crate::plan::{Assembly, ExpertInput, Plan};
use crate::prompts::{Prompts, Tokenizers, check_tokenizers};
use crate::recipe::{
    Architecture, Attention, Choice, DenseRecipe, Expert, MoeRecipe, RecipeErrors, SourceSpec,
};
use crate::self_text::DEFAULT_TOKENS;
use crate::sources;
use crate::write::Provenance;

impl Prepared {
    /// Opens and checks everything that `recipe` names. Nothing is written.
    ///
    /// # Errors
    /// [`MergeError`]: sources that cannot be read or do not go together, prompts that are longer than the context,
    /// evaluation text that cannot be read.
    pub fn new(
        recipe: &MoeRecipe,
        text: RecipeText<'_>,
        options: BuildOptions,
    ) -> Result<Self, MergeError> {
        let start = Instant::now();
        let dir = text.folder();
        let plain = sources::open(&recipe.base_model, dir)?;
        let experts = inputs(&recipe.experts, dir)?;
        let shared = inputs(&recipe.shared_experts, dir)?;
        let mut origins = Origins::default();
        origins.add(&recipe.base_model, &plain);
        let described = recipe.experts.iter().chain(&recipe.shared_experts);
        described
            .zip(experts.iter().chain(&shared))
            .for_each(|(e, i)| origins.add(&e.source, &i.source));
        let (base, plain_base) = match &recipe.attention {
            Attention::Base => (plain, None),
            Attention::Merge(merge) => (with_attention(&plain, merge, dir)?, Some(plain)),
        };
        let estimator = moe_merge_router::find(recipe.gate_mode.name())
            .map_err(|e| recipe.place.error(e.to_string()))
            .map_err(|e| RecipeErrors(vec![e]))?;
        let prompted = recipe.shared_experts.iter().any(Expert::has_prompts);
        let drawn = matches!(estimator.method, Method::Seed(_));
        let wanted: Vec<&str> = recipe.architecture.iter().map(|a| a.name()).collect();
        let select = |shared_gate| {
            let request = Request {
                base: &base,
                experts: experts.iter().map(|e| &e.source).collect(),
                shared: shared.iter().map(|e| &e.source).collect(),
                shared_gate,
            };
            families::select(&wanted, &request).map(|family| (family, shared_gate))
        };
        // Without prompts a gate for the shared expert can only be drawn, and only some families want one.
        let (family, shared_gate) = match (prompted, drawn && !shared.is_empty()) {
            (true, _) => select(SharedGate::Computed),
            (false, false) => select(SharedGate::Absent),
            (false, true) => {
                select(SharedGate::Absent).or_else(|e| select(SharedGate::Computed).map_err(|_| e))
            }
        }
        .map_err(|e| origins.locate(e))?;
        if !recipe.base_tokenizer {
            check_tokenizers(recipe, &base, &experts).map_err(|e| origins.locate(e))?;
        }
        let generalist = recipe.generalist.unwrap_or(Choice::No);
        let mut assembly = Assembly {
            base,
            experts,
            shared,
            shared_gate,
            top_k: recipe.experts_per_token,
            dtype: recipe.dtype,
            family,
            layout: options.layout,
            seed: recipe.seed,
        };
        if generalist != Choice::No {
            refuse_generalist(recipe, estimator, &assembly)?;
        }
        let (plan, alternative) = {
            let plan = |assembly: &Assembly| Plan::new(assembly).map_err(|e| origins.locate(e));
            match generalist {
                Choice::No => (plan(&assembly)?, None),
                Choice::Yes => {
                    assembly = with_generalist(&assembly);
                    (plan(&assembly)?, None)
                }
                Choice::Auto => {
                    let other = with_generalist(&assembly);
                    let planned = plan(&other)?;
                    (plan(&assembly)?, Some(Box::new((other, planned))))
                }
            }
        };
        let tokenizer = Tokenizers { base: &assembly.base, opened: None };
        let mut originals: Vec<Source> =
            assembly.experts.iter().map(|e| e.source.clone()).collect();
        originals.truncate(recipe.experts.len());
        let prompts = Prompts::encode(recipe, estimator.method, shared_gate, tokenizer)
            .map_err(|e| origins.locate(e))?;
        let base = &recipe.base_model;
        let mut same_as_base: Vec<bool> =
            recipe.experts.iter().map(|e| unchanged(e, base)).collect();
        same_as_base.resize(assembly.experts.len(), true);
        let sources = assembly.sources();
        let sources = sources.iter().map(|(_, s)| *s).chain(&originals);
        let files: Vec<PathBuf> = sources.flat_map(|s| s.files.iter().cloned()).collect();
        let identity = options.identity(&format!("{recipe:?}"), &files);
        let self_text = prompts.experts.iter().map(|p| self_text_of(recipe, p)).collect();
        Ok(Self {
            plan,
            estimator,
            self_text,
            sequential: recipe.sequential != Some(Choice::No),
            alternative,
            align: recipe.align.clone(),
            originals,
            fitted: Vec::new(),
            jointly: None,
            experts: prompts.experts,
            shared: prompts.shared,
            bos: prompts.bos,
            notes: prompts.notes,
            plain_base,
            same_as_base,
            domains: Domain::read_all(&recipe.evaluation)?,
            target: text.target(options.out.as_ref(), recipe.output.as_ref()),
            provenance: Provenance {
                recipe: Some(text.text.to_owned()),
                dialect: dialect(recipe),
                gate_mode: Some(recipe.gate_mode.name().into()),
                seed: recipe.seed,
                shard_limit: options.shard_limit,
                ..Provenance::default()
            },
            assembly,
            origins,
            identity,
            options,
            opened: start.elapsed().as_secs_f64(),
        })
    }
}

fn with_generalist(assembly: &Assembly) -> Assembly {
    let mut all = assembly.clone();
    all.experts.push(ExpertInput {
        source: assembly.base.clone(),
        name: GENERALIST.into(),
        layers: None,
        noise_scale: 0.0,
        residual_scale: 1.0,
    });
    all
}

/// Only output matching finds tokens for an expert without text.
fn refuse_generalist(
    recipe: &MoeRecipe,
    estimator: &moe_merge_router::Estimator,
    assembly: &Assembly,
) -> Result<(), MergeError> {
    let (what, expected) = if assembly.experts.iter().any(|e| e.name == GENERALIST) {
        ("an expert is called `generalist` already", "another name")
    } else if !matches!(estimator.method, Method::Matching(_)) {
        ("a generalist has no text to learn from", "`gate_mode: auto` or `match`")
    } else if recipe.sequential == Some(Choice::No) {
        ("a generalist has no text to learn from", "`sequential` left out, or true")
    } else {
        return Ok(());
    };
    let mut error = recipe.place.error(what);
    error.path = "generalist".into();
    error.expected = Some(expected.into());
    Err(RecipeErrors(vec![error]).into())
}

/// Tokens that an expert writes: as the recipe says; without its word, what an expert without prompts needs.
fn self_text_of(recipe: &MoeRecipe, prompts: &TokenPrompts) -> usize {
    match recipe.self_text {
        _ if !recipe.gate_mode.learned() => 0,
        Some(tokens) => tokens,
        None if prompts.positive.is_empty() => DEFAULT_TOKENS,
        None => 0,
    }
}

/// Whether mergekit-moe would read the recipe, too.
fn dialect(recipe: &MoeRecipe) -> Dialect {
    let experts = recipe.experts.iter().chain(&recipe.shared_experts);
    let ours = recipe.gate_mode.learned()
        || recipe.self_text.is_some()
        || recipe.generalist.is_some()
        || recipe.sequential.is_some()
        || recipe.prompt_tokens.is_some()
        || recipe.align.is_some()
        || !matches!(recipe.attention, Attention::Base)
        || matches!(
            recipe.architecture[..],
            [Architecture::Ernie45Moe | Architecture::GraniteMoeShared]
        )
        || recipe.base_tokenizer
        || recipe.output.is_some()
        || recipe.seed != 0
        || !recipe.evaluation.is_empty()
        || experts
            .into_iter()
            .any(|e| e.name.is_some() || e.layers.is_some() || !e.prompts_files.is_empty());
    if ours { Dialect::Own } else { Dialect::MergekitMoe }
}

/// Opens the sources of experts.
fn inputs(experts: &[Expert], dir: &Path) -> Result<Vec<ExpertInput>, MergeError> {
    experts
        .iter()
        .map(|expert| {
            Ok(ExpertInput {
                source: sources::open(&expert.source, dir)?,
                name: expert.label(),
                layers: expert.layers.clone(),
                noise_scale: expert.noise_scale,
                residual_scale: expert.residual_scale,
            })
        })
        .collect()
}

/// Whether an expert is the base, unchanged.
fn unchanged(expert: &Expert, base: &SourceSpec) -> bool {
    expert.source.same_as(base) && expert.noise_scale == 0.0 && expert.residual_scale == 1.0
}

/// The base with the tensors outside its MLPs taken from a dense merge.
fn with_attention(base: &Source, merge: &DenseRecipe, dir: &Path) -> Result<Source, MergeError> {
    let merged = crate::dense(merge, dir)?;
    let mut mixed = base.clone();
    for (name, weight) in &mut mixed.tensors {
        if !name.contains(".mlp.")
            && let Some(other) = merged.tensors.get(name)
        {
            other.expect_shape(weight.shape(), "as in the base model")?;
            *weight = other.clone();
        }
    }
    mixed.files.extend(merged.files.iter().filter(|f| !base.files.contains(f)).cloned());
    Ok(mixed)
}
