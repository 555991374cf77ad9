//! A model whose layers are loaded one by one, and texts on their way through it.

use moe_merge_checkpoint::Source;

use crate::error::ModelError;
use crate::layer::{Layer, Past};
use crate::model::{Tables, check_length, embed};
use crate::probe::{Batch, batch};
use crate::spec::Spec;
use crate::weights::Weights;

pub(crate) struct Running {
    pub spec: Spec,
    pub weights: Weights,
}

impl Running {
    pub fn new(source: &Source) -> Result<Self, ModelError> {
        let spec = Spec::of(source)?;
        Ok(Self { weights: Weights::new(source, &spec)?, spec })
    }

    pub fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        Layer::load(&self.weights, &self.spec, index)
    }

    /// Lets go of the pages of a layer.
    pub fn release(&self, index: usize) {
        self.weights.release(&format!("model.layers.{index}."));
    }

    pub fn embedded(&self, texts: &[Vec<u32>]) -> Result<Vec<Batch>, ModelError> {
        texts.iter().try_for_each(|t| check_length(&self.spec, t.len()))?;
        let embedding = self.weights.stored("model.embed_tokens.weight")?;
        batch(texts, |tokens| embed(&self.spec, &embedding, tokens))
    }

    pub fn pass(&self, layer: &Layer, batches: &mut [Batch]) -> Result<(), ModelError> {
        for batch in batches {
            let mut tables = Tables::new(&batch.positions);
            let table = tables.of(layer.rope());
            let past = Past::None(&batch.rows);
            batch.stream = layer.forward(&self.spec, &batch.stream, table, past)?.stream;
        }
        Ok(())
    }
}
