//! The header of a GGUF file, checked before anything in it is believed.
//!
//! Everything borrows from the mapped bytes: a count or a length in the file never decides how much is allocated.
//!
//! # Source
//! ggml `docs/gguf.md`, versions 2 and 3, little-endian.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::error::CheckpointError;
use crate::gguf::kinds::TensorKind;
use crate::gguf::value::{Cursor, KIND_LIST, KIND_TEXT, List, Value, fixed_size, scalar};

/// Arrays inside arrays that are followed; no known file goes beyond one.
const MAX_DEPTH: usize = 4;

/// Longest key or tensor name; the format allows keys of 65535 bytes.
const MAX_NAME: usize = 65535;

/// Axes of a tensor that ggml knows.
const MAX_AXES: usize = 4;

/// Where tensors start when `general.alignment` does not say otherwise: at multiples of this many bytes.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Bytes of the shortest metadata entry (empty key, one-byte value) and of the shortest tensor entry (one axis).
const SHORTEST_ENTRY: u64 = 8 + 4 + 1;
const SHORTEST_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// How its numbers are stored.
    pub kind: TensorKind,
    /// Row-major shape (the file lists the axes the other way round).
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header<'a> {
    /// Format version: 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<&'a str, Value<'a>>,
    /// Tensors in the order of the file.
    pub tensors: Vec<TensorInfo<'a>>,
}

impl<'a> Header<'a> {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.metadata.get(key)
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo<'a>> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Parses and checks the header in `bytes`, which are a whole file; `path` is for messages.
///
/// # Errors
/// [`CheckpointError::Malformed`] for everything that is not a version 2 or 3 little-endian GGUF file in which each
/// tensor lies inside the file, on its own bytes, with the size that its type and shape ask for.
pub fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<Header<'a>, CheckpointError> {
    Parser { cursor: Cursor { bytes, at: 0 }, path }.header()
}

struct Parser<'a, 'p> {
    cursor: Cursor<'a>,
    path: &'p Path,
}

impl<'a> Parser<'a, '_> {
    fn refuse<T>(
        &self,
        what: String,
        tensor: Option<&str>,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: Option<&str>,
    ) -> Result<T, CheckpointError> {
        Err(CheckpointError::Malformed {
            what,
            file: self.path.to_owned(),
            tensor: tensor.map(str::to_owned),
            expected: expected.into(),
            found: found.into(),
            hint: hint.map(str::to_owned),
        })
    }

    /// The refusal for a file that ends inside of something.
    fn ended<T>(&self, inside: &str) -> Result<T, CheckpointError> {
        self.refuse(
            format!("GGUF file ends inside of {inside}"),
            None,
            "a complete header",
            format!("the end of the file at byte {}", self.cursor.bytes.len()),
            Some(COPY_AGAIN),
        )
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        self.cursor.u32().map_or_else(|| self.ended(what), Ok)
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        self.cursor.u64().map_or_else(|| self.ended(what), Ok)
    }

    /// A count of things that take at least `shortest` bytes each: more cannot follow.
    fn count(&mut self, what: &str, shortest: u64) -> Result<u64, CheckpointError> {
        let count = self.u64(what)?;
        let most = self.cursor.left() as u64 / shortest;
        if count > most {
            return self.refuse(
                format!("{what} is larger than the file"),
                None,
                format!("at most {most} in the {} bytes that follow", self.cursor.left()),
                count.to_string(),
                Some(COPY_AGAIN),
            );
        }
        Ok(count)
    }

    fn name(&mut self, what: &str) -> Result<&'a str, CheckpointError> {
        let len = self.u64(what)?;
        if len > MAX_NAME as u64 {
            return self.refuse(
                format!("{what} is too long"),
                None,
                format!("at most {MAX_NAME} bytes"),
                format!("{len} bytes"),
                Some(COPY_AGAIN),
            );
        }
        self.text(len, what)
    }

    fn text(&mut self, len: u64, what: &str) -> Result<&'a str, CheckpointError> {
        let at = self.cursor.at;
        let taken = usize::try_from(len).ok().and_then(|len| self.cursor.take(len));
        let Some(bytes) = taken else {
            return self.refuse(
                format!("length of {what} goes beyond the file"),
                None,
                format!("at most {} bytes", self.cursor.left()),
                format!("{len} bytes"),
                Some(COPY_AGAIN),
            );
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(e) => self.refuse(
                format!("{what} is not UTF-8"),
                None,
                "UTF-8",
                format!("another byte at {} of the file", at + e.valid_up_to()),
                None,
            ),
        }
    }

    fn header(mut self) -> Result<Header<'a>, CheckpointError> {
        if self.cursor.take(4) != Some(b"GGUF".as_slice()) {
            let start = &self.cursor.bytes[..self.cursor.bytes.len().min(4)];
            return self.refuse(
                "not a GGUF file".into(),
                None,
                "the bytes `GGUF` at the start",
                format!("{start:02x?}"),
                Some("is it a safetensors file, or a pointer that Git LFS left in its place?"),
            );
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            let hint = if version.swap_bytes() < 16 {
                "the file is big-endian; convert it with gguf-py's `gguf_convert_endian.py`"
            } else {
                "convert the model again with a current llama.cpp"
            };
            return self.refuse(
                "GGUF version is not supported".into(),
                None,
                "version 2 or 3, little-endian",
                format!("version {version}"),
                Some(hint),
            );
        }
        let tensor_count = self.count("the number of tensors", SHORTEST_TENSOR)?;
        let entry_count = self.count("the number of metadata entries", SHORTEST_ENTRY)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entry_count {
            let key = self.name("a metadata key")?;
            let kind = self.u32(&format!("metadata key `{key}`"))?;
            let value = self.value(key, kind)?;
            if metadata.insert(key, value).is_some() {
                return self.refuse(
                    format!("metadata key `{key}` is there twice"),
                    None,
                    "each key once",
                    "a second value",
                    None,
                );
            }
        }
        let alignment = self.alignment(&metadata)?;
        let tensors = self.tensors(tensor_count, alignment)?;
        Ok(Header { version, metadata, tensors })
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value<'a>, CheckpointError> {
        let what = format!("metadata key `{key}`");
        if let Some(size) = fixed_size(kind) {
            let Some(bytes) = self.cursor.take(size) else { return self.ended(&what) };
            return match scalar(kind, bytes) {
                Some(value) => Ok(value),
                None => self.refuse(
                    format!("{what} is no truth value"),
                    None,
                    "0 or 1",
                    format!("{bytes:?}"),
                    None,
                ),
            };
        }
        match kind {
            KIND_TEXT => {
                let len = self.u64(&what)?;
                Ok(Value::Text(self.text(len, &what)?))
            }
            KIND_LIST => {
                let kind = self.u32(&what)?;
                let (start, count) = self.list(key, kind, 0)?;
                let bytes = &self.cursor.bytes[start..self.cursor.at];
                Ok(Value::List(List { kind, count, bytes }))
            }
            _ => self.unknown_kind(key, kind),
        }
    }

    fn unknown_kind<T>(&self, key: &str, kind: u32) -> Result<T, CheckpointError> {
        self.refuse(
            format!("metadata key `{key}` has a value of unknown type"),
            None,
            "a type from 0 to 12",
            format!("type {kind}"),
            Some(COPY_AGAIN),
        )
    }

    /// Steps over the values of a list; returns where they start and how many there are.
    fn list(
        &mut self,
        key: &str,
        kind: u32,
        depth: usize,
    ) -> Result<(usize, usize), CheckpointError> {
        let what = format!("the list length of metadata key `{key}`");
        if depth >= MAX_DEPTH {
            return self.refuse(
                format!("lists of metadata key `{key}` are nested too deep"),
                None,
                format!("at most {MAX_DEPTH} levels"),
                "more",
                None,
            );
        }
        let shortest = match (fixed_size(kind), kind) {
            (Some(size), _) => size as u64,
            (None, KIND_TEXT) => 8,
            (None, KIND_LIST) => 12,
            _ => return self.unknown_kind(key, kind),
        };
        let count = self.count(&what, shortest)?;
        let start = self.cursor.at;
        match kind {
            KIND_TEXT => {
                for _ in 0..count {
                    let len = self.u64(&what)?;
                    let taken = usize::try_from(len).ok().and_then(|len| self.cursor.take(len));
                    if taken.is_none() {
                        return self.refuse(
                            format!("a text of metadata key `{key}` goes beyond the file"),
                            None,
                            format!("at most {} bytes", self.cursor.left()),
                            format!("{len} bytes"),
                            Some(COPY_AGAIN),
                        );
                    }
                }
            }
            KIND_LIST => {
                for _ in 0..count {
                    let kind = self.u32(&what)?;
                    self.list(key, kind, depth + 1)?;
                }
            }
            _ => {
                // `count` has checked that this many fit in what is left.
                self.cursor.take((count * shortest) as usize);
            }
        }
        Ok((start, count as usize))
    }

    fn alignment(&self, metadata: &BTreeMap<&str, Value>) -> Result<u64, CheckpointError> {
        let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
        match value.unsigned() {
            Some(a) if a.is_power_of_two() && a <= 1 << 30 => Ok(a),
            _ => self.refuse(
                "metadata key `general.alignment` makes no sense".into(),
                None,
                "a power of two",
                value.describe(),
                None,
            ),
        }
    }

    fn tensors(
        &mut self,
        count: u64,
        alignment: u64,
    ) -> Result<Vec<TensorInfo<'a>>, CheckpointError> {
        let mut found: Vec<(&'a str, TensorKind, Vec<usize>, u64, u64)> = Vec::new();
        for _ in 0..count {
            let name = self.name("a tensor name")?;
            let (shape, kind) = self.shape_and_kind(name)?;
            let size = self.size(name, kind, &shape)?;
            let offset = self.u64(&format!("tensor `{name}`"))?;
            if offset % alignment != 0 {
                return self.refuse(
                    "tensor is not aligned".into(),
                    Some(name),
                    format!("an offset that is a multiple of {alignment}"),
                    offset.to_string(),
                    None,
                );
            }
            found.push((name, kind, shape, offset, size));
        }
        self.refuse_duplicates(found.iter().map(|t| t.0))?;
        let start = (self.cursor.at as u64).next_multiple_of(alignment);
        let file_len = self.cursor.bytes.len() as u64;
        let mut tensors = Vec::with_capacity(found.len());
        for (name, kind, shape, offset, size) in found {
            let end = start.checked_add(offset).and_then(|from| from.checked_add(size));
            match end {
                Some(end) if end <= file_len => {
                    let range = (end - size) as usize..end as usize;
                    tensors.push(TensorInfo { name, kind, shape, range });
                }
                _ => {
                    return self.refuse(
                        "tensor goes beyond the end of the file".into(),
                        Some(name),
                        format!("{size} bytes from offset {offset} of the data at byte {start}"),
                        format!("a file of {file_len} bytes"),
                        Some(COPY_AGAIN),
                    );
                }
            }
        }
        self.refuse_overlaps(&tensors)?;
        Ok(tensors)
    }

    fn shape_and_kind(&mut self, name: &str) -> Result<(Vec<usize>, TensorKind), CheckpointError> {
        let what = format!("tensor `{name}`");
        let axes = self.u32(&what)? as usize;
        if !(1..=MAX_AXES).contains(&axes) {
            return self.refuse(
                "tensor has an impossible number of axes".into(),
                Some(name),
                format!("1 to {MAX_AXES}"),
                axes.to_string(),
                Some(COPY_AGAIN),
            );
        }
        let mut shape = Vec::with_capacity(axes);
        for _ in 0..axes {
            let len = self.u64(&what)?;
            match usize::try_from(len) {
                Ok(len) if len > 0 && len <= i64::MAX as usize => shape.push(len),
                _ => {
                    return self.refuse(
                        "tensor has an axis of impossible length".into(),
                        Some(name),
                        "at least 1 and below 2^63",
                        len.to_string(),
                        Some(COPY_AGAIN),
                    );
                }
            }
        }
        shape.reverse();
        let id = self.u32(&what)?;
        match TensorKind::from_id(id) {
            Some(kind) => Ok((shape, kind)),
            None => self.refuse(
                "tensor is of a type this program does not know".into(),
                Some(name),
                "a type of ggml that is still in use",
                format!("type {id}"),
                Some("convert the model again, for example to Q8_0 or BF16"),
            ),
        }
    }

    /// Bytes that `shape` takes in `kind`.
    fn size(&self, name: &str, kind: TensorKind, shape: &[usize]) -> Result<u64, CheckpointError> {
        let (block, bytes) = kind.block();
        let cols = shape.last().copied().unwrap_or(1);
        if cols % block != 0 {
            return self.refuse(
                "rows of the tensor are no whole number of blocks".into(),
                Some(name),
                format!("rows of a multiple of {block} values for {kind}"),
                format!("rows of {cols}"),
                None,
            );
        }
        let count = shape.iter().try_fold(1u64, |n, &len| n.checked_mul(len as u64));
        match count.and_then(|n| (n / block as u64).checked_mul(bytes as u64)) {
            // Values are addressed as f32 later: four bytes each have to be countable as well.
            Some(size) if count.is_some_and(|n| n <= i64::MAX as u64 / 4) => Ok(size),
            _ => self.refuse(
                "shape of the tensor is impossibly large".into(),
                Some(name),
                format!("a size within the file of {} bytes", self.cursor.bytes.len()),
                format!("{shape:?}"),
                Some(COPY_AGAIN),
            ),
        }
    }

    fn refuse_duplicates<'n>(
        &self,
        names: impl Iterator<Item = &'n str>,
    ) -> Result<(), CheckpointError> {
        let mut sorted: Vec<&str> = names.collect();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => self.refuse(
                "two tensors have the same name".into(),
                Some(pair[0]),
                "each name once",
                "a second tensor",
                None,
            ),
            None => Ok(()),
        }
    }

    fn refuse_overlaps(&self, tensors: &[TensorInfo]) -> Result<(), CheckpointError> {
        let mut sorted: Vec<&TensorInfo> = tensors.iter().collect();
        sorted.sort_by_key(|t| (t.range.start, t.range.end));
        match sorted.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            Some(pair) => self.refuse(
                "two tensors lie on the same bytes".into(),
                Some(pair[1].name),
                format!("a start at byte {} or later, after `{}`", pair[0].range.end, pair[0].name),
                format!("byte {}", pair[1].range.start),
                Some(COPY_AGAIN),
            ),
            None => Ok(()),
        }
    }
}

const COPY_AGAIN: &str = "the file is damaged or incomplete; download or copy it again";
