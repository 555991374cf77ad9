//! What a teacher predicts of each token, and how far a student is from it, without the whole vocabulary.

use std::ops::Range;

use moe_merge_kernels::dense::Into;
use moe_merge_kernels::{
    Dtype, Exec, KernelError, LogSumExp, MatView, linear, linear_backward, rms_norm_backward,
    softmax,
};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::ops::RmsNorm;
use crate::router_training::head::Head;

/// Tokens of the vocabulary that are compared at most: those with the largest share of all predictions.
const KEPT: usize = 4096;

/// Probabilities of a teacher that are held at most; beyond it, some rows stand for all.
const HELD: usize = 1 << 26;

/// Rows whose logits exist together.
const ROWS: usize = 512;

/// A teacher's predictions of some rows of a text.
pub(crate) struct Predictions {
    /// The rows that are compared, ascending.
    pub rows: Vec<usize>,
    /// Of the student: `[kept, hidden]`.
    head: Vec<f32>,
    kept: usize,
    /// `[rows, kept]`.
    teacher: Vec<f32>,
    /// `sum p ln p` of each row.
    negentropy: Vec<f64>,
}

impl Predictions {
    /// Of a teacher whose stream before its last norm is `stream [tokens, hidden]`.
    pub fn new(student: &Head<'_>, teacher: &Head<'_>, stream: &[f32]) -> Result<Self, ModelError> {
        Self::within(student, teacher, stream, [KEPT, HELD])
    }

    /// The same, with so many tokens of the vocabulary, and so many probabilities.
    fn within(
        student: &Head<'_>,
        teacher: &Head<'_>,
        stream: &[f32],
        [most, held]: [usize; 2],
    ) -> Result<Self, ModelError> {
        let (hidden, vocab) = (teacher.spec.hidden, teacher.spec.vocab);
        let tokens = stream.len() / hidden.max(1);
        let kept: Vec<usize> = match vocab <= most {
            true => (0..vocab).collect(),
            false => most_likely(teacher, stream, most)?,
        };
        let step = (tokens * kept.len()).div_ceil(held.max(1)).max(1);
        let rows: Vec<usize> = (0..tokens).step_by(step).collect();
        let picked: Vec<f32> =
            rows.iter().flat_map(|r| &stream[r * hidden..(r + 1) * hidden]).copied().collect();
        let own = gathered(teacher.weight, &kept);
        let states = teacher.states(&picked)?;
        let mut probabilities = vec![0.0; rows.len() * kept.len()];
        let blocks = states.chunks(ROWS * hidden).zip(probabilities.chunks_mut(ROWS * kept.len()));
        for (states, logits) in blocks {
            linear(states, view(&own, hidden)?, None, logits, &Exec::default())?;
            teacher.finish(logits);
        }
        let negentropy: Vec<f64> = probabilities
            .par_chunks_mut(kept.len().max(1))
            .map(|row| {
                softmax(row);
                let terms = row.iter().filter(|p| **p > 0.0).map(|p| f64::from(*p));
                terms.map(|p| p * p.ln()).sum::<f64>()
            })
            .collect();
        Ok(Self {
            rows,
            head: gathered(student.weight, &kept),
            kept: kept.len(),
            teacher: probabilities,
            negentropy,
        })
    }

    /// Sum over some of the rows of `sum p_teacher ln(p_teacher / p_student)`, and its gradient with respect to the
    /// student's stream before its last norm, `stream [rows, hidden]`.
    pub fn losses(
        &self,
        student: &Head<'_>,
        rows: Range<usize>,
        stream: &[f32],
    ) -> Result<(f64, Vec<f32>), ModelError> {
        let (hidden, kept) = (student.spec.hidden, self.kept);
        let states = student.states(stream)?;
        let head = view(&self.head, hidden)?;
        let mut logits = vec![0.0; rows.len() * kept];
        linear(&states, head, None, &mut logits, &Exec::default())?;
        student.finish(&mut logits);
        let nats: Vec<f64> = logits
            .par_chunks_mut(kept.max(1))
            .zip(self.teacher[rows.start * kept..rows.end * kept].par_chunks(kept.max(1)))
            .zip(&self.negentropy[rows])
            .map(|((logits, teacher), negentropy)| {
                let mut sum = LogSumExp::default();
                sum.add(logits);
                let pairs = teacher.iter().zip(&*logits);
                let mean: f64 = pairs.map(|(p, l)| f64::from(*p) * f64::from(*l)).sum();
                let slopes = student.slopes(logits);
                softmax(logits);
                logits.iter_mut().zip(teacher).for_each(|(s, t)| *s -= *t);
                student.scale(logits, slopes, 1.0);
                negentropy - mean + sum.value()
            })
            .collect();
        let mut d_states = vec![0.0; stream.len()];
        linear_backward(&logits, head, &mut d_states, Into::Overwrite, &Exec::default())?;
        let mut gradient = vec![0.0; stream.len()];
        let RmsNorm { weight, eps, offset } = student.norm;
        rms_norm_backward(
            stream,
            weight,
            *eps,
            *offset,
            &d_states,
            &mut gradient,
            Into::Overwrite,
        )?;
        Ok((nats.iter().sum(), gradient))
    }
}

fn view(rows: &[f32], hidden: usize) -> Result<MatView<'_>, KernelError> {
    MatView::new(bytemuck::cast_slice(rows), Dtype::F32, rows.len() / hidden.max(1), hidden)
}

/// Some rows of a matrix, widened.
fn gathered(matrix: MatView<'_>, rows: &[usize]) -> Vec<f32> {
    let width = matrix.cols();
    let mut out = vec![0.0; rows.len() * width];
    let each = out.chunks_exact_mut(width.max(1)).zip(rows);
    each.for_each(|(out, row)| matrix.widen_row(*row, out));
    out
}

/// The tokens with the largest sums of probabilities, ascending.
fn most_likely(teacher: &Head<'_>, stream: &[f32], most: usize) -> Result<Vec<usize>, ModelError> {
    let (hidden, vocab) = (teacher.spec.hidden, teacher.spec.vocab);
    let mut mass = vec![0f64; vocab];
    for rows in stream.chunks(ROWS * hidden.max(1)) {
        let mut logits = teacher.logits(&teacher.states(rows)?)?;
        logits.par_chunks_mut(vocab).for_each(softmax);
        for row in logits.chunks_exact(vocab) {
            mass.iter_mut().zip(row).for_each(|(m, p)| *m += f64::from(*p));
        }
    }
    let mut order: Vec<usize> = (0..vocab).collect();
    order.sort_by(|&a, &b| mass[b].total_cmp(&mass[a]).then(a.cmp(&b)));
    order.truncate(most);
    order.sort_unstable();
    Ok(order)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moe_merge_checkpoint::Source;

    use super::super::Side;
    use super::*;

    /// Part of a vocabulary and of the rows: the likeliest tokens, no divergence of a model from itself, and slopes elsewhere.
    #[test]
    fn a_part_of_the_vocabulary_stands_for_all() {
        let folder = moe_merge_testkit::repository("model/tests/data/mixtral_fused");
        let source = folder.display().to_string().parse().unwrap();
        let source = Source::open(&source, Path::new(".")).unwrap();
        let texts = [vec![1, 5, 9, 3, 2], vec![2, 8, 4, 7]];
        let side = Side::new(&source, &texts).unwrap();
        let (ending, stream) = (side.ending().unwrap(), side.stream().unwrap());
        let head = ending.head().unwrap();
        let all = Predictions::new(&head, &head, &stream).unwrap();
        assert_eq!((all.rows.len(), all.kept), (9, head.spec.vocab));
        let mass = |token: usize| -> f64 {
            all.teacher.chunks(all.kept).map(|row| f64::from(row[token])).sum()
        };
        let some = Predictions::within(&head, &head, &stream, [6, 6 * 5]).unwrap();
        assert_eq!((some.rows.as_slice(), some.kept), (&[0, 2, 4, 6, 8][..], 6));
        let kept = most_likely(&head, &stream, 6).unwrap();
        let least = kept.iter().map(|&t| mass(t)).fold(f64::INFINITY, f64::min);
        let others = (0..all.kept).filter(|t| !kept.contains(t)).map(mass);
        assert!(others.fold(0.0, f64::max) <= least + 1e-6);

        let hidden = head.spec.hidden;
        let picked: Vec<f32> =
            some.rows.iter().flat_map(|r| &stream[r * hidden..(r + 1) * hidden]).copied().collect();
        let (nats, _) = some.losses(&head, 0..5, &picked).unwrap();
        assert!(nats.abs() < 1e-5, "{nats}");
        let away: Vec<f32> =
            picked.iter().enumerate().map(|(i, v)| v + 0.3 * ((i % 5) as f32 - 2.0)).collect();
        let (nats, gradient) = some.losses(&head, 0..5, &away).unwrap();
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(nats > 1e-3 && norm > 0.0, "{nats} {norm}");
        let value = |by: f64| {
            let step = (by / norm) as f32;
            let moved: Vec<f32> = away.iter().zip(&gradient).map(|(v, g)| v + step * g).collect();
            some.losses(&head, 0..5, &moved).unwrap().0
        };
        let slope = (value(1e-2) - value(-1e-2)) / 2e-2;
        assert!((slope / norm - 1.0).abs() < 1e-2, "{slope} {norm}");
    }
}
