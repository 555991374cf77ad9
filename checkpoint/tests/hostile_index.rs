//! One broken model folder per way in which index, shards and config can be wrong.

mod folder;

use std::fs;
use std::path::Path;

use folder::{config, open, shard};
use moe_merge_checkpoint::{CheckpointError, Explain, Kind};

const INDEX: &str = "model.safetensors.index.json";

/// A folder with a config, two shards (`a`, `b` and `c`) and this index.
fn with_index(index: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    shard(&dir.path().join("1.safetensors"), &["a", "b"]);
    shard(&dir.path().join("2.safetensors"), &["c"]);
    fs::write(dir.path().join(INDEX), index).unwrap();
    dir
}

#[track_caller]
fn refused(dir: &Path, what: &str, at: &str, tensor: Option<&str>, expected: &str, found: &str) {
    let error = open(".", dir).expect_err("must be refused");
    assert_eq!(error.to_string(), what);
    assert_eq!(error.kind(), Kind::Input);
    assert!(error.hint().is_some(), "no hint");
    match &error {
        CheckpointError::Malformed { file, tensor: t, expected: e, found: f, .. } => {
            assert!(file.ends_with(at), "{}", file.display());
            assert_eq!(t.as_deref(), tensor);
            assert!(e.contains(expected), "expected: {e}");
            assert!(f.contains(found), "found: {f}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn whole_index_opens() {
    let dir = with_index(
        r#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#,
    );
    let source = open(".", dir.path()).unwrap();
    assert_eq!(source.tensors.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(source.files.len(), 2);
    assert!(source.notes.is_empty(), "{:?}", source.notes);
}

#[test]
fn index_that_is_no_json() {
    let dir = with_index("{");
    refused(dir.path(), "index is not JSON", INDEX, None, "weight_map", "EOF");
}

#[test]
fn index_without_a_map() {
    let dir = with_index("{}");
    refused(dir.path(), "index has no weight map", INDEX, None, "weight_map", "no `weight_map`");
}

#[test]
fn map_that_is_no_object() {
    for index in [r#"{"weight_map":[]}"#, r#"{"weight_map":3}"#, "[]"] {
        let dir = with_index(index);
        let what = "index is not what it should be";
        refused(dir.path(), what, INDEX, None, "weight_map", "invalid type");
    }
}

#[test]
fn shard_name_that_is_no_text() {
    let dir = with_index(r#"{"weight_map":{"a":7}}"#);
    let what = "index is not what it should be";
    refused(dir.path(), what, INDEX, Some("a"), "weight_map", "integer `7`");
}

#[test]
fn tensor_listed_twice() {
    let dir = with_index(r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#);
    let what = "index lists a tensor twice";
    refused(dir.path(), what, INDEX, Some("a"), "once", "`1.safetensors` and in `2.safetensors`");
}

#[test]
fn two_maps() {
    let dir = with_index(r#"{"weight_map":{},"weight_map":{}}"#);
    refused(dir.path(), "index has two weight maps", INDEX, None, "one", "two");
}

#[test]
fn shard_outside_the_folder() {
    for (name, found) in [
        ("../secret.safetensors", "upwards"),
        ("sub/../../secret.safetensors", "upwards"),
        ("/etc/passwd", "absolute"),
        ("", "empty"),
    ] {
        let dir = with_index(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#));
        let what = "index names a shard outside its folder";
        refused(dir.path(), what, INDEX, Some("a"), "without `..`", found);
    }
}

#[test]
fn missing_shard() {
    let dir = with_index(
        r#"{"weight_map":{"a":"1.safetensors","x":"3.safetensors","y":"3.safetensors"}}"#,
    );
    let what = "shard `3.safetensors` is missing";
    let expected = "3.safetensors`, which holds 2 tensors: `x`, `y`";
    refused(dir.path(), what, INDEX, Some("x"), expected, "no such file");
}

#[test]
fn tensor_not_in_its_shard() {
    let what = "tensor is not in the shard that the index names";
    let dir = with_index(r#"{"weight_map":{"a":"1.safetensors","z":"1.safetensors"}}"#);
    refused(dir.path(), what, "1.safetensors", Some("z"), INDEX, "no such tensor in any shard");
    let dir = with_index(
        r#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"1.safetensors","d":"2.safetensors"}}"#,
    );
    refused(dir.path(), what, "1.safetensors", Some("c"), INDEX, "2.safetensors");
}

#[test]
fn tensor_in_two_shards() {
    let dir = with_index(r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#);
    shard(&dir.path().join("2.safetensors"), &["a", "c"]);
    let what = "tensor is in two shards";
    refused(dir.path(), what, "2.safetensors", Some("a"), "one shard", "1.safetensors");
}

#[test]
fn an_old_value_in_an_earlier_shard_is_not_seen() {
    let dir = with_index(
        r#"{"weight_map":{"a":"2.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#,
    );
    shard(&dir.path().join("2.safetensors"), &["a", "c"]);
    let source = open(".", dir.path()).unwrap();
    assert!(source.tensors["a"].origin().0.ends_with("2.safetensors"));
    assert!(source.notes.is_empty(), "{:?}", source.notes);
    // The index says the first, loaders would keep the last.
    let index = r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#;
    fs::write(dir.path().join(INDEX), index).unwrap();
    refused(dir.path(), "tensor is in two shards", "2.safetensors", Some("a"), "one", "1.safe");
}

#[test]
fn unlisted_tensor_is_noted() {
    let dir = with_index(r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#);
    let source = open(".", dir.path()).unwrap();
    assert!(source.tensors.contains_key("b"));
    assert_eq!(source.notes.len(), 1);
    assert!(source.notes[0].contains("1 tensor of the shards not listed"), "{:?}", source.notes);
    assert!(source.notes[0].contains("`b`"), "{:?}", source.notes);
}

#[test]
fn single_file_beside_an_index_is_read_as_loaders_do() {
    let dir = with_index(
        r#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#,
    );
    shard(&dir.path().join("model.safetensors"), &["q"]);
    let source = open(".", dir.path()).unwrap();
    assert_eq!(source.tensors.keys().collect::<Vec<_>>(), ["q"]);
    assert!(source.notes[0].contains("`model.safetensors` is read"), "{:?}", source.notes);
    fs::write(dir.path().join(INDEX), r#"{"weight_map":{"q":"model.safetensors"}}"#).unwrap();
    assert!(open(".", dir.path()).unwrap().notes.is_empty());
}

#[test]
fn shards_without_an_index() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    shard(&dir.path().join("model-00001-of-00002.safetensors"), &["a"]);
    let what = "a shard is missing";
    let expected = "`model-00002-of-00002.safetensors`";
    refused(dir.path(), what, "", None, expected, "`model-00001-of-00002.safetensors`");
    shard(&dir.path().join("model-00002-of-00002.safetensors"), &["b"]);
    shard(&dir.path().join("expected.safetensors"), &["logits"]);
    let source = open(".", dir.path()).unwrap();
    assert_eq!(source.tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert!(source.notes[0].contains("there is no `model.safetensors.index.json`"));
    shard(&dir.path().join("model-00002-of-00002.safetensors"), &["a"]);
    let at = "model-00002-of-00002.safetensors";
    refused(dir.path(), "tensor is in two shards", at, Some("a"), "one shard", "model-00001");
}

#[test]
fn configs() {
    let dir = tempfile::tempdir().unwrap();
    shard(&dir.path().join("model.safetensors"), &["a"]);
    let at = "config.json";
    let expected = "a JSON object with `model_type`";
    refused(dir.path(), "config.json is missing", at, None, expected, "no such file");
    for (text, what, found) in [
        ("{", "config.json is not JSON", "EOF"),
        ("[]", "config.json is not an object", "a list"),
        ("{}", "config.json does not say the architecture", "no `model_type`"),
        (r#"{"model_type":3}"#, "config.json does not say the architecture", "`model_type`: 3"),
    ] {
        fs::write(dir.path().join(at), text).unwrap();
        refused(dir.path(), what, at, None, expected, found);
    }
    fs::write(dir.path().join(at), vec![b' '; (8 << 20) + 1]).unwrap();
    let what = "file is too large for what it should be";
    let error = open(".", dir.path()).expect_err("must be refused");
    assert_eq!(error.to_string(), what);
}

#[test]
fn folders_without_weights() {
    for (file, what, hint) in [
        (
            "pytorch_model.bin",
            "weights are a PyTorch pickle, which can run code when it is read",
            "save_pretrained",
        ),
        ("adapter_config.json", "folder holds an adapter, not a model", "BASE+"),
        ("m.gguf", "folder holds a GGUF file, no safetensors", "m.gguf"),
        ("model.onnx", "weights are in a format that cannot be read", "converted"),
        ("README.md", "folder holds no weights", "model.safetensors"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        config(dir.path());
        fs::write(dir.path().join(file), "x").unwrap();
        let error = open(".", dir.path()).expect_err("must be refused");
        assert_eq!(error.to_string(), what);
        assert!(matches!(error, CheckpointError::Unsupported { .. }));
        assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
    }
}

#[test]
fn a_folder_in_place_of_a_shard() {
    let dir = tempfile::tempdir().unwrap();
    config(dir.path());
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    let error = open(".", dir.path()).expect_err("must be refused");
    assert_eq!(error.to_string(), "not a file");
}

#[test]
fn a_bad_shard_is_named() {
    let dir = with_index(r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#);
    fs::write(dir.path().join("2.safetensors"), b"").unwrap();
    refused(dir.path(), "file is empty", "2.safetensors", None, "safetensors", "0 bytes");
}
