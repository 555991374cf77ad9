//! Layers of several models, drawn by chance, as a recipe.

use std::fmt::Write;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::MergeError;

/// How layers are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Layer `i` of the output is layer `i` of one of the models.
    Kept,
    /// Any layers of the models, as many of each as its weight says, in any order.
    Random,
}

/// A model that layers are drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Deck {
    /// As the recipe names it.
    pub model: String,
    /// Layers it has.
    pub layers: usize,
    /// Its weight. [`Order::Kept`]: the weights' sum is 1; [`Order::Random`]: the share of the first model's number of
    /// layers that comes from it.
    pub weight: f64,
}

/// A layer of the output: the model's number and the layer in it.
pub type Draw = (usize, usize);

/// Draws layers.
///
/// # Errors
/// [`MergeError::Argument`] for weights that are no weights, for models of different depth with [`Order::Kept`], or if no
/// layer comes out.
///
/// # Source
/// mergekit `scripts/layershuffle.py`. Differs: it works, and has a seed.
pub fn draw(decks: &[Deck], order: Order, seed: u64) -> Result<Vec<Draw>, MergeError> {
    let wrong = |what: &str, name: &str, expected: String, found: String| {
        Err(MergeError::Argument {
            what: what.into(),
            name: name.into(),
            expected,
            found,
            hint: None,
        })
    };
    let total: f64 = decks.iter().map(|d| d.weight).sum();
    if let Some(bad) = decks.iter().find(|d| !(d.weight.is_finite() && d.weight >= 0.0)) {
        let (expected, found) = ("numbers from 0".into(), bad.weight.to_string());
        return wrong("this is no weight", "--weights", expected, found);
    }
    let Some(first) = decks.first().filter(|_| total > 0.0) else {
        let expected = "a weight above 0".into();
        return wrong("no model has a weight", "--weights", expected, total.to_string());
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn: Vec<Draw> = match order {
        Order::Kept => {
            if let Some(other) = decks.iter().find(|d| d.layers != first.layers) {
                let expected = format!("{} layers, as `{}` has", first.layers, first.model);
                let found = format!("{} in `{}`", other.layers, other.model);
                return wrong(
                    "the models have different numbers of layers",
                    "MODEL",
                    expected,
                    found,
                );
            }
            (0..first.layers).map(|layer| (by_weight(decks, total, &mut rng), layer)).collect()
        }
        Order::Random => {
            let mut drawn = Vec::new();
            for (number, deck) in decks.iter().enumerate().filter(|(_, d)| d.layers > 0) {
                let count = (first.layers as f64 * deck.weight).trunc() as usize;
                drawn.extend((0..count).map(|_| (number, rng.random_range(0..deck.layers))));
            }
            // Fisher and Yates.
            for i in (1..drawn.len()).rev() {
                drawn.swap(i, rng.random_range(0..=i));
            }
            drawn
        }
    };
    if drawn.is_empty() {
        let expected = format!("shares of {} layers that come to one or more", first.layers);
        return wrong("no layer comes out", "--weights", expected, total.to_string());
    }
    Ok(drawn)
}

fn by_weight(decks: &[Deck], total: f64, rng: &mut impl Rng) -> usize {
    let mut left = rng.random::<f64>() * total;
    for (number, deck) in decks.iter().enumerate() {
        left -= deck.weight;
        if left < 0.0 {
            return number;
        }
    }
    // Rounding can leave a little of the last model's share.
    decks.iter().rposition(|d| d.weight > 0.0).unwrap_or(0)
}

/// The draws as a recipe that mergekit reads too: one slice for each layer.
pub fn recipe(decks: &[Deck], draws: &[Draw], dtype: Option<&str>) -> String {
    let mut text = String::from("merge_method: passthrough\n");
    if let Some(dtype) = dtype {
        let _ = writeln!(text, "dtype: {dtype}");
    }
    text.push_str("slices:\n");
    for &(number, layer) in draws {
        // Text in JSON is text in YAML.
        let model = serde_json::Value::from(decks[number].model.as_str());
        let range = format!("[{layer}, {}]", layer + 1);
        let _ = writeln!(text, "  - sources: [{{model: {model}, layer_range: {range}}}]");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decks(weights: &[f64], layers: usize) -> Vec<Deck> {
        let deck = |(i, w): (usize, &f64)| Deck { model: format!("m{i}"), layers, weight: *w };
        weights.iter().enumerate().map(deck).collect()
    }

    #[test]
    fn layers_keep_their_place_and_weights_their_shares() {
        let found = draw(&decks(&[3.0, 1.0, 0.0], 4000), Order::Kept, 1).unwrap();
        assert!(found.iter().enumerate().all(|(i, (_, layer))| *layer == i));
        let of = |n| found.iter().filter(|d| d.0 == n).count() as f64;
        // Five standard deviations.
        assert!((of(0) - 3000.0).abs() < 5.0 * (4000.0f64 * 0.75 * 0.25).sqrt());
        assert_eq!((of(0) + of(1), of(2)), (4000.0, 0.0));
        assert_eq!(found, draw(&decks(&[3.0, 1.0, 0.0], 4000), Order::Kept, 1).unwrap());
        assert_ne!(found, draw(&decks(&[3.0, 1.0, 0.0], 4000), Order::Kept, 2).unwrap());
    }

    #[test]
    fn random_layers_come_in_the_numbers_that_weights_say() {
        let found = draw(&decks(&[0.5, 0.76, 0.0], 10), Order::Random, 7).unwrap();
        let of = |n| found.iter().filter(|d| d.0 == n).count();
        assert_eq!((of(0), of(1), of(2)), (5, 7, 0));
        assert!(found.iter().all(|(_, layer)| *layer < 10));
        assert!(found.windows(2).any(|w| w[0].0 > w[1].0), "not shuffled");
    }

    #[test]
    fn what_cannot_be_drawn() {
        assert!(draw(&decks(&[-1.0], 3), Order::Kept, 0).is_err());
        assert!(draw(&decks(&[f64::NAN], 3), Order::Kept, 0).is_err());
        assert!(draw(&decks(&[0.0, 0.0], 3), Order::Kept, 0).is_err());
        assert!(draw(&decks(&[0.1], 3), Order::Random, 0).is_err());
        let mut uneven = decks(&[1.0, 1.0], 3);
        uneven[1].layers = 4;
        assert!(draw(&uneven, Order::Kept, 0).is_err());
        assert!(draw(&uneven, Order::Random, 0).is_ok());
    }

    #[test]
    fn a_recipe_of_one_layer_slices() {
        let mut decks = decks(&[1.0, 1.0], 2);
        decks[1].model = "a \"b\": c".into();
        let text = recipe(&decks, &[(1, 0), (0, 1)], Some("bfloat16"));
        let expected = "merge_method: passthrough\ndtype: bfloat16\nslices:\n  \
            - sources: [{model: \"a \\\"b\\\": c\", layer_range: [0, 1]}]\n  \
            - sources: [{model: \"m0\", layer_range: [1, 2]}]\n";
        assert_eq!(text, expected);
        assert!(crate::recipe::parse(&text, "x.yaml".as_ref()).is_ok());
    }
}
