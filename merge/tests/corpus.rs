//! Replays the fuzz corpus of recipes: whatever the text, an answer and no panic.

use std::fs;

use moe_merge_merge::recipe;

/// Files named `ok-*` are read, the others refused, each mistake with its words.
#[test]
fn recipes() {
    let folder = moe_merge_testkit::repository("fuzz/corpus/recipe");
    let mut paths: Vec<_> =
        fs::read_dir(&folder).expect("there").map(|entry| entry.expect("listed").path()).collect();
    paths.sort();
    assert!(paths.len() >= 20, "{} files", paths.len());
    for path in paths {
        let text = fs::read_to_string(&path).expect("UTF-8");
        let good = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ok-"));
        match recipe::parse(&text, &path) {
            Ok(_) => assert!(good, "{} was read", path.display()),
            Err(errors) => {
                assert!(!good, "{} was refused: {:?}", path.display(), errors.0);
                assert!(!errors.0.is_empty());
                for error in &errors.0 {
                    assert!(!error.what.is_empty() && !error.to_text().is_empty());
                }
            }
        }
    }
}
