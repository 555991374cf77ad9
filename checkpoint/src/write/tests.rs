use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;

use moe_merge_kernels::cast;

use super::*;
use crate::map::MappedFile;
use crate::publish::{Replace, Staging, Unfinished};
use crate::resume::Identity;
use crate::shard;
use crate::weight::{OwnedWeight, RowSlice, Weight};

fn tensor(name: &str, values: &[f32], shape: &[usize], stored: Dtype, out: Dtype) -> OutTensor {
    let weight = Arc::new(OwnedWeight::from_f32(name, values, shape, stored));
    OutTensor { name: name.into(), weight, dtype: out }
}

fn write_all(dir: &Path, shards: &[ShardPlan]) -> Result<Vec<WrittenShard>, CheckpointError> {
    let watch = Watch { interrupt: &Interrupt::default(), progress: &|_| {} };
    write_shards(dir, shards, watch)
}

fn by_content(stem: &str, tensors: Vec<OutTensor>) -> ShardPlan {
    ShardPlan::new(ShardName::ByContent(stem.into()), tensors)
}

#[test]
fn a_reader_finds_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let shard = by_content(
        "expert-03",
        vec![
            tensor("b", &[1.0, 2.0, 3.0], &[3], Dtype::F32, Dtype::BF16),
            tensor("c", &[0.5, -0.5], &[2, 1], Dtype::F32, Dtype::F32),
            tensor("a", &[1.5], &[1], Dtype::BF16, Dtype::BF16),
        ],
    );
    let bytes = AtomicU64::new(0);
    let progress = |n| {
        bytes.fetch_add(n, Ordering::Relaxed);
    };
    let watch = Watch { interrupt: &Interrupt::default(), progress: &progress };
    let written = write_shards(dir.path(), &[shard], watch).unwrap();
    let file = &written[0].file;
    let content = fs::read(dir.path().join(&file.name)).unwrap();
    assert_eq!(file.blake3, blake3::hash(&content).to_hex().to_string());
    assert_eq!(file.name, format!("expert-03-{}.safetensors", &file.blake3[..8]));
    assert_eq!((file.size, bytes.into_inner()), (content.len() as u64, content.len() as u64));
    assert_eq!(written[0].tensors, ["a", "b", "c"]);
    assert_eq!(written[0].tensor_bytes, 8 + 6 + 2);
    let (header, meta) = safetensors::SafeTensors::read_metadata(&content).unwrap();
    assert_eq!(header % 8, 0);
    assert_eq!(meta.metadata().as_ref().unwrap()["format"], "pt");
    // f32 first, so that it stays aligned behind odd numbers of 16-bit values.
    assert_eq!(meta.info("c").unwrap().data_offsets, (0, 8));
    assert_eq!(meta.info("a").unwrap().data_offsets, (8, 10));
    let read: std::collections::BTreeMap<_, _> =
        shard::open(&dir.path().join(&file.name)).unwrap().weights.into_iter().collect();
    assert_eq!((&read["b"] as &dyn Weight).to_f32().unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(read["c"].shape(), [2, 1]);
}

#[test]
fn the_index_is_sorted_and_sums_tensor_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let written = write_all(
        dir.path(),
        &[
            by_content("x", vec![tensor("z", &[1.0], &[1], Dtype::F32, Dtype::F32)]),
            by_content("y", vec![tensor("a", &[1.0, 2.0], &[2], Dtype::F32, Dtype::F16)]),
        ],
    )
    .unwrap();
    write_index(dir.path(), &written).unwrap();
    let text = fs::read_to_string(dir.path().join(INDEX_NAME)).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(index["metadata"]["total_size"], 8);
    let names: Vec<_> = index["weight_map"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["a", "z"]);
    assert_eq!(index["weight_map"]["a"], written[1].file.name);
}

#[test]
fn bad_numbers_are_named_with_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let mut values = vec![1.0; 600_000];
    values[555_555] = f32::NAN;
    for (i, (stored, out)) in
        [(Dtype::F32, Dtype::F32), (Dtype::BF16, Dtype::BF16), (Dtype::F32, Dtype::BF16)]
            .into_iter()
            .enumerate()
    {
        let shard =
            by_content(&i.to_string(), vec![tensor("w", &values, &[600, 1000], stored, out)]);
        match write_all(&dir.path().join("."), &[shard]) {
            Err(CheckpointError::NotFinite { tensor, index: 555_555, .. }) => {
                assert_eq!(tensor, "w");
            }
            other => panic!("{other:?}"),
        }
        fs::remove_file(dir.path().join(".shard-0.partial")).unwrap();
    }
    values[555_555] = 70_000.0;
    let shard = by_content("x", vec![tensor("w", &values, &[600, 1000], Dtype::F32, Dtype::F16)]);
    match write_all(dir.path(), &[shard]) {
        Err(CheckpointError::Malformed { what, found, .. }) => {
            assert!(what.contains("float16") && found == "70000 at flat index 555555", "{found}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_interrupt_stops_the_writing() {
    let dir = tempfile::tempdir().unwrap();
    let values = vec![1.0; 1 << 20];
    let shards: Vec<_> = (0..4)
        .map(|i| {
            let t = tensor("w", &values, &[1 << 10, 1 << 10], Dtype::F32, Dtype::F32);
            by_content(&i.to_string(), vec![t])
        })
        .collect();
    let interrupt = Interrupt::default();
    let seen = AtomicU64::new(0);
    let progress = |n| {
        seen.fetch_add(n, Ordering::Relaxed);
        interrupt.trigger();
    };
    let result =
        write_shards(dir.path(), &shards, Watch { interrupt: &interrupt, progress: &progress });
    assert!(matches!(result, Err(CheckpointError::Interrupted)), "{result:?}");
    assert!(seen.into_inner() < 4 << 20, "stopped long before the end");
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let values: Vec<f32> = (0..700_000).map(|i| (i as f32 * 0.37).sin()).collect();
    let stored = Arc::new(OwnedWeight::from_f32("w", &values, &[700, 1000], Dtype::F32));
    let write = |threads| {
        let dir = tempfile::tempdir().unwrap();
        let shards: Vec<_> = (0..3)
            .map(|i| {
                let weight: WeightRef = Arc::new(RowSlice::new(stored.clone(), i * 100..700));
                let wide =
                    OutTensor { name: "a".into(), weight: weight.clone(), dtype: Dtype::F32 };
                let half = OutTensor { name: "b".into(), weight, dtype: Dtype::BF16 };
                by_content(&format!("s{i}"), vec![wide, half])
            })
            .collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| write_all(dir.path(), &shards)).unwrap()
    };
    let one = write(1);
    assert_eq!(one, write(2));
    assert_eq!(one, write(5));
}

#[test]
fn parts_hold_at_most_the_limit() {
    let make = |n: usize| tensor(&n.to_string(), &vec![0.0; n], &[n], Dtype::F32, Dtype::F32);
    let parts = split([2, 3, 9, 1, 1].map(make).into(), 20);
    let sizes: Vec<Vec<u64>> =
        parts.iter().map(|p| p.iter().map(OutTensor::size).collect()).collect();
    assert_eq!(sizes, [vec![8, 12], vec![36], vec![4, 4]]);
}

#[test]
fn empty_tensors_and_empty_shards() {
    let dir = tempfile::tempdir().unwrap();
    let empty = tensor("e", &[], &[0, 4], Dtype::F32, Dtype::BF16);
    let written =
        write_all(dir.path(), &[by_content("s", vec![empty]), by_content("t", vec![])]).unwrap();
    for shard in &written {
        shard::open(&dir.path().join(&shard.file.name)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_read_is_what_was_rounded(
        shapes in proptest::collection::vec((1usize..40, 1usize..40), 1..6),
        stored in 0usize..3, out in 0usize..3, seed in any::<u32>(),
    ) {
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16];
        let dir = tempfile::tempdir().unwrap();
        let tensors: Vec<_> = shapes.iter().enumerate().map(|(i, &(r, c))| {
            let values: Vec<f32> =
                (0..r * c).map(|k| ((k as u32 ^ seed) as f32 * 1e-3).cos() * 3.0).collect();
            tensor(&format!("t{i}"), &values, &[r, c], dtypes[stored], dtypes[out])
        }).collect();
        let shard = ShardPlan::new(ShardName::Fixed("m.safetensors".into()), tensors.clone());
        write_all(dir.path(), &[shard]).unwrap();
        let read = shard::open(&dir.path().join("m.safetensors")).unwrap().weights;
        prop_assert_eq!(read.len(), tensors.len());
        for (name, weight) in read {
            let from = tensors.iter().find(|t| t.name == name).unwrap();
            let mut expected = vec![0; from.size() as usize];
            cast::narrow(&from.weight.to_f32().unwrap(), from.dtype, &mut expected);
            prop_assert_eq!(weight.bytes().unwrap(), &expected[..]);
            prop_assert_eq!(weight.shape(), from.weight.shape());
        }
    }
}

/// Tensors that are no weights, of eight bytes and of one byte each number: 1, 2, 3, …
fn buffers() -> Vec<OtherTensor> {
    static FILE: LazyLock<MappedFile> = LazyLock::new(|| {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), (1..=200).collect::<Vec<u8>>()).unwrap();
        MappedFile::open(file.path()).unwrap()
    });
    let buffer = |name: &str, dtype: &str, count: usize, range| OtherTensor {
        name: name.into(),
        dtype: dtype.into(),
        shape: vec![count],
        file: FILE.path().to_owned(),
        data: Some((FILE.clone(), range)),
    };
    vec![buffer("u", "BOOL", 33, 50..83), buffer("z", "I64", 5, 0..40)]
}

#[test]
fn buffers_stand_where_their_numbers_are_aligned() {
    let dir = tempfile::tempdir().unwrap();
    let plan = ShardPlan { buffers: buffers(), ..several().remove(0) };
    let written = write_all(dir.path(), &[plan]).unwrap().remove(0);
    assert!(written.tensors.is_sorted() && written.tensors.len() == 12, "{:?}", written.tensors);
    let content = fs::read(dir.path().join(&written.file.name)).unwrap();
    let header = crate::header::parse(&content, dir.path()).unwrap();
    let order: Vec<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!((order[0], order[11]), ("z", "u"));
    assert!(header.tensors[0].range.start.is_multiple_of(64));
    assert_eq!(
        written.tensor_bytes,
        (header.tensors[11].range.end - header.tensors[0].range.start) as u64
    );
    let found = shard::open(&dir.path().join(&written.file.name)).unwrap().other;
    for (found, given) in found.iter().zip(buffers().iter().rev()) {
        assert_eq!(
            (&found.name, &found.dtype, found.bytes()),
            (&given.name, &given.dtype, given.bytes())
        );
    }
    assert_eq!(found.len(), 2);
}

/// Two shards of tensors that are copied, rounded alone, and computed together, with buffers.
fn several() -> Vec<ShardPlan> {
    shifted(0)
}

/// The same with other numbers.
fn shifted(shift: usize) -> Vec<ShardPlan> {
    let numbers = |seed: usize, n: usize| -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 11) % 251) as f32 * 0.37 - 40.0).collect()
    };
    let shard = |stem: &str, seed: usize| {
        let copied = (0..4).map(|i| {
            let values = numbers(seed + i, 600);
            tensor(&format!("c{i}"), &values, &[20, 30], Dtype::BF16, Dtype::BF16)
        });
        let rounded = (0..6).map(|i| {
            let values = numbers(seed + 7 * i, 900);
            tensor(&format!("r{i}"), &values, &[900], Dtype::F32, Dtype::BF16)
        });
        ShardPlan { buffers: buffers(), ..by_content(stem, copied.chain(rounded).collect()) }
    };
    vec![shard("one", 1 + shift), shard("two", 2 + shift)]
}

/// Writes until so many bytes are written, then leaves everything as a killed process does.
fn cut_short(target: &Path, identity: &Identity, bytes: u64) {
    let staging = Staging::resume(target, Replace::Never, identity, Unfinished::TakeUp).unwrap();
    let (interrupt, written) = (Interrupt::default(), AtomicU64::new(0));
    let progress = |n| {
        if written.fetch_add(n, Ordering::Relaxed) + n >= bytes {
            interrupt.trigger();
        }
    };
    let watch = Watch { interrupt: &interrupt, progress: &progress };
    let result = write_logged(staging.path(), &several(), staging.log(), watch);
    assert!(matches!(result, Ok(_) | Err(CheckpointError::Interrupted)), "{result:?}");
    // The folder that is written is removed below: what is left takes the other of two names.
    let names = [".m.moe-merge-1-0", ".m.moe-merge-1-1"];
    let name = if staging.path().ends_with(names[0]) { names[1] } else { names[0] };
    let left = target.with_file_name(name);
    let lock = format!("{}.lock", left.display());
    fs::create_dir(&left).unwrap();
    for entry in fs::read_dir(staging.path()).unwrap().flatten() {
        fs::copy(entry.path(), left.join(entry.file_name())).unwrap();
    }
    fs::copy(format!("{}.lock", staging.path().display()), lock).unwrap();
}

#[test]
fn what_a_killed_run_left_is_gone_on_from_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = write_all(&tempfile::tempdir_in(&dir).unwrap().keep(), &several()).unwrap();
    let total: u64 = whole.iter().map(|s| s.file.size).sum();
    let target = dir.path().join("m");
    let identity = Identity::new("several", &[]);
    let mut went_on = 0;
    for spoil in [false, true] {
        for bytes in [1, 4_000, 7_000, 12_000, 17_000, 25_000, u64::MAX] {
            cut_short(&target, &identity, bytes);
            // Cut short a second time, further on.
            cut_short(&target, &identity, bytes.saturating_add(4_000));
            if spoil {
                for folder in fs::read_dir(dir.path()).unwrap().flatten() {
                    let hidden = folder.file_name().to_string_lossy().starts_with(".m.");
                    let files = fs::read_dir(folder.path()).ok().filter(|_| hidden);
                    for file in files.into_iter().flatten().flatten() {
                        let mut content = fs::read(file.path()).unwrap();
                        content.iter_mut().step_by(700).for_each(|b| *b ^= 1);
                        fs::write(file.path(), content).unwrap();
                    }
                }
            }
            let staging =
                Staging::resume(&target, Replace::Never, &identity, Unfinished::TakeUp).unwrap();
            went_on += u64::from(staging.note().is_some());
            let (interrupt, seen) = (Interrupt::default(), AtomicU64::new(0));
            let progress = |n| {
                seen.fetch_add(n, Ordering::Relaxed);
            };
            let watch = Watch { interrupt: &interrupt, progress: &progress };
            let again = write_logged(staging.path(), &several(), staging.log(), watch).unwrap();
            assert_eq!(again, whole, "{bytes}");
            assert_eq!(seen.into_inner(), total, "{bytes}");
            for shard in &again {
                let content = fs::read(staging.path().join(&shard.file.name)).unwrap();
                assert_eq!(blake3::hash(&content).to_hex().to_string(), shard.file.blake3);
            }
            assert_eq!(fs::read_dir(staging.path()).unwrap().count(), 2);
        }
    }
    assert!(went_on >= 8, "{went_on}");
}

#[test]
fn what_is_there_is_not_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir_in(&dir).unwrap().keep();
    let whole = write_all(&folder, &several()).unwrap();
    let (target, identity) = (dir.path().join("m"), Identity::new("several", &[]));
    for bytes in [12_000, u64::MAX] {
        cut_short(&target, &identity, bytes);
        let staging =
            Staging::resume(&target, Replace::Never, &identity, Unfinished::TakeUp).unwrap();
        let log = staging.log().unwrap();
        let points: Vec<usize> =
            (0..2).map(|i| log.point(i).map_or(0, |p| p.bytes as usize)).collect();
        let interrupt = Interrupt::default();
        let watch = Watch { interrupt: &interrupt, progress: &|_| () };
        // Other numbers: what is of the earlier run can be told from what is computed now.
        let mixed = write_logged(staging.path(), &shifted(5), Some(log), watch).unwrap();
        for ((shard, first), there) in mixed.iter().zip(&whole).zip(points) {
            let found = fs::read(staging.path().join(&shard.file.name)).unwrap();
            let expected = fs::read(folder.join(&first.file.name)).unwrap();
            assert_eq!(found[..there], expected[..there]);
            let end = there == expected.len();
            assert!((end || bytes < u64::MAX) && (found == expected) == end, "{there}");
        }
    }
}

#[test]
fn what_another_make_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("m");
    let (one, two) = (Identity::new("one", &[]), Identity::new("two", &[]));
    cut_short(&target, &one, 17_000);
    let staging = Staging::resume(&target, Replace::Never, &two, Unfinished::TakeUp).unwrap();
    assert!(staging.note().unwrap().contains("its recipe was another"));
    assert_eq!(fs::read_dir(staging.path()).unwrap().count(), 0);
    drop(staging);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    cut_short(&target, &one, 17_000);
    let staging = Staging::resume(&target, Replace::Never, &one, Unfinished::Remove).unwrap();
    assert_eq!((staging.note(), staging.log().unwrap().bytes()), (None, 0));
}
