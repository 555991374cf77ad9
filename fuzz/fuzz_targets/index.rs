//! The index of a sharded checkpoint.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = moe_merge_checkpoint::index::parse(bytes, "x".as_ref()) {
        let inside = |shard: &&str| !shard.starts_with('/') && shard.split('/').all(|part| part != "..");
        assert!(index.shards().iter().all(inside));
    }
});
