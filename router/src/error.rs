//! What can be wrong with the numbers an estimator gets.

use crate::registry::{ESTIMATORS, Estimator, Method};

/// Why no gate could be made. The caller knows the layer and adds it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RouterError {
    /// A router chooses among at least two experts.
    #[error("a learned router needs at least 2 experts, found {experts}")]
    TooFewExperts {
        /// Experts given.
        experts: usize,
    },
    /// An expert without a positive prompt.
    #[error("expert {expert} has no positive prompt")]
    NoPrompts {
        /// The expert's index.
        expert: usize,
    },
    /// An expert whose prompts hold no token besides bos.
    #[error("the prompts of expert {expert} hold no token")]
    NoTokens {
        /// The expert's index.
        expert: usize,
    },
    /// A feature is NaN or infinite.
    #[error("expert {expert}, prompt {prompt}, token {token}: feature is not finite")]
    NotFinite {
        /// The expert's index.
        expert: usize,
        /// Which of its prompts (of this sign), from 0.
        prompt: usize,
        /// Which token of the prompt, from 0.
        token: usize,
    },
    /// Every feature is zero.
    #[error("every feature is zero")]
    AllZero,
    /// A buffer has the wrong size.
    #[error("{what}: expected {expected} numbers, found {found}")]
    Shape {
        /// Which buffer.
        what: &'static str,
        /// Numbers it should hold.
        expected: usize,
        /// Numbers it holds.
        found: usize,
    },
    /// No estimator of this name learns from router inputs.
    #[error("`{name}` is not an estimator that learns from router inputs")]
    NotLearned {
        /// What was asked for.
        name: String,
    },
    /// An example names an expert that does not exist.
    #[error("an example belongs to expert {expert}, but there are {experts}")]
    NoSuchExpert {
        /// The index given.
        expert: usize,
        /// Experts there are.
        experts: usize,
    },
}

impl RouterError {
    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::TooFewExperts { .. } => Some("give a second expert".into()),
            Self::NoPrompts { .. } | Self::NoTokens { .. } => Some(
                "add text to the expert's `positive_prompts`, three to ten prompts of a sentence or two".into(),
            ),
            Self::NotFinite { .. } | Self::AllZero => Some(
                "the base model computes no usable hidden state here; look for NaN or zero weights up to this layer"
                    .into(),
            ),
            Self::NotLearned { .. } => {
                let learned = |e: &&Estimator| matches!(e.method, Method::RouterInputs(_));
                let names: Vec<_> =
                    ESTIMATORS.iter().filter(learned).map(|e| format!("`{}`", e.name)).collect();
                Some(format!("known: {}", names.join(", ")))
            }
            Self::Shape { .. } | Self::NoSuchExpert { .. } => None,
        }
    }
}

impl From<moe_merge_kernels::KernelError> for RouterError {
    fn from(error: moe_merge_kernels::KernelError) -> Self {
        match error {
            moe_merge_kernels::KernelError::Length { what, expected, found } => {
                Self::Shape { what, expected, found }
            }
            #[allow(unreachable_patterns)]
            _ => Self::Shape { what: "a product", expected: 0, found: 0 },
        }
    }
}

/// No estimator has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown gate mode `{name}`")]
pub struct UnknownEstimator {
    /// What was asked for.
    pub name: String,
    /// The known name nearest to it, if one is near.
    pub nearest: Option<&'static str>,
}

impl UnknownEstimator {
    pub(crate) fn new(name: &str) -> Self {
        let asked = name.to_lowercase().replace('-', "_");
        let nearest = ESTIMATORS
            .iter()
            .map(|e| (edits(&asked, e.name), e.name))
            .min()
            .filter(|&(distance, known)| distance <= known.len().div_ceil(3))
            .map(|(_, known)| known);
        Self { name: name.to_owned(), nearest }
    }

    /// What to do next: the nearest name, or all of them.
    pub fn hint(&self) -> String {
        match self.nearest {
            Some(name) => format!("did you mean `{name}`?"),
            None => {
                let names: Vec<_> = ESTIMATORS.iter().map(|e| format!("`{}`", e.name)).collect();
                format!("known: {}", names.join(", "))
            }
        }
    }
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
