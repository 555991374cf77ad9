//! Rows of a Parquet file as JSON lines: the columns that hold text, and nothing else of the file.
//!
//! Pages are read as they are needed, row group by row group; of other columns not a byte is touched.

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use moe_merge_checkpoint::CheckpointError;
use parquet::basic::{ConvertedType, Repetition, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::error::FinetuneError;

/// Keys of a document, as in a line of JSON.
const KEYS: [&str; 5] = ["text", "messages", "prompt", "completion", "response"];

/// Keys that make a document on their own.
const ENOUGH: [&str; 3] = ["text", "messages", "prompt"];

/// A Parquet file with text in it.
pub struct Table<'a> {
    path: &'a Path,
    reader: SerializedFileReader<File>,
    /// The part of the schema that is read.
    wanted: Type,
}

impl<'a> Table<'a> {
    /// Reads footer and schema.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`]: no Parquet file, or one cut short; no column of text.
    pub fn open(path: &'a Path, file: File) -> Result<Self, CheckpointError> {
        let reader = guarded(|| SerializedFileReader::new(file)).map_err(|e| broken(path, e))?;
        let schema = reader.metadata().file_metadata().schema();
        let columns = schema.get_fields();
        let mut own = Vec::new();
        for column in columns.iter().filter(|c| KEYS.contains(&c.name())) {
            let part = part(column).map_err(|e| broken(path, e.to_string()))?;
            own.push(part.ok_or_else(|| no_text(path, columns))?);
        }
        if !own.iter().any(|c| ENOUGH.contains(&c.name())) {
            return Err(no_text(path, columns));
        }
        let wanted = Type::group_type_builder(schema.name()).with_fields(own).build();
        let wanted = wanted.map_err(|e| broken(path, e.to_string()))?;
        Ok(Self { path, reader, wanted })
    }

    /// Shows every row to `see`: its number, from 1, and its line of JSON, or why it has none.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] for a page that cannot be read, with the row; what `see` returns.
    pub fn rows(
        &self,
        see: &mut dyn FnMut(usize, Result<String, &'static str>) -> Result<(), FinetuneError>,
    ) -> Result<(), FinetuneError> {
        let mut number = 1;
        for group in 0..self.reader.num_row_groups() {
            let failed = |row: usize, e: String| broken(self.path, format!("row {row}: {e}"));
            let group = guarded(|| self.reader.get_row_group(group));
            let group = group.map_err(|e| failed(number, e))?;
            let rows = guarded(|| RowIter::from_row_group(Some(self.wanted.clone()), &*group));
            let mut rows = rows.map_err(|e| failed(number, e))?;
            while let Some(row) =
                guarded(|| rows.next().transpose()).map_err(|e| failed(number, e))?
            {
                see(number, object(&row).map(|row| row.to_string()))?;
                number += 1;
            }
        }
        Ok(())
    }
}

/// The part of a column that holds text; none if there is none.
fn part(column: &Type) -> Result<Option<Arc<Type>>, ParquetError> {
    let info = column.get_basic_info();
    if column.is_primitive() {
        let text = column.get_physical_type() == Physical::BYTE_ARRAY
            && matches!(
                info.converted_type(),
                ConvertedType::UTF8
                    | ConvertedType::NONE
                    | ConvertedType::ENUM
                    | ConvertedType::JSON
            );
        return Ok(text.then(|| Arc::new(column.clone())));
    }
    let fields = column.get_fields();
    let plain = match info.converted_type() {
        ConvertedType::NONE => true,
        ConvertedType::LIST => {
            fields.len() == 1 && fields[0].get_basic_info().repetition() == Repetition::REPEATED
        }
        _ => false,
    };
    let mut own = Vec::new();
    for field in fields {
        own.extend(part(field)?);
    }
    if !plain || own.is_empty() {
        return Ok(None);
    }
    let builder = Type::group_type_builder(column.name())
        .with_repetition(info.repetition())
        .with_converted_type(info.converted_type())
        .with_logical_type(info.logical_type_ref().cloned());
    Ok(Some(Arc::new(builder.with_fields(own).build()?)))
}

fn object(row: &Row) -> Result<Value, &'static str> {
    let fields = row.get_column_iter();
    let pairs = fields.map(|(name, field)| value(field).map(|value| (name.clone(), value)));
    Ok(Value::Object(pairs.collect::<Result<Map<_, _>, _>>()?))
}

fn value(field: &Field) -> Result<Value, &'static str> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_err(|_| "not UTF-8")?.into(),
        Field::Group(row) => object(row)?,
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
        }
        _ => return Err("no text"),
    })
}

thread_local! {
    /// Whether a panic of this thread is expected, and told by whoever expects it.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// What the reader gives; where it panics, as it does over some bytes that no writer would leave, an error.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !EXPECTED.get() {
                told(panic);
            }
        }));
    });
    EXPECTED.set(true);
    // Nothing that the reader had in its hands is used again after an error.
    let found = catch_unwind(AssertUnwindSafe(read));
    EXPECTED.set(false);
    match found {
        Ok(found) => found.map_err(|e| e.to_string()),
        Err(_) => Err("its pages do not fit its footer".into()),
    }
}

fn broken(path: &Path, found: String) -> CheckpointError {
    CheckpointError::Malformed {
        what: "a Parquet file cannot be read".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "a whole Parquet file, its pages plain or packed with Snappy, gzip or zstd"
            .into(),
        found,
        hint: Some("it may be cut short: compare its size with that of the original".into()),
    }
}

fn no_text(path: &Path, columns: &[Arc<Type>]) -> CheckpointError {
    let kind = |c: &Type| match c.is_primitive() {
        true => format!("`{}` ({})", c.name(), c.get_physical_type()),
        false => format!("`{}` (nested)", c.name()),
    };
    let shown: Vec<String> = columns.iter().take(20).map(|c| kind(c.as_ref())).collect();
    CheckpointError::Malformed {
        what: "a Parquet file without text that can be learnt".into(),
        file: path.to_owned(),
        tensor: None,
        expected: "a column `text`, or `messages` (a list of `role` and `content`), or `prompt` and perhaps `completion`, \
                   of UTF-8"
            .into(),
        found: format!("columns {}", shown.join(", ")),
        hint: Some("rename the column that holds the text".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use moe_merge_testkit::repository;

    use super::*;

    /// Rows of a file with these bytes, or why there are none.
    fn rows(bytes: &[u8]) -> Result<usize, FinetuneError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut count = 0;
        Table::open(Path::new("t.parquet"), file)?.rows(&mut |_, _| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// The lines of a file of ours.
    fn lines(name: &str) -> Vec<Value> {
        let path = repository("tests/data/parquet").join(name);
        let mut lines = Vec::new();
        let table = Table::open(&path, File::open(&path).unwrap()).unwrap();
        let keep = &mut |row: usize, line: Result<String, &'static str>| {
            lines.push(serde_json::from_str(&line.unwrap()).unwrap());
            assert_eq!(row, lines.len());
            Ok(())
        };
        table.rows(keep).unwrap();
        lines
    }

    #[test]
    fn only_text_is_read() {
        let chats = lines("chats.parquet");
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!((chats.len(), keys(&chats[0])), (14, vec!["messages".to_owned()]));
        assert_eq!(keys(&chats[0]["messages"][1]), ["content", "role"], "no weights of messages");
        assert_eq!(chats[1]["messages"].as_array().unwrap().len(), 4);
        assert_eq!(
            (&chats[12]["messages"], &chats[13]["messages"]),
            (&Value::Null, &Value::Array(vec![]))
        );
        let exchanges = lines("exchanges.parquet");
        assert_eq!(keys(&exchanges[3]), ["prompt", "completion"]);
        assert_eq!(
            (&exchanges[3]["prompt"], &exchanges[11]["completion"]),
            (&"Task 3: ".into(), &Value::Null)
        );
        assert_eq!(lines("texts.parquet").len(), 18);
    }

    #[test]
    fn broken_files_are_refused_or_read_but_never_a_panic() {
        for name in ["chats", "exchanges", "texts"] {
            let whole = std::fs::read(
                repository("tests/data/parquet").join(name).with_extension("parquet"),
            );
            let whole = whole.unwrap();
            let mut refused = 0;
            for at in 0..whole.len() {
                for by in [0xff, 0x80, 0x01] {
                    let mut broken = whole.clone();
                    broken[at] ^= by;
                    refused += usize::from(rows(&broken).is_err());
                }
                assert!(rows(&whole[..at]).is_err(), "{name} cut at {at}");
            }
            assert!(refused > whole.len() / 2, "{name}: {refused} of {}", 3 * whole.len());
        }
    }
}
