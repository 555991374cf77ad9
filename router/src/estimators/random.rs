//! mergekit's `random`.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::gate::Gate;

/// Independent standard normal numbers, not normalised: rows have norm about `sqrt(hidden)`.
///
/// The stream is ChaCha12 keyed by (`seed`, `layer`); the numbers are made with the polar method from IEEE operations
/// and a logarithm of our own, so they are the same on every platform.
///
/// # Source
/// mergekit `moe/router.py::get_gate_params` (`torch.randn`). Differs: another generator, so other numbers of the same
/// distribution.
pub fn gate(experts: usize, hidden: usize, seed: u64, layer: u64) -> Gate {
    let mut rng = stream(seed, layer);
    let mut rows = Vec::with_capacity(experts * hidden + 1);
    while rows.len() < experts * hidden {
        let (a, b) = (2.0 * unit(&mut rng) - 1.0, 2.0 * unit(&mut rng) - 1.0);
        let square = a * a + b * b;
        if square < 1.0 && square > 0.0 {
            let factor = (-2.0 * ln(square) / square).sqrt();
            rows.extend([(a * factor) as f32, (b * factor) as f32]);
        }
    }
    rows.truncate(experts * hidden);
    Gate { experts, hidden, rows }
}

/// The generator of one layer.
pub(super) fn stream(seed: u64, layer: u64) -> ChaCha12Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&layer.to_le_bytes());
    ChaCha12Rng::from_seed(key)
}

/// Uniform in [0, 1) with 53 bits.
pub(super) fn unit(rng: &mut ChaCha12Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Natural logarithm of a positive normal number from additions, products and quotients alone: those are rounded alike
/// everywhere, the `ln` of the platform's library is not.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52)); // [1, 2)
    if m > std::f64::consts::SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    // ln m = 2 atanh(s), |s| < 0.172: the first term left out is below 1e-18.
    let s = (m - 1.0) / (m + 1.0);
    let series = (0..11).rev().fold(0.0, |sum, k| sum * s * s + 1.0 / f64::from(2 * k + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_a_standard_normal() {
        let gate = gate(8, 4096, 7, 3);
        let n = gate.rows.len() as f64;
        let moment = |k| gate.rows.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        // Standard errors at n = 32768: 0.0055, 0.0078, 0.054.
        assert!(moment(1).abs() < 0.025);
        assert!((moment(2) - 1.0).abs() < 0.035);
        assert!((moment(4) - 3.0).abs() < 0.25);
    }

    #[test]
    fn keyed_by_seed_and_layer() {
        assert_eq!(gate(3, 5, 1, 2), gate(3, 5, 1, 2));
        assert_ne!(gate(3, 5, 1, 2), gate(3, 5, 2, 1));
        assert_ne!(gate(3, 5, 1, 2), gate(3, 5, 1, 3));
        // More experts only append.
        assert_eq!(gate(3, 5, 1, 2).rows, gate(4, 5, 1, 2).rows[..15]);
    }

    #[test]
    fn logarithm_is_the_logarithm() {
        for x in [1e-300, 1e-9, 0.1, 0.5, 0.70, 0.71, 0.999, 1.0, 1.5, 7.25] {
            assert!((ln(x) - f64::ln(x)).abs() <= 2e-15 * f64::ln(x).abs().max(1.0), "{x}");
        }
    }
}
