//! Normalisation and softmax of rows.

use crate::error::KernelError;

/// Root mean square normalisation of rows.
///
/// `out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * (offset + weight[i])`
///
/// * `x`, `out`: `[rows, weight.len()]` f32; the mean is accumulated in f64
/// * `offset`: 0, or 1 for Gemma, whose weights are stored as the distance from 1
///
/// # Errors
/// [`KernelError::Length`] if `x` is not a whole number of rows or `out` differs from it.
pub fn rms_norm(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    offset: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    KernelError::check("norm output", x.len(), out.len())?;
    let width = weight.len().max(1);
    KernelError::check("norm input", x.len().div_ceil(width) * weight.len(), x.len())?;
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mut lanes = [0f64; 8];
        for chunk in row.chunks(8) {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *lane += *v as f64 * *v as f64;
            }
        }
        let mean = lanes.iter().sum::<f64>() / width as f64;
        let inverse = 1.0 / (mean as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(row).zip(weight) {
            *o = v * inverse * (offset + w);
        }
    }
    Ok(())
}

/// Softmax of one row in place, the largest value subtracted first.
pub fn softmax(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let mut sum = 0f32;
    for v in row.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    let inverse = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_norm_by_hand() {
        let mut out = [0.0; 4];
        // Mean squares: 25/2 and 2/2.
        rms_norm(&[3.0, 4.0, 1.0, -1.0], &[1.0, 2.0], 0.0, 0.0, &mut out).unwrap();
        let r = 12.5f32.sqrt();
        assert_eq!(out[2..], [1.0, -2.0]);
        assert!((out[0] - 3.0 / r).abs() < 1e-6 && (out[1] - 8.0 / r).abs() < 1e-6);
        rms_norm(&[1.0, 1.0], &[0.0, 1.0], 0.0, 1.0, &mut out[..2]).unwrap();
        assert_eq!(out[..2], [1.0, 2.0]);
    }

    #[test]
    fn rms_norm_refuses_half_rows() {
        let mut out = [0.0; 3];
        assert!(rms_norm(&[1.0; 3], &[1.0; 2], 0.0, 0.0, &mut out).is_err());
    }

    #[test]
    fn softmax_by_hand() {
        let mut row = [0.0, 3f32.ln(), 1000f32.ln() - 1000.0];
        softmax(&mut row);
        assert!((row[0] - 0.25).abs() < 1e-6 && (row[1] - 0.75).abs() < 1e-6 && row[2] == 0.0);
        let mut large = [1000.0, 1000.0];
        softmax(&mut large);
        assert_eq!(large, [0.5, 0.5]);
    }
}
