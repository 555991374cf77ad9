//! `dare_linear`: task arithmetic on changes that are kept by chance.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, parameters};
use super::{Base, Combine, Group, Method};

/// Keeps each difference with the chance `density`; with `rescale` the sum of absolute values stays what it was.
pub(super) const METHOD: Method = Method {
    name: "dare_linear",
    summary: "task arithmetic on changes that are kept by chance",
    formula: "B + lambda sum w d, d = W - B kept with chance `density`, its sum of absolute values restored",
    parameters: &parameters(false, true),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Yu et al. 2024, Language models are super Mario, arXiv:2311.03099",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::Random, consensus: false }.build(group)
}
