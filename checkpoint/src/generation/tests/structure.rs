//! Changes of the model's structure: tensors that come and go together with `config.json`.

use super::*;

const THIRD: &str = "model.layers.0.block_sparse_moe.experts.2.w1.weight";

fn named(name: &str, value: f32, shape: &[usize]) -> (String, WeightRef) {
    let values = vec![value; shape.iter().product()];
    (name.into(), Arc::new(OwnedWeight::from_f32("new", &values, shape, Dtype::BF16)))
}

fn config(experts: usize) -> Option<Map<String, Value>> {
    json!({"model_type": "mixtral", "num_local_experts": experts}).as_object().cloned()
}

/// One more expert, and routers that know it.
fn add() -> Change<'static> {
    let routers = GATES.map(|gate| named(gate, 7.0, &[3, 4])).to_vec();
    Change {
        action: "add",
        tensors: vec![
            NewTensors { role: "expert-02".into(), tensors: vec![named(THIRD, 4.0, &[3, 4])] },
            NewTensors { role: "router".into(), tensors: routers },
        ],
        config: config(3),
        experts: Some(["a", "b", "c"].map(str::to_owned).to_vec()),
        ..Change::default()
    }
}

/// The first expert goes, the second one takes its number.
fn drop_first(dir: &Path) -> Change<'static> {
    let kept = open(dir).tensors[EXPERTS[1]].clone();
    let routers = GATES.map(|gate| named(gate, 7.0, &[1, 4])).to_vec();
    Change {
        action: "drop",
        tensors: vec![
            NewTensors { role: "expert-00".into(), tensors: vec![(EXPERTS[0].into(), kept)] },
            NewTensors { role: "router".into(), tensors: routers },
        ],
        remove: EXPERTS.map(str::to_owned).to_vec(),
        config: config(1),
        ..Change::default()
    }
}

/// The experts that configuration, routers and experts speak of, which have to agree; the first number of each expert.
#[track_caller]
fn experts(dir: &Path) -> Vec<f32> {
    let source = open(dir);
    let by_config = source.config.usize("num_local_experts").unwrap();
    for gate in GATES {
        assert_eq!(source.tensors[gate].shape(), [by_config, 4]);
    }
    let found = source.tensors.iter().filter(|(name, _)| name.contains(".experts."));
    let found: Vec<f32> = found.map(|(_, w)| w.to_f32().unwrap()[0]).collect();
    assert_eq!(found.len(), by_config);
    found
}

fn total_size(dir: &Path) -> u64 {
    let index: Value = serde_json::from_slice(&fs::read(dir.join(INDEX_NAME)).unwrap()).unwrap();
    index["metadata"]["total_size"].as_u64().unwrap()
}

#[test]
fn experts_come_and_go() {
    for kind in [Kind::Own, Kind::Numbered, Kind::NoIndex, Kind::Single, Kind::Pickled] {
        let dir = folder(kind);
        let dir = dir.path();
        let before = hashes(dir);
        apply(dir, &add()).unwrap();
        assert_eq!(experts(dir), [2.0, 3.0, 4.0], "{kind:?}");
        whole(dir);
        // Two routers of 3 x 4, one of them f32; three experts of 3 x 4; the norm.
        assert_eq!(total_size(dir), 48 + 24 + 3 * 24 + 8, "{kind:?}");
        rollback(dir, None, None, watch(&Interrupt::default())).unwrap();
        assert_eq!(experts(dir), [2.0, 3.0], "{kind:?}");
        whole(dir);
        let mut now = hashes(dir);
        now.retain(|path, _| before.contains_key(path) && !path.starts_with(".moe-merge"));
        let own = before.iter().filter(|(path, _)| !path.starts_with(".moe-merge"));
        assert_eq!(now, own.map(|(p, h)| (p.clone(), h.clone())).collect(), "{kind:?}");
        apply(dir, &drop_first(dir)).unwrap();
        assert_eq!(experts(dir), [3.0], "{kind:?}");
        whole(dir);
        // Not in any file that loaders read, whatever the index says.
        let read = as_loaders_do(dir);
        assert!(!read.contains_key(EXPERTS[1]), "{kind:?}");
        rollback(dir, Some(1), None, watch(&Interrupt::default())).unwrap();
        assert_eq!(experts(dir), [2.0, 3.0, 4.0], "{kind:?}");
        whole(dir);
    }
}

/// One expert of a fused tensor gets new values, the others keep theirs, and no file is touched.
#[test]
fn a_part_of_a_fused_tensor_is_replaced() {
    let dir = folder(Kind::Fused);
    let dir = dir.path();
    let before = hashes(dir);
    let part =
        |expert: usize| format!("model.layers.0.block_sparse_moe.experts.{expert}.w2.weight");
    for (generation, (expert, value)) in [(1, 9.0), (0, 8.0)].into_iter().enumerate() {
        let weight = OwnedWeight::from_f32("new", &[value; 12], &[3, 4], Dtype::F32);
        let tensors = vec![(part(expert), Arc::new(weight) as WeightRef)];
        let tensors = vec![NewTensors { role: format!("expert-0{expert}"), tensors }];
        let made = apply(dir, &Change { action: "swap", tensors, ..Change::default() }).unwrap();
        assert_eq!(made.tensors, ["model.layers.0.mlp.experts.down_proj"]);
        let source = open(dir);
        let values = [0, 1].map(|e| source.tensors[&part(e)].to_f32().unwrap());
        let expected = if generation == 0 { [2.5, 9.0] } else { [8.0, 9.0] };
        assert_eq!(values, expected.map(|v| vec![v; 12]));
        whole(dir);
        let loaded = &as_loaders_do(dir)["model.layers.0.mlp.experts.down_proj"];
        assert_eq!(loaded.len(), 2 * 24);
        assert_eq!(loaded[24..], [0x10, 0x41].repeat(12), "9 in bf16");
    }
    let after = hashes(dir);
    let file = |all: &BTreeMap<PathBuf, String>, start: &str| {
        all.iter().find(|(n, _)| n.to_string_lossy().starts_with(start)).map(|(_, h)| h.clone())
    };
    assert_eq!(file(&after, "model-base-"), file(&before, "model.safetensors"));
    // The second change wrote the experts' file anew, without leaving the first one's beside it.
    assert_eq!(weight_files(dir).len(), 2);
}

/// Fused experts go to the hub layout, all at once.
#[test]
fn a_fused_layer_becomes_experts() {
    let dir = folder(Kind::Fused);
    let dir = dir.path();
    let part = |e: usize| format!("model.layers.0.block_sparse_moe.experts.{e}.w2.weight");
    let all = (0..2).map(|e| NewTensors {
        role: format!("expert-{e:02}"),
        tensors: vec![named(&part(e), 6.0 + e as f32, &[3, 4])],
    });
    let change = Change {
        action: "drop",
        tensors: all.collect(),
        remove: vec![part(0), part(1)],
        config: config(2),
        ..Change::default()
    };
    apply(dir, &change).unwrap();
    let source = open(dir);
    assert_eq!([0, 1].map(|e| source.tensors[&part(e)].to_f32().unwrap()[0]), [6.0, 7.0]);
    assert!(!as_loaders_do(dir).keys().any(|n| n.ends_with("down_proj")));
    whole(dir);
}

/// Kills a change of the structure before each of its steps: configuration and weights always agree.
#[test]
fn configuration_and_weights_change_together() {
    for kind in [Kind::Own, Kind::Numbered, Kind::Single] {
        for dropping in [false, true] {
            let mut seen = BTreeSet::new();
            for steps in 0.. {
                let dir = folder(kind);
                let dir = dir.path();
                let change = if dropping { drop_first(dir) } else { add() };
                crash::after(Some(steps));
                let ended = apply(dir, &change);
                let done = !crash::crashed();
                crash::after(None);
                let now = experts(dir);
                seen.insert(now.len());
                whole(dir);
                if done {
                    ended.unwrap();
                    break;
                }
                recover(dir).unwrap();
                let after = experts(dir);
                assert!(after == now || kind == Kind::Single, "{kind:?} {steps} {now:?} {after:?}");
                whole(dir);
                // Now also for who knows nothing of a change that is under way.
                let config: Value =
                    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
                assert_eq!(config["num_local_experts"], after.len());
            }
            assert_eq!(seen.len(), 2, "{kind:?}: {seen:?}");
        }
    }
}

/// A reader that opens the model again and again while experts come and go never sees a mixture.
#[test]
fn a_reader_follows_the_structure() {
    let dir = folder(Kind::Own);
    let dir = dir.path();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for _ in 0..15 {
                apply(dir, &add()).unwrap();
                rollback(dir, None, None, watch(&Interrupt::default())).unwrap();
            }
        });
        while !writer.is_finished() {
            let count = experts(dir).len();
            assert!(count == 2 || count == 3);
        }
    });
    assert_eq!(experts(dir).len(), 2);
}
