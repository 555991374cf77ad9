//! Q8_0 blocks equal those of gguf-py bit by bit.

use std::sync::Arc;

use moe_merge_checkpoint::gguf::{self, GgufPlan, GgufTensor, Storage};
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch;
use moe_merge_checkpoint::{Dtype, Interrupt, Replace};
use moe_merge_testkit::repository;
use safetensors::SafeTensors;

#[test]
fn blocks_equal_gguf_pys() {
    let file = std::fs::read(repository("checkpoint/tests/data/q8_0.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let (values, blocks) = (file.tensor("values").unwrap(), file.tensor("blocks").unwrap());
    let shape = values.shape().to_vec();
    let numbers: Vec<f32> = values
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let weight = OwnedWeight::from_f32("w", &numbers, &shape, Dtype::F32);
    let plan = GgufPlan {
        metadata: Vec::new(),
        tensors: vec![GgufTensor {
            name: "w".into(),
            shape,
            storage: Storage::Q8_0,
            parts: vec![Arc::new(weight)],
        }],
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q8_0.gguf");
    let interrupt = Interrupt::default();
    let watch = Watch { interrupt: &interrupt, progress: &|_| {} };
    plan.write(&path, Replace::Never, &[], watch).unwrap();
    let written = std::fs::read(&path).unwrap();
    let header = gguf::parse(&written, &path).unwrap();
    let found = &written[header.tensor("w").unwrap().range.clone()];
    assert_eq!(found.len(), blocks.data().len());
    let differing = found.iter().zip(blocks.data()).position(|(a, b)| a != b);
    assert_eq!(differing, None, "of {} bytes", found.len());
}
