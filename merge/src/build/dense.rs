//! Dense merges, from a recipe to a published folder.

use std::path::PathBuf;
use std::time::Instant;

use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Identity, Source, WeightRef};
use serde::Serialize;

use super::{BuildOptions, Observer, RecipeText, Stage};
use crate::card::Dialect;
use crate::dense::{Fitting, Opened, TextReport, Watched, open_dense};
use crate::error::MergeError;
use crate::experts::ExpertMatch;
use crate::recipe::{DenseRecipe, MatchExperts};
use crate::write::{Provenance, remarks, write_dense};

/// What a dense build did.
#[derive(Debug, Clone, Serialize)]
pub struct DenseReport {
    /// The folder.
    pub output: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// The merge method.
    pub method: String,
    /// How the experts of MoE models were matched.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matched_experts: Vec<ExpertMatch>,
    /// Text that the models were run on, for methods that look at activations.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<TextReport>,
    /// Seconds it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// A dense merge whose sources are open and checked.
#[derive(Debug)]
pub struct PreparedDense {
    source: Source,
    matched_experts: Vec<ExpertMatch>,
    fitting: Option<Fitting>,
    /// Where it will be written.
    pub target: PathBuf,
    /// Bytes of its tensors.
    pub bytes: u64,
    method: &'static str,
    dtype: Option<Dtype>,
    provenance: Provenance,
    identity: Identity,
    options: BuildOptions,
}

impl PreparedDense {
    /// Opens and checks everything that `recipe` names. Nothing is computed.
    ///
    /// # Errors
    /// [`MergeError`] as [`crate::dense`].
    pub fn new(
        recipe: &DenseRecipe,
        text: RecipeText<'_>,
        options: BuildOptions,
    ) -> Result<Self, MergeError> {
        let Opened { source, matched, fitting } = open_dense(recipe, text.folder())?;
        let dtype = recipe.out_dtype.or(recipe.dtype);
        let size = |w: &WeightRef| w.size_in(dtype.unwrap_or(w.dtype()));
        let identity = options.identity(&format!("{recipe:?}"), &source.files);
        Ok(Self {
            bytes: source.tensors.values().map(size).sum(),
            target: text.target(options.out.as_ref(), recipe.output.as_ref()),
            method: recipe.method.name,
            dtype,
            provenance: Provenance {
                recipe: Some(text.text.to_owned()),
                dialect: dialect(recipe),
                seed: recipe.seed,
                shard_limit: options.shard_limit,
                ..Provenance::default()
            },
            source,
            matched_experts: matched,
            fitting,
            identity,
            options,
        })
    }

    /// Bytes of memory that fitting weights takes, about; none for a method that fits none.
    ///
    /// # Errors
    /// [`MergeError::Checkpoint`] for a model that lacks a tensor.
    pub fn fitting_memory(&self) -> Result<Option<u64>, MergeError> {
        self.fitting.as_ref().map(Fitting::memory).transpose()
    }

    /// What a person should know of it, as far as that is known before anything is computed.
    pub fn notes(&self) -> &[String] {
        &self.source.notes
    }

    /// Computes, writes, publishes.
    ///
    /// # Errors
    /// [`MergeError`]; then there is no output.
    pub fn build(mut self, observer: &dyn Observer) -> Result<DenseReport, MergeError> {
        let clock = Instant::now();
        let staging = self.options.staging(&self.target, &self.identity)?;
        let taken_up = staging.note();
        self.provenance.name =
            self.target.file_name().map_or("merge".into(), |n| n.to_string_lossy().into_owned());
        let texts = match self.fitting.take() {
            Some(fitting) => {
                let watched = Watched { observer, interrupt: &self.options.interrupt };
                fitting.run(&mut self.source, &self.target, watched)?
            }
            None => Vec::new(),
        };
        observer.stage(Stage::Write, self.bytes);
        let progress = |bytes| observer.advance(bytes);
        let watch = Watch { interrupt: &self.options.interrupt, progress: &progress };
        let inputs = vec![("merged".to_owned(), &self.source)];
        let written =
            write_dense(&self.source, &inputs, self.dtype, &self.provenance, &staging, watch)?;
        Ok(DenseReport {
            output: {
                staging.publish()?;
                self.target.clone()
            },
            bytes: written.bytes,
            method: self.method.into(),
            matched_experts: self.matched_experts,
            texts,
            seconds: clock.elapsed().as_secs_f64(),
            warnings: {
                let tensors = self.source.tensors.iter().map(|(name, w)| (&**name, w));
                let told = remarks(tensors).into_iter().chain(self.source.notes.clone());
                taken_up.into_iter().chain(told).collect()
            },
        })
    }
}

/// Whether mergekit-yaml would read the recipe, too.
fn dialect(recipe: &DenseRecipe) -> Dialect {
    let ours = recipe.match_experts != MatchExperts::None
        || recipe.match_neurons
        || recipe.method.activations.is_some();
    if ours { Dialect::Own } else { Dialect::MergekitYaml }
}
