//! Models side by side, each on texts of its own, and the model that is made of them matrix by matrix.
//!
//! Where several models of one architecture become one, this shows for each group of linear weights what the models make of their
//! inputs, and goes on with the weights that are chosen for it.

mod experts;

use candle_core::Tensor;
use moe_merge_checkpoint::{Source, WeightRef};

use crate::error::ModelError;
use crate::layer::{Layer, Past, site_names};
use crate::model::Tables;
use crate::ops::to_vec;
use crate::probe::Batch;
use crate::running::Running;
use crate::spec::Spec;

pub use experts::{ExpertOutputs, compare_experts};

/// A group of linear weights that read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Queries, keys, values.
    Attention,
    /// The output projection of attention.
    AttentionOut,
    /// Gate and up projection.
    Mlp,
    /// The down projection.
    MlpOut,
}

impl Site {
    /// All of them, in the order in which a layer uses them.
    pub const ALL: [Site; 4] = [Site::Attention, Site::AttentionOut, Site::Mlp, Site::MlpOut];
}

/// Whose hidden states the inputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Each model's own; what is wanted of a weight is what the model's own weight gives.
    Own,
    /// Those of the merged model, with the weights that were chosen so far. What is wanted of a weight is that the model comes
    /// to what the model whose text it is comes to in its own stream: the same outputs, and for those that are added to the
    /// stream (unless a norm stands between) the same sum.
    Merged,
}

/// A model and its texts.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// The model.
    pub source: &'a Source,
    /// Its texts, each with the token that begins one where the tokenizer has it.
    pub texts: &'a [Vec<u32>],
}

/// The tensors at each site of each layer, without `.weight`.
///
/// `None` where a layer has experts or latent attention, whose inputs are not those of plain linear layers.
pub fn site_tensors(spec: &Spec, layer: usize, site: Site) -> Option<Vec<String>> {
    let modules = site_names(spec, spec.layers.get(layer)?, site)?;
    Some(modules.into_iter().map(|m| format!("model.layers.{layer}.{m}")).collect())
}

/// Some tokens of one model's text at a site.
#[derive(Debug)]
pub struct Tokens<'a> {
    /// The model whose text it is.
    pub member: usize,
    /// `[tokens, in]`
    pub inputs: &'a [f32],
    /// What the weights, without bias, should make of `inputs`: `[tokens, out]`, the outputs of all weights of the site side by
    /// side.
    pub wanted: &'a [f32],
}

/// Sees tokens.
pub type See<'a> = dyn FnMut(Tokens<'_>) -> Result<(), ModelError> + 'a;

/// Weights that are to be chosen.
pub struct SiteView<'a> {
    /// The layer.
    pub layer: usize,
    /// Where in it.
    pub site: Site,
    /// Names of the tensors, without `.weight`.
    pub tensors: Vec<String>,
    sides: &'a [Side],
    layers: &'a [Layer],
    merged: Option<(&'a Running, Layer)>,
}

/// Decides on the weights of a site: one for each of its tensors, of the shape that they have.
pub type Choose<'a> = dyn FnMut(&SiteView<'_>) -> Result<Vec<WeightRef>, ModelError> + 'a;

/// One member on its way.
struct Side {
    model: Running,
    own: Vec<Batch>,
    /// The same texts in the merged model.
    merged: Vec<Batch>,
}

/// Takes the texts of `members` through their models, asking `choose` for the weights of each site when they reach it.
///
/// * `merged`: the model that is made, with the tensors that are not chosen; those that are need not have any numbers
/// * memory: a layer of each model, the streams of all texts (twice with [`Stream::Merged`]), 2048 tokens at a site
///
/// # Errors
/// [`ModelError::Transplant`] for models with experts or latent attention and for weights of another shape; as
/// [`crate::Model::open`] and [`crate::Model::forward`]; what `choose` returns.
pub fn choose_weights(
    members: &[Member<'_>],
    merged: &Source,
    stream: Stream,
    choose: &mut Choose<'_>,
) -> Result<(), ModelError> {
    let mut target = Running::new(merged)?;
    let mut sides = Vec::new();
    for member in members {
        let model = Running::new(member.source)?;
        let own = model.embedded(member.texts)?;
        let merged = match stream {
            Stream::Own => Vec::new(),
            Stream::Merged => target.embedded(member.texts)?,
        };
        sides.push(Side { model, own, merged });
    }
    for index in 0..target.spec.layers.len() {
        let layers: Vec<Layer> =
            sides.iter().map(|s| s.model.layer(index)).collect::<Result<_, _>>()?;
        for site in Site::ALL {
            let tensors = site_tensors(&target.spec, index, site).ok_or_else(|| inputs(index))?;
            let merged = match stream {
                Stream::Own => None,
                Stream::Merged => Some((&target, target.layer(index)?)),
            };
            let (sides, layers) = (&sides[..], &layers[..]);
            let view = SiteView { layer: index, site, tensors, sides, layers, merged };
            let chosen = choose(&view)?;
            for (name, weight) in view.tensors.into_iter().zip(chosen) {
                target.weights.replace(format!("{name}.weight"), weight);
            }
        }
        for (side, layer) in sides.iter_mut().zip(&layers) {
            side.model.pass(layer, &mut side.own)?;
        }
        if stream == Stream::Merged {
            let layer = target.layer(index)?;
            sides.iter_mut().try_for_each(|side| target.pass(&layer, &mut side.merged))?;
        }
        drop(layers);
        sides.iter().for_each(|side| side.model.release(index));
        target.release(index);
    }
    Ok(())
}

fn inputs(layer: usize) -> ModelError {
    ModelError::Transplant {
        what: format!("layer {layer} has weights whose inputs are not followed"),
        expected: "plain attention and one MLP".into(),
        found: "experts, or latent attention".into(),
    }
}

impl SiteView<'_> {
    /// Shows all tokens, model after model.
    ///
    /// # Errors
    /// What a forward pass can meet, and what `see` returns.
    pub fn tokens(&self, see: &mut See<'_>) -> Result<(), ModelError> {
        for (member, (side, layer)) in self.sides.iter().zip(self.layers).enumerate() {
            for (i, own) in side.own.iter().enumerate() {
                let (inputs, wanted) =
                    self.batch(&side.model.spec, layer, own, side.merged.get(i))?;
                see(Tokens { member, inputs: &inputs, wanted: &wanted })?;
            }
        }
        Ok(())
    }

    fn batch(
        &self,
        spec: &Spec,
        layer: &Layer,
        own: &Batch,
        other: Option<&Batch>,
    ) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
        let reach = |spec: &Spec, layer: &Layer, batch: &Batch| {
            let mut tables = Tables::new(&batch.positions);
            let table = tables.of(layer.rope());
            layer.input_at(spec, self.site, &batch.stream, table, Past::None(&batch.rows))
        };
        let at = reach(spec, layer, own)?;
        let linears = layer.linears_at(self.site);
        let mut outputs = Vec::new();
        for linear in &linears {
            outputs.push(linear.forward(&at.input)?);
        }
        let mut wanted = Tensor::cat(&outputs, 1)?;
        let Some(((target, merged), other)) = self.merged.as_ref().zip(other) else {
            let mut wanted = to_vec(&wanted)?;
            take_off(&mut wanted, &bias(&linears));
            return Ok((to_vec(&at.input)?, wanted));
        };
        let reached = reach(&target.spec, merged, other)?;
        let added = matches!(self.site, Site::AttentionOut | Site::MlpOut);
        if added && !layer.normed_after() {
            let lead = (at.stream - &reached.stream)?;
            wanted = (wanted + (lead / f64::from(spec.residual_scale))?)?;
        }
        let mut wanted = to_vec(&wanted)?;
        take_off(&mut wanted, &bias(&merged.linears_at(self.site)));
        Ok((to_vec(&reached.input)?, wanted))
    }
}

/// The biases of `linears` side by side; empty where there are none.
fn bias(linears: &[&crate::ops::FrozenLinear]) -> Vec<f32> {
    linears.iter().filter_map(|l| l.bias.as_deref()).flatten().copied().collect()
}

fn take_off(rows: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        rows.chunks_exact_mut(bias.len())
            .for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y -= b));
    }
}
