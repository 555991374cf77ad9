//! Methods that look at activations: texts through the models, and the linear weights that follow from what is seen.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::OutTensor;
use moe_merge_checkpoint::{Dtype, Source, WeightRef};
use moe_merge_model::side_by_side::{Member, Site, SiteView, Stream, choose_weights, site_tensors};
use moe_merge_model::{ModelError, Spec};
use moe_merge_router::RouterError;
use moe_merge_router::refit::Correction;

use super::texts::{Amount, TextReport, same_tokens};
use crate::align::Store;
use crate::build::{Observer, Stage};
use crate::error::MergeError;
use crate::recipe::{DenseRecipe, Input, ModelText, Place, RecipeErrors};

/// Pull towards the mean of the models, as a share of the mean square of a site's inputs: what no text shows stays there.
const PULL: f64 = 1e-5;

/// What a method needs beside tensors, all models opened and checked.
#[derive(Debug)]
pub(crate) struct Fitting {
    stream: Stream,
    members: Vec<Owner>,
    /// For each tensor of the result: the weights of the members, and `alpha`.
    parameters: BTreeMap<String, (Vec<f64>, f64)>,
    amount: Amount,
    place: Place,
}

/// One of the models.
#[derive(Debug)]
struct Owner {
    source: Source,
    text: ModelText,
    place: Place,
}

/// Who is told, and who may stop it.
#[derive(Clone, Copy)]
pub(crate) struct Watched<'a> {
    pub observer: &'a dyn Observer,
    pub interrupt: &'a Interrupt,
}

/// Nobody.
pub(crate) struct Unwatched;

impl Observer for Unwatched {
    fn stage(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
}

impl Fitting {
    /// `None` for methods that look at tensors alone.
    ///
    /// * `models`: those of the recipe beside its base, in order
    /// * `parameters`: for each tensor those of each of them, and those of the merge
    ///
    /// # Errors
    /// [`MergeError::Incompatible`] for a model with weights whose inputs are not followed, and for other vocabularies.
    pub fn new(
        recipe: &DenseRecipe,
        models: Vec<(Source, &Input)>,
        parameters: BTreeMap<String, (Vec<f64>, f64)>,
    ) -> Result<Option<Self>, MergeError> {
        let Some(stream) = recipe.method.activations else { return Ok(None) };
        let member = |(source, input): (Source, &Input)| Owner {
            source,
            text: input.text.clone(),
            place: input.source.place.clone(),
        };
        let members: Vec<_> = models.into_iter().map(member).collect();
        members.iter().try_for_each(|m| followed(m, recipe.method.name))?;
        if let Some((first, others)) = members.split_first() {
            let whose = format!("`{}`", recipe.method.name);
            for other in others {
                same_tokens(&first.source, &other.source, &whose)
                    .map_err(|e| e.at(&other.place))?;
            }
        }
        Ok(Some(Self {
            stream,
            members,
            parameters,
            amount: Amount::of(recipe),
            place: recipe.place.clone(),
        }))
    }

    /// Bytes of memory that [`Fitting::run`] takes, about: the weights of the largest site, and the streams of all texts.
    ///
    /// # Errors
    /// [`MergeError::Checkpoint`] for a model that lacks a tensor.
    pub fn memory(&self) -> Result<u64, MergeError> {
        let Some(first) = self.members.first().map(|m| &m.source) else { return Ok(0) };
        let spec = Spec::of(first)?;
        let mut largest = 0;
        for layer in 0..spec.layers.len() {
            for site in Site::ALL {
                let (mut inputs, mut out) = (0, 0);
                for name in site_tensors(&spec, layer, site).unwrap_or_default() {
                    let weight = first.weight(&format!("{name}.weight"))?;
                    (inputs, out) = (weight.cols(), out + weight.rows());
                }
                largest = largest.max(inputs * (4 * inputs + 24 * out));
            }
        }
        let streams = if self.stream == Stream::Merged { 2 } else { 1 };
        let tokens: usize = self.members.iter().map(|m| self.amount.most(&m.text)).sum();
        Ok((largest + tokens * spec.hidden * size_of::<f32>() * streams) as u64)
    }

    /// Puts the weights of the method into `merged`, in which they are means so far.
    ///
    /// Memory: as [`choose_weights`], and for the weights at one site what their inputs are multiplied with: about
    /// `4 in² + 24 in out` bytes. Weights that are done lie in files beside `target`.
    ///
    /// # Errors
    /// [`MergeError`] for text that cannot be used, a model that cannot be run or gives numbers that are not finite, a full disk;
    /// interruption.
    pub fn run(
        &self,
        merged: &mut Source,
        target: &Path,
        watched: Watched<'_>,
    ) -> Result<Vec<TextReport>, MergeError> {
        let (texts, report) = self.texts(watched)?;
        let layers = Spec::of(&self.members[0].source)?.layers.len();
        watched.observer.stage(Stage::Fit, (layers * Site::ALL.len()) as u64);
        let store = Store::beside(target, Dtype::F32)?;
        let members: Vec<Member<'_>> = self
            .members
            .iter()
            .zip(&texts)
            .map(|(m, texts)| Member { source: &m.source, texts })
            .collect();
        let means = merged.clone();
        let (mut chosen, mut failed) = (BTreeMap::new(), None);
        let ran = choose_weights(&members, &means, self.stream, &mut |view| {
            let found = self.choose(view, &means, &texts, &store, watched.interrupt);
            let found = found.map_err(|e| {
                failed = Some(e);
                ModelError::Stopped("a weight could not be found".into())
            })?;
            watched.observer.advance(1);
            let names = view.tensors.iter().map(|t| format!("{t}.weight"));
            chosen.extend(names.zip(found.iter().cloned()));
            Ok(found)
        });
        failed.map_or(Ok(()), Err)?;
        ran?;
        merged.tensors.extend(chosen);
        Ok(report)
    }

    /// The weights at one site.
    fn choose(
        &self,
        view: &SiteView<'_>,
        means: &Source,
        texts: &[Vec<Vec<u32>>],
        store: &Store,
        interrupt: &Interrupt,
    ) -> Result<Vec<WeightRef>, MergeError> {
        let refused = |source| MergeError::Router { layer: view.layer, source };
        let names: Vec<String> = view.tensors.iter().map(|t| format!("{t}.weight")).collect();
        let (weights, alpha) = self.parameters(&names)?;
        let mean: Vec<&WeightRef> =
            names.iter().map(|n| means.weight(n)).collect::<Result<_, _>>()?;
        let inputs = mean[0].cols();
        let out: usize = mean.iter().map(|w| w.rows()).sum();
        let mut sums = Correction::new(inputs, out);
        let mut squares = vec![vec![0f64; inputs]; self.members.len()];
        let counts = texts.iter().map(|t| t.iter().map(Vec::len).sum::<usize>().max(1) as f64);
        let scales: Vec<f32> =
            weights.iter().zip(counts).map(|(w, n)| (w / n).sqrt() as f32).collect();
        let mut failed = None;
        let seen = view.tokens(&mut |tokens| {
            interrupt.check()?;
            let scale = scales[tokens.member];
            if scale == 0.0 {
                return Ok(());
            }
            let scaled = |x: &[f32]| -> Vec<f32> { x.iter().map(|v| scale * v).collect() };
            let (x, y) = (scaled(tokens.inputs), scaled(tokens.wanted));
            for row in x.chunks_exact(inputs) {
                let own = squares[tokens.member].iter_mut().zip(row);
                own.for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
            }
            sums.add(&x, &y).map_err(|e| {
                failed = Some(self.not_finite(tokens.member, view, &e).unwrap_or(refused(e)));
                ModelError::Stopped("a weight could not be found".into())
            })
        });
        failed.map_or(Ok(()), Err)?;
        seen?;
        sums.scale(alpha);
        if alpha < 1.0 {
            for (member, squares) in self.members.iter().zip(&mut squares) {
                squares.iter_mut().for_each(|s| *s *= 1.0 - alpha);
                let own: Result<Vec<_>, _> =
                    names.iter().map(|n| member.source.weight(n)).collect();
                sums.pull(squares, &side_by_side(&own?)?).map_err(refused)?;
            }
        }
        let pull = vec![PULL * sums.mean_square(); inputs];
        sums.pull(&pull, &side_by_side(&mean)?).map_err(refused)?;
        let solved = sums.solve(0.0).map_err(refused)?;
        let mut rest = solved.as_slice();
        let tensors = names.iter().zip(&mean).map(|(name, mean)| {
            let (own, others) = rest.split_at(mean.len());
            rest = others;
            let values: Vec<f32> = own.iter().map(|v| *v as f32).collect();
            let weight = OwnedWeight::from_f32(name, &values, mean.shape(), Dtype::F32);
            OutTensor { name: name.clone(), weight: Arc::new(weight), dtype: mean.dtype() }
        });
        let file = format!("layer-{:04}-{:?}.safetensors", view.layer, view.site);
        let mut kept = store.keep(&file, tensors.collect(), interrupt)?;
        Ok(names.iter().filter_map(|n| kept.remove(n)).collect())
    }

    /// Weights of the members and `alpha` at a site, which its tensors share.
    fn parameters(&self, names: &[String]) -> Result<(Vec<f64>, f64), MergeError> {
        let of = |name: &String| {
            let weights = |n| (vec![1.0; n], 1.0);
            self.parameters.get(name).cloned().unwrap_or_else(|| weights(self.members.len()))
        };
        let first = of(&names[0]);
        let Some(other) = names.iter().find(|n| of(n) != first) else { return Ok(first) };
        let mut error = self.place.error("parameters differ for weights that read the same input");
        error.expected = Some(format!("the same for {}", names.join(", ")));
        error.found = Some(format!("other ones for {other} than for {}", names[0]));
        error.hint = Some("let filters name `self_attn`, `mlp` or whole layers".into());
        Err(RecipeErrors(vec![error]).into())
    }

    /// What to blame for numbers that are not finite.
    fn not_finite(
        &self,
        member: usize,
        view: &SiteView<'_>,
        e: &RouterError,
    ) -> Option<MergeError> {
        let RouterError::NotFinite { .. } = e else { return None };
        let member = &self.members[member];
        let error = MergeError::Incompatible {
            what: "a model gives numbers that are not finite".into(),
            first: member.source.label.clone(),
            second: "output family of any kind".into(),
            expected: "finite inputs and outputs on text of its kind".into(),
            found: format!("NaN or infinity at `{}`", view.tensors.join("`, `")),
            hint: "`moe-merge verify` finds numbers that are not finite".into(),
            recipe: None,
        };
        Some(error.at(&member.place))
    }

    /// Token ids of each model's texts.
    fn texts(&self, watched: Watched<'_>) -> Result<(Vec<Tokens>, Vec<TextReport>), MergeError> {
        let total: usize = self.members.iter().map(|m| self.amount.written(&m.text)).sum();
        watched.observer.stage(Stage::SelfText, total as u64);
        let mut told = |tokens| watched.observer.advance(tokens as u64);
        let all = self.members.iter().enumerate().map(|(index, m)| {
            let model = (&m.source, index);
            let made = self.amount.text(model, &m.text, &m.place, watched.interrupt, &mut told);
            made.map_err(|e| e.at(&m.place))
        });
        Ok(all.collect::<Result<Vec<_>, _>>()?.into_iter().unzip())
    }
}

/// Token ids of some texts.
type Tokens = Vec<Vec<u32>>;

/// Whether the inputs of all linear weights in the layers of a model can be followed.
fn followed(member: &Owner, method: &str) -> Result<(), MergeError> {
    let source = &member.source;
    let spec = Spec::of(source).map_err(|e| MergeError::from(e).at(&member.place))?;
    for layer in 0..spec.layers.len() {
        let Some(site) = Site::ALL.into_iter().find(|s| site_tensors(&spec, layer, *s).is_none())
        else {
            continue;
        };
        let part = if matches!(site, Site::Mlp | Site::MlpOut) { "mlp" } else { "self_attn" };
        let inside = |name: &&String| {
            name.starts_with(&format!("model.layers.{layer}."))
                && (name.contains(&format!(".{part}.")) || name.contains(".block_sparse_moe."))
        };
        let tensor = source.tensors.keys().find(inside).cloned().unwrap_or_default();
        let error = MergeError::Incompatible {
            what: format!("`{method}` does not follow the inputs of `{tensor}`"),
            first: source.label.clone(),
            second: "output family of dense models".into(),
            expected: "layers of plain attention and one MLP".into(),
            found: match part {
                "mlp" => format!("experts in layer {layer}"),
                _ => format!("latent attention in layer {layer}"),
            },
            hint: "merge it with a method that looks at weights alone, as `tsv` or `linear`".into(),
            recipe: None,
        };
        return Err(error.at(&member.place));
    }
    Ok(())
}

/// The rows of several weights, one after the other.
fn side_by_side(weights: &[&WeightRef]) -> Result<Vec<f32>, MergeError> {
    let mut all = Vec::new();
    for weight in weights {
        all.extend(weight.to_f32()?);
    }
    Ok(all)
}
