//! What one layer has to be fitted to.

use super::mlp::{Input, Mlp};
use super::predictions::Predictions;
use super::{Ending, Half};
use crate::error::ModelError;

/// Tokens whose activations exist together.
const TOKENS: usize = 1024;

/// Gets activations `[n, inter]` and what is lacking `[n, hidden]`.
pub type See<'a> = dyn FnMut(&[f32], &[f32]) -> Result<(), ModelError> + 'a;

/// An expert in one layer, what it gets, and what should come of it.
pub struct LayerFit<'a> {
    /// The layer.
    pub layer: usize,
    pub(super) half: &'a Half,
    /// The teacher's stream after the layer, `[tokens, hidden]`.
    pub(super) target: &'a [f32],
    /// What the expert gives enters the stream times this.
    pub(super) factor: f32,
    pub(super) mlp: &'a Mlp,
    pub(super) ending: &'a Ending,
    pub(super) predictions: Option<Predictions>,
}

impl LayerFit<'_> {
    /// Width of the stream, and of the expert.
    pub fn sizes(&self) -> [usize; 2] {
        [self.mlp.hidden, self.mlp.inter]
    }

    /// The numbers of gate, up (`[inter, hidden]` each) and down (`[hidden, inter]`), one after the other.
    pub fn weights(&self) -> &[f32] {
        &self.mlp.flat
    }

    /// Whether [`LayerFit::loss`] can be told: in the last layer.
    pub fn predicts(&self) -> bool {
        self.predictions.is_some()
    }

    /// Shows the tokens in blocks: what goes into the down projection, `[n, inter]`, and what its output lacks for the stream
    /// to become the teacher's, `[n, hidden]`. Returns the sum of squares of what the output should be.
    ///
    /// # Errors
    /// What `see` returns.
    pub fn lacking(&self, see: &mut See<'_>) -> Result<f64, ModelError> {
        let block = TOKENS * self.mlp.hidden;
        let mut squares = 0.0;
        let rows = self.half.inputs.chunks(block).zip(self.half.rest.chunks(block));
        for ((inputs, rest), target) in rows.zip(self.target.chunks(block)) {
            let activations = self.mlp.activations(inputs)?;
            let mut lacking = self.mlp.down(&activations)?;
            for ((out, rest), target) in lacking.iter_mut().zip(rest).zip(target) {
                let wanted = (target - rest) / self.factor;
                squares += f64::from(wanted) * f64::from(wanted);
                *out = wanted - *out;
            }
            see(&activations, &lacking)?;
        }
        Ok(squares)
    }

    /// With other numbers in the place of [`LayerFit::weights`]: mean over tokens of `KL(teacher, student)` of the next token's
    /// distribution, in nats, and its gradient.
    ///
    /// # Errors
    /// [`ModelError::Stopped`] where it cannot be told.
    pub fn loss(&self, weights: &[f32]) -> Result<(f64, Vec<f64>), ModelError> {
        let untold = || ModelError::Stopped("only the last layer has predictions".into());
        let predictions = self.predictions.as_ref().ok_or_else(untold)?;
        let mlp = Mlp { flat: weights.to_vec(), ..*self.mlp };
        let head = self.ending.head()?;
        let (hidden, count) = (mlp.hidden, predictions.rows.len());
        let (mut nats, mut gradient) = (0.0, vec![0f64; weights.len()]);
        let mut part = vec![0f32; weights.len()];
        for from in (0..count).step_by(TOKENS) {
            let rows = from..count.min(from + TOKENS);
            let gather = |x: &[f32]| -> Vec<f32> {
                let rows = &predictions.rows[rows.clone()];
                rows.iter().flat_map(|r| &x[r * hidden..(r + 1) * hidden]).copied().collect()
            };
            let inputs = gather(&self.half.inputs);
            let mut stream = mlp.forward(&inputs)?;
            let rest = gather(&self.half.rest);
            stream.iter_mut().zip(&rest).for_each(|(y, x)| *y = x + self.factor * *y);
            let (sum, mut d) = predictions.losses(&head, rows.clone(), &stream)?;
            nats += sum;
            let scale = self.factor / count as f32;
            d.iter_mut().for_each(|d| *d *= scale);
            part.fill(0.0);
            mlp.backward(&inputs, &d, &mut part, Input::Frozen)?;
            gradient.iter_mut().zip(&part).for_each(|(g, p)| *g += f64::from(*p));
        }
        Ok((nats / count.max(1) as f64, gradient))
    }
}
