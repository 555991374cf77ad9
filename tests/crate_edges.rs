//! The arrows between the crates point one way only.

use std::collections::{BTreeMap, BTreeSet};

/// Which workspace crates each crate may use, outside its tests. `moe-merge` is the command line.
const ALLOWED: &[(&str, &[&str])] = &[
    ("moe-merge-kernels", &[]),
    ("moe-merge-checkpoint", &["moe-merge-kernels"]),
    ("moe-merge-router", &["moe-merge-kernels"]),
    ("moe-merge-model", &["moe-merge-checkpoint", "moe-merge-kernels"]),
    (
        "moe-merge-merge",
        &["moe-merge-checkpoint", "moe-merge-kernels", "moe-merge-model", "moe-merge-router"],
    ),
    (
        "moe-merge-adapt",
        &[
            "moe-merge-checkpoint",
            "moe-merge-kernels",
            "moe-merge-merge",
            "moe-merge-model",
            "moe-merge-router",
        ],
    ),
    ("moe-merge-serve", &["moe-merge-adapt", "moe-merge-checkpoint", "moe-merge-model"]),
    ("moe-merge-testkit", &[]),
    (
        "moe-merge",
        &[
            "moe-merge-adapt",
            "moe-merge-checkpoint",
            "moe-merge-kernels",
            "moe-merge-merge",
            "moe-merge-model",
            "moe-merge-router",
            "moe-merge-serve",
        ],
    ),
];

/// External crates that would bring a layer's forbidden work with them.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("moe-merge-kernels", &["candle-core", "serde_json", "fs-err"]),
    ("moe-merge-checkpoint", &["serde-saphyr", "clap", "indicatif"]),
    ("moe-merge-router", &["candle-core", "fs-err", "memmap2"]),
    ("moe-merge-model", &["clap", "indicatif", "axum"]),
    ("moe-merge-merge", &["clap", "indicatif", "miette"]),
    ("moe-merge-adapt", &["clap", "indicatif", "miette", "axum"]),
];

#[test]
fn crates_use_only_what_lies_below_them() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let names: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    assert_eq!(names, allowed.keys().copied().collect(), "every crate has its row in ALLOWED");

    for package in packages {
        let name = package["name"].as_str().expect("name");
        let used: BTreeSet<&str> = package["dependencies"]
            .as_array()
            .expect("dependencies")
            .iter()
            .filter(|d| d["kind"].is_null())
            .filter_map(|d| d["name"].as_str())
            .collect();
        for inner in used.iter().filter(|d| names.contains(*d)) {
            assert!(allowed[name].contains(inner), "{name} must not use {inner}");
        }
        let forbidden = FORBIDDEN.iter().find(|(n, _)| *n == name).map_or(&[][..], |(_, f)| f);
        for outer in forbidden {
            assert!(!used.contains(outer), "{name} must not use {outer}");
        }
    }
}
