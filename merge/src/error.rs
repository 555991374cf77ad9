//! What can go wrong between a recipe and its output.

use moe_merge_checkpoint::{CheckpointError, Explain, Kind};
use moe_merge_model::router_training::TrainingError;
use moe_merge_model::{ModelError, TextError};
use moe_merge_router::RouterError;

use crate::documents::DocumentError;
use crate::recipe::{Place, RecipeErrors};

/// An error of planning, merging or writing.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The recipe itself.
    #[error(transparent)]
    Recipe(#[from] RecipeErrors),
    /// A file: a source that cannot be read, an output that cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model that cannot be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Text that cannot be tokenised, or a tokenizer that cannot be read.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Routers that cannot be trained.
    #[error(transparent)]
    Training(#[from] TrainingError),
    /// A file of prompts.
    #[error(transparent)]
    Documents(#[from] DocumentError),
    /// No gate can be made from the prompts.
    #[error("no router can be made for layer {layer}: {source}")]
    Router {
        /// The layer.
        layer: usize,
        /// Why.
        #[source]
        source: RouterError,
    },
    /// Two models that do not go together, or a model that the output cannot hold.
    #[error("{what}")]
    Incompatible {
        /// What does not fit, in one line.
        what: String,
        /// The source that sets the rule, as the recipe names it.
        first: String,
        /// The source that breaks it; the output family where there is no second source.
        second: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
        /// What to do.
        hint: String,
        /// Place in the recipe, where it is known: `recipe.yaml:9:5  experts[2].source_model`.
        recipe: Option<String>,
    },
    /// A model that is to be changed, and is no folder of its own.
    #[error("only a model folder can be changed")]
    NotAFolder {
        /// As a person wrote it.
        found: String,
    },
    /// A value given on the command line, or by a program, that cannot be used.
    #[error("{what}")]
    Argument {
        /// What is wrong, in one line.
        what: String,
        /// The option, as it is typed.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
        /// What to do.
        hint: Option<String>,
    },
    /// What is wrong with a source, and where the recipe names it.
    #[error("{error}")]
    At {
        /// What is wrong.
        error: Box<MergeError>,
        /// `recipe.yaml:9:5  experts[2].source_model`.
        recipe: String,
    },
}

impl MergeError {
    /// The error with the place in the recipe that it goes back to. An error that names one keeps its own; what is the
    /// fault of no source (an interruption, a full disk, an output that is there) gets none.
    pub fn at(self, place: &Place) -> Self {
        match self {
            Self::Checkpoint(
                CheckpointError::Interrupted
                | CheckpointError::NoRoom { .. }
                | CheckpointError::OutputExists { .. }
                | CheckpointError::NotAModel { .. },
            )
            | Self::Recipe(_)
            | Self::At { .. }
            | Self::Incompatible { recipe: Some(_), .. } => self,
            Self::Incompatible { what, first, second, expected, found, hint, recipe: None } => {
                let recipe = Some(place.to_string());
                Self::Incompatible { what, first, second, expected, found, hint, recipe }
            }
            other => Self::At { error: Box::new(other), recipe: place.to_string() },
        }
    }
}

impl Explain for MergeError {
    fn kind(&self) -> Kind {
        match self {
            Self::Recipe(e) => e.kind(),
            Self::Checkpoint(e) => e.kind(),
            Self::Model(e) => e.kind(),
            Self::Text(e) => e.kind(),
            Self::Documents(e) => e.kind(),
            Self::Training(e) => e.kind(),
            Self::Router { .. } => Kind::Usage,
            Self::Incompatible { .. } | Self::NotAFolder { .. } | Self::Argument { .. } => {
                Kind::Usage
            }
            Self::At { error, .. } => error.kind(),
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Recipe(e) => e.fields(),
            Self::Checkpoint(e) => e.fields(),
            Self::Model(e) => e.fields(),
            Self::Text(e) => e.fields(),
            Self::Documents(e) => e.fields(),
            Self::Training(e) => e.fields(),
            Self::Router { .. } => Vec::new(),
            Self::Incompatible { first, second, expected, found, recipe, .. } => {
                let alone = second.starts_with("output family");
                let labels = if alone { ["source", "output"] } else { ["first", "second"] };
                let mut fields = vec![(labels[0], first.clone()), (labels[1], second.clone())];
                fields.push(("expected", expected.clone()));
                fields.push(("found", found.clone()));
                fields.extend(recipe.iter().map(|r| ("recipe", r.clone())));
                fields
            }
            Self::NotAFolder { found } => vec![
                (
                    "expected",
                    "a folder with `config.json` and safetensors, without `+ADAPTER`".into(),
                ),
                ("found", format!("`{found}`")),
            ],
            Self::Argument { name, expected, found, .. } => vec![
                ("option", name.clone()),
                ("expected", expected.clone()),
                ("found", found.clone()),
            ],
            Self::At { error, recipe } => {
                let mut fields = error.fields();
                fields.push(("recipe", recipe.clone()));
                fields
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe(e) => e.hint(),
            Self::Checkpoint(e) => e.hint(),
            Self::Model(e) => e.hint(),
            Self::Text(e) => e.hint(),
            Self::Documents(e) => e.hint(),
            Self::Training(e) => e.hint(),
            Self::Router { source, .. } => source.hint(),
            Self::Incompatible { hint, .. } => Some(hint.clone()),
            Self::NotAFolder { .. } => None,
            Self::Argument { hint, .. } => hint.clone(),
            Self::At { error, .. } => error.hint(),
        }
    }
}
