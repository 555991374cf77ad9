//! One estimator a file. mergekit's six share the steps below; the closed forms share `closed_form`.

pub mod cheap_embed;
mod closed_form;
#[cfg(test)]
pub(crate) mod corpus;
pub mod hidden;
pub mod hidden_avg;
pub mod hidden_last;
pub mod lda;
pub mod logistic;
pub mod mean;
pub mod output_matching;
pub mod random;
pub mod ridge;
pub mod uniform_random;

use crate::error::RouterError;
use crate::gate::Gate;

/// What mergekit's modes see of one expert: for each prompt a matrix `[tokens, hidden]` f32, bos included, no padding.
#[derive(Debug, Clone, Default)]
pub struct ExpertPrompts<'a> {
    /// Prompts the expert is for.
    pub positive: Vec<&'a [f32]>,
    /// Prompts it is not for; may be empty.
    pub negative: Vec<&'a [f32]>,
}

/// Norms below this count as this, as in mergekit, so that a zero vector stays zero.
const SMALLEST_NORM: f64 = 1e-8;

/// `g[e] = unit(of(positive) - of(negative))`, where `of` turns an expert's prompts of one sign into one vector.
fn gate_of(
    experts: &[ExpertPrompts<'_>],
    hidden: usize,
    of: impl Fn(&[&[f32]]) -> Vec<f64>,
) -> Result<Gate, RouterError> {
    let mut rows = Vec::with_capacity(experts.len() * hidden);
    for (e, prompts) in experts.iter().enumerate() {
        if prompts.positive.is_empty() {
            return Err(RouterError::NoPrompts { expert: e });
        }
        check(&prompts.positive, e, hidden)?;
        check(&prompts.negative, e, hidden)?;
        let mut row = of(&prompts.positive);
        if !prompts.negative.is_empty() {
            for (g, n) in row.iter_mut().zip(of(&prompts.negative)) {
                *g -= n;
            }
        }
        scale_to_unit(&mut row);
        rows.extend(row);
    }
    Ok(Gate::from_f64(experts.len(), hidden, &rows))
}

fn check(prompts: &[&[f32]], expert: usize, hidden: usize) -> Result<(), RouterError> {
    for (prompt, values) in prompts.iter().enumerate() {
        if values.is_empty() {
            return Err(RouterError::NoTokens { expert });
        }
        if hidden == 0 || values.len() % hidden != 0 {
            return Err(RouterError::Shape {
                what: "a prompt's hidden states",
                expected: values.len().next_multiple_of(hidden.max(1)),
                found: values.len(),
            });
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(RouterError::NotFinite { expert, prompt, token: at / hidden });
        }
    }
    Ok(())
}

fn scale_to_unit(row: &mut [f64]) {
    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(SMALLEST_NORM);
    row.iter_mut().for_each(|v| *v /= norm);
}

/// Sum over the tokens of `prompt: [tokens, hidden]`, times `factor`, added to `sum: [hidden]`.
fn add_tokens(sum: &mut [f64], prompt: &[f32], factor: f64) {
    for token in prompt.chunks_exact(sum.len()) {
        for (s, &v) in sum.iter_mut().zip(token) {
            *s += factor * f64::from(v);
        }
    }
}
