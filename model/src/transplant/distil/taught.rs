//! The texts of one expert and what its teacher makes of them.

use crate::error::ModelError;
use crate::layer::{Layer, Past};
use crate::model::{Tables, embed};
use crate::ops::to_vec;
use crate::probe::Batch;
use crate::router_training::head::Head;
use crate::transplant::predictions::Predictions;
use crate::transplant::{Ending, Side, go_together};

use super::Pupil;

/// A pupil with its teacher's predictions.
pub(super) struct Taught<'a> {
    /// Texts to learn from, then those that are held out.
    pub texts: Vec<&'a [u32]>,
    /// How many of them are to learn from.
    pub learnt: usize,
    /// First row of each text among all.
    starts: Vec<usize>,
    predictions: Predictions,
    /// The teacher's layers, where its stream counts.
    stream: Option<(Side, Vec<Layer>)>,
}

impl<'a> Taught<'a> {
    /// * `own`, `ending`: the student
    /// * `stream`: whether the teacher's stream counts too
    pub fn new(
        own: &Side,
        ending: &Ending,
        pupil: &Pupil<'a>,
        stream: bool,
    ) -> Result<Self, ModelError> {
        let all: Vec<Vec<u32>> = pupil.texts.iter().chain(pupil.held_out).cloned().collect();
        let mut right = Side::new(pupil.teacher, &all)?;
        go_together(own, &right)?;
        for l in 0..right.model.spec.layers.len() {
            right.pass(&right.model.layer(l)?)?;
            right.model.release(l);
        }
        let taught = right.ending()?;
        let predictions = Predictions::new(&ending.head()?, &taught.head()?, &right.stream()?)?;
        right.batches.clear();
        let layers = (0..right.model.spec.layers.len()).map(|l| right.model.layer(l));
        let stream = match stream {
            true => {
                let layers = layers.collect::<Result<_, _>>()?;
                Some((right, layers))
            }
            false => None,
        };
        let texts: Vec<&[u32]> =
            pupil.texts.iter().chain(pupil.held_out).map(Vec::as_slice).collect();
        let starts = texts
            .iter()
            .scan(0, |from, text| {
                let start = *from;
                *from += text.len();
                Some(start)
            })
            .collect();
        Ok(Self { texts, learnt: pupil.texts.len(), starts, predictions, stream })
    }

    /// Sum of the divergences over the tokens of text `text` that have a prediction, and their number; the gradient of the sum
    /// is added to `d`.
    ///
    /// * `stream`, `d`: rows of the text before the last norm, `[tokens, hidden]`
    pub fn losses(
        &self,
        head: &Head<'_>,
        text: usize,
        stream: &[f32],
        d: &mut [f32],
    ) -> Result<(f64, usize), ModelError> {
        let hidden = head.spec.hidden;
        let (start, len) = (self.starts[text], self.texts[text].len());
        let known = &self.predictions.rows;
        let rows =
            known.partition_point(|r| *r < start)..known.partition_point(|r| *r < start + len);
        let places: Vec<usize> = known[rows.clone()].iter().map(|r| r - start).collect();
        if places.is_empty() {
            return Ok((0.0, 0));
        }
        let picked = places.iter().flat_map(|p| &stream[p * hidden..(p + 1) * hidden]);
        let picked: Vec<f32> = picked.copied().collect();
        let (sum, gradient) = self.predictions.losses(head, rows, &picked)?;
        for (place, row) in places.iter().zip(gradient.chunks_exact(hidden)) {
            let into = &mut d[place * hidden..(place + 1) * hidden];
            into.iter_mut().zip(row).for_each(|(d, g)| *d += g);
        }
        Ok((sum, places.len()))
    }

    /// The teacher's stream after each layer but the last, `[tokens, hidden]` of the texts one after the other.
    pub fn streams(&self, texts: &[usize]) -> Result<Vec<Vec<f32>>, ModelError> {
        let Some((side, layers)) = &self.stream else { return Ok(Vec::new()) };
        let embedding = side.model.weights.stored("model.embed_tokens.weight")?;
        let mut batch = Batch::of(texts.iter().map(|t| self.texts[*t]), |tokens| {
            embed(&side.model.spec, &embedding, tokens)
        })?;
        let mut tables = Tables::new(&batch.positions);
        let mut all = Vec::new();
        for layer in layers.iter().take(layers.len().saturating_sub(1)) {
            let (table, past) = (tables.of(layer.rope()), Past::None(&batch.rows));
            batch.stream = layer.forward(&side.model.spec, &batch.stream, table, past)?.stream;
            all.push(to_vec(&batch.stream)?);
        }
        Ok(all)
    }
}
