//! The header of a safetensors file, checked to the last byte before anything is used.
//!
//! The layout: eight bytes (length of the header, little-endian), the header (a JSON object: tensor name to
//! dtype, shape and byte range; `__metadata__` to texts), then the data. The ranges must cover the data
//! completely and without overlap.
//!
//! The safetensors crate checks the same things. This parser exists for its messages (it names the tensor, what
//! was expected and what was found) and because duplicate names must be refused, not overwritten.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use moe_merge_kernels::Dtype;

use crate::error::CheckpointError;

/// Longest header that is read, in bytes: the limit of the format's reference implementation.
pub const MAX_HEADER: u64 = 100_000_000;

/// Most axes of a tensor, as in PyTorch: bounds what a hostile shape can allocate.
const MAX_AXES: usize = 64;

/// Name in the file, bits of one number, and our dtype where it is one that a weight can have.
const DTYPES: &[(&str, u64, Option<Dtype>)] = &[
    ("F32", 32, Some(Dtype::F32)),
    ("BF16", 16, Some(Dtype::BF16)),
    ("F16", 16, Some(Dtype::F16)),
    ("F64", 64, None),
    ("C64", 64, None),
    ("I64", 64, None),
    ("U64", 64, None),
    ("I32", 32, None),
    ("U32", 32, None),
    ("I16", 16, None),
    ("U16", 16, None),
    ("I8", 8, None),
    ("U8", 8, None),
    ("BOOL", 8, None),
    ("F8_E4M3", 8, None),
    ("F8_E5M2", 8, None),
    ("F8_E8M0", 8, None),
    ("F8_E4M3FNUZ", 8, None),
    ("F8_E5M2FNUZ", 8, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("F4", 4, None),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// The dtype as the file spells it.
    pub stored: &'static str,
    /// The same, if a weight can have it.
    pub dtype: Option<Dtype>,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// All tensors in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of the safetensors file with these `bytes`; `path` is for messages.
///
/// Memory is bounded by a small multiple of the header's length, whatever the bytes.
///
/// # Errors
/// [`CheckpointError::Malformed`] for everything that is not exactly as the format says.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Header, CheckpointError> {
    let text = header_text(bytes, path)?;
    let data_start = 8 + text.len();
    let mut problem = Problem::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let raw = HeaderSeed { problem: &mut problem }
        .deserialize(&mut json)
        .and_then(|raw| json.end().map(|()| raw))
        .map_err(|e| problem.explain(&e, path))?;
    check(raw, bytes.len(), data_start, path)
}

/// The header's text, from the length in front of it.
fn header_text<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str, CheckpointError> {
    let malformed = |what: &str, expected: String, found: String, hint: &str| {
        Err(CheckpointError::Malformed {
            what: what.into(),
            file: path.to_owned(),
            tensor: None,
            expected,
            found,
            hint: Some(hint.into()),
        })
    };
    let again = "the file is damaged; download or copy it again";
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let what = if bytes.is_empty() { "file is empty" } else { "file is too short" };
        let expected = "a safetensors file: 8 bytes of header length, header, data";
        return malformed(what, expected.into(), format!("{} bytes", bytes.len()), again);
    };
    if let Some((found, hint)) = other_format(bytes) {
        return malformed("not a safetensors file", "safetensors".into(), found.into(), hint);
    }
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let hint =
            "this is no safetensors file, or its start is damaged; download or copy it again";
        return malformed(
            "header length is beyond all measure",
            format!("at most {MAX_HEADER} bytes"),
            format!("{length} bytes"),
            hint,
        );
    }
    let Some(header) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        return malformed(
            "header length is beyond the end of the file",
            format!("a header of {length} bytes"),
            format!("{} bytes after the length", rest.len()),
            "the file is cut off; download or copy it again",
        );
    };
    match std::str::from_utf8(header) {
        Ok(text) => Ok(text),
        Err(e) => malformed(
            "header is not text",
            "UTF-8".into(),
            format!("a byte that cannot be, at {}", 8 + e.valid_up_to()),
            again,
        ),
    }
}

/// What files under a wrong name usually are.
fn other_format(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    let is = |magic: &[u8]| bytes.starts_with(magic);
    if is(b"version https://git-lfs") {
        return Some((
            "a Git LFS pointer: the weights themselves were not fetched",
            "run `git lfs pull` in the repository, or download the file from the Hub",
        ));
    }
    if is(b"GGUF") {
        return Some((
            "a GGUF file",
            "give the file a name that ends in `.gguf`, and name it as source",
        ));
    }
    if is(b"PK\x03\x04") {
        return Some((
            "a zip archive, as PyTorch writes its `.bin` and `.pt` files",
            "load the model in transformers and save it again: that writes safetensors",
        ));
    }
    if is(b"<!DOCTYP") || is(b"<!doctyp") || is(b"<html>") {
        return Some(("a web page", "download it again, from the file's `resolve` address"));
    }
    None
}

/// A tensor's entry before it is checked against the file.
struct RawTensor {
    name: String,
    stored: &'static str,
    bits: u64,
    dtype: Option<Dtype>,
    shape: Vec<u64>,
    offsets: [u64; 2],
}

#[derive(Default)]
struct RawHeader {
    tensors: Vec<RawTensor>,
    metadata: BTreeMap<String, String>,
}

/// What to do about byte ranges that cannot be.
const DAMAGED: &str = "the file is damaged, or was written wrongly; download or copy it again";

/// Checks sizes and ranges, one tensor after the other in the order of their bytes.
fn check(
    raw: RawHeader,
    file_len: usize,
    data_start: usize,
    path: &Path,
) -> Result<Header, CheckpointError> {
    let data_len = (file_len - data_start) as u64;
    let mut raw_tensors = raw.tensors;
    refuse_duplicates(&mut raw_tensors, path)?;
    raw_tensors.sort_by(|a, b| (a.offsets, &a.name).cmp(&(b.offsets, &b.name)));
    // A range far away leaves a hole where it should have been: it is the one to name.
    let beyond = raw_tensors.iter().find(|t| t.offsets[0] > data_len);
    let beyond = beyond.map(|t| (t.name.clone(), t.offsets));
    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(raw_tensors.len());
    let mut covered = 0;
    for tensor in raw_tensors {
        let malformed = |what: &str, expected: String, found: String, hint: Option<&str>| {
            CheckpointError::Malformed {
                what: what.into(),
                file: path.to_owned(),
                tensor: Some(tensor.name.clone()),
                expected,
                found,
                hint: hint.map(str::to_owned),
            }
        };
        let [begin, end] = tensor.offsets;
        if end < begin {
            return Err(malformed(
                "tensor ends before it begins",
                "data_offsets in ascending order".into(),
                format!("[{begin}, {end}]"),
                None,
            ));
        }
        let size = size_in_bytes(&tensor.shape, tensor.bits).map_err(|found| {
            malformed(
                "tensor has an impossible size",
                "a whole number of bytes below 2^64".into(),
                format!("{} {:?}: {found}", tensor.stored, tensor.shape),
                None,
            )
        })?;
        if size != end - begin {
            return Err(malformed(
                "shape and byte range of a tensor disagree",
                format!("{size} bytes for {} {:?}", tensor.stored, tensor.shape),
                format!("{} bytes at [{begin}, {end}]", end - begin),
                None,
            ));
        }
        if end > data_len {
            return Err(malformed(
                "tensor lies beyond the end of the file",
                format!("data up to byte {}", (data_start as u64).saturating_add(end)),
                format!("a file of {file_len} bytes"),
                Some("the file is cut off; download or copy it again"),
            ));
        }
        if begin < covered {
            let before = tensors.last().map_or("", |t| &t.name);
            return Err(malformed(
                "tensors overlap",
                format!("data from {covered} on, after `{before}`"),
                format!("data_offsets [{begin}, {end}]"),
                Some(DAMAGED),
            ));
        }
        if begin > covered
            && let Some((name, [begin, end])) = beyond
        {
            return Err(CheckpointError::Malformed {
                what: "tensor lies beyond the end of the file".into(),
                file: path.to_owned(),
                tensor: Some(name),
                expected: format!("data_offsets within the {data_len} bytes of data"),
                found: format!("[{begin}, {end}]"),
                hint: Some(DAMAGED.into()),
            });
        }
        if begin > covered {
            return Err(malformed(
                "bytes that belong to no tensor",
                format!("data from {covered} on"),
                format!("data_offsets [{begin}, {end}], a hole of {} bytes", begin - covered),
                Some(DAMAGED),
            ));
        }
        covered = end;
        tensors.push(TensorInfo {
            name: tensor.name,
            stored: tensor.stored,
            dtype: tensor.dtype,
            // Each axis of a tensor with bytes is at most the file's length; one of a tensor without bytes may be
            // anything that an address can count.
            shape: tensor.shape.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect(),
            range: data_start + begin as usize..data_start + end as usize,
        });
    }
    if covered < data_len {
        return Err(CheckpointError::Malformed {
            what: "bytes behind the last tensor".into(),
            file: path.to_owned(),
            tensor: None,
            expected: format!("a file of {} bytes", data_start as u64 + covered),
            found: format!("{file_len} bytes"),
            hint: Some("the file is damaged; download or copy it again".into()),
        });
    }
    Ok(Header { tensors, metadata: raw.metadata })
}

fn refuse_duplicates(tensors: &mut [RawTensor], path: &Path) -> Result<(), CheckpointError> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        None => Ok(()),
        Some(pair) => Err(CheckpointError::Malformed {
            what: "tensor is there twice".into(),
            file: path.to_owned(),
            tensor: Some(pair[0].name.clone()),
            expected: "each name once".into(),
            found: format!("two entries, at {:?} and {:?}", pair[0].offsets, pair[1].offsets),
            hint: Some("which of them is meant cannot be known; write the file again".into()),
        }),
    }
}

/// `product(shape) * bits / 8`, or why there is no such number.
fn size_in_bytes(shape: &[u64], bits: u64) -> Result<u64, &'static str> {
    // A zero makes the tensor empty, but the other axes must still be countable for those who multiply them first.
    let count = shape
        .iter()
        .try_fold(1u64, |n, &axis| n.checked_mul(axis))
        .filter(|_| shape.iter().all(|&axis| usize::try_from(axis).is_ok()));
    let bits = count.and_then(|n| n.checked_mul(bits)).ok_or("more than can be counted")?;
    if bits % 8 == 0 { Ok(bits / 8) } else { Err("not whole bytes") }
}

/// What went wrong while the JSON was read, in more detail than a JSON error carries.
#[derive(Default)]
struct Problem {
    /// The tensor whose entry is being read.
    tensor: Option<String>,
    what: Option<&'static str>,
    expected: String,
    found: String,
}

impl Problem {
    fn set<E: de::Error>(&mut self, what: &'static str, expected: &str, found: String) -> E {
        self.what = Some(what);
        self.expected = expected.to_owned();
        self.found = found;
        E::custom(what)
    }

    fn explain(self, error: &serde_json::Error, path: &Path) -> CheckpointError {
        let (what, expected, found) = match self.what {
            Some(what) => (what, self.expected, self.found),
            None if error.is_data() && self.tensor.is_some() => (
                "tensor's entry in the header is not what it should be",
                "an object with `dtype`, `shape` and `data_offsets`".to_owned(),
                error.to_string(),
            ),
            None if error.is_data() => {
                ("header is not an object", "a JSON object".to_owned(), error.to_string())
            }
            None => ("header is not JSON", "a JSON object".to_owned(), error.to_string()),
        };
        CheckpointError::Malformed {
            what: what.into(),
            file: path.to_owned(),
            tensor: self.tensor,
            expected,
            found,
            hint: Some("the file is damaged; download or copy it again".into()),
        }
    }
}

struct HeaderSeed<'p> {
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<RawHeader, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut has_metadata, true) {
                    self.problem.tensor = Some(name);
                    let found = "two of them".to_owned();
                    return Err(self.problem.set(
                        "header is ambiguous",
                        "one `__metadata__`",
                        found,
                    ));
                }
                self.problem.tensor = Some(name);
                header.metadata = map.next_value_seed(MetadataSeed { problem: self.problem })?;
            } else {
                self.problem.tensor = Some(name);
                let tensor = map.next_value_seed(TensorSeed { problem: self.problem })?;
                header.tensors.push(tensor);
            }
            self.problem.tensor = None;
        }
        Ok(header)
    }
}

struct MetadataSeed<'p> {
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if metadata.contains_key(&key) {
                let found = format!("`{key}` twice");
                return Err(self.problem.set("metadata is ambiguous", "each key once", found));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

struct TensorSeed<'p> {
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<RawTensor, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `dtype`, `shape` and `data_offsets`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
        let problem = self.problem;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => {
                    let numbers = Numbers { most: MAX_AXES, what: "shape", problem };
                    shape.replace(map.next_value_seed(numbers)?).is_some()
                }
                "data_offsets" => {
                    let numbers = Numbers { most: 2, what: "data_offsets", problem };
                    offsets.replace(map.next_value_seed(numbers)?).is_some()
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    let expected = "`dtype`, `shape`, `data_offsets`";
                    let what = "tensor's entry has an unknown key";
                    return Err(problem.set(what, expected, format!("`{key}`")));
                }
            };
            if twice {
                let what = "tensor's entry has a key twice";
                return Err(problem.set(what, "each key once", format!("`{key}`")));
            }
        }
        let mut absent = |key: &str| -> A::Error {
            let expected = "`dtype`, `shape`, `data_offsets`";
            problem.set("tensor's entry is incomplete", expected, format!("no `{key}`"))
        };
        let dtype = dtype.ok_or_else(|| absent("dtype"))?;
        let shape = shape.ok_or_else(|| absent("shape"))?;
        let offsets = offsets.ok_or_else(|| absent("data_offsets"))?;
        let Ok(offsets) = <[u64; 2]>::try_from(offsets) else {
            let what = "data_offsets are not two numbers";
            return Err(problem.set(what, "[begin, end]", "fewer".to_owned()));
        };
        let Some(&(stored, bits, dtype)) = DTYPES.iter().find(|(name, ..)| *name == dtype) else {
            let known: Vec<&str> = DTYPES.iter().map(|(name, ..)| *name).collect();
            let expected = format!("one of {}", known.join(", "));
            return Err(problem.set(
                "tensor has an unknown dtype",
                &expected,
                format!("`{dtype}`"),
            ));
        };
        let name = problem.tensor.take().unwrap_or_default();
        Ok(RawTensor { name, stored, bits, dtype, shape, offsets })
    }
}

/// A list of at most `most` unsigned numbers.
struct Numbers<'p> {
    most: usize,
    what: &'static str,
    problem: &'p mut Problem,
}

impl<'de> DeserializeSeed<'de> for Numbers<'_> {
    type Value = Vec<u64>;

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<Vec<u64>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` as a list of numbers", self.what)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = seq.next_element::<serde_json::Number>()? {
            let Some(value) = number.as_u64() else {
                let (what, found) = ("number in the header is out of range", number.to_string());
                return Err(self.problem.set(what, "whole numbers from 0 to 2^64 - 1", found));
            };
            if numbers.len() == self.most {
                let expected = format!("at most {} numbers in `{}`", self.most, self.what);
                return Err(self.problem.set(
                    "list in the header is too long",
                    &expected,
                    "more".into(),
                ));
            }
            numbers.push(value);
        }
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests;
