//! From the last stream to the loss and back, without ever holding all logits.

use std::ops::Range;

use moe_merge_kernels::{
    Exec, LogSumExp, MatView, dense, linear, linear_backward, rms_norm, rms_norm_backward, softmax,
};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::ops::RmsNorm;
use crate::spec::Spec;

/// Logits held at a time.
const LOGITS: usize = 1 << 23;

/// What predictions are compared with.
pub(crate) enum Target<'a> {
    /// The tokens that come next: cross entropy.
    Next(&'a [u32]),
    /// The states of a teacher after the last norm, `[rows, hidden]`: divergence of the student from it.
    Teacher(&'a [f32]),
    /// The same of a teacher that has its own head, with the same vocabulary.
    Other(&'a [f32], &'a Head<'a>),
}

/// Last norm and head.
pub(crate) struct Head<'a> {
    pub spec: &'a Spec,
    pub norm: &'a RmsNorm,
    /// `[vocab, hidden]`.
    pub weight: MatView<'a>,
    /// How products with it are computed.
    pub exec: Exec,
}

/// Losses of rows, and where it is wanted the gradient of their weighted sum.
pub(crate) struct Losses {
    /// In nats, `[rows]`.
    pub nats: Vec<f64>,
    /// With respect to the stream before the last norm, `[rows, hidden]`.
    pub gradient: Option<Vec<f32>>,
}

impl Head<'_> {
    /// The last norm of rows of the stream.
    pub fn states(&self, stream: &[f32]) -> Result<Vec<f32>, ModelError> {
        let mut states = vec![0.0; stream.len()];
        let RmsNorm { weight, eps, offset } = self.norm;
        rms_norm(stream, weight, *eps, *offset, &mut states)?;
        Ok(states)
    }

    /// Losses of the rows `stream [rows, hidden]`; with `weights [rows]`, also the gradient of `sum weight * loss`.
    pub fn losses(
        &self,
        stream: &[f32],
        target: &Target<'_>,
        weights: Option<&[f32]>,
    ) -> Result<Losses, ModelError> {
        let (hidden, vocab) = (self.spec.hidden, self.spec.vocab);
        let states = self.states(stream)?;
        let rows = states.len() / hidden;
        let at_once = (LOGITS / vocab).clamp(16, 512);
        let mut nats = Vec::with_capacity(rows);
        let mut d_states = weights.map(|_| vec![0.0; states.len()]);
        for from in (0..rows).step_by(at_once) {
            let part = from..rows.min(from + at_once);
            let wide = part.start * hidden..part.end * hidden;
            let mut logits = self.logits(&states[wide.clone()])?;
            let weights = weights.map(|w| &w[part.clone()]);
            let weight = |row: usize| weights.map(|w| w[row]);
            let found: Vec<f64> = match target {
                Target::Next(next) => logits
                    .par_chunks_mut(vocab)
                    .zip(&next[part.clone()])
                    .enumerate()
                    .map(|(row, (logits, next))| self.surprise(logits, *next as usize, weight(row)))
                    .collect(),
                Target::Teacher(_) | Target::Other(..) => {
                    let mut taught = self.taught(target, part.clone())?;
                    logits
                        .par_chunks_mut(vocab)
                        .zip(taught.par_chunks_mut(vocab))
                        .enumerate()
                        .map(|(row, (own, taught))| self.divergence(own, taught, weight(row)))
                        .collect()
                }
            };
            nats.extend(found);
            if let Some(d) = &mut d_states {
                let into = dense::Into::Overwrite;
                linear_backward(&logits, self.weight, &mut d[wide], into, &self.exec)?;
            }
        }
        let gradient = match d_states {
            None => None,
            Some(d) => {
                let mut gradient = vec![0.0; stream.len()];
                let RmsNorm { weight, eps, offset } = self.norm;
                let into = dense::Into::Overwrite;
                rms_norm_backward(stream, weight, *eps, *offset, &d, &mut gradient, into)?;
                Some(gradient)
            }
        };
        Ok(Losses { nats, gradient })
    }

    /// Logits of the teacher for some rows.
    fn taught(&self, target: &Target<'_>, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let (states, head) = match *target {
            Target::Next(_) => return Ok(Vec::new()),
            Target::Teacher(states) => (states, self),
            Target::Other(states, head) => (states, head),
        };
        let hidden = head.spec.hidden;
        head.logits(&states[rows.start * hidden..rows.end * hidden])
    }

    /// Logits as the model gives them, `[rows, vocab]`.
    pub fn logits(&self, states: &[f32]) -> Result<Vec<f32>, ModelError> {
        let mut logits = vec![0.0; states.len() / self.spec.hidden * self.spec.vocab];
        linear(states, self.weight, None, &mut logits, &self.exec)?;
        self.finish(&mut logits);
        Ok(logits)
    }

    /// From the products of the head to logits.
    pub fn finish(&self, logits: &mut [f32]) {
        let (divisor, cap) = (self.spec.logits_divisor, self.spec.final_softcap);
        if divisor != 1.0 || cap.is_some() {
            logits.par_iter_mut().for_each(|l| {
                *l /= divisor;
                *l = cap.map_or(*l, |cap| cap * (*l / cap).tanh());
            });
        }
    }

    /// `-ln softmax(logits)[next]`; with a weight, `logits` becomes the gradient with respect to the product.
    fn surprise(&self, logits: &mut [f32], next: usize, weight: Option<f32>) -> f64 {
        let mut sum = LogSumExp::default();
        sum.add(logits);
        let nats = sum.value() - f64::from(logits[next]);
        if let Some(weight) = weight {
            let slopes = self.slopes(logits);
            softmax(logits);
            logits[next] -= 1.0;
            self.scale(logits, slopes, weight);
        }
        nats
    }

    /// `sum p_teacher ln(p_teacher / p_student)`; with a weight, `logits` becomes the gradient as in
    /// [`Head::surprise`].
    fn divergence(&self, logits: &mut [f32], teacher: &mut [f32], weight: Option<f32>) -> f64 {
        let (mut own, mut right) = (LogSumExp::default(), LogSumExp::default());
        own.add(logits);
        right.add(teacher);
        let (own, right) = (own.value(), right.value());
        let nats = teacher
            .iter()
            .zip(&*logits)
            .map(|(t, s)| {
                let log_p = f64::from(*t) - right;
                log_p.exp() * (log_p - (f64::from(*s) - own))
            })
            .sum();
        if let Some(weight) = weight {
            let slopes = self.slopes(logits);
            softmax(logits);
            softmax(teacher);
            logits.iter_mut().zip(teacher).for_each(|(s, t)| *s -= *t);
            self.scale(logits, slopes, weight);
        }
        nats
    }

    /// Slope of the softcap at each logit, where there is one.
    pub fn slopes(&self, logits: &[f32]) -> Option<Vec<f32>> {
        let cap = self.spec.final_softcap?;
        Some(logits.iter().map(|l| 1.0 - (l / cap) * (l / cap)).collect())
    }

    /// Back from the logits to the products of the head.
    pub fn scale(&self, d: &mut [f32], slopes: Option<Vec<f32>>, weight: f32) {
        let factor = weight / self.spec.logits_divisor;
        d.iter_mut().for_each(|d| *d *= factor);
        if let Some(slopes) = slopes {
            d.iter_mut().zip(slopes).for_each(|(d, s)| *d *= s);
        }
    }
}
