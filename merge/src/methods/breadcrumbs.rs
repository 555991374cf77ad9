//! `breadcrumbs`: task arithmetic without the smallest and the very largest changes.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, GAMMA, parameters_with};
use super::{Base, Combine, Group, Method};

/// Keeps a share `density` of the differences of each model, next below the `gamma` largest.
pub(super) const METHOD: Method = Method {
    name: "breadcrumbs",
    summary: "task arithmetic without the smallest and the very largest changes",
    formula: "B + lambda sum w d, d = W - B without the gamma largest and, of the rest, all but the `density` largest",
    parameters: &parameters_with(GAMMA, false, false),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::Outliers, consensus: false }.build(group)
}
