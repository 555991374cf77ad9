//! `della_linear`: task arithmetic on changes kept by chance, large ones more often.

use super::sparsify::Sparsifier;
use super::task_vectors::{EPSILON, Family, parameters_with};
use super::{Base, Combine, Group, Method};

/// As `della`, without the vote.
pub(super) const METHOD: Method = Method {
    name: "della_linear",
    summary: "task arithmetic on changes kept by chance, large ones more often",
    formula: "B + lambda sum w d, d as in `della`",
    parameters: &parameters_with(EPSILON, false, true),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::ByRank, consensus: false }.build(group)
}
