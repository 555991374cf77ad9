//! Rotary position embedding.
//!
//! A pair of dimensions `(a, b)` at position `p` turns by the angle `p * f_i`:
//! `a' = a cos - b sin`, `b' = b cos + a sin`.

use std::sync::Arc;

use crate::error::KernelError;
use crate::simd::each_set;
use crate::tasks::{Parts, for_each};

/// Tokens that one task turns.
const TOKENS: usize = 32;

/// Which dimensions form the pair `i` of `dim / 2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `(i, i + dim / 2)`, as Llama in the Hugging Face layout.
    Halves,
    /// `(2i, 2i + 1)`, as DeepSeek and Ernie.
    Interleaved,
}

/// How frequencies are changed for contexts longer than those of the first training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All positions divided by `factor`.
    Linear {
        /// How much longer the context is.
        factor: f64,
    },
    /// Llama 3: long waves divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// How much longer the context is.
        factor: f64,
        /// Waves longer than `original / low` are scaled.
        low: f64,
        /// Waves shorter than `original / high` are kept.
        high: f64,
        /// Context of the first training.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// How much longer the context is.
        factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Context of the first training.
        original: f64,
        /// Whether the bounds of the ramp are rounded to whole dimensions.
        truncate: bool,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
}

/// Frequencies of one rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Dimensions of a head that turn: the first `dim` of it, or of the part they are applied to.
    pub dim: usize,
    /// Long-context scaling.
    pub scaling: RopeScaling,
    /// Which dimensions form a pair.
    pub pairing: RopePairing,
}

impl RopeSpec {
    /// Angles per position, one for each pair: `theta^(-2i / dim)`, scaled. f32 as the reference keeps them.
    pub fn frequencies(&self) -> Vec<f32> {
        let plain = |i: usize| self.theta.powf(-(2.0 * i as f64) / self.dim as f64);
        let pairs = 0..self.dim / 2;
        match self.scaling {
            RopeScaling::None => pairs.map(|i| plain(i) as f32).collect(),
            RopeScaling::Linear { factor } => pairs.map(|i| (plain(i) / factor) as f32).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => pairs
                .map(|i| {
                    let f = plain(i);
                    let wave = 2.0 * std::f64::consts::PI / f;
                    let smooth = ((original / wave - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - smooth) * f / factor + smooth * f) as f32
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
                let dim = self.dim as f64;
                let bound = |rotations: f64| {
                    dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (bound(beta_fast), bound(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                pairs
                    .map(|i| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        (plain(i) / factor * ramp + plain(i) * (1.0 - ramp)) as f32
                    })
                    .collect()
            }
        }
    }
}

/// Cosines and sines for the positions of one pass; a copy shares them.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// `[tokens, dim / 2]`.
    cos: Arc<[f32]>,
    /// `[tokens, dim / 2]`.
    sin: Arc<[f32]>,
    tokens: usize,
    half: usize,
    pairing: RopePairing,
}

impl RopeTable {
    /// The table for tokens at `positions`.
    pub fn new(spec: &RopeSpec, positions: &[u32]) -> Self {
        let frequencies = spec.frequencies();
        let scale = match spec.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let count = positions.len() * frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for &position in positions {
            for &frequency in &frequencies {
                // The angle is rounded to f32 as the reference does; its functions are then taken in f64.
                let (s, c) = ((position as f32 * frequency) as f64).sin_cos();
                cos.push((c * scale) as f32);
                sin.push((s * scale) as f32);
            }
        }
        let half = frequencies.len();
        let (cos, sin) = (cos.into(), sin.into());
        Self { cos, sin, tokens: positions.len(), half, pairing: spec.pairing }
    }

    /// Turns, in every head, the dimensions `from..from + dim`.
    ///
    /// * `x`: `[tokens, heads * head_dim]`, changed in place
    ///
    /// # Errors
    /// [`KernelError::Length`] if `x` or the head does not fit.
    pub fn apply(
        &self,
        x: &mut [f32],
        heads: usize,
        head_dim: usize,
        from: usize,
    ) -> Result<(), KernelError> {
        self.turn(x, heads, head_dim, from, 1.0)
    }

    /// Gradient of [`RopeTable::apply`]: turns by the negative angles, with the same factor on cosine and sine.
    ///
    /// * `d`: gradient of the output, `[tokens, heads * head_dim]`, changed in place to that of the input
    ///
    /// # Errors
    /// As [`RopeTable::apply`].
    pub fn apply_backward(
        &self,
        d: &mut [f32],
        heads: usize,
        head_dim: usize,
        from: usize,
    ) -> Result<(), KernelError> {
        self.turn(d, heads, head_dim, from, -1.0)
    }

    /// `sign`: 1 turns forwards, -1 back.
    fn turn(
        &self,
        x: &mut [f32],
        heads: usize,
        head_dim: usize,
        from: usize,
        sign: f32,
    ) -> Result<(), KernelError> {
        KernelError::check("rotary input", self.tokens * heads * head_dim, x.len())?;
        let dim = 2 * self.half;
        if from + dim > head_dim {
            return Err(KernelError::Length {
                what: "rotary head",
                expected: from + dim,
                found: head_dim,
            });
        }
        if x.is_empty() || dim == 0 {
            return Ok(());
        }
        let width = heads * head_dim;
        let out = Parts::new(x);
        for_each(self.tokens.div_ceil(TOKENS), self.tokens > TOKENS, |task| {
            for token in task * TOKENS..self.tokens.min((task + 1) * TOKENS) {
                let part = token * self.half..(token + 1) * self.half;
                let (cos, sin) = (&self.cos[part.clone()], &self.sin[part]);
                // SAFETY: the tokens of this task.
                let row = unsafe { out.range(token * width, width) };
                for head in row.chunks_exact_mut(head_dim) {
                    turn_head(&mut head[from..from + dim], cos, sin, sign, self.pairing);
                }
            }
        });
        Ok(())
    }
}

each_set! {
    fn turn_head(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32, pairing: RopePairing) {
        match pairing {
            RopePairing::Halves => {
                let (a, b) = head.split_at_mut(cos.len());
                for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    let s = sign * s;
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            RopePairing::Interleaved => {
                for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b, s) = (pair[0], pair[1], sign * s);
                    pair[0] = a * c - b * s;
                    pair[1] = b * c + a * s;
                }
            }
        }
    }
}

/// YaRN's growth of attention with the context: `0.1 * mscale * ln(factor) + 1`, or 1 for `factor <= 1`.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(scaling: RopeScaling, pairing: RopePairing) -> RopeSpec {
        RopeSpec { theta: 10_000.0, dim: 4, scaling, pairing }
    }

    #[test]
    fn frequencies_by_hand() {
        let plain = spec(RopeScaling::None, RopePairing::Halves);
        assert_eq!(plain.frequencies(), [1.0, 0.01]);
        let linear = spec(RopeScaling::Linear { factor: 4.0 }, RopePairing::Halves);
        assert_eq!(linear.frequencies(), [0.25, 0.0025]);
        // Waves are 6.28 and 628 positions long; 64 / 4 = 16 and 64 / 1 = 64 bound the ramp.
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 };
        assert_eq!(spec(scaling, RopePairing::Halves).frequencies(), [1.0, 0.01 / 8.0]);
    }

    #[test]
    fn pairs_turn_by_the_angle() {
        for (pairing, partner) in [(RopePairing::Halves, 2), (RopePairing::Interleaved, 1)] {
            let table = RopeTable::new(&spec(RopeScaling::None, pairing), &[0, 2]);
            let mut x = [0.0; 10];
            // One head of five dimensions, of which the last four turn.
            (x[0], x[1], x[5], x[6]) = (7.0, 1.0, 7.0, 1.0);
            table.apply(&mut x, 1, 5, 1).unwrap();
            assert_eq!(x[..5], [7.0, 1.0, 0.0, 0.0, 0.0]);
            assert_eq!(x[5], 7.0);
            assert!((x[6] - 2f32.cos()).abs() < 1e-6);
            assert!((x[6 + partner] - 2f32.sin()).abs() < 1e-6);
        }
    }

    #[test]
    fn backward_is_the_transpose() {
        // <y, R x> = <R^T y, x> for a linear map, here with YaRN's factor in it.
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 64.0,
            truncate: true,
            attention_factor: 1.3,
        };
        for pairing in [RopePairing::Halves, RopePairing::Interleaved] {
            let table = RopeTable::new(&spec(scaling, pairing), &[3, 9]);
            let x: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin()).collect();
            let y: Vec<f32> = (0..20).map(|i| (i as f32 * 1.3).cos()).collect();
            let (mut turned, mut back) = (x.clone(), y.clone());
            table.apply(&mut turned, 2, 5, 1).unwrap();
            table.apply_backward(&mut back, 2, 5, 1).unwrap();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            assert!((dot(&y, &turned) - dot(&back, &x)).abs() < 1e-5);
            assert_ne!(turned, x);
        }
        let table = RopeTable::new(&spec(RopeScaling::None, RopePairing::Halves), &[0]);
        assert!(table.apply_backward(&mut [0.0; 3], 1, 3, 0).is_err());
    }

    #[test]
    fn sizes_are_checked() {
        let table = RopeTable::new(&spec(RopeScaling::None, RopePairing::Halves), &[0]);
        assert!(table.apply(&mut [0.0; 3], 1, 3, 0).is_err());
        assert!(table.apply(&mut [0.0; 8], 1, 4, 0).is_err());
        assert!(table.apply(&mut [0.0; 5], 1, 5, 2).is_err());
    }

    #[test]
    fn yarn_mscale_by_hand() {
        assert_eq!(yarn_mscale(1.0, 1.0), 1.0);
        assert!((yarn_mscale(40.0, 0.707) - 1.260_804).abs() < 1e-5);
    }
}
