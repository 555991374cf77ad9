//! Perplexity of the five tiny checkpoints on the four evaluation texts, against transformers 5.23.0.

use moe_merge_checkpoint::Source;
use moe_merge_model::perplexity::{Windows, perplexity, perplexity_of_tokens};
use moe_merge_model::streamed::{TokenText, Watcher, WindowRouting, perplexities};
use moe_merge_model::{Model, ModelError, Placement, Tokenizer};
use moe_merge_testkit::shared;

const CHECKPOINTS: [&str; 5] = ["base", "prose", "code", "math", "facts"];
const TEXTS: [&str; 4] = ["prose", "code", "math", "facts"];

fn open(name: &str) -> Option<(Model, Tokenizer)> {
    let path = shared(&format!("models/tiny/{name}"))?;
    let source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
    Some((Model::open(&source).unwrap(), Tokenizer::from_source(&source).unwrap()))
}

/// `perplexity.json` was made from windows of 128 tokens, the last short one left away: the same here.
#[test]
fn whole_windows_equal_the_reference() {
    let Some(path) = shared("models/tiny/perplexity.json") else { return };
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let windows = Windows { window: 128, stride: None };
    let mut largest = 0f64;
    for checkpoint in CHECKPOINTS {
        let Some((model, tokenizer)) = open(checkpoint) else { return };
        for name in TEXTS {
            let Some(path) = shared(&format!("models/tiny/eval_{name}.txt")) else { return };
            let tokens = tokenizer.encode(&std::fs::read_to_string(path).unwrap()).unwrap();
            let whole = &tokens[..tokens.len() / 127 * 127];
            let bos = tokenizer.bos();
            let found =
                perplexity_of_tokens(&model, whole, bos, name, windows, &mut |_, _| {}).unwrap();
            assert_eq!(found.tokens, whole.len());
            let expected = expected[checkpoint][name].as_f64().unwrap();
            largest = largest.max((found.perplexity() - expected).abs());
            assert!(
                (found.perplexity() - expected).abs() < 1e-3,
                "{checkpoint} on {name}: {} against {expected}",
                found.perplexity()
            );
        }
    }
    println!("largest difference in perplexity: {largest:.6}");
}

/// The last short window counts in the command's own measure.
#[test]
fn the_last_short_window_counts() {
    let Some((model, tokenizer)) = open("base") else { return };
    let Some(path) = shared("models/tiny/eval_prose.txt") else { return };
    let text: String = std::fs::read_to_string(path).unwrap().chars().take(1000).collect();
    let tokens = tokenizer.encode(&text).unwrap().len();
    let windows = Windows { window: 128, stride: None };
    let found = perplexity(&model, &tokenizer, &text, "prose", windows, &mut |_, _| {}).unwrap();
    assert_eq!(found.tokens, tokens);
    assert!(tokens % 127 != 0, "the text ends with a window");
}

struct Silent(usize);

impl Watcher for Silent {
    fn advance(&mut self, tokens: usize) {
        self.0 += tokens;
    }

    fn routed(&mut self, _: WindowRouting<'_>) {
        panic!("a dense model has no experts");
    }

    fn go_on(&mut self) -> Result<(), ModelError> {
        Ok(())
    }
}

/// Layer by layer, all texts together: the numbers of the whole model, text by text.
#[test]
fn one_layer_at_a_time_gives_the_same() {
    let Some(path) = shared("models/tiny/code") else { return };
    let source = Source::open(&path.display().to_string().parse().unwrap(), &path).unwrap();
    let (model, tokenizer) = open("code").unwrap();
    let mut encoded = Vec::new();
    for name in TEXTS {
        let Some(path) = shared(&format!("models/tiny/eval_{name}.txt")) else { return };
        let text: String = std::fs::read_to_string(path).unwrap().chars().take(3000).collect();
        encoded.push(tokenizer.encode(&text).unwrap());
    }
    let texts: Vec<_> =
        encoded.iter().map(|tokens| TokenText { tokens, origin: "a text" }).collect();
    let windows = Windows { window: 100, stride: Some(60) };
    for bos in [None, Some(1)] {
        let mut silent = Silent(0);
        let found =
            perplexities(&source, &texts, bos, windows, &mut silent, &Placement::cpu()).unwrap();
        assert_eq!(silent.0, found.iter().map(|p| p.computed).sum::<usize>());
        for (found, tokens) in found.iter().zip(&encoded) {
            let whole =
                perplexity_of_tokens(&model, tokens, bos, "a text", windows, &mut |_, _| {})
                    .unwrap();
            assert_eq!(found.tokens, whole.tokens);
            let difference = (found.perplexity() / whole.perplexity() - 1.0).abs();
            assert!(difference < 2e-6, "{difference}");
        }
    }
}
