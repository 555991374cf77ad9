//! The configuration of an adapter, beside weights that are none.
#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // One folder per process, in memory where the system has such a place.
    let folder = if Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
    let dir = folder.join(format!("moe-merge-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("room for a folder");
    std::fs::write(dir.join("adapter_config.json"), bytes).expect("room for a small file");
    std::fs::write(dir.join("adapter_model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").expect("room for a small file");
    if let Ok(info) = moe_merge_checkpoint::adapter::describe(&dir) {
        assert!(info.rank > 0 && info.alpha.is_finite());
    }
    let _ = std::fs::remove_dir_all(&dir);
});
