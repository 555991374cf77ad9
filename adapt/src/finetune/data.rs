//! Text to learn from: found once, then read piece by piece when it is needed.
//!
//! A first pass goes through the files and keeps of each document only where it stands and how many tokens it has. So
//! memory does not grow with the text, mistakes are known before the first step, and any document can be read at any time.
//!
//! | file | documents |
//! |---|---|
//! | `.jsonl` | one a line, with `text`, `messages`, or `prompt` and perhaps `completion`; lines that are none are counted |
//! | `.parquet` | one a row, in columns of these names; unpacked into a temporary file, where any row can be read again |
//! | `.json` | the same in a list, at most 256 MiB |
//! | any other | text, in segments of some windows that end at a blank line where there is one |

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_merge_checkpoint::{CheckpointError, Interrupt};
use moe_merge_merge::MergeError;
use moe_merge_merge::documents::{
    Answered, At, Document, DocumentError, Encoder, PromptFile, json_line,
};
use moe_merge_model::expert_training::Lesson;
use serde::Serialize;

use super::error::FinetuneError;
use super::parquet::Table;

/// The longest line of a `.jsonl` file that is read, in bytes.
const LONGEST_LINE: u64 = 64 << 20;

/// Bad lines that are told one by one.
const TOLD: usize = 10;

/// Bytes of text that make a segment, per token of a window: some four windows.
const SEGMENT: usize = 16;

/// Where a document stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: u32,
    line: u32,
    at: Spot,
    /// Tokens of its lessons before they are cut into windows.
    tokens: u32,
    plain: bool,
}

#[derive(Debug, Clone, Copy)]
enum Spot {
    /// Bytes of the file, or of what it was unpacked into.
    Bytes(u64, u32),
    /// A document of a `.json` file, in memory.
    Held(u32),
}

/// What the files hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Documents that are used.
    pub documents: usize,
    /// Their tokens, beginning-of-text tokens included.
    pub tokens: u64,
    /// Documents without any text.
    pub empty: usize,
    /// Lines and rows that are no documents.
    pub bad: usize,
    /// The first of them, with the reason.
    pub bad_lines: Vec<String>,
    /// Conversations and completions whose end is beyond the window.
    pub cut: usize,
    /// Documents of whose answers nothing is within the window.
    pub unanswered: usize,
}

/// Documents in files.
pub struct Corpus<'a> {
    encoder: &'a Encoder<'a>,
    files: Vec<(Arc<Path>, File)>,
    held: Vec<Document>,
    places: Vec<Place>,
    window: usize,
    fingerprint: u64,
    /// What was found.
    pub report: DataReport,
}

impl<'a> Corpus<'a> {
    /// Goes through the files.
    ///
    /// * `window`: tokens of a lesson at most, the beginning-of-text token included
    ///
    /// # Errors
    /// [`FinetuneError`]: a file that cannot be read or holds no document at all; interruption.
    pub fn open(
        files: &[PathBuf],
        encoder: &'a Encoder<'a>,
        window: usize,
        interrupt: &Interrupt,
    ) -> Result<Self, FinetuneError> {
        let mut corpus = Self {
            encoder,
            files: Vec::new(),
            held: Vec::new(),
            places: Vec::new(),
            window,
            fingerprint: 0xcbf2_9ce4_8422_2325,
            report: DataReport::default(),
        };
        for path in files {
            let file = File::open(path).map_err(|e| CheckpointError::io("reading", path, e))?;
            corpus.files.push((path.as_path().into(), file));
            let extension = path.extension().map(|e| e.to_ascii_lowercase()).unwrap_or_default();
            match extension.to_str() {
                Some("jsonl") => corpus.index_lines(interrupt)?,
                Some("json") => corpus.index_held(path)?,
                Some("parquet") => corpus.index_rows(interrupt)?,
                _ => corpus.index_text(interrupt)?,
            }
        }
        corpus.report.documents = corpus.places.len();
        if corpus.places.is_empty() {
            return Err(corpus.nothing());
        }
        Ok(corpus)
    }

    fn nothing(&self) -> FinetuneError {
        let r = &self.report;
        let names: Vec<_> = self.files.iter().map(|(p, _)| p.display().to_string()).collect();
        let mut found = Vec::new();
        for (count, what) in [
            (r.bad, "lines that are no documents"),
            (r.empty, "empty documents"),
            (r.unanswered, "answers beyond the window"),
        ] {
            if count > 0 {
                found.push(format!("{count} {what}"));
            }
        }
        found.extend(r.bad_lines.iter().take(3).cloned());
        FinetuneError::NoData {
            files: names.join(", "),
            expected: "at least one document of two tokens".into(),
            found: if found.is_empty() { "no text".into() } else { found.join("\n") },
        }
    }

    /// Documents.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// A number that other text, or another tokenizer, makes another one.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Lengths of the lessons of a document, without reading it.
    pub fn lengths(&self, document: usize) -> impl Iterator<Item = usize> + use<> {
        let Place { tokens, plain, .. } = self.places[document];
        let (tokens, window) = (tokens as usize, self.window);
        let lead = usize::from(plain && self.encoder.tokenizer().bos().is_some());
        let room = if plain { window - lead } else { tokens };
        let content = tokens - lead;
        let pieces = content.div_ceil(room.max(1));
        (0..pieces).map(move |i| lead + room.min(content - i * room)).filter(|n| *n > 1)
    }

    /// The lessons of a document.
    ///
    /// # Errors
    /// [`FinetuneError`] if its file has changed since it was opened.
    pub fn lessons(&self, document: usize) -> Result<Vec<Lesson>, FinetuneError> {
        let place = self.places[document];
        let file = &self.files[place.file as usize];
        let read = match place.at {
            Spot::Held(at) => self.held[at as usize].clone(),
            Spot::Bytes(offset, len) => {
                let mut bytes = vec![0; len as usize];
                let mut from = &file.1;
                let failed = |e| CheckpointError::io("reading", &file.0, e);
                from.seek(SeekFrom::Start(offset)).map_err(failed)?;
                from.read_exact(&mut bytes).map_err(failed)?;
                let text = String::from_utf8(bytes).map_err(|_| self.changed(place))?;
                if is_lines(&file.0) {
                    let parsed = json_line(&file.0, place.line as usize, &text);
                    parsed.ok().flatten().ok_or_else(|| self.changed(place))?
                } else {
                    Document::text(&text, &file.0, At::Line(place.line as usize))
                }
            }
        };
        let answered = self.encoder.answered(&read)?;
        let lessons = cut(answered, self.window, self.encoder.tokenizer().bos().is_some());
        if !lessons.iter().map(|l| l.tokens.len()).eq(self.lengths(document)) {
            return Err(self.changed(place));
        }
        Ok(lessons)
    }

    fn changed(&self, place: Place) -> FinetuneError {
        let file = &self.files[place.file as usize].0;
        let document = At::Line(place.line as usize);
        MergeError::from(CheckpointError::Malformed {
            what: "the data have changed while they were used".into(),
            file: file.to_path_buf(),
            tensor: None,
            expected: format!("the document that stood at {}{document}", file.display()),
            found: "another one".into(),
            hint: Some("start again, with files that stay as they are".into()),
        })
        .into()
    }

    /// Takes a document up, unless there is nothing in it to learn.
    fn note(&mut self, document: &Document, line: usize, at: Spot) -> Result<(), MergeError> {
        let Answered { tokens, answers, plain } = self.encoder.answered(document)?;
        for token in &tokens {
            self.fingerprint = (self.fingerprint ^ u64::from(*token)).wrapping_mul(0x100_0000_01b3);
        }
        let within = if plain { tokens.len() } else { tokens.len().min(self.window) };
        if !answers.iter().take(within).skip(1).any(|a| *a) {
            match plain {
                true => self.report.empty += 1,
                false => self.report.unanswered += 1,
            }
            return Ok(());
        }
        self.report.cut += usize::from(within < tokens.len());
        self.report.tokens += within as u64;
        let file = self.files.len() as u32 - 1;
        self.places.push(Place { file, line: line as u32, at, tokens: within as u32, plain });
        Ok(())
    }

    /// A line that is no document.
    fn bad(&mut self, line: usize, why: &str) {
        self.report.bad += 1;
        if self.report.bad_lines.len() < TOLD {
            let file = self.files.last().map(|(p, _)| p.display().to_string()).unwrap_or_default();
            self.report.bad_lines.push(format!("{file}:{line}: {why}"));
        }
    }

    fn index_held(&mut self, path: &Path) -> Result<(), FinetuneError> {
        let read = PromptFile::read(path)?;
        self.report.empty += read.empty;
        for document in read.documents {
            let item = self.held.len();
            self.note(&document, item, Spot::Held(item as u32))?;
            self.held.push(document);
        }
        Ok(())
    }

    fn reader(&self) -> Result<(Arc<Path>, BufReader<File>), FinetuneError> {
        let Some((path, file)) = self.files.last() else {
            return Err(self.nothing());
        };
        let file = file.try_clone().map_err(|e| CheckpointError::io("reading", path, e))?;
        Ok((path.clone(), BufReader::with_capacity(1 << 20, file)))
    }

    fn index_lines(&mut self, interrupt: &Interrupt) -> Result<(), FinetuneError> {
        let (path, mut reader) = self.reader()?;
        let failed = |e| CheckpointError::io("reading", &path, e);
        let (mut offset, mut line, mut bytes) = (0, 0, Vec::new());
        loop {
            interrupt.check()?;
            bytes.clear();
            let read = (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes);
            let read = read.map_err(failed)? as u64;
            if read == 0 {
                return Ok(());
            }
            line += 1;
            let at = offset;
            offset += read;
            if read == LONGEST_LINE && bytes.last() != Some(&b'\n') {
                offset += skip_line(&mut reader).map_err(failed)?;
                self.bad(line, "longer than 64 MiB");
                continue;
            }
            let Ok(text) = std::str::from_utf8(&bytes) else {
                self.bad(line, "not UTF-8");
                continue;
            };
            let text = if line == 1 { text.trim_start_matches('\u{feff}') } else { text };
            if text.trim().is_empty() {
                continue;
            }
            let at = at + (bytes.len() - text.len()) as u64;
            self.take_line(&path, line, text, Spot::Bytes(at, text.len() as u32))?;
        }
    }

    /// Takes a line of JSON up, or notes that it is no document.
    fn take_line(
        &mut self,
        path: &Arc<Path>,
        line: usize,
        text: &str,
        spot: Spot,
    ) -> Result<(), FinetuneError> {
        match json_line(path, line, text) {
            Ok(None) => self.report.empty += 1,
            Err(e) => self.bad(line, &reason(&e)),
            Ok(Some(document)) => match self.note(&document, line, spot) {
                Ok(()) => {}
                // A conversation that the template refuses is a bad line; a model without template is not.
                Err(MergeError::Documents(e)) if e.hint.is_none() => self.bad(line, &reason(&e)),
                Err(other) => return Err(other.into()),
            },
        }
        Ok(())
    }

    /// Unpacks the rows of a Parquet file as lines of JSON, and takes them up.
    fn index_rows(&mut self, interrupt: &Interrupt) -> Result<(), FinetuneError> {
        let folder = std::env::temp_dir();
        let failed = |e| CheckpointError::io("unpacking Parquet data into", &folder, e);
        let unpacked = tempfile::tempfile().map_err(failed)?;
        let Some((path, file)) = self.files.pop() else { return Ok(()) };
        let mut writer = BufWriter::new(unpacked.try_clone().map_err(failed)?);
        self.files.push((path.clone(), unpacked));
        let mut offset = 0;
        Table::open(&path, file)?.rows(&mut |row, text| {
            interrupt.check()?;
            let text = match text {
                Ok(text) if text.len() as u64 > LONGEST_LINE => Err("longer than 64 MiB"),
                other => other,
            };
            match text {
                Err(why) => self.bad(row, why),
                Ok(text) => {
                    writer.write_all(text.as_bytes()).map_err(failed)?;
                    self.take_line(&path, row, &text, Spot::Bytes(offset, text.len() as u32))?;
                    offset += text.len() as u64;
                }
            }
            Ok(())
        })?;
        writer.flush().map_err(failed)?;
        Ok(())
    }

    fn index_text(&mut self, interrupt: &Interrupt) -> Result<(), FinetuneError> {
        let (path, mut reader) = self.reader()?;
        let least = self.window * SEGMENT;
        let (mut offset, mut line, mut first) = (0u64, 1, 1);
        let (mut segment, mut next) = (Vec::new(), Vec::new());
        loop {
            interrupt.check()?;
            next.clear();
            let read = (&mut reader).take(4 * least as u64).read_until(b'\n', &mut next);
            read.map_err(|e| CheckpointError::io("reading", &path, e))?;
            let blank = next.iter().all(u8::is_ascii_whitespace);
            let full = (blank && segment.len() >= least)
                || segment.len() + next.len() > 2 * least && !segment.is_empty();
            if full || next.is_empty() {
                let used = self.segment(&path, &segment, offset, first)?;
                offset += used as u64;
                segment.drain(..used);
                first = line;
                if next.is_empty() {
                    return Ok(());
                }
            }
            segment.extend_from_slice(&next);
            line += usize::from(next.ends_with(b"\n"));
        }
    }

    /// Takes a segment of text up, and says how many of its bytes: a character may go on behind its end.
    fn segment(
        &mut self,
        path: &Arc<Path>,
        bytes: &[u8],
        offset: u64,
        line: usize,
    ) -> Result<usize, FinetuneError> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) if e.error_len().is_none() && e.valid_up_to() > 0 => {
                std::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(e) => {
                let upto = &bytes[..e.valid_up_to()];
                let line = line + upto.iter().filter(|b| **b == b'\n').count();
                return Err(MergeError::from(CheckpointError::Malformed {
                    what: "text is not UTF-8".into(),
                    file: path.to_path_buf(),
                    tensor: None,
                    expected: "text in UTF-8".into(),
                    found: format!("line {line} holds a byte that is not part of a character"),
                    hint: Some("convert it, for example with `iconv -t UTF-8`".into()),
                })
                .into());
            }
        };
        if !text.trim().is_empty() {
            let document = Document::text(text, path, At::Line(line));
            self.note(&document, line, Spot::Bytes(offset, text.len() as u32))?;
        }
        Ok(text.len())
    }
}

/// Whether each document is a line of JSON.
fn is_lines(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["jsonl", "parquet"].iter().any(|e| extension.eq_ignore_ascii_case(e))
}

fn reason(error: &DocumentError) -> String {
    match &error.found {
        Some(found) => format!("{}: {found}", error.what),
        None => error.what.clone(),
    }
}

/// Reads over the rest of a line.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let rest = reader.fill_buf()?;
        let end = rest.iter().position(|b| *b == b'\n');
        let count = end.map_or(rest.len(), |e| e + 1);
        let done = rest.is_empty() || end.is_some();
        reader.consume(count);
        skipped += count as u64;
        if done {
            return Ok(skipped);
        }
    }
}

/// Plain text in windows, each with the beginning-of-text token before it; the beginning of anything else.
fn cut(answered: Answered, window: usize, bos: bool) -> Vec<Lesson> {
    let Answered { mut tokens, mut answers, plain } = answered;
    if !plain {
        tokens.truncate(window);
        answers.truncate(window);
        return vec![Lesson { tokens, scored: answers }];
    }
    let lead = usize::from(bos);
    let (first, content) = tokens.split_at(lead);
    content
        .chunks((window - lead).max(1))
        .map(|part| {
            let tokens = [first, part].concat();
            let scored = (0..tokens.len()).map(|i| i >= lead).collect();
            Lesson { tokens, scored }
        })
        .filter(|lesson| lesson.tokens.len() > 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_begin_with_the_leading_token() {
        let plain = Answered { tokens: vec![9, 1, 2, 3, 4], answers: vec![true; 5], plain: true };
        let found: Vec<_> = cut(plain.clone(), 3, true).into_iter().map(|l| l.tokens).collect();
        assert_eq!(found, [vec![9, 1, 2], vec![9, 3, 4]]);
        // Without one, a last window of one token has nothing to learn.
        let found: Vec<_> = cut(plain, 2, false).into_iter().map(|l| l.tokens).collect();
        assert_eq!(found, [vec![9, 1], vec![2, 3]]);
        let answers = vec![false, false, true, true];
        let chat = Answered { tokens: vec![1, 2, 3, 4], answers, plain: false };
        let found = cut(chat, 3, true);
        assert_eq!(found, [Lesson { tokens: vec![1, 2, 3], scored: vec![false, false, true] }]);
    }

    #[test]
    fn the_rest_of_a_line_is_read_over() {
        let mut reader = BufReader::with_capacity(4, &b"rest of it\nnext"[..]);
        assert_eq!(skip_line(&mut reader).unwrap(), 11);
        assert_eq!(skip_line(&mut reader).unwrap(), 4);
    }
}
