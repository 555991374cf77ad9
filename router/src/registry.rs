//! The one list of estimators.

use crate::best::best_of;
use crate::error::{RouterError, UnknownEstimator};
use crate::estimators;
use crate::estimators::ExpertPrompts;
use crate::gate::Gate;
use crate::samples::{Fit, Options, Samples};

/// How an estimator is called, which is also what features it needs.
#[derive(Debug, Clone, Copy)]
pub enum Method {
    /// Residual stream entering the layer, one matrix per prompt, bos included; per layer.
    Streams(fn(&[ExpertPrompts<'_>], usize) -> Result<Gate, RouterError>),
    /// Rows of the input embedding, one matrix per prompt, bos included; once for all layers.
    Embeddings(fn(&[ExpertPrompts<'_>], usize) -> Result<Gate, RouterError>),
    /// No prompts: experts, hidden, seed, layer.
    Seed(fn(usize, usize, u64, u64) -> Gate),
    /// True router inputs of every token without bos; per layer.
    RouterInputs(fn(&Samples<'_>, &Options) -> Result<Fit, RouterError>),
    /// As [`Method::RouterInputs`], then [`crate::estimators::output_matching::fit`] from there.
    Matching(fn(&Samples<'_>, &Options) -> Result<Fit, RouterError>),
}

impl Method {
    /// Whether it learns from router inputs.
    pub fn learned(self) -> bool {
        matches!(self, Self::RouterInputs(_) | Self::Matching(_))
    }
}

/// A way to make gates.
#[derive(Debug, Clone, Copy)]
pub struct Estimator {
    /// The value of `gate_mode`.
    pub name: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Where the formula comes from.
    pub source: &'static str,
    /// What it needs and how it is called.
    pub method: Method,
}

/// Every estimator: one file below `estimators/` and one row here each (`auto` names the best one known).
pub const ESTIMATORS: &[Estimator] = &[
    Estimator {
        name: "auto",
        summary: "what measured best: the classifier that held-out prompts prefer, then output matching",
        source: "moe-merge",
        method: Method::Matching(best_classifier),
    },
    Estimator {
        name: "match",
        summary: "output matching: the layer's output as near as can be to that of the right expert, from `logistic`",
        source: "moe-merge",
        method: Method::Matching(estimators::logistic::fit),
    },
    Estimator {
        name: "logistic",
        summary: "class-balanced multinomial logistic regression on router inputs; penalty and temperature from held-out prompts",
        source: "moe-merge; L-BFGS: Liu and Nocedal 1989",
        method: Method::RouterInputs(estimators::logistic::fit),
    },
    Estimator {
        name: "ridge",
        summary: "class-balanced ridge regression to one-hot targets on router inputs; penalty and scale from held-out prompts",
        source: "Hoerl and Kennard 1970",
        method: Method::RouterInputs(estimators::ridge::fit),
    },
    Estimator {
        name: "lda",
        summary: "linear discriminant analysis on router inputs with a shrunk, class-balanced covariance",
        source: "Fisher 1936; shrinkage: Ledoit and Wolf 2004",
        method: Method::RouterInputs(estimators::lda::fit),
    },
    Estimator {
        name: "mean",
        summary: "class means of router inputs, centred by the mean over classes",
        source: "moe-merge",
        method: Method::RouterInputs(estimators::mean::fit),
    },
    Estimator {
        name: "hidden",
        summary: "residual stream at the last position, mean over prompts, norm 1",
        source: "mergekit moe/router.py::get_gate_params",
        method: Method::Streams(estimators::hidden::gate),
    },
    Estimator {
        name: "hidden_avg",
        summary: "residual stream averaged over positions and prompts, norm 1",
        source: "mergekit moe/router.py::get_gate_params",
        method: Method::Streams(estimators::hidden_avg::gate),
    },
    Estimator {
        name: "hidden_last",
        summary: "another name of `hidden`",
        source: "mergekit moe/router.py::get_gate_params",
        method: Method::Streams(estimators::hidden_last::gate),
    },
    Estimator {
        name: "cheap_embed",
        summary: "sum of the prompts' input embeddings, norm 1, the same for all layers",
        source: "mergekit moe/router.py::get_cheap_embedding",
        method: Method::Embeddings(estimators::cheap_embed::gate),
    },
    Estimator {
        name: "random",
        summary: "independent standard normal numbers, not normalised",
        source: "mergekit moe/router.py::get_gate_params",
        method: Method::Seed(estimators::random::gate),
    },
    Estimator {
        name: "uniform_random",
        summary: "independent uniform numbers within 1/sqrt(hidden) of zero",
        source: "mergekit moe/router.py::get_gate_params",
        method: Method::Seed(estimators::uniform_random::gate),
    },
];

/// The classifier that held-out prompts prefer; for a wide model `logistic`, which needs no matrix of hidden by hidden for
/// every group of prompts.
fn best_classifier(samples: &Samples<'_>, options: &Options) -> Result<Fit, RouterError> {
    const WIDE: usize = 1024;
    if samples.hidden > WIDE {
        return estimators::logistic::fit(samples, options);
    }
    Ok(best_of(samples, options, &["logistic", "ridge", "lda"])?.1)
}

/// The estimator called `name`.
///
/// # Errors
/// [`UnknownEstimator`], with the nearest known name.
pub fn find(name: &str) -> Result<&'static Estimator, UnknownEstimator> {
    ESTIMATORS.iter().find(|e| e.name == name).ok_or_else(|| UnknownEstimator::new(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_found() {
        let names: BTreeSet<_> = ESTIMATORS.iter().map(|e| e.name).collect();
        assert_eq!(names.len(), ESTIMATORS.len());
        for e in ESTIMATORS {
            assert_eq!(find(e.name).unwrap().name, e.name);
            assert!(!e.summary.is_empty() && !e.source.is_empty());
        }
    }

    #[test]
    fn a_misspelling_gets_its_neighbour() {
        let nearest = |name| find(name).unwrap_err().nearest;
        assert_eq!(nearest("hiden"), Some("hidden"));
        assert_eq!(nearest("Hidden-Avg"), Some("hidden_avg"));
        assert_eq!(nearest("cheap_embedd"), Some("cheap_embed"));
        assert_eq!(nearest("logistics"), Some("logistic"));
        assert_eq!(nearest("xyzzy"), None);
        assert!(find("xyzzy").unwrap_err().hint().contains("`uniform_random`"));
        assert_eq!(find("hiden").unwrap_err().hint(), "did you mean `hidden`?");
    }
}
