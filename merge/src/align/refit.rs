//! `refit`: each layer's MLP fitted on its own when the text has come that far.

use moe_merge_model::ModelError;
use moe_merge_model::transplant::LayerFit;
use moe_merge_router::RouterError;
use moe_merge_router::refit::{Correction, descend};

use crate::error::MergeError;

/// Penalty on a change of the down projection; see [`Correction`].
const PENALTY: f64 = 0.003;

/// Steps in the last layer.
const STEPS: usize = 30;

/// A stream that differs from the teacher's by less than this share of what the MLP adds, squared, is the same.
const SAME: f64 = 1e-9;

/// Predictions nearer to the teacher's than this, in nats, are the same.
const SAME_NATS: f64 = 1e-6;

/// The new matrices of a layer, laid out as [`LayerFit::weights`]; `None` where there is nothing to mend.
///
/// The down projection is corrected by ridge regression, so that the stream becomes the teacher's. In the last layer all three
/// matrices then follow the divergence from the teacher's predictions downhill: it hangs on the tokens one by one, and needs no
/// pass through the model.
///
/// # Errors
/// [`MergeError::Router`] for numbers that are not finite; what the view returns.
pub(super) fn fit(view: &LayerFit<'_>) -> Result<Option<Vec<f32>>, MergeError> {
    let refused = |source: RouterError| MergeError::Router { layer: view.layer, source };
    let plain = match view.predicts() {
        true => Some(view.loss(view.weights())?.0),
        false => None,
    };
    if plain.is_some_and(|nats| nats < SAME_NATS) {
        return Ok(None);
    }
    let [hidden, inter] = view.sizes();
    let mut correction = Correction::new(inter, hidden);
    let mut failed = None;
    let seen = view.lacking(&mut |activations, lacking| {
        correction.add(activations, lacking).map_err(|e| {
            failed = Some(refused(e));
            ModelError::Stopped("a layer cannot be fitted".into())
        })
    });
    failed.map_or(Ok(()), Err)?;
    let mut weights = view.weights().to_vec();
    let moved = correction.lacking() > SAME * seen?;
    if moved {
        let change = correction.solve(PENALTY).map_err(refused)?;
        let down = weights.len() - change.len();
        weights[down..].iter_mut().zip(change).for_each(|(w, c)| *w += c as f32);
    }
    let Some(plain) = plain else { return Ok(moved.then_some(weights)) };
    // A head that differs from the teacher's can make the teacher's stream the wrong place to start from.
    let start = match view.loss(&weights)?.0 < plain {
        true => &weights[..],
        false => view.weights(),
    };
    let found = descend(start, STEPS, &mut |weights: &[f32]| view.loss(weights))?;
    Ok((found.loss[1] < plain).then_some(found.point))
}
