//! Keys and values of the tokens seen so far.

use moe_merge_kernels::KeyValues;

use crate::error::ModelError;
use crate::model::Model;
use crate::spec::Spec;

/// Keys and values of all layers, allocated once.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    capacity: usize,
    max_positions: usize,
    len: usize,
}

/// Keys and values of one layer: `[kv_heads, capacity, dim]`.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    keys: Aligned,
    values: Aligned,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    capacity: usize,
}

/// Numbers that begin at a cache line: vectors that lie across two take longer to read.
#[derive(Debug)]
struct Aligned {
    all: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    const LINE: usize = 64;

    fn zeros(len: usize) -> Self {
        // Memory that was never touched stays so: most of a cache may never be used.
        let all = vec![0.0; len + Self::LINE / size_of::<f32>()];
        let start = all.as_ptr().align_offset(Self::LINE).min(all.len() - len);
        Self { all, start, len }
    }

    fn as_slice(&self) -> &[f32] {
        &self.all[self.start..self.start + self.len]
    }

    fn numbers(&mut self) -> &mut [f32] {
        &mut self.all[self.start..self.start + self.len]
    }
}

impl Clone for Aligned {
    fn clone(&self) -> Self {
        let mut copy = Self::zeros(self.len);
        copy.numbers().copy_from_slice(self.as_slice());
        copy
    }
}

impl Cache {
    /// Room for `capacity` tokens of `model`.
    pub fn new(model: &Model, capacity: usize) -> Self {
        let spec = model.spec();
        Self {
            layers: spec.layers.iter().map(|_| LayerCache::new(spec, capacity)).collect(),
            capacity,
            max_positions: spec.max_positions,
            len: 0,
        }
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens; the memory stays.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets all tokens from position `len` on; nothing happens if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Whether `tokens` more have room, in it and in the model's context.
    pub(crate) fn check(&self, tokens: usize) -> Result<(), ModelError> {
        let tokens = self.len + tokens;
        if tokens > self.max_positions {
            return Err(ModelError::TooLong {
                what: "the context",
                tokens,
                limit: self.max_positions,
            });
        }
        if tokens > self.capacity {
            return Err(ModelError::TooLong { what: "the cache", tokens, limit: self.capacity });
        }
        Ok(())
    }

    /// Counts tokens that every layer has taken in.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

impl LayerCache {
    /// Room for `capacity` tokens.
    pub(crate) fn new(spec: &Spec, capacity: usize) -> Self {
        let a = &spec.attention;
        let (qk_dim, v_dim) = (a.qk_dim(), a.v_dim());
        Self {
            keys: Aligned::zeros(a.kv_heads * capacity * qk_dim),
            values: Aligned::zeros(a.kv_heads * capacity * v_dim),
            kv_heads: a.kv_heads,
            qk_dim,
            v_dim,
            capacity,
        }
    }

    /// Puts keys `[tokens, kv_heads * qk_dim]` and values `[tokens, kv_heads * v_dim]` at positions from `at` on.
    ///
    /// The caller has checked that they fit.
    pub(crate) fn put(&mut self, at: usize, keys: &[f32], values: &[f32]) {
        for (all, new, dim) in
            [(&mut self.keys, keys, self.qk_dim), (&mut self.values, values, self.v_dim)]
        {
            for (token, row) in new.chunks_exact(self.kv_heads * dim).enumerate() {
                for (head, part) in row.chunks_exact(dim).enumerate() {
                    let to = (head * self.capacity + at + token) * dim;
                    all.numbers()[to..to + dim].copy_from_slice(part);
                }
            }
        }
    }

    /// The first `count` positions.
    pub(crate) fn view(&self, count: usize) -> KeyValues<'_> {
        KeyValues {
            keys: self.keys.as_slice(),
            values: self.values.as_slice(),
            count,
            key_strides: (self.qk_dim, self.capacity * self.qk_dim),
            value_strides: (self.v_dim, self.capacity * self.v_dim),
        }
    }
}
