//! Numbers to Q8_0 blocks.

use half::f16;

/// Values of a block, and its bytes.
pub(super) const BLOCK: usize = 32;
pub(super) const BLOCK_BYTES: usize = 34;

/// Rounds `values` to Q8_0: for each 32 values a scale `d = max |v| / 127` as f16, then `round(v / d)` as signed bytes,
/// halves away from zero, computed in f32 with the scale before its own rounding.
///
/// `values` are whole blocks and finite, `out` has 34 bytes for each. Returns the block whose scale is too large for f16,
/// if there is one.
///
/// # Source
/// ggml `quantize_row_q8_0_ref`; gguf-py `quants.py` gives the same bytes.
pub(super) fn q8_0(values: &[f32], out: &mut [u8]) -> Option<usize> {
    let mut too_large = None;
    let blocks = values.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK_BYTES));
    for (i, (values, out)) in blocks.enumerate() {
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let stored = f16::from_f32(scale);
        if !stored.is_finite() {
            too_large = too_large.or(Some(i));
        }
        out[..2].copy_from_slice(&stored.to_le_bytes());
        for (q, v) in out[2..].iter_mut().zip(values) {
            // In range: |v| is at most `largest`; a scale below the normal numbers saturates.
            *q = (v * inverse).round() as i8 as u8;
        }
    }
    too_large
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_by_hand() {
        let mut values = [0f32; 32];
        // Largest 127: scale 1, so the numbers are their own roundings, halves away from zero.
        values[..6].copy_from_slice(&[127.0, -127.0, 0.5, -0.5, 1.4, -2.5]);
        let mut out = [9u8; 34];
        assert_eq!(q8_0(&values, &mut out), None);
        assert_eq!(out[..2], [0x00, 0x3c]);
        let found: Vec<i8> = out[2..8].iter().map(|b| *b as i8).collect();
        assert_eq!(found, [127, -127, 1, -1, 1, -3]);
        assert_eq!(out[8..], [0; 26]);
    }

    #[test]
    fn zeros_and_giants() {
        let mut out = [9u8; 34];
        assert_eq!(q8_0(&[0.0; 32], &mut out), None);
        assert_eq!(out, [0; 34]);
        assert_eq!(q8_0(&[1e10; 32], &mut out), Some(0));
    }
}
