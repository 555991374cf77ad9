//! Why routers cannot be compared.

use moe_merge_checkpoint::{Explain, Kind};
use moe_merge_router::UnknownEstimator;

use crate::error::MergeError;
use crate::recipe::Place;

/// Why routers cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum QualityError {
    /// What a build can meet, too: sources, prompts, models, text.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The recipe names no text.
    #[error("the recipe gives no text to evaluate on")]
    NoText {
        /// The recipe.
        recipe: Place,
        /// Names of its experts.
        experts: Vec<String>,
    },
    /// No estimator has this name.
    #[error("unknown estimator `{}`", .0.name)]
    Estimator(UnknownEstimator),
    /// No expert has this name.
    #[error("the recipe has no expert `{name}`")]
    Expert {
        /// What was asked for.
        name: String,
        /// Names there are.
        known: Vec<String>,
    },
    /// A MoE of one expert.
    #[error("a MoE needs at least two experts")]
    TooFew {
        /// Those asked for.
        experts: Vec<String>,
    },
    /// An expert that is asked for twice in one MoE.
    #[error("expert `{name}` is asked for twice in one MoE")]
    Twice {
        /// Its name.
        name: String,
    },
    /// No combination of what was asked for can be built.
    #[error("nothing of what was asked for can be built")]
    Nothing {
        /// Why, one reason for each combination.
        reasons: Vec<String>,
    },
}

impl Explain for QualityError {
    fn kind(&self) -> Kind {
        match self {
            Self::Merge(e) => e.kind(),
            _ => Kind::Usage,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Merge(e) => e.fields(),
            Self::NoText { recipe, .. } => vec![
                ("recipe", recipe.to_string()),
                ("expected", "`evaluation:`, text files by domain".into()),
                ("found", "none".into()),
            ],
            Self::Estimator(_) | Self::Twice { .. } => Vec::new(),
            Self::Expert { known, .. } => {
                vec![("expected", format!("some of {}", known.join(", ")))]
            }
            Self::TooFew { experts } => {
                vec![("expected", "2 or more".into()), ("found", experts.join(", "))]
            }
            Self::Nothing { reasons } => vec![("found", reasons.join("\n"))],
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Merge(e) => e.hint(),
            Self::NoText { experts, .. } => {
                let line = |e: &String| format!("\n  {e}: held_out_{e}.txt");
                let lines: String = experts.iter().map(line).collect();
                Some(format!(
                    "add text that no expert was trained on and no prompt is taken from, each file under the name of its \
                     expert:\nevaluation:{lines}"
                ))
            }
            Self::Estimator(e) => Some(e.hint()),
            Self::Expert { .. } | Self::TooFew { .. } | Self::Twice { .. } => Some(
                "`--experts a,b` is one MoE of these experts; give it once for each MoE".into(),
            ),
            Self::Nothing { .. } => None,
        }
    }
}
