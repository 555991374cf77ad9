//! Keys and values of the tokens seen so far.

use half::f16;
use moe_merge_kernels::{Accuracy, KeptNumber, KeyValues};

use crate::error::ModelError;
use crate::model::Model;
use crate::spec::Spec;

/// Keys and values of all layers, allocated once: f32, or f16 for a model that computes [`Accuracy::Fast`], whose larger
/// numbers become the largest one.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    capacity: usize,
    max_positions: usize,
    len: usize,
}

/// Keys and values of one layer, as exact as the model computes.
#[derive(Debug, Clone)]
pub(crate) enum LayerCache {
    F32(Kept<f32>),
    /// Half the bytes to read for every token.
    F16(Kept<f16>),
}

/// Keys and values of one layer: `[kv_heads, capacity, dim]`.
#[derive(Debug, Clone)]
pub(crate) struct Kept<T: KeptNumber> {
    keys: Aligned<T>,
    values: Aligned<T>,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    capacity: usize,
}

/// Numbers that begin at a cache line: vectors that lie across two take longer to read.
#[derive(Debug)]
struct Aligned<T: KeptNumber> {
    all: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: KeptNumber> Aligned<T> {
    const LINE: usize = 64;

    fn zeros(len: usize) -> Self {
        // Memory that was never touched stays so: most of a cache may never be used.
        let all: Vec<T> = bytemuck::zeroed_vec(len + Self::LINE / size_of::<T>());
        let start = all.as_ptr().align_offset(Self::LINE).min(all.len() - len);
        Self { all, start, len }
    }

    fn as_slice(&self) -> &[T] {
        &self.all[self.start..self.start + self.len]
    }

    fn numbers(&mut self) -> &mut [T] {
        &mut self.all[self.start..self.start + self.len]
    }
}

impl<T: KeptNumber> Clone for Aligned<T> {
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
            layers: spec.layers.iter().map(|_| LayerCache::new(model, capacity)).collect(),
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
    pub(crate) fn new(model: &Model, capacity: usize) -> Self {
        match model.accuracy() {
            Accuracy::Exact => Self::F32(Kept::new(model.spec(), capacity)),
            Accuracy::Fast => Self::F16(Kept::new(model.spec(), capacity)),
        }
    }

    /// Puts keys `[tokens, kv_heads * qk_dim]` and values `[tokens, kv_heads * v_dim]` at positions from `at` on.
    ///
    /// The caller has checked that they fit.
    pub(crate) fn put(&mut self, at: usize, keys: &[f32], values: &[f32]) {
        match self {
            Self::F32(kept) => kept.put(at, keys, values, <[f32]>::copy_from_slice),
            Self::F16(kept) => kept.put(at, keys, values, |to, from| {
                let most = f16::MAX.to_f32();
                to.iter_mut().zip(from).for_each(|(t, f)| *t = f16::from_f32(f.clamp(-most, most)));
            }),
        }
    }
}

impl<T: KeptNumber> Kept<T> {
    fn new(spec: &Spec, capacity: usize) -> Self {
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

    fn put(&mut self, at: usize, keys: &[f32], values: &[f32], keep: impl Fn(&mut [T], &[f32])) {
        for (all, new, dim) in
            [(&mut self.keys, keys, self.qk_dim), (&mut self.values, values, self.v_dim)]
        {
            for (token, row) in new.chunks_exact(self.kv_heads * dim).enumerate() {
                for (head, part) in row.chunks_exact(dim).enumerate() {
                    let to = (head * self.capacity + at + token) * dim;
                    keep(&mut all.numbers()[to..to + dim], part);
                }
            }
        }
    }

    /// The first `count` positions.
    pub(crate) fn view(&self, count: usize) -> KeyValues<'_, T> {
        KeyValues {
            keys: self.keys.as_slice(),
            values: self.values.as_slice(),
            count,
            key_strides: (self.qk_dim, self.capacity * self.qk_dim),
            value_strides: (self.v_dim, self.capacity * self.v_dim),
        }
    }
}
