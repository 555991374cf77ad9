//! `task_arithmetic`: the base plus weighted task vectors.

use super::sparsify::Sparsifier;
use super::task_vectors::{Family, parameters};
use super::{Base, Combine, Group, Method};

/// `B + lambda sum_m w_m (W_m - B)`, divided by `sum_m w_m` with `normalize`. Rounded to the dtype of the arithmetic after
/// each step.
pub(super) const METHOD: Method = Method {
    name: "task_arithmetic",
    summary: "the base plus weighted task vectors",
    formula: "B + lambda sum w (W - B), the sum divided by sum w with `normalize`",
    parameters: &parameters(false, false),
    base: Base::Required,
    models: (0, usize::MAX),
    whole_tensor: false,
    activations: None,
    source: "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    build,
};

fn build(group: &Group) -> Result<Box<dyn Combine>, String> {
    Family { sparsifier: Sparsifier::None, consensus: false }.build(group)
}
