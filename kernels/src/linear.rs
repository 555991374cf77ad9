//! Products of activations with weights as stored.

use crate::error::KernelError;
use crate::exec::Exec;
use crate::panel::{self, Form, LinearBlock, Output, ROWS};
use crate::rows;
use crate::tasks;
use crate::view::MatView;

/// Multiply-adds below which handing work to other threads costs more than it gains.
pub(crate) const ALONE_BELOW: usize = 1 << 20;

/// Linear layer: `out[t, r] = sum_c x[t, c] * w[r, c] + bias[r]`.
///
/// * `x`: `[tokens, w.cols()]`; `out`: `[tokens, w.rows()]`; `bias`: `[w.rows()]`
/// * f32 sums; the weight is read as stored, and never copied but for some rows at a time
/// * the same bits for any number of threads
///
/// # Errors
/// [`KernelError::Length`] if the slices do not fit the weight.
pub fn linear(
    x: &[f32],
    w: MatView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
    exec: &Exec,
) -> Result<(), KernelError> {
    let (rows, cols) = (w.rows(), w.cols());
    let tokens = x.len().checked_div(cols).unwrap_or(out.len() / rows.max(1));
    KernelError::check("linear input", tokens * cols, x.len())?;
    KernelError::check("linear output", tokens * rows, out.len())?;
    if let Some(bias) = bias {
        KernelError::check("linear bias", rows, bias.len())?;
    }
    if out.is_empty() {
        return Ok(());
    }
    if rows::takes(tokens, exec) {
        return rows::linear_few(x, w, bias, out, exec);
    }
    let panels = panel::of_rows(x, tokens, cols, Form::of(w.dtype(), exec), exec);
    let (chunks, blocks) = (panels.chunks(), rows.div_ceil(ROWS));
    let out = Output { start: out.as_mut_ptr(), stride: rows };
    tasks::for_each(chunks.len() * blocks, tokens * rows * cols >= ALONE_BELOW, |task| {
        let from = task % blocks * ROWS;
        let block = LinearBlock {
            w,
            bias,
            rows: from..rows.min(from + ROWS),
            panels: &panels,
            chunk: chunks[task / blocks].clone(),
            out,
        };
        // SAFETY: every task has rows and tokens of its own, and `out` holds them all.
        unsafe { block.compute(exec.isa) }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accuracy, Batching, Dtype, Isa};

    fn weight(rows: usize, cols: usize, dtype: Dtype) -> (Vec<f32>, Vec<u8>) {
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 29 % 61) as f32 - 30.0) / 32.0).collect();
        let mut bytes = vec![0; values.len() * dtype.size() + 1];
        crate::cast::narrow(&values, dtype, &mut bytes[1..]);
        (values, bytes)
    }

    /// All sets of this processor, exact and fast, and the tolerance that rounding to bf16 asks for.
    fn ways() -> Vec<(Exec, f64)> {
        let sets = Isa::ALL.into_iter().filter(|isa| isa.available());
        sets.flat_map(|isa| {
            [(Accuracy::Exact, 1e-5), (Accuracy::Fast, 1e-2)]
                .map(|(accuracy, near)| (Exec { isa, accuracy, batching: Batching::Fastest }, near))
        })
        .collect()
    }

    #[test]
    fn every_set_equals_the_plain_sum() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (tokens, rows, cols) in [
                (1, 5, 3),
                (2, 33, 40),
                (3, 100, 33),
                (4, 97, 17),
                (17, 1, 1),
                (33, 49, 31),
                (50, 200, 64),
                (521, 50, 7),
            ] {
                let (w, bytes) = weight(rows, cols, dtype);
                let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
                let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.7).sin()).collect();
                let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
                for (exec, near) in ways() {
                    let mut out = vec![f32::NAN; tokens * rows];
                    linear(&x, view, Some(&bias), &mut out, &exec).unwrap();
                    for t in 0..tokens {
                        for r in 0..rows {
                            let terms = (0..cols)
                                .map(|c| f64::from(x[t * cols + c]) * f64::from(w[r * cols + c]));
                            let (sum, size) =
                                terms.fold((r as f64, r as f64), |(s, a), v| (s + v, a + v.abs()));
                            let found = f64::from(out[t * rows + r]);
                            assert!(
                                (found - sum).abs() <= near * size.max(1e-3),
                                "{dtype} {exec:?} {tokens} {t} {r}: {found} {sum}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_alone_has_the_bits_it_has_among_others() {
        let (_, bytes) = weight(70, 90, Dtype::BF16);
        let view = MatView::new(&bytes[1..], Dtype::BF16, 70, 90).unwrap();
        let x: Vec<f32> = (0..60 * 90).map(|i| (i as f32 * 0.7).sin()).collect();
        for (exec, _) in ways() {
            for batching in [Batching::Together, Batching::Alone] {
                let exec = Exec { batching, ..exec };
                let mut all = vec![0.0; 60 * 70];
                linear(&x, view, None, &mut all, &exec).unwrap();
                for tokens in [1, 2, 3, 20] {
                    let mut some = vec![0.0; tokens * 70];
                    linear(&x[..tokens * 90], view, None, &mut some, &exec).unwrap();
                    assert_eq!(some, all[..tokens * 70], "{exec:?} {tokens}");
                }
                if batching == Batching::Alone {
                    let mut one = vec![0.0; 70];
                    let exec = Exec { batching: Batching::Fastest, ..exec };
                    linear(&x[59 * 90..], view, None, &mut one, &exec).unwrap();
                    assert_eq!(one, all[59 * 70..], "{exec:?}");
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (_, bytes) = weight(500, 300, Dtype::BF16);
        let view = MatView::new(&bytes[1..], Dtype::BF16, 500, 300).unwrap();
        for tokens in [2, 20] {
            let x: Vec<f32> = (0..tokens * 300).map(|i| (i as f32 * 0.7).sin()).collect();
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; tokens * 500];
                pool.install(|| linear(&x, view, None, &mut out, &Exec::default())).unwrap();
                out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(run(1), run(2));
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let view = MatView::new(&[0; 24], Dtype::F32, 2, 3).unwrap();
        let (mut out, exec) = ([0.0; 2], Exec::default());
        assert!(linear(&[0.0; 4], view, None, &mut out, &exec).is_err());
        assert!(linear(&[0.0; 3], view, None, &mut out[..1], &exec).is_err());
        assert!(linear(&[0.0; 3], view, Some(&[0.0]), &mut out, &exec).is_err());
        assert!(linear(&[], view, None, &mut [], &exec).is_ok());
    }
}
