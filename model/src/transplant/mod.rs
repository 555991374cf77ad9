//! One expert of a MoE fitted to the stream that it now lives in.
//!
//! A MoE keeps the attention of its base. Where an expert's own attention was trained too, its MLPs then see a stream that they
//! were not made for. Here the text goes through the dense model that the expert comes from (the teacher) and through the MoE
//! with every token sent to that expert (the student), side by side, one layer at a time; each layer's MLP is asked for when
//! the text has come that far, and the text goes on through the MLP that was given.
//!
//! The sum that the student has to come to: with `x` the stream after its attention and `f` the MLP, `x + f(norm(x))` should be
//! the teacher's stream after the same layer. In the last layer the streams themselves do not matter, as teacher and student
//! may have different heads: there the predictions count.

use std::ops::Range;

use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::{Exec, MatView};

use crate::error::ModelError;
use crate::layer::{Layer, Past, norm};
use crate::model::Tables;
use crate::ops::{FrozenLinear, RmsNorm, to_vec};
use crate::probe::Batch;
use crate::router_training::head::{Head, Target};
use crate::running::Running;
use crate::spec::Spec;

mod distil;
pub(crate) mod mlp;
pub(crate) mod predictions;
mod view;

pub use distil::{
    Distillation, DistillationState, Distilled, Matrices, Pupil, Told, Visits, distil,
};
use mlp::Mlp;
use predictions::Predictions;
pub use view::{LayerFit, See};

/// A MoE and the expert in it that gets all tokens, or a dense model.
#[derive(Debug, Clone, Copy)]
pub struct Student<'a> {
    /// The model.
    pub source: &'a Source,
    /// The routed expert; of no matter in a dense model.
    pub expert: usize,
}

/// The matrices that a layer's expert shall have from now on, gate, up and down; `None`: those that it has.
pub type NewMatrices = Option<[WeightRef; 3]>;

/// Decides on the matrices of one layer.
pub type Fit<'a> = dyn FnMut(LayerFit<'_>) -> Result<NewMatrices, ModelError> + 'a;

/// Takes `texts` through teacher and student, asking `fit` for the MLP of each layer in `layers` when they reach it.
///
/// * `texts`: with the token that begins one, where the tokenizer has it
/// * memory: a layer of each model, its MLP in f32, the streams and MLP inputs of all tokens, 256 MB of predictions
///
/// # Errors
/// [`ModelError::Transplant`] for models that do not go together; as [`crate::Model::open`] and [`crate::Model::forward`]; what
/// `fit` returns.
pub fn transplant(
    student: Student<'_>,
    teacher: &Source,
    texts: &[Vec<u32>],
    layers: Range<usize>,
    fit: &mut Fit<'_>,
) -> Result<(), ModelError> {
    let (mut own, mut right) = (Side::new(student.source, texts)?, Side::new(teacher, texts)?);
    go_together(&own, &right)?;
    let last = own.model.spec.layers.len() - 1;
    for l in 0..=last {
        let (layer, taught) = (own.model.layer(l)?, right.model.layer(l)?);
        right.pass(&taught)?;
        drop(taught);
        let half = own.half(&layer)?;
        let (expert, factor) =
            layer.mlp_of(&own.model.spec, student.expert).ok_or_else(|| missing(student.expert))?;
        let mut mlp = Mlp::of(expert, own.model.spec.activation)?;
        if layers.contains(&l) && own.fitted(&layer) {
            let target = right.stream()?;
            let (ending, taught) = (own.ending()?, right.ending()?);
            let predictions = match l == last {
                true => Some(Predictions::new(&ending.head()?, &taught.head()?, &target)?),
                false => None,
            };
            let view = LayerFit {
                layer: l,
                half: &half,
                target: &target,
                factor,
                mlp: &mlp,
                ending: &ending,
                predictions,
            };
            if let Some(new) = fit(view)? {
                for (matrix, weight) in new.iter().enumerate() {
                    let at = mlp.range(matrix);
                    weight.expect_shape(&mlp.shape(matrix), "as before")?;
                    mlp.flat[at].copy_from_slice(&weight.to_f32()?);
                }
            }
        }
        own.go_on(&half, &mlp, factor)?;
        drop(layer);
        own.model.release(l);
        right.model.release(l);
    }
    Ok(())
}

/// `KL(teacher, student)` of the next token's distribution, mean over all tokens of `texts`, for each of `students`.
///
/// # Errors
/// As [`transplant`].
pub fn divergences(
    teacher: &Source,
    students: &[Student<'_>],
    texts: &[Vec<u32>],
) -> Result<Vec<f64>, ModelError> {
    let mut right = Side::new(teacher, texts)?;
    for l in 0..right.model.spec.layers.len() {
        let layer = right.model.layer(l)?;
        right.pass(&layer)?;
        right.model.release(l);
    }
    let (ending, stream) = (right.ending()?, right.stream()?);
    let head = ending.head()?;
    let states = head.states(&stream)?;
    let mut found = Vec::new();
    for student in students {
        let mut own = Side::new(student.source, texts)?;
        go_together(&own, &right)?;
        for l in 0..own.model.spec.layers.len() {
            let layer = own.model.layer(l)?;
            let half = own.half(&layer)?;
            let (expert, factor) = layer
                .mlp_of(&own.model.spec, student.expert)
                .ok_or_else(|| missing(student.expert))?;
            own.go_on(&half, &Mlp::of(expert, own.model.spec.activation)?, factor)?;
            own.model.release(l);
        }
        let target = Target::Other(&states, &head);
        let nats = own.ending()?.head()?.losses(&own.stream()?, &target, None)?.nats;
        found.push(nats.iter().sum::<f64>() / nats.len().max(1) as f64);
    }
    Ok(found)
}

fn missing(expert: usize) -> ModelError {
    ModelError::Transplant {
        what: "there is no such expert".into(),
        expected: "an expert of every layer".into(),
        found: format!("expert {expert}"),
    }
}

fn go_together(student: &Side, teacher: &Side) -> Result<(), ModelError> {
    let (s, t) = (&student.model.spec, &teacher.model.spec);
    let sizes = |s: &Spec| [s.layers.len(), s.hidden, s.vocab];
    if sizes(s) == sizes(t) {
        return Ok(());
    }
    let told = |[layers, hidden, vocab]: [usize; 3]| {
        format!("{layers} layers, hidden size {hidden}, vocabulary of {vocab}")
    };
    Err(ModelError::Transplant {
        what: "an expert can only be fitted with a teacher of the same sizes".into(),
        expected: told(sizes(s)),
        found: told(sizes(t)),
    })
}

/// One of the two models and its stream.
struct Side {
    model: Running,
    batches: Vec<Batch>,
}

/// What a layer has made of the stream before its expert is asked: all `[tokens, hidden]`.
pub(crate) struct Half {
    /// The expert's input.
    pub inputs: Vec<f32>,
    /// The stream after the layer if the expert gave nothing.
    pub rest: Vec<f32>,
}

/// Last norm and head of a model.
pub(crate) struct Ending {
    spec: Spec,
    norm: RmsNorm,
    head: FrozenLinear,
}

impl Ending {
    pub fn head(&self) -> Result<Head<'_>, ModelError> {
        let weight: MatView<'_> = self.head.view()?;
        Ok(Head { spec: &self.spec, norm: &self.norm, weight, exec: Exec::default() })
    }
}

impl Side {
    fn new(source: &Source, texts: &[Vec<u32>]) -> Result<Self, ModelError> {
        let model = Running::new(source)?;
        Ok(Self { batches: model.embedded(texts)?, model })
    }

    /// Whether what is fitted has a part in `layer`: in a MoE, dense layers belong to all experts.
    fn fitted(&self, layer: &Layer) -> bool {
        layer.experts() > 0 || self.model.spec.moe_layers().next().is_none()
    }

    fn ending(&self) -> Result<Ending, ModelError> {
        let name =
            if self.model.spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Ok(Ending {
            norm: norm(&self.model.weights, &self.model.spec, "model.norm.weight")?,
            head: self.model.weights.frozen(self.model.weights.get(name)?, None),
            spec: self.model.spec.clone(),
        })
    }

    /// All rows of the stream.
    fn stream(&self) -> Result<Vec<f32>, ModelError> {
        let mut all = Vec::new();
        for batch in &self.batches {
            all.extend(to_vec(&batch.stream)?);
        }
        Ok(all)
    }

    /// Through a layer as it is.
    fn pass(&mut self, layer: &Layer) -> Result<(), ModelError> {
        self.model.pass(layer, &mut self.batches)
    }

    /// Through the attention of a layer, and whatever stands beside the expert.
    fn half(&self, layer: &Layer) -> Result<Half, ModelError> {
        let mut half = Half { inputs: Vec::new(), rest: Vec::new() };
        for batch in &self.batches {
            let mut tables = Tables::new(&batch.positions);
            let table = tables.of(layer.rope());
            let past = Past::None(&batch.rows);
            let (x, inputs) = layer.attended(&self.model.spec, &batch.stream, table, past)?;
            half.rest.extend(to_vec(&layer.without_experts(&self.model.spec, &x, &inputs)?)?);
            half.inputs.extend(to_vec(&inputs)?);
        }
        Ok(half)
    }

    /// The stream after the layer, with `mlp` as its expert.
    fn go_on(&mut self, half: &Half, mlp: &Mlp, factor: f32) -> Result<(), ModelError> {
        let hidden = self.model.spec.hidden;
        let mut from = 0;
        for batch in &mut self.batches {
            let rows = from..from + batch.positions.len() * hidden;
            from = rows.end;
            let mut stream = mlp.forward(&half.inputs[rows.clone()])?;
            stream.iter_mut().zip(&half.rest[rows]).for_each(|(y, x)| *y = x + factor * *y);
            batch.stream = crate::ops::tensor_like(stream, &batch.stream)?;
        }
        Ok(())
    }
}
