//! A recipe: typed, or refused with at least one mistake.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(errors) = moe_merge_merge::recipe::parse(text, "fuzz.yaml".as_ref()) {
        assert!(!errors.0.is_empty());
        for error in &errors.0 {
            assert!(!error.what.is_empty() && !error.to_text().is_empty());
        }
    }
});
