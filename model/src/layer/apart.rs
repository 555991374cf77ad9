//! The expert that has factors on the processor, while all others are on a device.

use moe_merge_kernels::cuda::CudaMoe;
use moe_merge_kernels::{
    Activation, Exec, ExpertLora, ExpertView, MoeBlock, MoeGradients, MoeInner, Routing,
};

use super::Moe;
use crate::error::ModelError;

/// What its pass leaves for the way back.
pub(super) struct Own {
    /// Slots of all tokens that visit it.
    slots: Vec<usize>,
    pub inner: MoeInner,
}

/// Experts of which one is apart.
pub(super) struct Apart<'a> {
    pub moe: &'a Moe,
    pub placed: &'a CudaMoe,
    pub routing: &'a Routing,
    pub activation: Activation,
    pub lora: ExpertLora<'a>,
}

impl Apart<'_> {
    /// What the experts make of `x [tokens, hidden]` is put into `out`, if it is wanted.
    pub fn forward(&self, x: &[f32], out: Option<&mut [f32]>) -> Result<Own, ModelError> {
        let slots = self.slots();
        let routing = self.visits(&slots);
        let (rows, exec) = (self.rows(x, &slots), self.moe.exec());
        let (expert, lora) = self.expert()?;
        let block = self.block(&rows, &routing, &expert, lora, &exec);
        let inner = block.inner()?;
        if let Some(out) = out {
            self.placed.forward(x, &self.others(&slots), self.activation, out)?;
            let mut own = vec![0.0; rows.len()];
            block.forward(&inner, &mut own)?;
            self.add(&own, &slots, out);
        }
        Ok(Own { slots, inner })
    }

    /// Gradients from that of the output, `d [tokens, hidden]`; that of `x` is put into `d_x`, if it is wanted.
    pub fn backward(
        &self,
        own: Own,
        x: &[f32],
        d: &[f32],
        mut d_x: Option<&mut [f32]>,
    ) -> Result<MoeGradients, ModelError> {
        let Own { slots, inner } = own;
        let (routing, others) = (self.visits(&slots), self.others(&slots));
        let mut weights =
            self.placed.backward(x, &others, self.activation, d, d_x.as_deref_mut())?;
        let (rows, d_rows) = (self.rows(x, &slots), self.rows(d, &slots));
        let exec = self.moe.exec();
        let (expert, lora) = self.expert()?;
        let block = self.block(&rows, &routing, &expert, lora, &exec);
        let mut own = d_x.is_some().then(|| vec![0.0; rows.len()]);
        let found = block.backward(inner, &d_rows, own.as_deref_mut())?;
        if let (Some(d_x), Some(own)) = (d_x, &own) {
            self.add(own, &slots, d_x);
        }
        slots.iter().zip(&found.weights).for_each(|(slot, d)| weights[*slot] = *d);
        Ok(MoeGradients { weights, ..found })
    }

    /// The slots that visit the expert.
    fn slots(&self) -> Vec<usize> {
        let ids = self.routing.ids.iter().enumerate();
        ids.filter(|(_, id)| **id as usize == self.lora.expert).map(|(slot, _)| slot).collect()
    }

    /// The visits to the expert, as if there were no other.
    fn visits(&self, slots: &[usize]) -> Routing {
        let weights: Vec<f32> = slots.iter().map(|s| self.routing.weights[*s]).collect();
        Routing { tokens: weights.len(), top_k: 1, ids: vec![0; weights.len()], weights }
    }

    /// The routing, in which visits to the expert have no weight.
    fn others(&self, slots: &[usize]) -> Routing {
        let mut others = self.routing.clone();
        slots.iter().for_each(|slot| others.weights[*slot] = 0.0);
        others
    }

    /// The expert alone, with its factors.
    fn expert(&self) -> Result<([ExpertView<'_>; 1], ExpertLora<'_>), ModelError> {
        let found = self.moe.experts.get(self.lora.expert);
        let missing = || candle_core::Error::msg("factors of an expert that is not there");
        Ok(([found.ok_or_else(missing)?.view()?], ExpertLora { expert: 0, ..self.lora }))
    }

    fn block<'b>(
        &self,
        x: &'b [f32],
        routing: &'b Routing,
        experts: &'b [ExpertView<'b>],
        lora: ExpertLora<'b>,
        exec: &'b Exec,
    ) -> MoeBlock<'b> {
        MoeBlock { x, routing, experts, activation: self.activation, lora: Some(lora), exec }
    }

    /// The rows of `x [tokens, hidden]` that slots belong to.
    fn rows(&self, x: &[f32], slots: &[usize]) -> Vec<f32> {
        let hidden = x.len() / self.routing.tokens.max(1);
        let rows = slots.iter().map(|slot| slot / self.routing.top_k);
        rows.flat_map(|row| &x[row * hidden..(row + 1) * hidden]).copied().collect()
    }

    /// Adds rows to those that slots belong to.
    fn add(&self, rows: &[f32], slots: &[usize], out: &mut [f32]) {
        let hidden = out.len() / self.routing.tokens.max(1);
        for (row, slot) in rows.chunks_exact(hidden.max(1)).zip(slots) {
            let to = slot / self.routing.top_k * hidden;
            out[to..to + hidden].iter_mut().zip(row).for_each(|(o, v)| *o += v);
        }
    }
}
