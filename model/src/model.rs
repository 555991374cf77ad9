//! The whole model: embedding, layers, head.

use std::ops::Range;

use candle_core::{Device, Tensor};
use moe_merge_checkpoint::{Source, WeightRef};
use moe_merge_kernels::{Accuracy, Batching, Exec, RopeSpec, RopeTable, Routing};

use crate::cache::{Cache, LayerCache};
use crate::error::ModelError;
use crate::layer::{Layer, Passed, Past, norm};
use crate::ops::{FrozenLinear, RmsNorm, to_vec};
use crate::placement::Placement;
use crate::spec::{Mlp, MoeMlp, Spec};
use crate::trace::shares;
use crate::weights::Weights;

/// For which tokens of a pass logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// Every token.
    All,
    /// The last one.
    Last,
    /// None.
    Skip,
}

/// What the router of a layer did with the tokens of a pass.
#[derive(Debug)]
pub struct Visited<'a> {
    /// The layer.
    pub layer: usize,
    /// Its rule and number of experts.
    pub moe: &'a MoeMlp,
    /// Experts chosen and their weights, best first.
    pub routing: &'a Routing,
    /// Logits they were chosen by, `[tokens, experts]`.
    pub logits: &'a [f32],
}

impl Visited<'_> {
    /// Entropy in nats of what the router thought of the experts, summed over the tokens of the pass.
    pub fn entropy(&self) -> f64 {
        let mut sum = 0.0;
        let mut row = vec![0.0; self.moe.experts];
        for logits in self.logits.chunks_exact(self.moe.experts) {
            row.copy_from_slice(logits);
            shares(&mut row, &self.moe.router);
            let terms =
                row.iter().filter(|p| **p > 0.0).map(|&p| -f64::from(p) * f64::from(p).ln());
            sum += terms.sum::<f64>();
        }
        sum
    }
}

/// Told about every MoE layer of a pass.
pub type Watch<'a> = dyn FnMut(Visited<'_>) + Send + 'a;

/// A model that runs: its weights are views of the files they lie in.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) spec: Spec,
    pub(crate) embedding: WeightRef,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: FrozenLinear,
}

impl Model {
    /// Opens a model. Nothing is copied but norms and biases, and weights that have to be computed.
    ///
    /// # Errors
    /// [`ModelError::Config`] for what is not done; [`ModelError::Checkpoint`] for missing or misshapen tensors.
    pub fn open(source: &Source) -> Result<Self, ModelError> {
        Self::open_with(source, Exec::default())
    }

    /// As [`Model::open`], with products computed as `exec` says; routers choose by exact ones in any case.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_with(source: &Source, exec: Exec) -> Result<Self, ModelError> {
        Self::open_on(source, exec, &Placement::cpu())
    }

    /// As [`Model::open_with`], with its products where `placement` says; on a device, their weights are copied there.
    ///
    /// # Errors
    /// As [`Model::open`], and [`ModelError::Device`] if the device has no room, or fails.
    pub fn open_on(source: &Source, exec: Exec, placement: &Placement) -> Result<Self, ModelError> {
        let spec = Spec::of(source)?;
        let weights = Weights::new(source, &spec)?.computed(exec);
        let embedding = weights.get("model.embed_tokens.weight")?;
        let head = if spec.tied { embedding.clone() } else { weights.get("lm_head.weight")? };
        let mut head = weights.frozen(head, None);
        head.place(placement)?;
        Ok(Self {
            layers: (0..spec.layers.len())
                .map(|l| Layer::load_on(&weights, &spec, l, placement))
                .collect::<Result<_, _>>()?,
            norm: norm(&weights, &spec, "model.norm.weight")?,
            head,
            embedding,
            spec,
        })
    }

    /// Lets every token visit `top_k` experts instead of as many as the configuration says.
    ///
    /// # Errors
    /// [`ModelError::TopK`] if it is 0 or more than there are, or the model is dense; nothing has changed then.
    pub fn set_experts_per_token(&mut self, top_k: usize) -> Result<(), ModelError> {
        let experts = self.spec.moe_layers().map(|(_, moe)| moe.experts).min().unwrap_or(0);
        if top_k == 0 || top_k > experts {
            return Err(ModelError::TopK { top_k, experts });
        }
        self.layers.iter_mut().for_each(|layer| layer.set_top_k(top_k));
        for layer in &mut self.spec.layers {
            if let Mlp::Moe(moe) = &mut layer.mlp {
                moe.router.top_k = top_k;
            }
        }
        Ok(())
    }

    /// Rounds router logits and weights to bf16 where transformers 5 does when it runs the family in bf16: a token between
    /// two experts then goes the way it goes there. Routing is computed on the processor then.
    pub fn round_routers_like_hf(&mut self) {
        self.layers.iter_mut().for_each(Layer::round_router_like_hf);
        for layer in &mut self.spec.layers {
            if let Mlp::Moe(moe) = &mut layer.mlp {
                moe.router.precision = moe.reference_precision;
            }
        }
    }

    /// The same model over the same weights, with the tokens of a pass in the kernels that `batching` says; the head
    /// takes each row alone unless that is [`Batching::Fastest`], for logits are wanted of one token of a prompt.
    pub(crate) fn batched(&self, batching: Batching) -> Self {
        let mut model = self.clone();
        model.layers.iter_mut().for_each(|layer| layer.set_batching(batching));
        model.head.exec.batching = match batching {
            Batching::Fastest => Batching::Fastest,
            Batching::Together | Batching::Alone => Batching::Alone,
        };
        model
    }

    /// How its products are computed.
    pub fn accuracy(&self) -> Accuracy {
        self.head.accuracy()
    }

    /// What the model is made of.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Logits of `tokens` that follow those in `cache`; the cache then holds them too.
    ///
    /// * returns `[rows, vocab]` f32, rows as `rows` says
    ///
    /// # Errors
    /// [`ModelError::TooLong`], [`ModelError::Token`], [`ModelError::Router`]; the cache is then as before.
    pub fn forward(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
    ) -> Result<Vec<f32>, ModelError> {
        self.forward_watched(tokens, cache, rows, None)
    }

    /// As [`Model::forward`], telling `watch` where the tokens go.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_watched(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
        watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        cache.check(tokens.len())?;
        in_pool(|| self.forward_checked(tokens, cache, rows, watch))
    }

    fn forward_checked(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        rows: LogitRows,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        let start = cache.len() as u32;
        let positions: Vec<u32> = (start..start + tokens.len() as u32).collect();
        let mut tables = Tables::new(&positions);
        let mut x = embed(&self.spec, &self.embedding, tokens)?;
        let held = cache.len();
        for (layer, kept) in self.layers.iter().zip(&mut cache.layers) {
            let table = tables.of(layer.rope());
            let passed = layer.forward(&self.spec, &x, table, Past::Cache(kept, held))?;
            tell(layer, &passed, watch.as_deref_mut())?;
            x = passed.stream;
        }
        cache.advance(tokens.len());
        match rows {
            LogitRows::All => {}
            LogitRows::Last => x = x.narrow(0, tokens.len() - 1, 1)?.contiguous()?,
            LogitRows::Skip => return Ok(Vec::new()),
        }
        self.logits(&self.norm.forward(&x)?)
    }

    /// Logits after the next token of several sequences, each with keys and values of its own.
    ///
    /// * `tokens`, `lens`: the token of each sequence and the tokens before it, which its caches hold
    /// * `caches`: for each layer those of the sequences, which then hold the token too
    /// * `rows`: ascending, the sequences whose logits are wanted; returns `[rows, vocab]`
    ///
    /// The caller has checked that the tokens have room.
    pub(crate) fn forward_lanes(
        &self,
        tokens: &[u32],
        lens: &[usize],
        caches: Vec<Vec<&mut LayerCache>>,
        rows: &[u32],
        watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        in_pool(|| self.lanes_checked(tokens, lens, caches, rows, watch))
    }

    fn lanes_checked(
        &self,
        tokens: &[u32],
        lens: &[usize],
        caches: Vec<Vec<&mut LayerCache>>,
        rows: &[u32],
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<Vec<f32>, ModelError> {
        let positions: Vec<u32> = lens.iter().map(|&len| len as u32).collect();
        let mut tables = Tables::new(&positions);
        let mut x = embed(&self.spec, &self.embedding, tokens)?;
        for (layer, lanes) in self.layers.iter().zip(caches) {
            let table = tables.of(layer.rope());
            let passed = layer.forward(&self.spec, &x, table, Past::Lanes(lanes, lens))?;
            tell(layer, &passed, watch.as_deref_mut())?;
            x = passed.stream;
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        if rows.len() < tokens.len() {
            let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
            x = x.index_select(&rows, 0)?;
        }
        self.logits(&self.norm.forward(&x)?)
    }

    /// The stream at every depth, and the logits: `hidden_0` (embeddings) to `hidden_L` (after the final norm), each
    /// `[tokens, hidden]`, as transformers' `output_hidden_states` gives them.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn hidden_states(&self, tokens: &[u32]) -> Result<(Vec<Vec<f32>>, Vec<f32>), ModelError> {
        let mut states = Vec::new();
        let x = self.whole(tokens, |x| states.push(x.clone()))?;
        let last = self.norm.forward(&x)?;
        let logits = self.logits(&last)?;
        states.push(last);
        Ok((states.iter().map(to_vec).collect::<Result<_, _>>()?, logits))
    }

    /// One sequence through all layers; `see` gets the stream before each layer.
    fn whole(&self, tokens: &[u32], mut see: impl FnMut(&Tensor)) -> Result<Tensor, ModelError> {
        check_length(&self.spec, tokens.len())?;
        let sequences = [Range { start: 0, end: tokens.len() }];
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let mut tables = Tables::new(&positions);
        let mut x = embed(&self.spec, &self.embedding, tokens)?;
        for layer in &self.layers {
            see(&x);
            let table = tables.of(layer.rope());
            x = layer.forward(&self.spec, &x, table, Past::None(&sequences))?.stream;
        }
        Ok(x)
    }

    fn logits(&self, x: &Tensor) -> Result<Vec<f32>, ModelError> {
        let mut logits = to_vec(&self.head.forward(x)?)?;
        self.spec.finish_logits(&mut logits);
        Ok(logits)
    }
}

/// Tells `watch` what the router of `layer` did, if there is one.
fn tell(layer: &Layer, passed: &Passed, watch: Option<&mut Watch<'_>>) -> Result<(), ModelError> {
    let (Some(watch), Some(routing), Some(logits), Some((moe, _))) =
        (watch, &passed.routing, &passed.logits, layer.router())
    else {
        return Ok(());
    };
    watch(Visited { layer: layer.index(), moe, routing, logits: &to_vec(logits)? });
    Ok(())
}

/// Does `work` on a thread of the pool: one that stands outside would put itself to sleep and wake two others whenever work is
/// shared.
pub(crate) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if rayon::current_thread_index().is_some() { work() } else { rayon::scope(|_| work()) }
}

/// Rotary tables of one pass, one for each set of frequencies.
pub(crate) struct Tables<'a> {
    positions: &'a [u32],
    made: Vec<(RopeSpec, RopeTable)>,
}

impl<'a> Tables<'a> {
    pub fn new(positions: &'a [u32]) -> Self {
        Self { positions, made: Vec::new() }
    }

    pub fn of(&mut self, spec: &RopeSpec) -> &RopeTable {
        let at = self.made.iter().position(|(s, _)| s == spec).unwrap_or_else(|| {
            self.made.push((*spec, RopeTable::new(spec, self.positions)));
            self.made.len() - 1
        });
        &self.made[at].1
    }
}

/// Whether a sequence fits the context.
pub(crate) fn check_length(spec: &Spec, tokens: usize) -> Result<(), ModelError> {
    if tokens <= spec.max_positions {
        return Ok(());
    }
    Err(ModelError::TooLong { what: "the context", tokens, limit: spec.max_positions })
}

/// Embeddings of `tokens`, `[tokens, hidden]`.
pub(crate) fn embed(
    spec: &Spec,
    embedding: &WeightRef,
    tokens: &[u32],
) -> Result<Tensor, ModelError> {
    let mut x = vec![0.0; tokens.len() * spec.hidden];
    for (row, &token) in x.chunks_exact_mut(spec.hidden).zip(tokens) {
        let at = token as usize;
        if at >= spec.vocab {
            return Err(ModelError::Token { token, vocab: spec.vocab });
        }
        embedding.read_rows(at..at + 1, row)?;
    }
    if spec.embedding_scale != 1.0 {
        x.iter_mut().for_each(|v| *v *= spec.embedding_scale);
    }
    Ok(Tensor::from_vec(x, (tokens.len(), spec.hidden), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use moe_merge_kernels::Accuracy;

    use super::*;

    #[test]
    fn routers_choose_by_exact_products_in_a_fast_model() {
        let folder = moe_merge_testkit::repository("model/tests/data/mixtral_fused");
        let source = Source::open(&folder.display().to_string().parse().unwrap(), Path::new("."));
        let model = Model::open_with(&source.unwrap(), Exec::fast()).unwrap();
        assert_eq!(model.head.exec.accuracy, Accuracy::Fast);
        for layer in &model.layers {
            let (_, router) = layer.router().expect("every layer is a MoE");
            assert_eq!(router.exec.accuracy, Accuracy::Exact);
        }
    }
}
