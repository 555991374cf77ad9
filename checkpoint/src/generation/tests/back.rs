//! Going back to earlier generations, forgetting them, opening them.

use super::*;

fn back(dir: &Path, to: Option<u32>) -> Result<Generation, CheckpointError> {
    rollback(dir, to, Some("not better"), watch(&Interrupt::default()))
}

/// Files of the model itself.
fn model_files(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = hashes(dir);
    all.retain(|path, _| !path.starts_with(".moe-merge"));
    all
}

#[test]
fn the_files_of_a_generation_come_back() {
    for kind in KINDS {
        let dir = folder(kind);
        let dir = dir.path();
        let mut states = vec![model_files(dir)];
        for value in [7.0, 8.0] {
            apply(dir, &routers(value, &[0, 1])).unwrap();
            states.push(model_files(dir));
        }
        // Nothing named: the last change, then the one before it.
        for (to, value) in [(1, 7.0), (0, 1.0)] {
            let made = back(dir, None).unwrap();
            assert_eq!(made.parent + 1, made.number);
            let lines = history(dir).unwrap();
            assert_eq!(lines.last().unwrap().details, json!({"to": to}), "{kind:?}");
            assert_eq!(values(dir), [value, value, 5.0], "{kind:?}");
            whole(dir);
            let mut expected = states[to].clone();
            if kind == Kind::NoIndex && to == 0 {
                // Shards without an index get one.
                let index = PathBuf::from(INDEX_NAME);
                expected.insert(index.clone(), model_files(dir)[&index].clone());
            }
            assert_eq!(model_files(dir), expected, "{kind:?} {to}");
        }
        assert!(matches!(back(dir, None), Err(CheckpointError::NoGeneration { .. })), "{kind:?}");
        back(dir, Some(2)).unwrap();
        assert_eq!((model_files(dir), values(dir)[0]), (states[2].clone(), 8.0), "{kind:?}");
        whole(dir);
        for (generation, value) in [(0, 1.0), (1, 7.0), (2, 8.0), (3, 7.0), (4, 1.0), (5, 8.0)] {
            let then = super::super::open_old(dir, generation).unwrap();
            assert_eq!(then.tensors[GATES[1]].to_f32().unwrap(), [value; 8], "{kind:?}");
            assert_eq!(then.tensors[SHARED].shape(), [4]);
        }
        let unknown = back(dir, Some(9)).unwrap_err();
        assert!(matches!(unknown, CheckpointError::NoGeneration { wanted: 9, last: Some(5), .. }));
        apply(dir, &routers(9.0, &[0, 1])).unwrap();
        assert_eq!(values(dir), [9.0, 9.0, 5.0]);
        whole(dir);
    }
}

/// Kills a rollback before each of its steps, looks at the folder as loaders do, then goes on.
#[test]
fn a_rollback_that_ends_half_way_leaves_the_old_or_the_new_model() {
    for kind in KINDS {
        for to in [0, 1] {
            let mut seen = BTreeSet::new();
            for steps in 0.. {
                let dir = folder(kind);
                let dir = dir.path();
                apply(dir, &routers(7.0, &[0, 1])).unwrap();
                apply(dir, &routers(8.0, &[0, 1])).unwrap();
                if to == 1 {
                    // Also from a model that is one file again.
                    back(dir, Some(0)).unwrap();
                }
                let old = values(dir)[0];
                let new = if to == 0 { 1.0 } else { 7.0 };
                crash::after(Some(steps));
                let ended = back(dir, Some(to));
                let done = !crash::crashed();
                crash::after(None);
                let now = values(dir);
                assert!(now[0] == old || now[0] == new, "{kind:?} {steps}: {now:?}");
                assert_eq!(now, [now[0], now[0], 5.0], "{kind:?} {steps}");
                assert_eq!(now[0], bf16(&as_loaders_do(dir)), "{kind:?} {steps}");
                whole(dir);
                seen.insert(now[0] as i32);
                if done {
                    ended.unwrap();
                    break;
                }
                let again = if steps % 2 == 0 {
                    recover(dir).unwrap();
                    now[0]
                } else {
                    apply(dir, &routers(9.0, &[0, 1])).unwrap();
                    9.0
                };
                // A model in one file may have been between index and file: then it goes forward.
                let after = values(dir);
                assert!(after[0] == again || after[0] == new, "{kind:?} {steps}: {after:?}");
                whole(dir);
                assert!(!switch::is_unfinished(dir), "{kind:?} {steps}");
            }
            assert_eq!(seen.len(), 2, "{kind:?}: both sides of the switch were seen: {seen:?}");
        }
    }
}

#[test]
fn what_is_forgotten_cannot_come_back() {
    let dir = folder(Kind::Own);
    let dir = dir.path();
    for value in [7.0, 8.0, 9.0] {
        apply(dir, &routers(value, &[0, 1])).unwrap();
    }
    let stored = || fs::read_dir(dir.join(".moe-merge/store")).into_iter().flatten().count();
    assert_eq!(stored(), 3);
    let pruned = prune(dir, 1).unwrap();
    assert_eq!((pruned.files, pruned.generations, stored()), (2, vec![0, 1], 1));
    let error = back(dir, Some(1)).unwrap_err();
    assert!(error.to_string().contains("of generation 1 is gone"), "{error}");
    assert_eq!(values(dir)[0], 9.0);
    back(dir, Some(2)).unwrap();
    assert_eq!(values(dir)[0], 8.0);
    let pruned = prune(dir, 0).unwrap();
    assert_eq!((pruned.generations, stored()), (vec![3], 0));
    let checked = check(dir, &Interrupt::default()).unwrap();
    assert_eq!(checked.problems, []);
    assert_eq!(checked.notes.len(), 3, "{:?}", checked.notes);
}

/// Somebody who writes a history by hand, chain and all, cannot make a rollback write elsewhere.
#[test]
fn a_history_that_leads_out_of_the_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("model");
    fs::create_dir(&inner).unwrap();
    model(&inner, Kind::Own);
    apply(&inner, &routers(7.0, &[0, 1])).unwrap();
    let lines = history(&inner).unwrap();
    let old = inner.join(".moe-merge/manifests/0.json");
    let text = fs::read_to_string(&old).unwrap();
    let shard = lines[1].removed.iter().find(|f| f.name != INDEX_NAME).unwrap();
    let forged = text.replace(&shard.name, "../outside.safetensors");
    assert_ne!(forged, text);
    fs::write(&old, &forged).unwrap();
    let mut journal = String::new();
    for line in lines {
        let mut line = line;
        if line.generation == 0 {
            line.manifest = crate::manifest::hash_bytes(forged.as_bytes());
        } else {
            line.previous = Some(crate::manifest::hash_bytes(journal.trim_end().as_bytes()));
        }
        journal += &line.text();
    }
    fs::write(inner.join(JOURNAL_NAME), journal).unwrap();
    let error = back(&inner, None).unwrap_err().to_string();
    assert!(error.contains("outside the folder"), "{error}");
    assert!(!dir.path().join("outside.safetensors").exists());
    assert!(super::super::open_old(&inner, 0).is_err());
    assert_eq!(values(&inner)[0], 7.0);
}
