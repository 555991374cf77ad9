//! The same bytes come out twice, and with one thread and with two.

use std::collections::BTreeMap;
use std::path::Path;

use assert_cmd::Command;
use moe_merge_testkit::repository;

fn build(out: &Path, threads: &str, recipe: &str) {
    Command::cargo_bin("moe-merge")
        .unwrap()
        .current_dir(repository(""))
        .args([recipe, "--quiet", "--threads", threads, "--out"])
        .arg(out)
        .assert()
        .success();
}

/// Every file below `dir` with its bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                all.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    all
}

#[test]
fn same_bytes_whatever_the_thread_count() {
    let temp = tempfile::tempdir().unwrap();
    let recipe = temp.path().join("recipe.yaml");
    let quickstart = std::fs::read_to_string(repository("recipes/quickstart.yaml")).unwrap();
    let text = quickstart
        .replace("quickstart/", &format!("{}/", repository("recipes/quickstart").display()))
        .replace(
            "  - name: prose",
            "  - name: prose\n    noise_scale: 0.001\n    residual_scale: 0.9",
        );
    let text = text.split("evaluation:").next().unwrap();
    std::fs::write(&recipe, text).unwrap();
    let recipe = recipe.display().to_string();
    // The same folder name each time: it stands in the model card.
    let runs: Vec<_> = ["1", "1", "2"]
        .iter()
        .enumerate()
        .map(|(i, threads)| {
            let out = temp.path().join(i.to_string()).join("moe");
            build(&out, threads, &recipe);
            files(&out)
        })
        .collect();
    assert!(runs[0].len() > 8, "{:?}", runs[0].keys());
    for other in &runs[1..] {
        assert_eq!(runs[0].keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
        for (name, bytes) in &runs[0] {
            assert!(bytes == &other[name], "{name} differs");
        }
    }
}
