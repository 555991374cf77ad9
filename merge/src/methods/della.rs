//! `della`: changes kept by chance, large ones more often, that agree in sign.

use super::sparsify::Sparsifier;
use super::task_vectors::{EPSILON, Family, parameters_with};
use super::{Base, Combine, Group, Method};

/// Keeps each difference with a chance that rises with its rank in its row, then votes as `ties` does. Rows run along the
/// last axis.
pub(super) const METHOD: Method = Method {
    name: "della",
    summary: "changes kept by chance, large ones more often, that agree in sign",
    formula: "as `ties`, d = W - B kept with chance density - epsilon + 2 epsilon rank/(n-1) in its row, restored",
    parameters: &parameters_with(EPSILON, true, true),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: true,
    activations: None,
    source: "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::ByRank, consensus: true }.build(group)
}
