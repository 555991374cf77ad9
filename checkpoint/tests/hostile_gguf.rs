//! Damaged and malicious GGUF files: one for each refusal, and random ones.

use std::path::Path;

use moe_merge_checkpoint::{CheckpointError, Explain, gguf};
use proptest::prelude::*;

const TEXT: u32 = 8;
const LIST: u32 = 9;

/// Writes GGUF files, right or wrong.
#[derive(Clone, Default)]
struct File {
    version: u32,
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key).as_slice(), &kind.to_le_bytes(), value].concat()
}

fn list(kind: u32, count: u64, values: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat()
}

fn tensor(name: &str, axes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((axes.len() as u32).to_le_bytes());
    axes.iter().for_each(|a| bytes.extend(a.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl File {
    fn new() -> Self {
        Self { version: 3, ..Self::default() }
    }

    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.push(entry(key, kind, value));
        self
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    fn tensor(mut self, name: &str, axes: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, axes, kind, offset));
        self
    }

    fn data(mut self, len: usize) -> Self {
        self.data = len;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.entries.len() as u64).to_le_bytes());
        bytes.extend(self.entries.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}

fn refusal(bytes: &[u8]) -> String {
    let error = gguf::parse(bytes, Path::new("hostile.gguf")).expect_err("has to be refused");
    shown(&error)
}

fn shown(error: &CheckpointError) -> String {
    let fields: Vec<String> = error.fields().iter().map(|(k, v)| format!("{k} {v}")).collect();
    assert!(fields.iter().any(|f| f.starts_with("file ")), "{error} names no file");
    format!("{error} | {} | {}", fields.join(" | "), error.hint().unwrap_or_default())
}

#[track_caller]
fn says(found: &str, parts: &[&str]) {
    for part in parts {
        assert!(found.contains(part), "`{found}` does not say `{part}`");
    }
}

#[test]
fn the_writer_above_writes_good_files() {
    let bytes = File::new().number("a", 7).tensor("t", &[64, 3], 0, 0).data(768).bytes();
    let header = gguf::parse(&bytes, Path::new("good.gguf")).unwrap();
    assert_eq!(header.tensors[0].shape, [3, 64]);
    assert_eq!(header.get("a").unwrap().unsigned(), Some(7));
}

#[test]
fn empty_file() {
    says(&refusal(b""), &["not a GGUF file", "hostile.gguf"]);
}

#[test]
fn wrong_magic() {
    says(&refusal(b"GGML\x03\0\0\0"), &["not a GGUF file", "47, 47, 4d, 4c"]);
}

#[test]
fn version_1() {
    says(
        &refusal(&File { version: 1, ..File::new() }.bytes()),
        &["version is not supported", "version 1"],
    );
}

#[test]
fn big_endian() {
    let bytes = File { version: 3u32.swap_bytes(), ..File::new() }.bytes();
    says(&refusal(&bytes), &["version is not supported", "big-endian"]);
}

#[test]
fn ends_after_the_version() {
    says(&refusal(b"GGUF\x03\0\0\0"), &["ends inside of the number of tensors"]);
}

#[test]
fn absurd_tensor_count() {
    let mut bytes = File::new().bytes();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    says(&refusal(&bytes), &["number of tensors is larger than the file", "18446744073709551615"]);
}

#[test]
fn absurd_entry_count() {
    let mut bytes = File::new().bytes();
    bytes[16..24].copy_from_slice(&(1u64 << 60).to_le_bytes());
    says(&refusal(&bytes), &["number of metadata entries is larger than the file"]);
}

#[test]
fn absurd_key_length() {
    let mut file = File::new();
    file.entries.push([&u64::MAX.to_le_bytes()[..], &[0; 20]].concat());
    says(&refusal(&file.bytes()), &["metadata key is too long"]);
}

#[test]
fn key_beyond_the_file() {
    let mut file = File::new();
    file.entries.push([&60_000u64.to_le_bytes()[..], &[0; 20]].concat());
    says(&refusal(&file.bytes()), &["length of a metadata key goes beyond the file", "60000"]);
}

#[test]
fn key_that_is_not_utf8() {
    let mut file = File::new();
    file.entries.push([&2u64.to_le_bytes()[..], &[0xff, 0xfe, 0, 0, 0, 0, 0]].concat());
    says(&refusal(&file.bytes()), &["metadata key is not UTF-8"]);
}

#[test]
fn text_beyond_the_file() {
    let file = File::new().entry("k", TEXT, &(u64::MAX - 3).to_le_bytes());
    says(&refusal(&file.bytes()), &["metadata key `k` goes beyond the file"]);
}

#[test]
fn unknown_value_type() {
    says(
        &refusal(&File::new().entry("k", 13, &[0; 8]).bytes()),
        &["`k` has a value of unknown type", "13"],
    );
}

#[test]
fn truth_value_of_two() {
    says(&refusal(&File::new().entry("k", 7, &[2]).bytes()), &["`k` is no truth value"]);
}

#[test]
fn absurd_list_length() {
    let file = File::new().entry("k", LIST, &list(10, 1 << 61, &[]));
    says(&refusal(&file.bytes()), &["list length of metadata key `k`", "larger than the file"]);
}

#[test]
fn list_of_unknown_type() {
    let file = File::new().entry("k", LIST, &list(77, 1, &[0; 8]));
    says(&refusal(&file.bytes()), &["unknown type", "77"]);
}

#[test]
fn list_text_beyond_the_file() {
    let file = File::new().entry("k", LIST, &list(TEXT, 1, &u64::MAX.to_le_bytes()));
    says(&refusal(&file.bytes()), &["a text of metadata key `k` goes beyond the file"]);
}

#[test]
fn lists_in_lists_without_end() {
    let mut value = list(0, 0, &[]);
    for _ in 0..10_000 {
        value = list(LIST, 1, &value);
    }
    says(&refusal(&File::new().entry("k", LIST, &value).bytes()), &["`k` are nested too deep"]);
}

#[test]
fn key_twice() {
    says(&refusal(&File::new().number("k", 1).number("k", 1).bytes()), &["key `k` is there twice"]);
}

#[test]
fn alignment_of_zero_or_three() {
    for value in [0, 3] {
        let file = File::new().number("general.alignment", value);
        says(&refusal(&file.bytes()), &["`general.alignment` makes no sense", "power of two"]);
    }
    let file = File::new().entry("general.alignment", TEXT, &text("32"));
    says(&refusal(&file.bytes()), &["`general.alignment` makes no sense", "`32`"]);
}

#[test]
fn tensor_twice() {
    let file = File::new().tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64);
    says(&refusal(&file.bytes()), &["same name", "tensor t"]);
}

#[test]
fn axes_none_or_many() {
    for axes in [&[][..], &[1; 5][..]] {
        let file = File::new().tensor("t", axes, 0, 0).data(64);
        says(&refusal(&file.bytes()), &["impossible number of axes", "tensor t"]);
    }
}

#[test]
fn axis_of_zero() {
    let file = File::new().tensor("t", &[8, 0], 0, 0).data(64);
    says(&refusal(&file.bytes()), &["axis of impossible length", "tensor t"]);
}

#[test]
fn shape_that_overflows() {
    let file = File::new().tensor("t", &[1 << 32, 1 << 31, 4], 0, 0).data(64);
    says(&refusal(&file.bytes()), &["impossibly large", "tensor t"]);
}

#[test]
fn unknown_tensor_type() {
    let file = File::new().tensor("t", &[32], 31, 0).data(64);
    says(&refusal(&file.bytes()), &["type this program does not know", "type 31", "tensor t"]);
}

#[test]
fn row_that_is_no_whole_block() {
    let file = File::new().tensor("t", &[33], 8, 0).data(64);
    says(&refusal(&file.bytes()), &["no whole number of blocks", "multiple of 32", "Q8_0"]);
}

#[test]
fn offset_that_is_not_aligned() {
    let file = File::new().tensor("t", &[8], 0, 8).data(64);
    says(&refusal(&file.bytes()), &["not aligned", "multiple of 32"]);
}

#[test]
fn tensor_beyond_the_file() {
    let file = File::new().tensor("t", &[8, 3], 0, 0).data(64);
    says(&refusal(&file.bytes()), &["beyond the end of the file", "96 bytes"]);
}

#[test]
fn offset_that_overflows() {
    let file = File::new().tensor("t", &[8], 0, u64::MAX - 31).data(64);
    says(&refusal(&file.bytes()), &["beyond the end of the file", "tensor t"]);
}

#[test]
fn tensors_on_the_same_bytes() {
    let file = File::new().tensor("a", &[16], 0, 0).tensor("b", &[8], 0, 32).data(64);
    says(&refusal(&file.bytes()), &["same bytes", "tensor b", "after `a`"]);
}

/// A llama of one layer, complete but for what a test leaves out or puts in.
fn llama() -> File {
    File::new()
        .entry("general.architecture", TEXT, &text("llama"))
        .number("llama.block_count", 1)
        .number("llama.context_length", 16)
        .number("llama.embedding_length", 8)
        .number("llama.feed_forward_length", 8)
        .number("llama.attention.head_count", 2)
        .entry("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes())
        .tensor("token_embd.weight", &[8, 4], 0, 0)
        .data(1024)
}

fn without(mut file: File, key: &str) -> File {
    file.entries.retain(|e| !e[8..].starts_with(key.as_bytes()));
    file
}

fn open(file: &File) -> Result<moe_merge_checkpoint::Source, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    gguf::open(&path)
}

fn open_refusal(file: &File) -> String {
    shown(&open(file).expect_err("has to be refused"))
}

#[test]
fn a_llama_that_is_complete_enough() {
    let source = open(&llama()).unwrap();
    assert_eq!(source.config.usize("vocab_size"), Some(4));
    assert_eq!(source.config.usize("head_dim"), Some(4));
    assert_eq!(source.notes, ["the GGUF file has no tokenizer"]);
}

#[test]
fn unknown_architecture() {
    let file = without(llama(), "general.").entry("general.architecture", TEXT, &text("mamba"));
    says(&open_refusal(&file), &["architecture `mamba` is not supported", "qwen3moe"]);
}

#[test]
fn missing_metadata() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.context_length",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        says(&open_refusal(&without(llama(), key)), &[key, "missing or makes no sense"]);
    }
}

#[test]
fn missing_embedding() {
    let mut file = llama();
    file.tensors.clear();
    says(&open_refusal(&file), &["tensor is missing", "token_embd.weight"]);
}

#[test]
fn embedding_of_another_width() {
    let mut file = llama();
    file.tensors = vec![tensor("token_embd.weight", &[4, 8], 0, 0)];
    says(&open_refusal(&file), &["wrong shape", "[8, 8]", "[8, 4]"]);
}

#[test]
fn heads_that_do_not_divide_the_rows() {
    let file = llama().tensor("blk.0.attn_q.weight", &[8, 6], 0, 128);
    says(&open_refusal(&file), &["wrong shape", "blk.0.attn_q.weight", "2 heads"]);
}

#[test]
fn experts_of_another_number() {
    let file = llama().number("llama.expert_count", 3).number("llama.expert_used_count", 1).tensor(
        "blk.0.ffn_up_exps.weight",
        &[8, 8, 2],
        0,
        128,
    );
    says(&open_refusal(&file), &["wrong shape", "ffn_up_exps", "[3, rows, columns]"]);
}

#[test]
fn quantisation_that_cannot_be_read() {
    let file = llama().tensor("blk.0.attn_v.weight", &[256, 1], 16, 128);
    says(&open_refusal(&file), &["blk.0.attn_v.weight", "IQ2_XXS", "Q8_0"]);
}

#[test]
fn one_of_several_files() {
    says(&open_refusal(&llama().number("split.count", 2)), &["split over 2 files", "--merge"]);
}

#[test]
fn rope_scaling_of_unknown_kind() {
    let file = llama().entry("llama.rope.scaling.type", TEXT, &text("spiral")).entry(
        "llama.rope.scaling.factor",
        6,
        &2f32.to_le_bytes(),
    );
    says(&open_refusal(&file), &["rope scaling `spiral`"]);
}

#[test]
fn rope_factors_of_unknown_origin() {
    // Zeros: no scaling has them.
    let file = llama().tensor("rope_freqs.weight", &[2], 0, 128);
    says(&open_refusal(&file), &["rope factors", "rope_freqs.weight"]);
}

#[test]
fn tensors_that_nobody_knows_are_listed() {
    let source = open(&llama().tensor("blk.0.strange.weight", &[8], 0, 128)).unwrap();
    let names: Vec<&str> = source.other.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(names, ["blk.0.strange.weight"]);
    assert!(source.notes.iter().any(|n| n.contains("blk.0.strange.weight")));
}

fn texts(values: &[&str]) -> Vec<u8> {
    list(TEXT, values.len() as u64, &values.iter().flat_map(|v| text(v)).collect::<Vec<_>>())
}

fn with_tokenizer(model: &str, tokens: &[&str]) -> File {
    llama().entry("tokenizer.ggml.model", TEXT, &text(model)).entry(
        "tokenizer.ggml.tokens",
        LIST,
        &texts(tokens),
    )
}

#[test]
fn unknown_tokenizer() {
    says(
        &open_refusal(&with_tokenizer("bert", &["a"])),
        &["tokenizer model `bert`", "gpt2, llama"],
    );
}

#[test]
fn unknown_pre_tokenizer() {
    let file = with_tokenizer("gpt2", &["a"]).entry("tokenizer.ggml.pre", TEXT, &text("klingon"));
    says(&open_refusal(&file), &["pre-tokenizer `klingon`", "llama-bpe"]);
}

#[test]
fn tokens_of_another_type() {
    let file = llama().entry("tokenizer.ggml.model", TEXT, &text("gpt2")).entry(
        "tokenizer.ggml.tokens",
        LIST,
        &list(4, 1, &[0; 4]),
    );
    says(&open_refusal(&file), &["tokenizer.ggml.tokens", "a list of texts"]);
}

#[test]
fn token_that_is_not_utf8() {
    let value = list(TEXT, 1, &[&1u64.to_le_bytes()[..], &[0xff]].concat());
    let file = llama().entry("tokenizer.ggml.model", TEXT, &text("gpt2")).entry(
        "tokenizer.ggml.tokens",
        LIST,
        &value,
    );
    says(&open_refusal(&file), &["tokenizer.ggml.tokens", "UTF-8", "entry 0"]);
}

#[test]
fn token_types_of_another_number() {
    let file = with_tokenizer("gpt2", &["a", "b"]).entry(
        "tokenizer.ggml.token_type",
        LIST,
        &list(5, 1, &[0; 4]),
    );
    says(&open_refusal(&file), &["token_type", "2 tokens", "1 entries"]);
}

#[test]
fn merges_missing_or_of_unknown_tokens() {
    let file = with_tokenizer("gpt2", &["a", "b"]);
    says(&open_refusal(&file), &["tokenizer.ggml.merges", "nothing"]);
    let file = file.entry("tokenizer.ggml.merges", LIST, &texts(&["a b"]));
    says(&open_refusal(&file), &["tokenizer.ggml.merges", "entry 0", "`a b`"]);
}

#[test]
fn scores_missing_or_nan() {
    let file = with_tokenizer("llama", &["a", "b"]);
    says(&open_refusal(&file), &["tokenizer.ggml.scores", "nothing"]);
    let nan = [f32::NAN.to_le_bytes(), 1f32.to_le_bytes()].concat();
    let file = file.entry("tokenizer.ggml.scores", LIST, &list(6, 2, &nan));
    says(&open_refusal(&file), &["tokenizer.ggml.scores", "NaN for token 0"]);
}

#[test]
fn token_of_absurd_length() {
    let file = with_tokenizer("llama", &[&"a".repeat(100_000)]).entry(
        "tokenizer.ggml.scores",
        LIST,
        &list(6, 1, &[0; 4]),
    );
    says(&open_refusal(&file), &["tokenizer.ggml.tokens", "token 0 of 100000 bytes"]);
}

const QUANTS: &[u8] = include_bytes!("data/quants.gguf");
const SPM: &[u8] = include_bytes!("data/spm.gguf");

/// Opens `bytes` as a file and reads all that can be read: must end, in an error or not.
fn survive(bytes: &[u8]) {
    if gguf::parse(bytes, Path::new("random.gguf")).is_err() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("random.gguf");
    std::fs::write(&path, bytes).unwrap();
    if let Ok(weights) = gguf::open_raw(&path) {
        weights.values().for_each(|w| drop(w.to_f32()));
    }
    if let Ok(source) = gguf::open(&path) {
        source.tensors.values().for_each(|w| drop(w.to_f32()));
    }
}

#[test]
fn every_truncation_is_refused_or_read() {
    for bytes in [QUANTS, SPM] {
        for len in 0..bytes.len().min(9000) {
            survive(&bytes[..len]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_bytes_never_panic(
        spm in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = if spm { SPM.to_vec() } else { QUANTS.to_vec() };
        // Most of the first 1200 bytes are header; data is not interpreted.
        for (at, value) in changes {
            let at = at.index(1200);
            bytes[at] = value;
        }
        survive(&bytes);
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(noise);
        survive(&bytes);
    }
}
