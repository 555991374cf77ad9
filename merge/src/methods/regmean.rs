//! `regmean`: what every model's linear weights make of their inputs, as nearly as one weight can.

use moe_merge_model::side_by_side::Stream;

use super::{Base, Method, Parameter, Scope, linear, number};

pub(super) const WEIGHT: Parameter =
    number("weight", Scope::Model, Some(1.0), "weight of this model's text")
        .within(0.0, f64::INFINITY);
pub(super) const ALPHA: &str =
    "factor on products of different inputs; below 1 each input counts more on its own";

/// `(sum_m w_m G_m)^-1 sum_m w_m G_m W_m` for the linear weights of the layers, with `G_m = E[x x^T]` over the inputs that the
/// weight gets in model `m` on text of its kind, products of different inputs times `alpha`. This minimises the mean squared
/// distance of the merged weight's outputs from those of each model. Other tensors get the weighted mean.
pub(super) const METHOD: Method = Method {
    name: "regmean",
    summary: "linear weights whose outputs are nearest to those of each model, on the inputs that they get there",
    formula: "(sum w G)^-1 sum w G W with G the mean of x x' over a weight's inputs x, for the linear weights of the layers; \
              sum w W / sum w else",
    parameters: &[WEIGHT, number("alpha", Scope::Global, Some(0.9), ALPHA).within(0.0, 1.0)],
    base: Base::Optional,
    models: (1, usize::MAX),
    whole_tensor: false,
    activations: Some(Stream::Own),
    source: "Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv:2212.09849",
    build: linear::mean,
};
