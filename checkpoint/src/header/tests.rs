use super::*;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn reads_tensors_in_the_order_of_their_bytes() {
    let header = r#"{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},"__metadata__":{"format":"pt"},
        "a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"z":{"dtype":"F32","shape":[0,4],"data_offsets":[8,8]}}"#;
    let parsed = parse(&file(header, 20), "x".as_ref()).unwrap();
    let start = 8 + header.len();
    let names: Vec<_> = parsed.tensors.iter().map(|t| (t.name.as_str(), t.range.clone())).collect();
    assert_eq!(
        names,
        [("a", start..start + 8), ("z", start + 8..start + 8), ("b", start + 8..start + 20)]
    );
    assert_eq!(parsed.tensors[0].dtype, None);
    assert_eq!(parsed.tensors[0].stored, "I64");
    assert_eq!(parsed.tensors[2].shape, [2, 3]);
    assert_eq!(parsed.metadata["format"], "pt");
}

#[test]
fn sizes() {
    assert_eq!(size_in_bytes(&[], 16), Ok(2));
    assert_eq!(size_in_bytes(&[3, 0], 32), Ok(0));
    assert_eq!(size_in_bytes(&[3], 4), Err("not whole bytes"));
    assert_eq!(size_in_bytes(&[u64::MAX, 2], 8), Err("more than can be counted"));
    assert_eq!(size_in_bytes(&[1 << 62], 32), Err("more than can be counted"));
}

#[test]
fn a_file_without_tensors_is_legal() {
    assert!(parse(&file("{}", 0), "x".as_ref()).unwrap().tensors.is_empty());
}
