//! The best of several estimators for one layer.

use crate::error::RouterError;
use crate::estimators::logistic;
use crate::registry::{Method, find};
use crate::samples::{Fit, Options, Samples};

/// Fits the estimators called `names` and gives the one whose held-out negative log-likelihood is lowest, with its name.
///
/// * on a tie `logistic` if it is among them, else the one named first
/// * `logistic`, named or not, where no prompt can be held out: there is nothing to choose by
///
/// # Errors
/// [`RouterError::NotLearned`] for a name that [`find`] does not know or whose method is not [`Method::RouterInputs`], and for
/// an empty list; else as [`logistic::fit`].
pub fn best_of(
    samples: &Samples<'_>,
    options: &Options,
    names: &[&str],
) -> Result<(&'static str, Fit), RouterError> {
    let mut estimators = Vec::new();
    for &name in names {
        match find(name).map(|e| (e.name, e.method)) {
            Ok((name, Method::RouterInputs(fit))) => estimators.push((name, fit)),
            _ => return Err(RouterError::NotLearned { name: name.to_owned() }),
        }
    }
    // Stable: the others stay in the order given.
    estimators.sort_by_key(|(name, _)| *name != "logistic");
    let mut best: Option<(f64, &'static str, Fit)> = None;
    for (name, estimate) in estimators {
        let fit = estimate(samples, options)?;
        let Some(nll) = fit.held_out.as_ref().map(|h| h.nll) else {
            let fit = if name == "logistic" { fit } else { logistic::fit(samples, options)? };
            return Ok(("logistic", fit));
        };
        if best.as_ref().is_none_or(|(lowest, ..)| nll < *lowest) {
            best = Some((nll, name, fit));
        }
    }
    best.map(|(_, name, fit)| (name, fit))
        .ok_or_else(|| RouterError::NotLearned { name: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimators::corpus::Corpus;
    use crate::estimators::{lda, mean, ridge};

    const ALL: [&str; 4] = ["mean", "ridge", "lda", "logistic"];

    #[test]
    fn the_lowest_held_out_loss_wins() {
        let options = Options::default();
        for distance in [0.0, 0.3, 0.8] {
            let corpus = Corpus::new(3, 4, 12, 20, distance);
            let samples = corpus.samples();
            let (name, fit) = best_of(&samples, &options, &ALL).unwrap();
            let nll = |fit: &Fit| fit.held_out.as_ref().unwrap().nll;
            let all = [
                ("mean", mean::fit(&samples, &options).unwrap()),
                ("ridge", ridge::fit(&samples, &options).unwrap()),
                ("lda", lda::fit(&samples, &options).unwrap()),
                ("logistic", logistic::fit(&samples, &options).unwrap()),
            ];
            assert!(all.iter().all(|(_, other)| nll(&fit) <= nll(other)), "{distance} {name}");
            assert!(all.iter().any(|(n, other)| *n == name && *other == fit));
        }
    }

    #[test]
    fn without_held_out_prompts_logistic() {
        let corpus = Corpus::new(3, 1, 12, 20, 0.8);
        let (name, fit) = best_of(&corpus.samples(), &Options::default(), &["mean"]).unwrap();
        assert_eq!(name, "logistic");
        assert_eq!(fit, logistic::fit(&corpus.samples(), &Options::default()).unwrap());
    }

    #[test]
    fn other_names_are_errors() {
        let corpus = Corpus::new(2, 2, 4, 6, 0.8);
        let of =
            |names: &[&str]| best_of(&corpus.samples(), &Options::default(), names).unwrap_err();
        for name in ["hidden", "rigde"] {
            let error = of(&["mean", name]);
            assert_eq!(error, RouterError::NotLearned { name: name.into() });
            let hint = error.hint().unwrap();
            assert!(hint.contains("`ridge`") && !hint.contains("hidden"), "{hint}");
        }
        assert_eq!(of(&[]), RouterError::NotLearned { name: String::new() });
    }
}
