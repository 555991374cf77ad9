//! `regmean_stream`: as `regmean`, in the hidden states of the merged model itself.

use moe_merge_model::side_by_side::Stream;

use super::regmean::{ALPHA, WEIGHT};
use super::{Base, Method, Scope, linear, number};

/// `argmin_W sum_m w_m E |W x - y_m|^2`, weight after weight, with `x` the input in the merged model, whose weights before it are
/// chosen already, on text of model `m`, and `y_m` the output that takes it to where model `m` is on the same text: that of the
/// model's own weight and, for what is added to the stream, what the stream lacks. Other tensors get the weighted mean.
///
/// That inputs are those of the merged model is RegMean++; that outputs make up for what went wrong before is not.
pub(super) const METHOD: Method = Method {
    name: "regmean_stream",
    summary: "as `regmean`, layer by layer in the merged model, each weight making up for what the ones before it lost",
    formula: "argmin sum w |W x - y|^2 with x from the merged model and y what takes it to where each model is on its own text, \
              for the linear weights of the layers; sum w W / sum w else",
    parameters: &[WEIGHT, number("alpha", Scope::Global, Some(1.0), ALPHA).within(0.0, 1.0)],
    base: Base::Optional,
    models: (1, usize::MAX),
    whole_tensor: false,
    activations: Some(Stream::Merged),
    source: "after Nguyen et al. 2025, RegMean++, arXiv:2508.03121, with the models' own streams as targets",
    build: linear::mean,
};
