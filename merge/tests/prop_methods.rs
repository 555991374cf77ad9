//! The algebra of the merge methods, on random tensors.

mod tensors;

use moe_merge_checkpoint::Dtype;
use moe_merge_merge::methods::{Base, METHODS};
use proptest::prelude::*;
use tensors::{Case, normal};

fn close(found: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(found.len(), expected.len());
    // Numbers are of the size of one, also where they cancel out.
    let scale = expected.iter().fold(1f64, |m, v| m.max(f64::from(v.abs())));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let difference = f64::from((f - e).abs()) / scale;
        assert!(difference <= bound, "{i}: {f} instead of {e} ({difference:e})");
    }
}

fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        (1..4usize).prop_map(|n| vec![n]),
        (1..60usize).prop_map(|n| vec![n]),
        (1..20usize, 1..40usize).prop_map(|(r, c)| vec![r, c]),
        (1..5usize, 1..6usize, 1..7usize).prop_map(|(a, b, c)| vec![a, b, c]),
    ]
}

fn models(count: usize) -> impl Strategy<Value = (Vec<usize>, Vec<Vec<f32>>)> {
    (shape(), any::<u64>()).prop_map(move |(shape, seed)| {
        let n = shape.iter().product();
        (shape, (0..count as u64).map(|m| normal(seed, m, n)).collect())
    })
}

fn case(method: &str, shape: &[usize], models: &[&[f32]]) -> Case {
    Case::new(method, shape, models)
}

fn sum(terms: &[(f32, &[f32])]) -> Vec<f32> {
    let n = terms[0].1.len();
    (0..n)
        .map(|i| terms.iter().map(|(c, v)| f64::from(*c) * f64::from(v[i])).sum::<f64>() as f32)
        .collect()
}

fn norm(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn copies_of_one_model_give_that_model((shape, models) in models(1), w in 0.1..3.0f64) {
        let a = models[0].as_slice();
        for method in METHODS {
            let others = method.models.1.min(3).max(method.models.0);
            let base = method.base == Base::Required;
            let count = others + usize::from(base);
            let mut case = case(method.name, &shape, &vec![a; count]);
            if base { case = case.base(0); }
            for m in 0..count {
                case = case.own_if(m, "weight", w + m as f64 * 0.5).own_if(m, "density", 1.0);
            }
            let case = case.global_if("t", 0.3);
            close(&case.run(), a, 1e-6);
        }
    }

    #[test]
    fn linear_is_a_mean((shape, models) in models(3), w in prop::array::uniform3(0.1..2.0f64), k in 0.1..9.0f64) {
        let [a, b, c] = [&models[0][..], &models[1], &models[2]];
        let first = case("linear", &shape, &[a, b]).own(0, "weight", 1.0).own(1, "weight", 0.0);
        prop_assert_eq!(first.run(), a.to_vec());
        let with = |order: [usize; 3], factor: f64| {
            let all = [a, b, c];
            let mut case = case("linear", &shape, &order.map(|m| all[m]));
            for (place, m) in order.into_iter().enumerate() {
                case = case.own(place, "weight", w[m] * factor);
            }
            case.run()
        };
        let plain = with([0, 1, 2], 1.0);
        close(&with([2, 0, 1], 1.0), &plain, 1e-6);
        close(&with([0, 1, 2], k), &plain, 1e-6);
        // Task arithmetic with weights that add up to one.
        let total: f64 = w.iter().sum();
        let mut task = case("task_arithmetic", &shape, &[a, b, c]).base(0);
        for (m, w) in w.iter().enumerate().skip(1) {
            task = task.own(m, "weight", w / total);
        }
        close(&task.run(), &plain, 2e-6);
    }

    #[test]
    fn order_changes_only_rounding((shape, models) in models(4), w in prop::array::uniform3(0.2..2.0f64)) {
        // Directions of a few numbers cancel out: their mean is then what comes first.
        prop_assume!(shape.iter().product::<usize>() >= 8);
        for (method, density) in [("multislerp", 1.0), ("karcher", 1.0), ("ties", 0.7), ("sce", 0.5), ("ram", 1.0), ("model_stock", 1.0)] {
            let with = |order: [usize; 3]| {
                let picked: Vec<&[f32]> = [3].into_iter().chain(order).map(|m| &models[m][..]).collect();
                let base = method != "karcher";
                let mut case = case(method, &shape, if base { &picked } else { &picked[1..] });
                if base { case = case.base(0); }
                for (place, m) in order.into_iter().enumerate() {
                    let place = place + usize::from(base);
                    case = case.own_if(place, "weight", w[m]).own_if(place, "density", density);
                }
                case.global_if("select_topk", 0.5).run()
            };
            close(&with([2, 0, 1]), &with([0, 1, 2]), 1e-5);
        }
    }

    #[test]
    fn slerp_at_its_ends_and_reversed((shape, models) in models(2), t in 0.0..1.0f64) {
        let [a, b] = [&models[0][..], &models[1]];
        let at = |base: usize, t: f64| case("slerp", &shape, &[a, b]).base(base).global("t", t).run();
        close(&at(0, 0.0), a, 1e-6);
        close(&at(0, 1.0), b, 1e-6);
        close(&at(0, t), &at(1, 1.0 - t), 2e-5);
        let opposite: Vec<f32> = a.iter().map(|v| -v).collect();
        let straight = case("slerp", &shape, &[a, &opposite]).base(0).global("t", t).run();
        close(&straight, &sum(&[((1.0 - 2.0 * t) as f32, a)]), 1e-5);
        if shape.iter().product::<usize>() > 3 {
            let unit = |v: &[f32]| sum(&[((1.0 / norm(v)) as f32, v)]);
            let (u, v) = (unit(a), unit(b));
            let cosine: f64 = u.iter().zip(&v).map(|(x, y)| f64::from(x * y)).sum();
            if cosine.abs() < 0.9995 {
                let between = case("slerp", &shape, &[&u, &v]).base(0).global("t", t).run();
                prop_assert!((norm(&between) - 1.0).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn nuslerp_forms_agree((shape, models) in models(3), w in 0.1..2.0f64) {
        let [a, b, base] = [&models[0][..], &models[1], &models[2]];
        let plain = |x: &[f32], y: &[f32], shape: &[usize]| {
            case("nuslerp", shape, &[x, y]).own(0, "weight", 1.0).own(1, "weight", w)
        };
        let weights = |x, y| case("nuslerp", &shape, &[a, b]).own(0, "weight", x).own(1, "weight", y);
        close(&weights(1.0, 0.0).run(), a, 1e-6);
        close(&weights(0.0, 1.0).run(), b, 1e-6);
        close(&weights(1.0, -1.0).run(), &weights(1.0, 1.0).run(), 1e-6);
        let (d0, d1) = (sum(&[(1.0, a), (-1.0, base)]), sum(&[(1.0, b), (-1.0, base)]));
        let relative = case("nuslerp", &shape, &[a, base, b]).base(1).own(0, "weight", 1.0).own(2, "weight", w);
        close(&relative.run(), &sum(&[(1.0, base), (1.0, &plain(&d0, &d1, &shape).run())]), 1e-4);
        let flat = |case: Case, columns: f64| case.global("nuslerp_flatten", 0.0).global("nuslerp_row_wise", columns);
        let n = a.len();
        let whole = plain(a, b, &[n]);
        close(&flat(plain(a, b, &[n]), 0.0).run(), &whole.run(), 1e-6);
        close(&flat(plain(a, b, &[n]), 1.0).run(), &whole.run(), 1e-6);
        if let [rows, cols] = shape[..] {
            let transposed = |v: &[f32], rows: usize, cols: usize| -> Vec<f32> {
                (0..rows * cols).map(|i| v[(i % rows) * cols + i / rows]).collect()
            };
            let by_rows = flat(plain(a, b, &shape), 0.0).run();
            let (ta, tb) = (transposed(a, rows, cols), transposed(b, rows, cols));
            let by_columns = flat(plain(&ta, &tb, &[cols, rows]), 1.0).run();
            close(&transposed(&by_columns, cols, rows), &by_rows, 1e-4);
        }
    }

    #[test]
    fn means_on_the_sphere((shape, models) in models(2), k in 0.1..9.0f64) {
        let [a, b] = [&models[0][..], &models[1]];
        let b = sum(&[((norm(a) / norm(b)) as f32, b)]);
        let cosine: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>() / norm(a).powi(2);
        prop_assume!(cosine.abs() < 0.99);
        let middle = case("slerp", &shape, &[a, &b]).base(0).global("t", 0.5).run();
        let weigh = |k: f64| case("multislerp", &shape, &[a, &b]).own(0, "weight", k).own(1, "weight", k).run();
        close(&weigh(1.0), &middle, 1e-5);
        close(&weigh(k), &middle, 1e-5);
        close(&case("karcher", &shape, &[a, &b]).run(), &middle, 1e-5);
    }

    #[test]
    fn ties_by_its_limits((shape, models) in models(3), w in 0.2..2.0f64) {
        let [base, a, b] = [&models[0][..], &models[1], &models[2]];
        let one = case("ties", &shape, &[base, a]).base(0).own(1, "weight", w);
        close(&one.run(), a, 1e-6);
        let task = case("task_arithmetic", &shape, &[base, a]).base(0).own(1, "weight", w);
        close(&one.clone().global("normalize", 0.0).run(), &task.run(), 1e-6);
        // The same signs everywhere: the weighted mean.
        let twice = sum(&[(1.0, base), (2.0, a), (-2.0, base)]);
        let both = case("ties", &shape, &[base, a, &twice]).base(0).own(1, "weight", 1.0).own(2, "weight", w);
        let mean = sum(&[(1.0, base), (((1.0 + 2.0 * w) / (1.0 + w)) as f32, &sum(&[(1.0, a), (-1.0, base)]))]);
        close(&both.run(), &mean, 1e-5);
        // A model without weight is a model that is not there.
        let with = case("ties", &shape, &[base, a, b]).base(0).own(1, "weight", w).own(2, "weight", 0.0);
        close(&with.own(1, "density", 0.5).run(), &case("ties", &shape, &[base, a]).base(0).own(1, "weight", w).own(1, "density", 0.5).run(), 0.0);
    }

    #[test]
    fn the_family_meets_at_density_one((shape, models) in models(3), l in -2.0..2.0f64) {
        let [base, a, b] = [&models[0][..], &models[1], &models[2]];
        let with = |method: &str, normalize: f64| {
            case(method, &shape, &[base, a, b]).base(0).own(1, "weight", 0.6).own(2, "weight", 0.5)
                .global("normalize", normalize)
        };
        for (plain, methods) in [
            ("task_arithmetic", &["dare_linear", "della_linear", "breadcrumbs"][..]),
            ("ties", &["dare_ties", "della", "breadcrumbs_ties"]),
        ] {
            for method in methods {
                prop_assert_eq!(with(method, 0.0).run(), with(plain, 0.0).run(), "{}", method);
            }
            prop_assert_eq!(with(plain, 0.0).global("int8_mask", 1.0).run(), with(plain, 0.0).run());
            prop_assert_eq!(with(plain, 0.0).global("lambda", 0.0).run(), base.to_vec());
            let scaled = sum(&[(1.0, base), (l as f32, &sum(&[(1.0, &with(plain, 0.0).run()), (-1.0, base)]))]);
            let exact = with(plain, 0.0).global("lambda", l).run();
            let largest = exact.iter().chain(base).fold(0f32, |m, v| m.max(v.abs()));
            for (f, e) in exact.iter().zip(&scaled) {
                prop_assert!((f - e).abs() <= 1e-5 * largest.max(1.0), "{} {}", f, e);
            }
        }
    }

    #[test]
    fn sparsifiers_keep_exactly_what_they_say((shape, models) in models(1), d in 0.01..1.0f64, gamma in 0.0..0.5f64) {
        let delta = &models[0];
        let n = delta.len();
        let zero = vec![0.0; n];
        let kept = |method: &str, d: f64, gamma: f64| -> Vec<usize> {
            let case = case(method, &shape, &[&zero, delta]).base(0).own(1, "weight", 1.0).own(1, "density", d);
            let out = case.own_if(1, "gamma", gamma).global("normalize", 0.0).run();
            let kept: Vec<usize> = (0..n).filter(|&i| out[i] != 0.0).collect();
            kept.iter().for_each(|&i| assert_eq!(out[i], delta[i]));
            kept
        };
        let product = |d: f64| (d * n as f64) as usize;
        let largest = kept("ties", d, 0.0);
        prop_assert_eq!(largest.len(), product(d).max(1));
        let smallest_kept = largest.iter().map(|&i| delta[i].abs()).fold(f32::INFINITY, f32::min);
        prop_assert!((0..n).all(|i| largest.contains(&i) || delta[i].abs() <= smallest_kept));
        prop_assert!(kept("ties", d * 0.5, 0.0).iter().all(|i| largest.contains(i)));
        prop_assert_eq!(kept("breadcrumbs", d, gamma).len(), product(d));
        if product(d) > 0 {
            prop_assert_eq!(kept("breadcrumbs", d, 0.0), largest);
        }
        // Restored sums.
        let restored = case("ties", &shape, &[&zero, delta]).base(0).own(1, "weight", 1.0).own(1, "density", d)
            .global("normalize", 0.0).global("rescale", 1.0).run();
        let total = |v: &[f32]| v.iter().map(|x| f64::from(x.abs())).sum::<f64>();
        prop_assert!((total(&restored) / total(delta) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn sce_and_ram((shape, models) in models(2)) {
        let (base, a) = (&models[0], &models[1]);
        let n = base.len();
        close(&case("sce", &shape, &[base, a, a]).base(0).run(), a, 1e-6);
        // Differences up to 1e-5 count as none.
        close(&case("ram", &shape, &[base, a, a]).base(0).run(), a, 2e-5);
        // Supports that do not meet: the sum of the differences.
        let only = |even: usize| -> Vec<f32> { (0..n).map(|i| if i % 2 == even { a[i] } else { base[i] }).collect() };
        close(&case("ram", &shape, &[base, &only(0), &only(1)]).base(0).run(), a, 2e-5);
        let plus = case("ramplus_tl", &shape, &[base, &only(0), &only(1)]).base(0).run();
        close(&plus, a, 2e-5);
    }

    #[test]
    fn model_stock_by_its_limits((shape, models) in models(2)) {
        let (base, a) = (&models[0], &models[1]);
        close(&case("model_stock", &shape, &[base, a, a]).base(0).run(), a, 1e-5);
        let mirrored = sum(&[(2.0, base), (-1.0, a)]);
        let opposite = case("model_stock", &shape, &[base, a, &mirrored]).base(0).run();
        close(&opposite, base, 1e-5);
        if shape.len() == 2 && shape[0] > 1 {
            let half = |first: bool| -> Vec<f32> {
                (0..base.len()).map(|i| if (i < shape[1]) == first { a[i] } else { base[i] }).collect()
            };
            let orthogonal = case("model_stock", &shape, &[base, &half(true), &half(false)]).base(0);
            close(&orthogonal.run(), base, 1e-6);
        }
    }

    #[test]
    fn nearswap_and_passthrough_at_their_ends((shape, models) in models(2)) {
        let (base, a) = (&models[0], &models[1]);
        let at = |t: f64| case("nearswap", &shape, &[base, a]).base(0).global("t", t).run();
        prop_assert_eq!(&at(0.0), base);
        prop_assert_eq!(&at(1e9), a);
        prop_assert_eq!(&case("passthrough", &shape, &[a]).run(), a);
    }

    #[test]
    fn sixteen_bits_stay_sixteen_bits((shape, models) in models(3)) {
        for method in METHODS {
            let others = method.models.1.min(2).max(method.models.0);
            let base = method.base == Base::Required;
            let picked: Vec<&[f32]> = models[..others + usize::from(base)].iter().map(Vec::as_slice).collect();
            let mut case = case(method.name, &shape, &picked).dtype(Dtype::BF16);
            if base { case = case.base(0); }
            for m in 0..picked.len() {
                case = case.own_if(m, "weight", 0.5).own_if(m, "density", 0.8).own_if(m, "epsilon", 0.1);
            }
            for v in case.global_if("t", 0.4).run() {
                prop_assert!(v.is_finite() && v.to_bits() & 0xffff == 0, "{} {}", method.name, v);
            }
        }
    }
}

#[test]
fn zero_tensors_and_models_equal_to_the_base_stay_finite() {
    let shape = [3, 5];
    let (zero, some) = (vec![0.0; 15], normal(1, 1, 15));
    for method in METHODS {
        for pattern in [
            [&zero, &zero, &zero],
            [&zero, &some, &zero],
            [&some, &some, &zero],
            [&some, &zero, &some],
        ] {
            let others = method.models.1.min(2).max(method.models.0);
            let base = method.base == Base::Required;
            let picked: Vec<&[f32]> =
                pattern[..others + usize::from(base)].iter().map(|v| v.as_slice()).collect();
            let mut case = case(method.name, &shape, &picked);
            if base {
                case = case.base(0);
            }
            for m in 0..picked.len() {
                case = case.own_if(m, "weight", 0.5).own_if(m, "density", 0.5);
            }
            let out = case.global_if("t", 0.5).global_if("select_topk", 0.5).run();
            assert!(out.iter().all(|v| v.is_finite()), "{}: {out:?}", method.name);
        }
    }
}

#[test]
fn what_cannot_be_computed_says_why() {
    let (a, b) = (normal(1, 0, 6), normal(1, 1, 6));
    let opposite: Vec<f32> = a.iter().map(|v| -v).collect();
    let weights = |case: Case| {
        case.own_if(0, "weight", 1.0).own_if(1, "weight", 1.0).own_if(2, "weight", 1.0)
    };
    let text = |case: Case| case.try_run().unwrap_err();
    let della = weights(case("della", &[6], &[&a, &b]).base(0)).own(1, "density", 0.9);
    assert!(text(della).contains("below 1"));
    let three = [&a[..], &opposite, &[0.0; 6]];
    assert!(text(weights(case("multislerp", &[6], &three))).contains("cancel"));
    let linear = case("linear", &[6], &[&a, &b]).own(0, "weight", 1.0).own(1, "weight", -1.0);
    assert!(text(linear).contains("zero"));
}
