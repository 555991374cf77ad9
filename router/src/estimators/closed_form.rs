//! What the closed forms share: held-out choice of their strength and scale.

use rayon::prelude::*;

use crate::error::RouterError;
use crate::features::Features;
use crate::finish::finish;
use crate::folds::Folds;
use crate::held_out::{HeldOut, Logits};
use crate::moments::{Grams, Group, Moments, groups, moments};
use crate::samples::{Fit, Options, Samples, Table, Warning};

/// Spread of the logits from which the search for the temperature starts: it may move by a factor of 16 either way, and
/// the scale of a closed form says nothing about odds (one-hot targets are too flat, differences of means far too steep).
const SPREAD: f64 = 2.0;

/// Spread of the logits of given tokens where no prompt can be held out.
const SPREAD_WITHOUT_HELD_OUT: f64 = 1.0;

/// The prompts of a layer, and their moments with each fold left out.
pub(super) struct ClosedForm {
    pub table: Table,
    pub features: Features,
    pub groups: Vec<Group>,
    /// One per fold, then that of all prompts.
    moments: Vec<Moments>,
    folds: Folds,
}

impl ClosedForm {
    pub fn new(
        samples: &Samples<'_>,
        options: &Options,
        grams: Grams,
    ) -> Result<Self, RouterError> {
        let table = Table::new(samples)?;
        let features = match grams {
            Grams::Needed => Features::new(&table)?,
            Grams::Spared => Features::whole(&table),
        };
        Self::of(table, features, options, grams)
    }

    fn of(
        table: Table,
        features: Features,
        options: &Options,
        grams: Grams,
    ) -> Result<Self, RouterError> {
        let folds = Folds::new(&table, options.max_folds);
        let groups = groups(&table);
        let moments = moments(&table, &features, &folds, &groups, grams)?;
        Ok(Self { table, features, groups, moments, folds })
    }

    /// Moments of all prompts.
    pub fn all(&self) -> &Moments {
        &self.moments[self.folds.count]
    }

    /// The gate of `rows(moments, strength): [experts, width]`.
    ///
    /// Of `strengths`, tried in their order until held-out loss rises, the one with the lowest loss on held-out prompts
    /// at its best temperature; `fallback` where nothing can be held out.
    pub fn fit(
        mut self,
        options: &Options,
        strengths: &[f64],
        fallback: f64,
        rows: impl Fn(&Self, &Moments, f64) -> Result<Vec<f64>, RouterError> + Sync,
    ) -> Result<Fit, RouterError> {
        let search = self.search(options, strengths, &rows)?;
        let strength = search.as_ref().map_or(fallback, |s| s.strength);
        let parameters = rows(&self, self.all(), strength)?;
        let temperature = match &search {
            Some(search) => search.temperature,
            None => {
                self.table.warnings.push(Warning::NoHeldOut { penalty: fallback });
                let logits = Logits::of_all(&self.table, &self.features, &parameters);
                factor(SPREAD_WITHOUT_HELD_OUT, logits.spread())
            }
        };
        let gate = finish(&self.features, &parameters, temperature, &mut self.table);
        Ok(Fit {
            gate,
            held_out: search.map(|s| s.held_out),
            penalty: strength,
            temperature,
            input_rms: self.table.rms,
            iterations: 0,
            warnings: self.table.warnings,
        })
    }

    fn search(
        &self,
        options: &Options,
        strengths: &[f64],
        rows: &(impl Fn(&Self, &Moments, f64) -> Result<Vec<f64>, RouterError> + Sync),
    ) -> Result<Option<Search>, RouterError> {
        let (features, folds) = (&self.features, &self.folds);
        let mut best: Option<Search> = None;
        if folds.count == 0 {
            return Ok(best);
        }
        for &strength in strengths {
            let parameters: Vec<Vec<f64>> = self.moments[..folds.count]
                .par_iter()
                .map(|m| rows(self, m, strength))
                .collect::<Result<_, _>>()?;
            let points: Vec<&[f64]> = parameters.iter().map(Vec::as_slice).collect();
            let mut logits =
                Logits::new(&self.table, folds, &features.x32, features.width, &points);
            let scale = factor(SPREAD, logits.spread());
            logits.scale(scale);
            let (temperature, value) = logits.best_temperature();
            if best.as_ref().is_some_and(|b| value >= b.value) {
                break;
            }
            let held_out = logits.figures(temperature, folds.count, options.top_k);
            best = Some(Search { strength, temperature: scale * temperature, held_out, value });
        }
        Ok(best)
    }
}

/// What held-out prompts say.
struct Search {
    strength: f64,
    temperature: f64,
    held_out: HeldOut,
    value: f64,
}

/// The factor that makes `found` `wanted`; 1 where logits differ by rounding alone (those of ridge and `lda` are of order
/// 1 on their own, those of `mean` larger).
fn factor(wanted: f64, found: f64) -> f64 {
    if found > 1e-9 { wanted / found } else { 1.0 }
}

#[cfg(test)]
mod tests;
