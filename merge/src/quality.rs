//! How good the routers of a recipe are, by every way of making them, on text that nothing was fitted to.
//!
//! *Oracle*: the model with the MLPs of the right expert for every token of a domain; the right expert is the one of the same
//! name. *Recovered* = `(ln ppl_base - ln ppl_router) / (ln ppl_base - ln ppl_oracle)`, over all scored tokens of a domain
//! or those at some positions of their windows; means are over the domains whose oracle gains. Nothing is written to disk.

use std::collections::BTreeMap;
use std::time::Instant;

use moe_merge_checkpoint::Source;
use moe_merge_checkpoint::publish::{Interrupt, Replace};
use moe_merge_model::Placement;
use moe_merge_router::{ESTIMATORS, Estimator};
use serde::Serialize;

use crate::align::{AlignReport, Survival};
use crate::build::{BuildOptions, Jointly, Observer, Prepared, RecipeText, Stage};
use crate::error::MergeError;
pub use crate::evaluate::POSITION_GROUPS;
use crate::evaluate::{Cut, Score, Scorer};
use crate::families::Layout;
use crate::gates::TokenPrompts;
use crate::recipe::MoeRecipe;

mod error;
mod variant;

pub use error::QualityError;
use variant::{Build, Text};

/// What a person asks for.
#[derive(Debug, Clone, Default)]
pub struct QualityOptions {
    /// Estimators by name; empty for all but other names of the same.
    pub estimators: Vec<String>,
    /// Tokens that a model sees at once; 512, or the context where it is shorter.
    pub window: Option<usize>,
    /// Tokens of each text, from its beginning; all.
    pub tokens: Option<usize>,
    /// Experts per token, one MoE for each; empty: as the recipe says.
    pub top_k: Vec<usize>,
    /// Prompts of each expert, from the first, one MoE for each; empty: all of the recipe.
    pub prompts: Vec<usize>,
    /// Experts by name, one MoE for each set; empty: all of the recipe.
    pub experts: Vec<Vec<String>>,
    /// One row more: `auto` with so many tokens that each expert writes itself.
    pub self_text: Option<usize>,
    /// One row more: `auto` without any prompt.
    pub no_prompts: bool,
    /// One row more: `auto` with the base as one more expert.
    pub generalist: bool,
    /// Raised to stop.
    pub interrupt: Interrupt,
    /// Where texts are scored.
    pub placement: Placement,
}

/// Base, experts, oracle and routers side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quality {
    /// Tokens that a model saw at once.
    pub window: usize,
    /// Texts, in the order of the recipe.
    pub domains: Vec<DomainFacts>,
    /// Base and experts, each alone, with its perplexity per domain.
    pub models: Vec<(String, Vec<f64>)>,
    /// First positions of the groups in `by_position`: text tokens before the one predicted, in its window.
    pub position_groups: [usize; POSITION_GROUPS.len()],
    /// What fitting the experts did, if the recipe asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub align: Option<AlignReport>,
    /// One row per router.
    pub routers: Vec<RouterRow>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// One text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainFacts {
    /// Its name.
    pub name: String,
    /// Tokens scored.
    pub tokens: usize,
    /// Perplexity of its oracle, where an expert has its name.
    pub oracle: Option<f64>,
    /// The same with MLPs as they came, where the recipe has them fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_oracle: Option<f64>,
    /// What of the expert's gain survives in the two, where the recipe has MLPs fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub survival: Option<Survival>,
}

/// One way of making routers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouterRow {
    /// Experts of the MoE; a generalist is named if it is one.
    pub experts: Vec<String>,
    /// Experts that each token visits.
    pub experts_per_token: usize,
    /// Most prompts of each expert that were used; `None` for all.
    pub prompts: Option<usize>,
    /// The estimator, with what was done beside it.
    pub router: String,
    /// Results by domain; `None` for text of an expert that the MoE does not have.
    pub domains: Vec<Option<DomainResult>>,
    /// Means over domains.
    pub mean: Shares,
    /// Tokens in all prompts, what the experts wrote themselves included.
    pub prompt_tokens: usize,
    /// Tokens that the experts wrote themselves.
    pub self_text_tokens: usize,
    /// Seconds for the routers, text that experts write included where this row was the first to need it.
    pub seconds: f64,
}

/// One router on one text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainResult {
    /// Over all scored tokens.
    pub perplexity: f64,
    /// How near that is to what could be had.
    #[serde(flatten)]
    pub shares: Shares,
}

/// Shares between 0 and 1, where they can be told; shares of the gap may be less or more.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Of the gap between base and oracle.
    pub recovered: Option<f64>,
    /// The same from the ninth token of a window on.
    pub recovered_from_ninth: Option<f64>,
    /// The same by [`POSITION_GROUPS`].
    pub by_position: Vec<Option<f64>>,
    /// Of tokens whose first choice is the right expert, mean over layers.
    pub accuracy: Option<f64>,
    /// Of tokens that have it among their top-k.
    pub coverage: Option<f64>,
    /// What held-out prompts let expect of `accuracy`, for learned routers.
    pub forecast: Option<f64>,
}

impl Shares {
    /// Each share's mean over those that are known.
    fn mean(all: &[&Shares]) -> Self {
        let mean = |of: &dyn Fn(&Shares) -> Option<f64>| {
            let known: Vec<f64> = all.iter().filter_map(|s| of(s)).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        Self {
            recovered: mean(&|s| s.recovered),
            recovered_from_ninth: mean(&|s| s.recovered_from_ninth),
            by_position: (0..POSITION_GROUPS.len())
                .map(|g| mean(&|s| s.by_position.get(g).copied().flatten()))
                .collect(),
            accuracy: mean(&|s| s.accuracy),
            coverage: mean(&|s| s.coverage),
            forecast: mean(&|s| s.forecast),
        }
    }
}

/// The group of positions that the ninth token of a window begins.
const NINTH: usize = 4;
const _: () = assert!(POSITION_GROUPS[NINTH] == 8);

/// An oracle that gains less, in nats per token, says nothing about routers.
const GAIN: f64 = 1e-3;

/// Measures base, experts, oracle and every router asked for on the evaluation text of `recipe`.
///
/// Each router is made exactly as a build would make it, and scored in a model with the numbers that the build would write;
/// no file is written.
///
/// # Errors
/// [`QualityError`]: no evaluation text, names that do not exist, what a build can meet; interruption.
pub fn measure(
    recipe: &MoeRecipe,
    text: RecipeText<'_>,
    options: &QualityOptions,
    observer: &dyn Observer,
) -> Result<Quality, QualityError> {
    let labels: Vec<String> = recipe.experts.iter().map(|e| e.label()).collect();
    if recipe.evaluation.is_empty() {
        return Err(QualityError::NoText { recipe: recipe.place.clone(), experts: labels });
    }
    let sets = expert_sets(&labels, &options.experts)?;
    let (builds, mut notes) = builds(recipe, &sets, options)?;
    let mut comparison = Comparison::new(recipe, text, options, observer)?;
    notes.extend(comparison.unmatched());
    let mut rows = Vec::new();
    for (at, build) in builds.iter().enumerate() {
        let label = build.router();
        observer.subject(&format!("`{label}`, {} of {}", at + 1, builds.len()));
        match comparison.row(build, observer) {
            Ok(row) => rows.push(row),
            // Too few prompts for an estimator, say: the others still count.
            Err(error @ MergeError::Router { .. }) => notes.push(format!("`{label}`: {error}")),
            Err(error) => return Err(error.into()),
        }
    }
    notes.extend(std::mem::take(&mut comparison.notes));
    Ok(comparison.finish(rows, notes))
}

/// The experts of each MoE by number.
fn expert_sets(labels: &[String], asked: &[Vec<String>]) -> Result<Vec<Vec<usize>>, QualityError> {
    if asked.is_empty() {
        return Ok(vec![(0..labels.len()).collect()]);
    }
    let set = |names: &Vec<String>| {
        let mut set: Vec<usize> = Vec::new();
        for name in names {
            let Some(at) = labels.iter().position(|l| l == name) else {
                return Err(QualityError::Expert { name: name.clone(), known: labels.to_vec() });
            };
            if set.contains(&at) {
                return Err(QualityError::Twice { name: name.clone() });
            }
            set.push(at);
        }
        match set.len() {
            0 | 1 => Err(QualityError::TooFew { experts: names.clone() }),
            _ => Ok(set),
        }
    };
    asked.iter().map(set).collect()
}

/// Every MoE that was asked for, in the order of the rows, and why some cannot be.
fn builds(
    recipe: &MoeRecipe,
    sets: &[Vec<usize>],
    options: &QualityOptions,
) -> Result<(Vec<Build>, Vec<String>), QualityError> {
    let estimators: Vec<&'static Estimator> = match options.estimators.as_slice() {
        // Another name of `hidden`.
        [] => ESTIMATORS.iter().filter(|e| e.name != "hidden_last").collect(),
        names => names
            .iter()
            .map(|n| moe_merge_router::find(n).map_err(QualityError::Estimator))
            .collect::<Result<_, _>>()?,
    };
    let (mut builds, mut refused) = (Vec::new(), Vec::new());
    let counts: Vec<Option<usize>> = match options.prompts.as_slice() {
        [] => vec![None],
        counts => counts.iter().copied().map(Some).collect(),
    };
    let top_ks = match options.top_k.as_slice() {
        [] => vec![recipe.experts_per_token],
        top_ks => top_ks.to_vec(),
    };
    for set in sets {
        for (i, &prompts) in counts.iter().enumerate() {
            for &top_k in &top_ks {
                let plain = |estimator| Build {
                    set: set.clone(),
                    prompts,
                    top_k,
                    estimator,
                    text: Text::Recipe,
                    generalist: recipe.generalist,
                    extra: false,
                };
                let auto = plain(&ESTIMATORS[0]);
                let mut asked: Vec<Build> = estimators.iter().map(|e| plain(e)).collect();
                asked.extend(
                    options.self_text.map(|n| Build { text: Text::Also(n), ..auto.clone() }),
                );
                asked.extend(options.no_prompts.then(|| Build {
                    text: Text::Only(options.self_text),
                    prompts: Some(0),
                    ..auto.clone()
                }));
                asked.extend(options.generalist.then(|| auto.clone().with_generalist()));
                // What reads no prompts is the same whatever their number.
                asked.retain(|b| i == 0 || b.reads_prompts());
                for build in asked {
                    match build.refusal(recipe) {
                        None => builds.push(build),
                        Some(reason) if refused.contains(&reason) => {}
                        Some(reason) => refused.push(reason),
                    }
                }
            }
        }
    }
    match builds.is_empty() {
        true => Err(QualityError::Nothing { reasons: refused }),
        false => Ok((builds, refused)),
    }
}

/// What rows are compared with, and what they have in common.
struct Comparison<'a> {
    recipe: &'a MoeRecipe,
    text: RecipeText<'a>,
    interrupt: &'a Interrupt,
    scorer: Scorer<'a>,
    names: Vec<String>,
    /// The expert of each domain, by its number in the recipe.
    right: Vec<Option<usize>>,
    base: Vec<Score>,
    oracle: Vec<Option<Score>>,
    /// The oracle's perplexity with MLPs as they came, where they are fitted.
    plain_oracle: Vec<Option<f64>>,
    align: Option<AlignReport>,
    /// Sources of the recipe's experts with fitted MLPs.
    fitted: Vec<Option<Source>>,
    /// What is to be done with them once there are routers.
    jointly: Option<Jointly>,
    models: Vec<(String, Vec<f64>)>,
    /// Prompts with what the experts wrote: written once for all rows that need the same.
    texts: BTreeMap<String, (Vec<TokenPrompts>, usize)>,
    notes: Vec<String>,
}

impl<'a> Comparison<'a> {
    fn new(
        recipe: &'a MoeRecipe,
        text: RecipeText<'a>,
        options: &'a QualityOptions,
        observer: &dyn Observer,
    ) -> Result<Self, MergeError> {
        let interrupt = &options.interrupt;
        let plain = MoeRecipe { generalist: None, ..recipe.clone() };
        let mut prepared = Prepared::new(&plain, text, build_options(interrupt))?;
        let unfitted = prepared.assembly().clone();
        observer.subject("experts");
        let align = prepared.align(observer)?;
        let domains = prepared.domains().to_vec();
        let labels = prepared.expert_names();
        let right: Vec<Option<usize>> =
            domains.iter().map(|d| labels.iter().position(|l| *l == d.name)).collect();
        let cut = Cut { window: options.window, tokens: options.tokens };
        let shared = match prepared.gated_shared() {
            true => {
                observer.subject("gate of the shared expert");
                prepared.routers(observer)?.0.shared
            }
            false => Vec::new(),
        };
        let references = prepared.references();
        let base = references.iter().find_map(|(_, source)| *source);
        let base = base.unwrap_or(&prepared.assembly().base);
        let scorer = Scorer::new(base, &domains, cut, interrupt, &options.placement)?;
        let all: Vec<usize> = (0..domains.len()).collect();
        let passes = references.iter().filter(|(_, source)| source.is_some()).count();
        let matched: Vec<usize> = all.iter().copied().filter(|&d| right[d].is_some()).collect();
        observer.subject("base, experts and oracle");
        let oracles = if align.is_some() { 2 } else { 1 };
        let total = scorer.tokens(&all) * passes + scorer.tokens(&matched) * oracles;
        observer.stage(Stage::Evaluate, total as u64);
        let mut done = |tokens| observer.advance(tokens as u64);
        let mut base_scores: Vec<Score> = Vec::new();
        let mut models: Vec<(String, Vec<f64>)> = Vec::new();
        for (name, source) in &references {
            let perplexities = match (source, models.first()) {
                (None, Some((_, base))) => base.clone(),
                (source, _) => {
                    let scores = scorer.score(source.unwrap_or(base), &all, &mut done)?;
                    let each = scores.iter().map(Score::perplexity).collect();
                    if base_scores.is_empty() {
                        base_scores = scores;
                    }
                    each
                }
            };
            models.push((name.clone(), perplexities));
        }
        let mut oracle = vec![None; domains.len()];
        let mut plain_oracle = vec![None; domains.len()];
        for domain in matched {
            let Some(expert) = right[domain] else { continue };
            if align.is_some() {
                let source = prepared.oracle_of(&unfitted, expert, &shared)?;
                let score = scorer.score(&source, &[domain], &mut done)?.pop();
                plain_oracle[domain] = score.as_ref().map(Score::perplexity);
            }
            let source = prepared.oracle(expert, &shared)?;
            oracle[domain] = scorer.score(&source, &[domain], &mut done)?.pop();
        }
        Ok(Self {
            recipe,
            text,
            interrupt,
            scorer,
            names: domains.into_iter().map(|d| d.name).collect(),
            right,
            base: base_scores,
            oracle,
            plain_oracle,
            align,
            fitted: prepared.fitted().0.to_vec(),
            jointly: prepared.fitted().1.cloned(),
            models,
            texts: BTreeMap::new(),
            notes: prepared.all_notes(),
        })
    }

    /// A note on texts whose right expert is not known.
    fn unmatched(&self) -> Option<String> {
        let unknown = self.names.iter().zip(&self.right).filter(|(_, right)| right.is_none());
        let names: Vec<String> = unknown.map(|(name, _)| format!("`{name}`")).collect();
        (!names.is_empty()).then(|| {
            format!(
                "no expert is called {}: no share can be told for that text",
                names.join(" or ")
            )
        })
    }

    /// Makes the routers of one MoE and scores it.
    fn row(&mut self, build: &Build, observer: &dyn Observer) -> Result<RouterRow, MergeError> {
        let clock = Instant::now();
        let recipe = build.recipe(self.recipe);
        let mut prepared = Prepared::new(&recipe, self.text, build_options(self.interrupt))?;
        if !self.fitted.is_empty() {
            let sources = build.set.iter().map(|&e| self.fitted[e].clone()).collect();
            prepared.take_aligned(sources, self.jointly.as_ref().map(|j| j.of(&build.set)))?;
        }
        let key = build.text_key();
        let known = key.as_ref().and_then(|key| self.texts.get(key)).cloned();
        let mut self_text_tokens = 0;
        if let Some((texts, written)) = known {
            prepared.take_texts(texts);
            self_text_tokens = written;
        }
        let (mut routers, written) = prepared.routers(observer)?;
        prepared.join(&mut routers, None, observer)?;
        self_text_tokens += written;
        if let (Some(key), 1..) = (key, written) {
            self.texts.insert(key, (prepared.texts().to_vec(), written));
        }
        let seconds = clock.elapsed().as_secs_f64();

        let source: Source = prepared.merged(&routers)?;
        let in_set = |d: &usize| self.right[*d].is_none_or(|e| build.set.contains(&e));
        let domains: Vec<usize> = (0..self.names.len()).filter(in_set).collect();
        observer.stage(Stage::Evaluate, self.scorer.tokens(&domains) as u64);
        let mut done = |tokens| observer.advance(tokens as u64);
        let scores = self.scorer.score(&source, &domains, &mut done)?;
        let mut results: Vec<Option<DomainResult>> = vec![None; self.names.len()];
        for (domain, score) in domains.into_iter().zip(&scores) {
            let expert = self.right[domain].and_then(|e| build.set.iter().position(|&s| s == e));
            let forecast = routers.forecast.as_ref().zip(expert);
            let shares = Shares {
                accuracy: expert.map(|e| score.load.first(e)),
                coverage: expert.map(|e| score.load.any(e)),
                forecast: forecast.and_then(|(f, e)| f.experts.get(e)?.accuracy),
                ..self.shares(domain, score)
            };
            results[domain] = Some(DomainResult { perplexity: score.perplexity(), shares });
        }
        let all: Vec<&Shares> = results.iter().flatten().map(|r| &r.shares).collect();
        Ok(RouterRow {
            experts: prepared.expert_names(),
            experts_per_token: build.top_k,
            prompts: if build.reads_prompts() { build.prompts } else { Some(0) },
            router: build.router(),
            mean: Shares::mean(&all),
            domains: results,
            prompt_tokens: prepared.prompt_tokens(),
            self_text_tokens,
            seconds,
        })
    }

    /// What of the gap a score recovers.
    fn shares(&self, domain: usize, score: &Score) -> Shares {
        let share = |groups: std::ops::Range<usize>| {
            let oracle = self.oracle[domain].as_ref()?.nats_per_token(groups.clone())?;
            let base = self.base[domain].nats_per_token(groups.clone())?;
            recovered(base, oracle, score.nats_per_token(groups)?)
        };
        let last = POSITION_GROUPS.len();
        Shares {
            recovered: share(0..last),
            recovered_from_ninth: share(NINTH..last),
            by_position: (0..last).map(|g| share(g..g + 1)).collect(),
            ..Shares::default()
        }
    }

    fn finish(self, routers: Vec<RouterRow>, notes: Vec<String>) -> Quality {
        let survival = |domain: usize| {
            let perplexities =
                [self.plain_oracle[domain]?, self.oracle[domain].as_ref()?.perplexity()];
            // The base comes first, the experts follow.
            let own = self.models.get(1 + self.right[domain]?)?.1[domain];
            Survival::of(self.base[domain].perplexity(), own, perplexities)
        };
        let survivals: Vec<_> = (0..self.names.len()).map(survival).collect();
        let facts = self.names.into_iter().zip(&self.base).zip(&self.oracle);
        let fitted = self.plain_oracle.into_iter().zip(survivals);
        Quality {
            window: self.scorer.window,
            domains: facts
                .zip(fitted)
                .map(|(((name, base), oracle), (plain_oracle, survival))| DomainFacts {
                    name,
                    tokens: base.tokens.iter().sum(),
                    oracle: oracle.as_ref().map(Score::perplexity),
                    plain_oracle,
                    survival,
                })
                .collect(),
            models: self.models,
            align: self.align,
            position_groups: POSITION_GROUPS,
            routers,
            notes,
        }
    }
}

/// Share of the gap between `base` and `oracle` at `router`, all in nats per token; `None` where the oracle gains next to
/// nothing.
fn recovered(base: f64, oracle: f64, router: f64) -> Option<f64> {
    (base - oracle > GAIN).then(|| (base - router) / (base - oracle))
}

/// Options of a build that is never written.
fn build_options(interrupt: &Interrupt) -> BuildOptions {
    BuildOptions {
        out: None,
        unfinished: Default::default(),
        replace: Replace::Never,
        layout: Layout::Hub,
        interrupt: interrupt.clone(),
        placement: Placement::cpu(),
        shard_limit: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|&n| n.to_owned()).collect()
    }

    #[test]
    fn shares_and_their_means_by_hand() {
        assert_eq!(recovered(3.0, 2.0, 2.25), Some(0.75));
        assert_eq!(recovered(3.0, 2.0, 3.5), Some(-0.5));
        assert_eq!(recovered(3.0, 2.9999, 2.0), None);
        let one = Shares { recovered: Some(0.5), accuracy: Some(1.0), ..Shares::default() };
        let two = Shares { recovered: Some(0.7), ..Shares::default() };
        let mean = Shares::mean(&[&one, &two]);
        assert!((mean.recovered.unwrap() - 0.6).abs() < 1e-12);
        assert_eq!((mean.accuracy, mean.forecast), (Some(1.0), None));
        assert_eq!(mean.by_position, vec![None; POSITION_GROUPS.len()]);
    }

    #[test]
    fn sets_of_experts_by_name() {
        let labels = strings(&["a", "b", "c"]);
        assert_eq!(expert_sets(&labels, &[]).unwrap(), [[0, 1, 2]]);
        let asked = [strings(&["c", "a"]), strings(&["a", "b", "c"])];
        assert_eq!(expert_sets(&labels, &asked).unwrap(), [vec![2, 0], vec![0, 1, 2]]);
        let refused = |names: &[&str]| expert_sets(&labels, &[strings(names)]).unwrap_err();
        assert!(matches!(refused(&["a", "d"]), QualityError::Expert { name, .. } if name == "d"));
        assert!(matches!(refused(&["a"]), QualityError::TooFew { .. }));
        assert!(matches!(refused(&["a", "b", "a"]), QualityError::Twice { name } if name == "a"));
    }
}
