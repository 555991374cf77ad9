//! All MLPs of one expert trained together, towards its teacher's predictions.
//!
//! A step: draw texts, run them through the student, and go back layer by layer, each computed again from its input. The
//! gradient is that of `KL(teacher, student)` of the next token's distribution, mean over tokens; it reaches the matrices of
//! the expert, and nothing else is trained. AdamW without decay; the rate falls in a straight line to a tenth.
//!
//! A step changes a number by about `learning_rate` times the root mean square of its matrix, whatever the model's width.

use std::ops::{ControlFlow, Range};

use candle_core::Tensor;
use moe_merge_checkpoint::{Source, WeightRef};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::mlp::{Input, Mlp};
use super::predictions::Predictions;
use super::{Ending, Side, Student, go_together, missing};
use crate::error::ModelError;
use crate::layer::{Layer, Past};
use crate::model::{Tables, embed};
use crate::ops::{tensor_like, to_vec};
use crate::probe::Batch;
use crate::spec::Spec;

/// Steps in which the rate rises.
const WARM_UP: usize = 20;

/// How to train. The same options, texts and models give the same numbers, on any number of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distillation {
    /// Steps in all.
    pub steps: usize,
    /// About the most that a step changes a number, as a share of its matrix's root mean square.
    pub learning_rate: f32,
    /// Tokens of a step, about; at least one text.
    pub batch_tokens: usize,
    /// Seed of the order of texts.
    pub seed: u64,
}

impl Default for Distillation {
    fn default() -> Self {
        Self { steps: 400, learning_rate: 0.015, batch_tokens: 1024, seed: 0 }
    }
}

/// Matrices of one layer after training.
#[derive(Debug, Clone, PartialEq)]
pub struct Distilled {
    /// The layer.
    pub layer: usize,
    /// Width of the stream, and of the expert.
    pub sizes: [usize; 2],
    /// Gate, up (`[inter, hidden]` each) and down (`[hidden, inter]`), one after the other.
    pub weights: Vec<f32>,
}

/// Trains the expert of `student` in `layers`, on texts of its kind.
///
/// * `done` is told of each step, with its loss in nats per token; `Break` stops
/// * memory: the expert's MLPs in f32 four times over, the streams of a batch for each layer, 256 MB of predictions
///
/// # Errors
/// [`ModelError::Transplant`] for models that do not go together, or if a loss is not finite; as [`crate::Model::open`] and
/// [`crate::Model::forward`]; [`ModelError::Stopped`].
pub fn distil(
    student: Student<'_>,
    teacher: &Source,
    texts: &[Vec<u32>],
    layers: Range<usize>,
    options: &Distillation,
    done: &mut dyn FnMut(f64) -> ControlFlow<()>,
) -> Result<Vec<Distilled>, ModelError> {
    let mut run = Run::new(student, teacher, texts, layers)?;
    let mut order = Order::new(texts, options.seed);
    for step in 0..options.steps {
        let batch = order.next(options.batch_tokens);
        let loss = run.gradient(texts, &batch)?;
        if !loss.is_finite() {
            return Err(ModelError::Transplant {
                what: format!("distilling failed in step {}", step + 1),
                expected: "a finite loss".into(),
                found: loss.to_string(),
            });
        }
        let left = 1.0 - 0.9 * step as f32 / options.steps as f32;
        let begun = ((step + 1) as f32 / WARM_UP as f32).min(1.0);
        run.update(step as i32 + 1, options.learning_rate * left * begun);
        if done(loss).is_break() {
            return Err(ModelError::Stopped("distilling was stopped".into()));
        }
    }
    let of = |part: Part| Distilled {
        layer: part.layer,
        sizes: [part.mlp.hidden, part.mlp.inter],
        weights: part.mlp.flat,
    };
    Ok(run.parts.into_iter().filter(|p| !p.moments.is_empty()).map(of).collect())
}

/// Texts in an order of their own for every round.
struct Order {
    lengths: Vec<usize>,
    random: ChaCha12Rng,
    left: Vec<usize>,
}

impl Order {
    fn new(texts: &[Vec<u32>], seed: u64) -> Self {
        let lengths = texts.iter().map(Vec::len).collect();
        Self { lengths, random: ChaCha12Rng::seed_from_u64(seed), left: Vec::new() }
    }

    fn next(&mut self, tokens: usize) -> Vec<usize> {
        let (mut batch, mut filled) = (Vec::new(), 0);
        while filled < tokens && batch.len() < self.lengths.len() {
            let Some(text) = self.left.pop() else {
                self.left = (0..self.lengths.len()).collect();
                for i in (1..self.left.len()).rev() {
                    let j = self.random.next_u64() % (i as u64 + 1);
                    self.left.swap(i, j as usize);
                }
                continue;
            };
            filled += self.lengths[text];
            batch.push(text);
        }
        batch
    }
}

/// The expert in one layer.
struct Part {
    layer: usize,
    mlp: Mlp,
    factor: f32,
    gradient: Vec<f32>,
    /// First and second moments of the gradient, one after the other; empty where nothing is trained.
    moments: Vec<f32>,
    /// Root mean square of each matrix at the start.
    scale: [f32; 3],
}

struct Run {
    spec: Spec,
    embedding: WeightRef,
    layers: Vec<Layer>,
    parts: Vec<Part>,
    ending: Ending,
    predictions: Predictions,
    /// First row of each text among all.
    starts: Vec<usize>,
}

impl Run {
    fn new(
        student: Student<'_>,
        teacher: &Source,
        texts: &[Vec<u32>],
        trained: Range<usize>,
    ) -> Result<Self, ModelError> {
        let (own, mut right) = (Side::new(student.source, texts)?, Side::new(teacher, texts)?);
        go_together(&own, &right)?;
        for l in 0..right.spec.layers.len() {
            right.pass(&right.layer(l)?)?;
            right.release(l);
        }
        let (ending, taught) = (own.ending()?, right.ending()?);
        let predictions = Predictions::new(&ending.head()?, &taught.head()?, &right.stream()?)?;
        let layers: Vec<Layer> =
            (0..own.spec.layers.len()).map(|l| own.layer(l)).collect::<Result<_, _>>()?;
        let mut parts = Vec::new();
        for (l, layer) in layers.iter().enumerate() {
            let found = layer.mlp_of(&own.spec, student.expert);
            let (expert, factor) = found.ok_or_else(|| missing(student.expert))?;
            let mlp = Mlp::of(expert, own.spec.activation)?;
            let size = mlp.flat.len();
            let learns = trained.contains(&l) && own.fitted(layer);
            let moments = vec![0.0; if learns { 2 * size } else { 0 }];
            let scale = [0, 1, 2].map(|m| rms(&mlp.flat[mlp.range(m)]));
            parts.push(Part { layer: l, gradient: vec![0.0; size], mlp, factor, moments, scale });
        }
        let starts = texts
            .iter()
            .scan(0, |from, text| {
                let start = *from;
                *from += text.len();
                Some(start)
            })
            .collect();
        let embedding = own.weights.get("model.embed_tokens.weight")?;
        Ok(Self { spec: own.spec, embedding, layers, parts, ending, predictions, starts })
    }

    /// Loss of some texts; the gradient is left in the parts.
    fn gradient(&mut self, texts: &[Vec<u32>], chosen: &[usize]) -> Result<f64, ModelError> {
        let batch = self.batch(texts, chosen)?;
        let (mut x, mut inputs) = (batch.stream.clone(), Vec::new());
        let mut tables = Tables::new(&batch.positions);
        for (layer, part) in self.layers.iter().zip(&self.parts) {
            let past = Past::None(&batch.rows);
            let (after, h) = layer.attended(&self.spec, &x, tables.of(layer.rope()), past)?;
            let rest = to_vec(&layer.without_experts(&self.spec, &after, &h)?)?;
            let mut stream = part.mlp.forward(&to_vec(&h)?)?;
            stream.iter_mut().zip(&rest).for_each(|(y, x)| *y = x + part.factor * *y);
            let next = tensor_like(stream, &x)?;
            inputs.push(std::mem::replace(&mut x, next));
        }
        let (loss, mut d) = self.loss(texts, chosen, &to_vec(&x)?)?;
        let first = self.parts.iter().position(|p| !p.moments.is_empty()).unwrap_or(0);
        for l in (first..self.layers.len()).rev() {
            let Some(input) = inputs.pop() else { break };
            let wanted = if l == first { Input::Frozen } else { Input::Followed };
            let (layer, part) = (&self.layers[l], &mut self.parts[l]);
            match back(&self.spec, layer, part, &input, &batch, &mut tables, d, wanted)? {
                Some(next) => d = next,
                None => break,
            }
        }
        Ok(loss)
    }

    fn batch(&self, texts: &[Vec<u32>], chosen: &[usize]) -> Result<Batch, ModelError> {
        let (mut tokens, mut rows, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for &text in chosen {
            rows.push(tokens.len()..tokens.len() + texts[text].len());
            positions.extend(0..texts[text].len() as u32);
            tokens.extend_from_slice(&texts[text]);
        }
        Ok(Batch { stream: embed(&self.spec, &self.embedding, &tokens)?, rows, positions })
    }

    /// Mean divergence over the tokens that have a teacher, and its gradient with respect to the last stream.
    fn loss(
        &self,
        texts: &[Vec<u32>],
        chosen: &[usize],
        stream: &[f32],
    ) -> Result<(f64, Vec<f32>), ModelError> {
        let (hidden, head) = (self.spec.hidden, self.ending.head()?);
        let (mut nats, mut count, mut at) = (0.0, 0, 0);
        let mut d = vec![0.0; stream.len()];
        for &text in chosen {
            let (start, len) = (self.starts[text], texts[text].len());
            let known = &self.predictions.rows;
            let rows =
                known.partition_point(|r| *r < start)..known.partition_point(|r| *r < start + len);
            let places: Vec<usize> = known[rows.clone()].iter().map(|r| at + r - start).collect();
            at += len;
            if places.is_empty() {
                continue;
            }
            let picked: Vec<f32> = places
                .iter()
                .flat_map(|p| &stream[p * hidden..(p + 1) * hidden])
                .copied()
                .collect();
            let (sum, gradient) = self.predictions.losses(&head, rows, &picked)?;
            (nats, count) = (nats + sum, count + places.len());
            for (place, row) in places.iter().zip(gradient.chunks_exact(hidden)) {
                d[place * hidden..(place + 1) * hidden].copy_from_slice(row);
            }
        }
        let share = 1.0 / count.max(1) as f32;
        d.iter_mut().for_each(|d| *d *= share);
        Ok((nats / count.max(1) as f64, d))
    }

    /// A step of AdamW down the gradient, which is then zero again.
    fn update(&mut self, step: i32, rate: f32) {
        const DECAY: [f32; 2] = [0.9, 0.999];
        const LEAST: f32 = 1e-12;
        let [first, second] = DECAY.map(|d| 1.0 - d.powi(step));
        for part in self.parts.iter_mut() {
            let size = part.gradient.len();
            if part.moments.is_empty() {
                part.gradient.fill(0.0);
                continue;
            }
            let (means, squares) = part.moments.split_at_mut(size);
            for matrix in 0..3 {
                let (range, rate) = (part.mlp.range(matrix), rate * part.scale[matrix]);
                let numbers =
                    part.mlp.flat[range.clone()].iter_mut().zip(&mut part.gradient[range.clone()]);
                let moments = means[range.clone()].iter_mut().zip(&mut squares[range]);
                for ((w, g), (m, v)) in numbers.zip(moments) {
                    *m = DECAY[0] * *m + (1.0 - DECAY[0]) * *g;
                    *v = DECAY[1] * *v + (1.0 - DECAY[1]) * *g * *g;
                    *w -= rate * (*m / first) / ((*v / second).sqrt() + LEAST);
                    *g = 0.0;
                }
            }
        }
    }
}

/// Back through one layer, computed again from its input: gradients of its expert added, and the one of its input returned
/// where it is wanted.
#[expect(clippy::too_many_arguments, reason = "what a layer needs on the way back")]
fn back(
    spec: &Spec,
    layer: &Layer,
    part: &mut Part,
    input: &Tensor,
    batch: &Batch,
    tables: &mut Tables<'_>,
    mut d: Vec<f32>,
    wanted: Input,
) -> Result<Option<Vec<f32>>, ModelError> {
    let table = tables.of(layer.rope());
    let (trail, h) = layer.attended_trail(spec, input, table, Past::None(&batch.rows))?;
    let d_out: Vec<f32> = d.iter().map(|d| part.factor * d).collect();
    let d_h = part.mlp.backward(&to_vec(&h)?, &d_out, &mut part.gradient, wanted)?;
    let Some(mut d_h) = d_h else { return Ok(None) };
    layer.without_experts_back(spec, &h, &d, &mut d_h)?;
    layer.attended_back(spec, &trail, (table, &batch.rows[..]), &d_h, &mut d)?;
    Ok(Some(d))
}

fn rms(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Gradients of a whole student against slopes, with another model as its teacher.
    #[test]
    fn gradients_are_slopes() {
        let Some(models) = moe_merge_testkit::shared("golden/arch") else { return };
        let open = |name: &str| {
            let folder = models.join(name).display().to_string();
            Source::open(&folder.parse().unwrap(), Path::new(".")).unwrap()
        };
        for (student, teacher) in [("mixtral", "llama_tied"), ("qwen2_moe", "qwen2")] {
            let (student, teacher) = (open(student), open(teacher));
            let (a, b) = (Spec::of(&student).unwrap(), Spec::of(&teacher).unwrap());
            let texts = [vec![1, 5, 9, 3], vec![2, 8, 4]];
            let teacher =
                match (a.layers.len(), a.hidden, a.vocab) == (b.layers.len(), b.hidden, b.vocab) {
                    true => &teacher,
                    false => &student,
                };
            let of = Student { source: &student, expert: 1 };
            let layers = 0..a.layers.len();
            let mut run = Run::new(of, teacher, &texts, layers).unwrap();
            // A model is its own worst teacher: away from it first.
            for part in &mut run.parts {
                part.mlp
                    .flat
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, w)| *w *= 1.0 + 0.5 * ((i % 7) as f32 - 3.0) / 3.0);
            }
            run.gradient(&texts, &[0, 1]).unwrap();
            let gradients: Vec<Vec<f32>> = run.parts.iter().map(|p| p.gradient.clone()).collect();
            for (l, gradient) in gradients.iter().enumerate() {
                let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(norm > 0.0, "layer {l}");
                let before = run.parts[l].mlp.flat.clone();
                let length = before.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                let mut value = |by: f64| {
                    let run = &mut run;
                    let step = (by * length / norm) as f32;
                    let moved = before.iter().zip(gradient).map(|(w, g)| w + step * g).collect();
                    run.parts[l].mlp.flat = moved;
                    run.gradient(&texts, &[0, 1]).unwrap()
                };
                // Curvature spoils large steps, rounding small ones.
                let off = [1e-2, 3e-3, 1e-3, 3e-4].map(|by| {
                    let slope = (value(by) - value(-by)) / (2.0 * by * length);
                    (slope / norm - 1.0).abs()
                });
                value(0.0);
                let least = off.into_iter().fold(f64::INFINITY, f64::min);
                assert!(least < 5e-3, "layer {l}: {off:?}");
            }
        }
    }

    #[test]
    fn every_text_is_drawn_once_a_round() {
        let texts = vec![vec![0; 10]; 6];
        let mut order = Order::new(&texts, 1);
        let mut seen: Vec<usize> = (0..3).flat_map(|_| order.next(20)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        assert_eq!(order.next(1000).len(), 6);
    }
}
