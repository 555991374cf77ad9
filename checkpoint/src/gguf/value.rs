//! Metadata values of a GGUF file: what they are, and how their bytes are read.
//!
//! # Source
//! ggml `docs/gguf.md`, `gguf_metadata_value_type`.

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A 32-bit number.
    F32(f32),
    /// A 64-bit number.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(&'a str),
    /// A list of values of one kind.
    List(List<'a>),
}

impl Value<'_> {
    /// What kind of value it is, for messages.
    pub fn describe(&self) -> String {
        match self {
            Value::Unsigned(v) => format!("{v}"),
            Value::Signed(v) => format!("{v}"),
            Value::F32(v) => format!("{v}"),
            Value::F64(v) => format!("{v}"),
            Value::Bool(v) => format!("{v}"),
            Value::Text(v) if v.len() <= 60 => format!("`{v}`"),
            Value::Text(v) => format!("a text of {} bytes", v.len()),
            Value::List(list) => format!("a list of {} values", list.count),
        }
    }

    /// The value as an unsigned integer.
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(v) => Some(v),
            Value::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }
}

/// A list in the metadata: checked to lie in the file, read when it is used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct List<'a> {
    pub(super) kind: u32,
    pub(super) count: usize,
    pub(super) bytes: &'a [u8],
}

impl<'a> List<'a> {
    /// Values in it.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The texts of a list of texts, as bytes; `None` for a list of anything else.
    pub fn texts(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        let mut cursor = Cursor { bytes: self.bytes, at: 0 };
        let next = move |_| {
            let len = usize::try_from(cursor.u64()?).ok()?;
            cursor.take(len)
        };
        (self.kind == KIND_TEXT).then(|| (0..self.count).map_while(next))
    }

    /// The numbers of a list of numbers; `None` for a list of anything else.
    pub fn numbers(&self) -> Option<impl Iterator<Item = f64> + use<'a>> {
        let (kind, width) = (self.kind, fixed_size(self.kind)?);
        Some(self.bytes.chunks_exact(width).map(move |c| match scalar(kind, c) {
            Some(Value::Unsigned(v)) => v as f64,
            Some(Value::Signed(v)) => v as f64,
            Some(Value::F32(v)) => f64::from(v),
            Some(Value::F64(v)) => v,
            Some(Value::Bool(v)) => f64::from(u8::from(v)),
            _ => f64::NAN,
        }))
    }
}
/// Type of a text.
pub(super) const KIND_TEXT: u32 = 8;

/// Type of a list.
pub(super) const KIND_LIST: u32 = 9;

/// Bytes of a value of fixed size.
pub(super) fn fixed_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A value of fixed size; `None` if `bytes` is too short or a truth value is neither 0 nor 1.
pub(super) fn scalar(kind: u32, bytes: &[u8]) -> Option<Value<'static>> {
    fn le<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
        bytes.first_chunk().copied()
    }
    Some(match kind {
        0 => Value::Unsigned(u64::from(*bytes.first()?)),
        1 => Value::Signed(i64::from(i8::from_le_bytes(le(bytes)?))),
        2 => Value::Unsigned(u64::from(u16::from_le_bytes(le(bytes)?))),
        3 => Value::Signed(i64::from(i16::from_le_bytes(le(bytes)?))),
        4 => Value::Unsigned(u64::from(u32::from_le_bytes(le(bytes)?))),
        5 => Value::Signed(i64::from(i32::from_le_bytes(le(bytes)?))),
        6 => Value::F32(f32::from_le_bytes(le(bytes)?)),
        7 => match bytes.first()? {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            _ => return None,
        },
        10 => Value::Unsigned(u64::from_le_bytes(le(bytes)?)),
        11 => Value::Signed(i64::from_le_bytes(le(bytes)?)),
        12 => Value::F64(f64::from_le_bytes(le(bytes)?)),
        _ => return None,
    })
}

/// Reads forward through bytes and stops at their end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take(4)?.first_chunk().map(|c| u32::from_le_bytes(*c))
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take(8)?.first_chunk().map(|c| u64::from_le_bytes(*c))
    }
}
