//! The index of a sharded checkpoint.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = moe_merge_checkpoint::index::parse(bytes, "x".as_ref()) {
        assert!(index.shards().iter().all(|s| !s.starts_with('/') && !s.contains("../")));
    }
});
