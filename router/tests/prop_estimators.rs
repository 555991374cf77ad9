//! What holds for every learned estimator, whatever the prompts.

use moe_merge_router::estimators::logistic::LOGIT_BOUND;
use moe_merge_router::estimators::{lda, logistic, mean, random, ridge};
use moe_merge_router::{Example, Fit, Options, RouterError, Samples, Sign};
use proptest::prelude::*;

type Estimate = fn(&Samples<'_>, &Options) -> Result<Fit, RouterError>;

const LEARNED: [(&str, Estimate); 4] =
    [("mean", mean::fit), ("ridge", ridge::fit), ("lda", lda::fit), ("logistic", logistic::fit)];

/// Expert, sign and router inputs of each prompt; every expert has at least one positive prompt.
type Prompts = Vec<(usize, Sign, Vec<f32>)>;

fn prompts() -> impl Strategy<Value = (usize, usize, Prompts)> {
    let lengths = prop::collection::vec((0usize..4, any::<bool>(), 1usize..7), 0..12);
    (2usize..5, 1usize..40, lengths, any::<u64>()).prop_map(|(experts, hidden, more, seed)| {
        let first = (0..experts).map(|e| (e, true, 2 + e));
        let all = first.chain(more.into_iter().map(|(e, positive, n)| (e % experts, positive, n)));
        let prompt = |(i, (expert, positive, tokens)): (usize, (usize, bool, usize))| {
            let sign = if positive { Sign::Positive } else { Sign::Negative };
            let centre = random::gate(1, hidden, seed, 1000 + expert as u64).rows;
            let noise = random::gate(tokens, hidden, seed, i as u64).rows;
            let inputs = noise.iter().enumerate().map(|(j, v)| v + centre[j % hidden]);
            (expert, sign, inputs.collect())
        };
        (experts, hidden, all.enumerate().map(prompt).collect())
    })
}

fn samples(experts: usize, hidden: usize, prompts: &Prompts) -> Samples<'_> {
    let examples = prompts
        .iter()
        .map(|(expert, sign, inputs)| Example { expert: *expert, sign: *sign, inputs })
        .collect();
    Samples { experts, hidden, examples }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn neither_order_nor_copies_change_the_gate(
        (experts, hidden, prompts) in prompts(),
        turn in 0usize..12,
    ) {
        let mut turned = prompts.clone();
        turned.rotate_left(turn % prompts.len());
        let mut copied = turned.clone();
        copied.extend_from_slice(&prompts[..prompts.len() / 2]);
        let options = Options::default();
        for (name, estimate) in LEARNED {
            let fit = estimate(&samples(experts, hidden, &prompts), &options).unwrap();
            prop_assert_eq!(&fit, &estimate(&samples(experts, hidden, &turned), &options).unwrap());
            let with_copies = estimate(&samples(experts, hidden, &copied), &options).unwrap();
            prop_assert_eq!(&fit.gate, &with_copies.gate, "{}", name);
            prop_assert_eq!(&fit.held_out, &with_copies.held_out, "{}", name);
        }
    }

    #[test]
    fn rows_are_finite_sum_to_zero_and_stay_within_the_bound(
        (experts, hidden, prompts) in prompts(),
    ) {
        for (name, estimate) in LEARNED {
            let fit = estimate(&samples(experts, hidden, &prompts), &Options::default()).unwrap();
            let largest = fit.gate.rows.iter().fold(0f32, |m, v| m.max(v.abs()));
            prop_assert!(largest.is_finite(), "{}", name);
            for k in 0..hidden {
                let sum: f32 = (0..experts).map(|e| fit.gate.row(e)[k]).sum();
                prop_assert!(sum.abs() <= 1e-6 * largest, "{} {} of {}", name, sum, largest);
            }
            for (_, _, inputs) in prompts.iter().filter(|p| p.1 == Sign::Positive) {
                for z in inputs.chunks_exact(hidden) {
                    let top = fit.gate.logits(z).into_iter().fold(0f64, |m, v| m.max(v.abs()));
                    prop_assert!(top <= LOGIT_BOUND * 1.0001, "{} {}", name, top);
                }
            }
        }
    }
}
