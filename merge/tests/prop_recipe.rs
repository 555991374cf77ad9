//! No text makes the reader of recipes panic or run for long.

use std::time::{Duration, Instant};

use moe_merge_merge::recipe;
use moe_merge_testkit::shared;
use proptest::prelude::*;

const SEEDS: &[&str] = &[
    "base_model: b\nexperts:\n  - source_model: a+c@1\n    positive_prompts: &p [x, 'y']\n    layers: [0, 3]\n  - source_model: {model: {path: q}}\n    positive_prompts: [z]\n    negative_prompts: *p\ngate_mode: hidden\nexperts_per_token: 2\nattention: average\n",
    "merge_method: ties\nbase_model: a\nmodels:\n- model: b\n  parameters:\n    weight:\n    - {filter: mlp, value: [0, 1]}\n    - value: 0.5\nparameters: {normalize: true, lambda: 1e-1}\ndtype: float32\n",
    "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [0, 3], parameters: {scale: 2}}\n",
];

fn parse(text: &str) {
    let started = Instant::now();
    if let Err(errors) = recipe::parse(text, "fuzz.yaml".as_ref()) {
        assert!(!errors.0.is_empty());
        for error in &errors.0 {
            assert!(!error.what.is_empty() && !error.to_text().is_empty());
        }
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_text(text in "\\PC{0,200}") {
        parse(&text);
    }

    #[test]
    fn text_of_yaml_signs(text in "[a:\\-\\[\\]{}&*!|>'\"#%@,? \n\t0-9.<]{0,200}") {
        parse(&text);
    }

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        parse(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn mutations(
        seed in 0..SEEDS.len(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 1..6),
    ) {
        let mut bytes = SEEDS[seed].as_bytes().to_vec();
        for (at, kind, byte) in edits {
            let at = at.index(bytes.len().max(1)).min(bytes.len().saturating_sub(1));
            match kind {
                _ if bytes.is_empty() => bytes.push(byte),
                0 => bytes[at] = byte,
                1 => { bytes.remove(at); }
                2 => bytes.insert(at, byte),
                _ => { bytes.truncate(at); }
            }
        }
        parse(&String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn the_seeds_are_recipes() {
    for seed in SEEDS {
        recipe::parse(seed, "seed.yaml".as_ref()).unwrap();
    }
}

#[test]
fn every_beginning_of_the_golden_recipes() {
    let Some(folder) = shared("golden/moe") else { return };
    for name in ["mixtral_hidden_negative", "qwen2_moe_hidden"] {
        let text = fs_err::read_to_string(folder.join(format!("{name}.yaml"))).unwrap();
        for end in (0..text.len()).step_by(7).filter(|&i| text.is_char_boundary(i)) {
            parse(&text[..end]);
        }
    }
}

#[test]
fn bombs_are_refused_quickly() {
    let mut bomb = String::from("base_model: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..30 {
        let refs = vec![format!("*a{}", i - 1); 9].join(", ");
        bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    let deep = format!("experts: {}{}", "[".repeat(50_000), "]".repeat(50_000));
    let nested = (0..200).fold(String::from("x"), |inner, _| {
        format!("{{merge_method: linear, models: [{{model: {inner}}}]}}")
    });
    let block: String = (0..500).map(|i| format!("{}experts:\n", "  ".repeat(i))).collect();
    let keys: String = (0..20_000).map(|i| format!("k{i}: 1\n")).collect();
    let long_key = format!("{}: 1\nexperts: []\n", "k".repeat(100_000));
    for text in [bomb, deep, nested, block, keys, long_key, "a".repeat(17 << 20)] {
        parse(&text);
        assert!(recipe::parse(&text, "bomb.yaml".as_ref()).is_err());
    }
}
