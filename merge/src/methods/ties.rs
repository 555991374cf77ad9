//! `ties`: task arithmetic on the largest changes that agree in sign.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, parameters};
use super::{Base, Combine, Group, Method};

/// Keeps the `density` largest differences of each model, then per number sums the weighted differences whose sign is the
/// sign of the weighted sum, divided by the weights of those models with `normalize`.
pub(super) const METHOD: Method = Method {
    name: "ties",
    summary: "task arithmetic on the largest changes that agree in sign",
    formula: "B + lambda sum w d/sum w over the d = largest W - B whose sign is that of sum w d",
    parameters: &parameters(true, false),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::Magnitude, consensus: true }.build(group)
}
