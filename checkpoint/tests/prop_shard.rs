//! Damaged files are refused or read, never a panic; whole ones are read as the safetensors crate reads them.

use std::collections::BTreeMap;
use std::path::Path;

use moe_merge_checkpoint::{header, index};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn tensors() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<usize>)>> {
    let dtype = prop::sample::select(vec![
        Dtype::F32,
        Dtype::BF16,
        Dtype::F16,
        Dtype::I64,
        Dtype::U8,
        Dtype::BOOL,
        Dtype::F8_E4M3,
        Dtype::F64,
    ]);
    let shape = prop::collection::vec(0usize..4, 0..4);
    prop::collection::btree_map("[a-z.\"\\\\é0-9]{1,12}", (dtype, shape), 0..8)
}

fn file(tensors: &BTreeMap<String, (Dtype, Vec<usize>)>) -> Vec<u8> {
    let data = |dtype: Dtype, shape: &[usize]| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (0..bytes).map(|i| i as u8).collect::<Vec<u8>>()
    };
    let filled: Vec<_> =
        tensors.iter().map(|(n, (d, s))| (n.clone(), *d, s.clone(), data(*d, s))).collect();
    let views = filled.iter().map(|(n, d, s, b)| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// Ours and the reference agree about `bytes`, or ours is the stricter one.
fn compare(bytes: &[u8]) -> Result<bool, TestCaseError> {
    let ours = header::parse(bytes, Path::new("x"));
    let theirs = SafeTensors::deserialize(bytes);
    let Ok(ours) = ours else { return Ok(false) };
    let theirs =
        theirs.map_err(|e| TestCaseError::fail(format!("only the reference refuses: {e}")))?;
    prop_assert_eq!(ours.tensors.len(), theirs.len());
    for tensor in &ours.tensors {
        let view = theirs.tensor(&tensor.name).unwrap();
        prop_assert_eq!(&tensor.shape, view.shape());
        prop_assert_eq!(tensor.stored, view.dtype().to_string());
        prop_assert_eq!(&bytes[tensor.range.clone()], view.data());
    }
    Ok(true)
}

proptest! {
    #[test]
    fn whole_files_are_read_as_the_reference_reads_them(tensors in tensors()) {
        prop_assert!(compare(&file(&tensors))?, "a whole file was refused");
    }

    #[test]
    fn truncated_files_are_refused(tensors in tensors(), cut in any::<prop::sample::Index>()) {
        let mut bytes = file(&tensors);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(header::parse(&bytes, Path::new("x")).is_err());
    }

    #[test]
    fn mutated_files_never_panic(
        tensors in tensors(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = file(&tensors);
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        compare(&bytes)?;
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        compare(&bytes)?;
        let _ = index::parse(&bytes, Path::new("x"));
    }

    #[test]
    fn mutated_indexes_never_panic(at in 0usize..80, value in any::<u8>()) {
        let mut json = br#"{"metadata":{"total_size":8},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#.to_vec();
        json[at] = value;
        let _ = index::parse(&json, Path::new("x"));
    }
}
