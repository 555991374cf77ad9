//! One hostile file per way in which a safetensors header can be wrong.

use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, Explain, Kind, header};

fn file(header: &str, data: usize) -> Vec<u8> {
    raw(header.len() as u64, header.as_bytes(), data)
}

fn raw(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    file(
        &format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#),
        data,
    )
}

/// Parses `bytes`, which must be refused with this message, about this tensor, with these words in the fields.
#[track_caller]
fn refused(bytes: &[u8], what: &str, tensor: Option<&str>, expected: &str, found: &str) {
    let error = header::parse(bytes, Path::new("m/x.safetensors")).expect_err("must be refused");
    assert_eq!(error.to_string(), what);
    assert_eq!(error.kind(), Kind::Input);
    match &error {
        CheckpointError::Malformed { file, tensor: t, expected: e, found: f, .. } => {
            assert_eq!(file, Path::new("m/x.safetensors"));
            assert_eq!(t.as_deref(), tensor);
            assert!(e.contains(expected), "expected: {e}");
            assert!(f.contains(found), "found: {f}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn empty_file() {
    refused(b"", "file is empty", None, "8 bytes of header length", "0 bytes");
}

#[test]
fn shorter_than_the_length() {
    refused(&[2, 0, 0, 0, 0, 0, 0], "file is too short", None, "8 bytes", "7 bytes");
}

#[test]
fn header_length_beyond_the_file() {
    let bytes = raw(3, b"{}", 0);
    let what = "header length is beyond the end of the file";
    refused(&bytes, what, None, "3 bytes", "2 bytes");
}

#[test]
fn header_length_beyond_all_measure() {
    for length in [100_000_001, u64::MAX, u64::MAX - 7] {
        let what = "header length is beyond all measure";
        refused(&raw(length, b"{}", 0), what, None, "at most 100000000", &length.to_string());
    }
}

#[test]
fn header_that_is_no_text() {
    refused(&raw(3, b"{\xff}", 0), "header is not text", None, "UTF-8", "at 9");
}

#[test]
fn header_that_is_no_json() {
    refused(&file("{]", 0), "header is not JSON", None, "a JSON object", "line 1 column 2");
    refused(&file("", 0), "header is not JSON", None, "a JSON object", "EOF");
    refused(&file("{} x", 0), "header is not JSON", None, "a JSON object", "trailing");
}

#[test]
fn header_that_is_no_object() {
    for header in ["[]", "3", "\"x\"", "null"] {
        refused(&file(header, 0), "header is not an object", None, "a JSON object", "invalid type");
    }
}

#[test]
fn deeply_nested_header() {
    let what = "header is not an object";
    refused(&file(&"[".repeat(100_000), 0), what, None, "a JSON object", "invalid type");
    let nested = format!(r#"{{"w":{{"dtype":"F32","x":{}"#, "[".repeat(1_000_000));
    let error = header::parse(&file(&nested, 0), Path::new("x")).expect_err("must be refused");
    assert_eq!(error.kind(), Kind::Input);
}

#[test]
fn duplicate_name() {
    let header = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let found = "[0, 1] and [1, 2]";
    refused(&file(header, 2), "tensor is there twice", Some("w"), "each name once", found);
}

#[test]
fn duplicate_key_in_an_entry() {
    let header = r#"{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#;
    let what = "tensor's entry has a key twice";
    refused(&file(header, 1), what, Some("w"), "each key once", "`dtype`");
}

#[test]
fn duplicate_metadata() {
    let twice = r#"{"__metadata__":{},"__metadata__":{}}"#;
    refused(&file(twice, 0), "header is ambiguous", Some("__metadata__"), "one", "two");
    let key = r#"{"__metadata__":{"a":"1","a":"2"}}"#;
    let what = "metadata is ambiguous";
    refused(&file(key, 0), what, Some("__metadata__"), "each key once", "`a` twice");
}

#[test]
fn unknown_key_in_an_entry() {
    let header = r#"{"w":{"dtype":"U8","scale":2,"shape":[1],"data_offsets":[0,1]}}"#;
    let what = "tensor's entry has an unknown key";
    refused(&file(header, 1), what, Some("w"), "`data_offsets`", "`scale`");
}

#[test]
fn incomplete_entry() {
    for (entry, absent) in [
        (r#"{"shape":[],"data_offsets":[0,1]}"#, "no `dtype`"),
        (r#"{"dtype":"U8","data_offsets":[0,1]}"#, "no `shape`"),
        (r#"{"dtype":"U8","shape":[]}"#, "no `data_offsets`"),
    ] {
        let what = "tensor's entry is incomplete";
        refused(&file(&format!(r#"{{"w":{entry}}}"#), 1), what, Some("w"), "`dtype`", absent);
    }
}

#[test]
fn entry_of_another_type() {
    let what = "tensor's entry in the header is not what it should be";
    refused(&file(r#"{"w":3}"#, 0), what, Some("w"), "an object", "integer `3`");
    refused(&one("U8", "7", "[0,1]", 1), what, Some("w"), "an object", "`shape`");
}

#[test]
fn unknown_dtype() {
    let what = "tensor has an unknown dtype";
    refused(&one("F128", "[1]", "[0,16]", 16), what, Some("w"), "F32, BF16, F16", "`F128`");
    refused(&one("bf16", "[1]", "[0,2]", 2), what, Some("w"), "BF16", "`bf16`");
}

#[test]
fn numbers_out_of_range() {
    let what = "number in the header is out of range";
    for shape in ["[-1]", "[1.5]", "[18446744073709551616]", "[1e3]"] {
        refused(&one("U8", shape, "[0,1]", 1), what, Some("w"), "whole numbers", "");
    }
    refused(&one("U8", "[1]", "[-1,0]", 1), what, Some("w"), "whole numbers", "-1");
}

#[test]
fn lists_of_the_wrong_length() {
    let what = "list in the header is too long";
    refused(&one("U8", "[1]", "[0,1,2]", 1), what, Some("w"), "at most 2", "more");
    let axes = format!("[{}1]", "1,".repeat(64));
    refused(&one("U8", &axes, "[0,1]", 1), what, Some("w"), "at most 64", "more");
    let what = "data_offsets are not two numbers";
    refused(&one("U8", "[1]", "[0]", 1), what, Some("w"), "[begin, end]", "fewer");
}

#[test]
fn overflowing_shape() {
    let what = "tensor has an impossible size";
    let found = "more than can be counted";
    for shape in ["[4294967296,4294967296]", "[4611686018427387904]", "[9223372036854775808,2,0]"] {
        refused(&one("F32", shape, "[0,0]", 0), what, Some("w"), "below 2^64", found);
    }
    refused(&one("F4", "[3]", "[0,2]", 2), what, Some("w"), "whole number", "not whole bytes");
}

#[test]
fn shape_and_range_disagree() {
    let what = "shape and byte range of a tensor disagree";
    refused(&one("F32", "[2,3]", "[0,12]", 12), what, Some("w"), "24 bytes", "12 bytes");
    refused(&one("BF16", "[]", "[0,4]", 4), what, Some("w"), "2 bytes", "4 bytes");
}

#[test]
fn range_backwards() {
    let what = "tensor ends before it begins";
    refused(&one("U8", "[1]", "[1,0]", 1), what, Some("w"), "ascending", "[1, 0]");
}

#[test]
fn truncated_data() {
    let what = "tensor lies beyond the end of the file";
    refused(&one("F32", "[2]", "[0,8]", 7), what, Some("w"), "data up to byte", "a file of");
    let far = format!("[{0},{0}]", u64::MAX);
    refused(&one("F32", "[0]", &far, 0), what, Some("w"), "data up to byte", "a file of");
}

#[test]
fn overlapping_ranges() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    refused(&file(header, 6), "tensors overlap", Some("w"), "from 4 on, after `a`", "[2, 6]");
}

#[test]
fn hole_between_tensors() {
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}"#;
    let found = "a hole of 2 bytes";
    refused(&file(header, 4), "bytes that belong to no tensor", Some("w"), "from 1 on", found);
}

#[test]
fn trailing_bytes() {
    let bytes = one("U8", "[1]", "[0,1]", 3);
    let expected = format!("{} bytes", bytes.len() - 2);
    let what = "bytes behind the last tensor";
    refused(&bytes, what, None, &expected, &format!("{} bytes", bytes.len()));
}

#[test]
fn other_formats_are_named() {
    for (bytes, found) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"[..], "Git LFS"),
        (&b"GGUF\x03\0\0\0\0\0\0\0"[..], "GGUF"),
        (&b"PK\x03\x04\0\0\0\0\0\0"[..], "PyTorch"),
        (&b"<!DOCTYPE html><html></html>"[..], "web page"),
    ] {
        refused(bytes, "not a safetensors file", None, "safetensors", found);
    }
}

#[test]
fn legal_oddities() {
    for (bytes, tensors) in [
        (file("{}", 0), 0),
        (file("{}      ", 0), 0),
        (file(r#"{"__metadata__":null}"#, 0), 0),
        (one("F32", "[0,5]", "[0,0]", 0), 1),
        (one("F32", "[]", "[0,4]", 4), 1),
        (one("F4", "[4]", "[0,2]", 2), 1),
        (one("BOOL", "[2]", "[0,2]", 2), 1),
    ] {
        assert_eq!(header::parse(&bytes, Path::new("x")).unwrap().tensors.len(), tensors);
    }
}
