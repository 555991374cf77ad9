//! mergekit's `uniform_random`.

use super::random::{stream, unit};
use crate::gate::Gate;

/// Independent uniform numbers in `[-1/sqrt(hidden), 1/sqrt(hidden))`, as a fresh linear layer has.
///
/// The stream is ChaCha12 keyed by (`seed`, `layer`), the same on every platform.
///
/// # Source
/// mergekit `moe/router.py::get_gate_params`. Differs: another generator.
pub fn gate(experts: usize, hidden: usize, seed: u64, layer: u64) -> Gate {
    let mut rng = stream(seed, layer);
    let scale = (1.0 / hidden as f64).sqrt();
    let rows =
        (0..experts * hidden).map(|_| (unit(&mut rng) * 2.0 * scale - scale) as f32).collect();
    Gate { experts, hidden, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_its_interval_evenly() {
        let gate = gate(16, 1024, 5, 0);
        let bound = 1.0 / 32.0;
        assert!(gate.rows.iter().all(|v| v.abs() <= bound));
        for quarter in 0..4 {
            let from = bound * (quarter as f32 / 2.0 - 1.0);
            let share = gate.rows.iter().filter(|&&v| v >= from && v < from + bound / 2.0).count();
            assert!((share as f64 / 16384.0 - 0.25).abs() < 0.02);
        }
    }

    #[test]
    fn keyed_by_seed_and_layer() {
        assert_eq!(gate(2, 9, 1, 2), gate(2, 9, 1, 2));
        assert_ne!(gate(2, 9, 1, 2), gate(2, 9, 1, 3));
        assert_ne!(gate(2, 9, 1, 2), gate(2, 9, 2, 2));
    }
}
