//! `dare_ties`: changes that are kept by chance and agree in sign.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, parameters};
use super::{Base, Combine, Group, Method};

/// As `dare_linear`, then the vote of `ties`.
pub(super) const METHOD: Method = Method {
    name: "dare_ties",
    summary: "changes that are kept by chance and agree in sign",
    formula: "as `ties`, d = W - B kept with chance `density`, its sum of absolute values restored",
    parameters: &parameters(false, true),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::Random, consensus: true }.build(group)
}
