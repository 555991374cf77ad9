//! A GGUF file: header, then every row of every tensor, then the model with its config and tokenizer.
#![no_main]

use std::path::Path;

use moe_merge_checkpoint::gguf;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = gguf::parse(bytes, "x".as_ref()) else { return };
    for tensor in &header.tensors {
        assert!(bytes.get(tensor.range.clone()).is_some());
    }
    // One file per process, in memory where the system has such a place.
    let folder = if Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    let path = folder.join(format!("moe-merge-fuzz-{}.gguf", std::process::id()));
    std::fs::write(&path, bytes).expect("room for a small file");
    for opened in [gguf::open_raw(&path).ok(), gguf::open(&path).ok().map(|source| source.tensors)] {
        for (name, weight) in opened.into_iter().flatten() {
            let values = weight.to_f32().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(values.len(), weight.len());
        }
    }
    let _ = std::fs::remove_file(&path);
});
