use super::*;
use crate::cast;

pub(super) fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
}

/// Numbers as stored, from the second byte on so that they are not aligned, and what they are then.
pub(super) fn stored(n: usize, dtype: Dtype, seed: usize) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; n * dtype.size() + 1];
    cast::narrow(&numbers(n, seed), dtype, &mut bytes[1..]);
    let mut values = vec![0.0; n];
    cast::widen(&bytes[1..], dtype, &mut values);
    (bytes, values)
}

pub(super) fn sets() -> impl Iterator<Item = Exec> {
    Isa::ALL.into_iter().filter_map(|isa| Exec::on(isa).ok())
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

#[test]
fn every_set_and_dtype_equals_the_sum_in_f64() {
    let mut worst = 0f64;
    for cols in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 576, 1001] {
        for (dtype, rows) in DTYPES.into_iter().zip([5, 6, 7]) {
            let (bytes, w) = stored(rows * cols, dtype, cols);
            let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
            for tokens in 1..=FEW {
                let (x, bias) = (numbers(tokens * cols, 1), numbers(rows, 2));
                for exec in sets() {
                    let mut out = vec![f32::NAN; tokens * rows];
                    linear_few(&x, view, Some(&bias), &mut out, &exec).unwrap();
                    for (i, found) in out.iter().enumerate() {
                        let (t, r) = (i / rows, i % rows);
                        let products = (0..cols)
                            .map(|c| f64::from(x[t * cols + c]) * f64::from(w[r * cols + c]));
                        let (sum, size) =
                            products.fold((0.0, 1.0), |(s, a), p| (s + p, a + p.abs()));
                        let error = (f64::from(*found) - sum - f64::from(bias[r])).abs() / size;
                        worst = worst.max(error);
                        assert!(error < 1e-6, "{exec:?} {dtype} {rows} x {cols}, {t} {r}: {error}");
                    }
                }
            }
        }
    }
    println!("largest error of a sum: {worst:.1e} of its products' sizes");
}

#[test]
fn what_lies_behind_a_row_does_not_show() {
    // The second row is all NaN, and so are activations that other vectors hold.
    for dtype in DTYPES {
        for cols in [5, 33, 70] {
            let mut values = numbers(cols, 1);
            values.extend(vec![f32::NAN; cols]);
            let mut bytes = vec![0; values.len() * dtype.size()];
            cast::narrow(&values, dtype, &mut bytes);
            let view = MatView::new(&bytes, dtype, 2, cols).unwrap();
            for exec in sets() {
                Scratch::new(1000).fill(f32::NAN);
                let mut out = [0.0; 2];
                linear_few(&numbers(cols, 2), view, None, &mut out, &exec).unwrap();
                assert!(out[0].is_finite() && out[1].is_nan(), "{exec:?} {dtype} {cols}");
            }
        }
    }
}

#[test]
fn threads_and_neighbours_do_not_change_a_bit() {
    let (rows, cols) = (2000, 700);
    for dtype in DTYPES {
        let (bytes, _) = stored(rows * cols, dtype, 3);
        let view = MatView::new(&bytes[1..], dtype, rows, cols).unwrap();
        assert!(view.bytes().len() >= SHARED_FROM);
        let x = numbers(FEW * cols, 4);
        for exec in sets() {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; FEW * rows];
                pool.install(|| linear_few(&x, view, None, &mut out, &exec)).unwrap();
                out
            };
            let alone = run(1);
            assert_eq!(alone, run(2));
            assert_eq!(alone, run(3));
            // A part of the rows, by themselves.
            let mut part = vec![0.0; FEW * 10];
            linear_few(&x, view.slice_rows(501, 511), None, &mut part, &exec).unwrap();
            for t in 0..FEW {
                assert_eq!(part[t * 10..][..10], alone[t * rows + 501..][..10]);
            }
        }
    }
}

#[test]
fn asking_for_weights_ahead_changes_no_bit() {
    for cols in [5, 64, 700] {
        for dtype in DTYPES {
            let rows = 9;
            let (bytes, _) = stored(rows * cols, dtype, 3);
            let x = numbers(FEW * cols, 4);
            for exec in sets() {
                let x = Prepared::new(&x, FEW, cols, dtype, &exec);
                let x: [&[f32]; FEW] = std::array::from_fn(|t| x.vector(t));
                for tokens in 1..=FEW {
                    let [asked, left] = [Ahead::Ask, Ahead::LeaveToProcessor].map(|ahead| {
                        let mut sums = vec![f32::NAN; rows * tokens];
                        let (bytes, out, how) = (&bytes[1..], &mut sums[..], Sums::Pairs);
                        let rows = Rows { bytes, dtype, cols, x, tokens, ahead, sums: out, how };
                        vector::run(set(&exec), rows);
                        sums
                    });
                    assert_eq!(asked, left, "{exec:?} {dtype} {cols} {tokens}");
                }
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let view = MatView::new(&[0; 24], Dtype::F32, 2, 3).unwrap();
    let exec = Exec::default();
    let mut out = [0.0; 2 * FEW + 2];
    assert!(linear_few(&[0.0; 4], view, None, &mut out[..2], &exec).is_err());
    assert!(linear_few(&[0.0; 3], view, None, &mut out[..1], &exec).is_err());
    assert!(linear_few(&[0.0; 3], view, Some(&[0.0]), &mut out[..2], &exec).is_err());
    assert!(linear_few(&[0.0; 3 * FEW + 3], view, None, &mut out, &exec).is_err());
    assert!(linear_few(&[], view, None, &mut [], &exec).is_err());
    let none = MatView::new(&[], Dtype::F32, 0, 3).unwrap();
    assert!(linear_few(&[0.0; 3], none, None, &mut [], &exec).is_ok());
    let narrow = MatView::new(&[], Dtype::BF16, 2, 0).unwrap();
    out.fill(1.0);
    linear_few(&[], narrow, Some(&[3.0, 4.0]), &mut out[..2], &exec).unwrap();
    assert_eq!(out[..2], [3.0, 4.0]);
}
