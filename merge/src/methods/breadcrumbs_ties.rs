//! `breadcrumbs_ties`: as breadcrumbs, merging what agrees in sign.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, GAMMA, parameters_with};
use super::{Base, Combine, Group, Method};

/// As `breadcrumbs`, then the vote of `ties`.
pub(super) const METHOD: Method = Method {
    name: "breadcrumbs_ties",
    summary: "as breadcrumbs, merging what agrees in sign",
    formula: "as `ties`, d as in `breadcrumbs`",
    parameters: &parameters_with(GAMMA, false, false),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Davari and Belilovsky 2023, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::Outliers, consensus: true }.build(group)
}
