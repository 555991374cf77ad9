//! The real SmolLM2-135M-Instruct GGUF: tokenisation, logits and greedy text.
//!
//! The file is 98 MB and not in the repository: `recipes/smollm2.yaml` says how to get it.

mod common;

use moe_merge_model::{Cache, LogitRows, Model, Tokenizer};
use moe_merge_testkit::golden::{self, LOGITS_F32};
use moe_merge_testkit::{repository, shared};

const SENTENCE: &str = "The expert that knows arithmetic says that 12 + 30 = 42, and the other one writes Rust: fn main() {";

#[test]
fn tokens_logits_and_text_are_those_of_transformers() {
    let Some(expected) = shared("golden/gguf/smollm2.expected.safetensors") else { return };
    let file = repository("recipes/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !file.exists() {
        eprintln!("SKIPPED: {} is not here, see recipes/smollm2.yaml", file.display());
        return;
    }
    let expected = golden::load(&expected);
    let source = common::open(&file);
    let tokenizer = Tokenizer::from_source(&source).unwrap();
    let ids = tokenizer.encode(SENTENCE).unwrap();
    assert_eq!(ids, expected["input_ids"].ids());

    let model = Model::open(&source).unwrap();
    let logits = common::logits(&model, &ids);
    let last = &logits[logits.len() - 4 * model.spec().vocab..];
    let difference = golden::relative_difference(last, &expected["logits"].values);
    println!("largest difference {difference:.2e}");
    assert!(difference <= LOGITS_F32, "{difference}");

    let greedy = expected["greedy"].ids();
    let mut text = ids[..12].to_vec();
    let mut cache = Cache::new(&model, greedy.len());
    let mut next = model.forward(&text, &mut cache, LogitRows::Last).unwrap();
    while text.len() < greedy.len() {
        let best = next.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
        text.push(best);
        if text.len() < greedy.len() {
            next = model.forward(&[best], &mut cache, LogitRows::Last).unwrap();
        }
    }
    assert_eq!(text, greedy);
}
