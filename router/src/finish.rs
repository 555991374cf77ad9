//! What every learned estimator does last: from parameters to a gate that may be stored.

use crate::features::Features;
use crate::gate::Gate;
use crate::samples::{Sign, Table, Warning};

/// Largest logit that a given token may get.
///
/// transformers and vLLM compute router logits in the dtype of the weights. bf16 has 8 significant bits: below 32 its
/// numbers lie at most 1/8 apart, so rounding moves the odds of two experts by less than 7 %; a logit of 256 would be
/// off by 1, and ties would appear where there are none.
pub const LOGIT_BOUND: f64 = 32.0;

/// The gate of `parameters: [experts, width]`: rows that sum to zero, times `temperature`, bounded, for inputs that are
/// not scaled to unit RMS.
pub(crate) fn finish(
    features: &Features,
    parameters: &[f64],
    temperature: f64,
    table: &mut Table,
) -> Gate {
    let mut rows = features.expand(parameters, table.hidden);
    centre(&mut rows, table);
    rows.iter_mut().for_each(|w| *w *= temperature);
    bound(&mut rows, table);
    rows.iter_mut().for_each(|w| *w /= table.rms);
    Gate::from_f64(table.experts, table.hidden, &rows)
}

/// Subtracts the mean row, after experts with the same prompts were given the very same row.
fn centre(rows: &mut [f64], table: &Table) {
    let width = table.hidden;
    for warning in &table.warnings {
        if let Warning::SamePrompts { a, b } = *warning {
            let (left, right) = rows.split_at_mut(b * width);
            right[..width].copy_from_slice(&left[a * width..(a + 1) * width]);
        }
    }
    for k in 0..width {
        let mean =
            (0..table.experts).map(|e| rows[e * width + k]).sum::<f64>() / table.experts as f64;
        (0..table.experts).for_each(|e| rows[e * width + k] -= mean);
    }
}

/// Scales the rows so that no positive token gets a logit above [`LOGIT_BOUND`].
fn bound(rows: &mut [f64], table: &mut Table) {
    let mut largest = 0f64;
    for p in (0..table.prompts.len()).filter(|&p| table.prompts[p].target.sign == Sign::Positive) {
        for z in table.inputs(p).chunks_exact(table.hidden) {
            for w in rows.chunks_exact(table.hidden) {
                let logit: f64 = w.iter().zip(z).map(|(w, &z)| w * f64::from(z)).sum();
                largest = largest.max(logit.abs());
            }
        }
    }
    if largest > LOGIT_BOUND {
        rows.iter_mut().for_each(|w| *w *= LOGIT_BOUND / largest);
        table.warnings.push(Warning::LogitsBounded { largest, bound: LOGIT_BOUND });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Example, Samples};

    #[test]
    fn bound_scales_all_rows_alike() {
        let (right, left) = ([1.0], [-1.0]);
        let example = |expert, inputs| Example { expert, sign: Sign::Positive, inputs };
        let examples = vec![example(0, &right[..]), example(1, &left[..])];
        let mut table = Table::new(&Samples { experts: 2, hidden: 1, examples }).unwrap();
        let mut rows = [64.0, -16.0];
        bound(&mut rows, &mut table);
        assert_eq!(rows, [32.0, -8.0]);
        let expected = Warning::LogitsBounded { largest: 64.0, bound: 32.0 };
        assert_eq!(table.warnings.last(), Some(&expected));
    }
}
