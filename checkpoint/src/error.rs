//! What can be wrong with files.

use std::path::{Path, PathBuf};

use crate::explain::{Explain, Kind};

/// An error about a file, a folder or a tensor in it.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Reading or writing failed.
    #[error("{action} failed: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The reason that the system gave.
        #[source]
        source: std::io::Error,
    },
    /// A source that does not exist.
    #[error("source not found")]
    NotFound {
        /// Path or Hub name as given.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// The text of a source reference cannot be read.
    #[error("source reference {what}")]
    BadReference {
        /// The text.
        text: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A file that is not what it should be.
    #[error("{what}")]
    Malformed {
        /// What is wrong, in one line.
        what: String,
        /// The file.
        file: PathBuf,
        /// The tensor, if one is concerned.
        tensor: Option<String>,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A tensor that should be there is not.
    #[error("tensor is missing")]
    MissingTensor {
        /// Checkpoint that should have it.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// The nearest name that is there.
        nearest: Option<String>,
    },
    /// A weight has another shape than expected.
    #[error("tensor has the wrong shape")]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape expected, with the reason.
        expected: String,
        /// Shape found.
        found: Vec<usize>,
    },
    /// A weight holds NaN or infinity.
    #[error("weight is not finite")]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index of the first bad number.
        index: usize,
    },
    /// Something that this program cannot read or apply.
    #[error("{what}")]
    Unsupported {
        /// What, in one line.
        what: String,
        /// The file.
        file: PathBuf,
        /// What to do.
        hint: String,
    },
    /// The disk is full, or will be.
    #[error("not enough room on disk")]
    NoRoom {
        /// Where it was to be written.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The output is there already.
    #[error("output exists already")]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// Replacing the output would delete something that is no model.
    #[error("refusing to delete what is no model folder")]
    NotAModel {
        /// What is there.
        path: PathBuf,
    },
    /// Replacing the output would delete something that is no GGUF file.
    #[error("refusing to replace what is no GGUF file")]
    NotAGguf {
        /// What is there.
        path: PathBuf,
    },
    /// Another process is changing the model.
    #[error("another process is changing this model")]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// The model has been changed since somebody looked at it.
    #[error("the model was changed in the meantime")]
    Outdated {
        /// The folder.
        path: PathBuf,
        /// The generation that was to be changed.
        expected: u32,
        /// The generation that is there.
        found: u32,
    },
    /// The settings of the folder ask for approval, and the change has none.
    #[error("changes of this model have to be approved")]
    ApprovalRequired {
        /// The folder.
        path: PathBuf,
    },
    /// A generation that the model never had.
    #[error("there is no such generation")]
    NoGeneration {
        /// The folder.
        path: PathBuf,
        /// The generation asked for.
        wanted: u32,
        /// The last one that there is; none for a model without history.
        last: Option<u32>,
    },
    /// The user stopped the program.
    #[error("interrupted")]
    Interrupted,
}

impl CheckpointError {
    /// An [`CheckpointError::Io`] (or [`CheckpointError::NoRoom`] when the disk is full) from an io error.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::NoRoom { path: path.to_owned(), needed: 0, free: 0 }
            }
            _ => Self::Io { action, path: path.to_owned(), source },
        }
    }
}

/// What a source can be written as.
const SOURCE_FORMS: &str =
    "PATH, FILE.gguf or org/name[@revision], and `+ADAPTER[@revision]` after any of them";

impl Explain for CheckpointError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoRoom { .. } => Kind::NoRoom,
            Self::OutputExists { .. }
            | Self::NotAModel { .. }
            | Self::NotAGguf { .. }
            | Self::BadReference { .. }
            | Self::NoGeneration { .. } => Kind::Usage,
            Self::ApprovalRequired { .. } => Kind::CheckFailed,
            Self::Interrupted => Kind::Interrupted,
            _ => Kind::Input,
        }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let show = |p: &PathBuf| p.display().to_string();
        match self {
            Self::Io { path, .. }
            | Self::OutputExists { path }
            | Self::Busy { path }
            | Self::ApprovalRequired { path }
            | Self::NotFound { path, .. } => vec![("path", show(path))],
            Self::Outdated { path, expected, found } => vec![
                ("path", show(path)),
                ("expected", format!("generation {expected}")),
                ("found", format!("generation {found}")),
            ],
            Self::NoGeneration { path, wanted, last } => vec![
                ("path", show(path)),
                (
                    "expected",
                    match last {
                        Some(last) => format!("a generation from 0 to {last}"),
                        None => "a model that was changed at least once".into(),
                    },
                ),
                ("found", format!("generation {wanted}")),
            ],
            Self::NotAModel { path } => vec![
                ("path", show(path)),
                (
                    "expected",
                    "nothing, an empty folder, or a model folder with `config.json`".into(),
                ),
                ("found", if path.is_dir() { "another folder" } else { "a file" }.into()),
            ],
            Self::NotAGguf { path } => vec![
                ("path", show(path)),
                ("expected", "nothing, or a GGUF file".into()),
                ("found", if path.is_dir() { "a folder" } else { "another file" }.into()),
            ],
            Self::BadReference { text, .. } => {
                vec![("expected", SOURCE_FORMS.into()), ("found", format!("`{text}`"))]
            }
            Self::Malformed { file, tensor, expected, found, .. } => {
                let mut fields = vec![("file", show(file))];
                fields.extend(tensor.iter().map(|t| ("tensor", t.clone())));
                fields.push(("expected", expected.clone()));
                fields.push(("found", found.clone()));
                fields
            }
            Self::MissingTensor { file, tensor, .. } => {
                vec![("file", show(file)), ("tensor", tensor.clone())]
            }
            Self::Shape { file, tensor, expected, found } => vec![
                ("file", show(file)),
                ("tensor", tensor.clone()),
                ("expected", expected.clone()),
                ("found", format!("{found:?}")),
            ],
            Self::NotFinite { file, tensor, index } => vec![
                ("file", show(file)),
                ("tensor", tensor.clone()),
                ("expected", "finite numbers".into()),
                ("found", format!("NaN or infinity at flat index {index}")),
            ],
            Self::Unsupported { file, .. } => vec![("file", show(file))],
            Self::NoRoom { path, needed, free } if *needed > 0 => vec![
                ("path", show(path)),
                ("expected", format!("{needed} bytes free")),
                ("found", format!("{free} bytes free")),
            ],
            Self::NoRoom { path, .. } => vec![("path", show(path))],
            Self::Interrupted => Vec::new(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { hint, .. } | Self::Unsupported { hint, .. } => Some(hint.clone()),
            Self::Malformed { hint, .. } => hint.clone(),
            Self::MissingTensor { nearest: Some(nearest), .. } => {
                Some(format!("the nearest name that is there: `{nearest}`"))
            }
            Self::MissingTensor { file, .. } => {
                Some(format!("`moe-merge inspect {}` shows what is there", file.display()))
            }
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::PermissionDenied => Some(
                    "your user may not do that there; change the permissions or choose another place".into(),
                ),
                std::io::ErrorKind::ReadOnlyFilesystem => {
                    Some("choose a place on another file system for the output (`--out`, `--gguf`)".into())
                }
                _ => None,
            },
            Self::NotFinite { .. } => Some(
                "the checkpoint is damaged or diverged in training; take an earlier one".into(),
            ),
            Self::NoRoom { path, .. } if path.extension().is_some_and(|e| e == "gguf") => {
                Some("free some space, or choose another place with `--gguf`".into())
            }
            Self::NoRoom { .. } => {
                Some("free some space, or choose another folder with `--out`".into())
            }
            Self::Busy { .. } => Some("wait until it is done, then try again".into()),
            Self::ApprovalRequired { path } => Some(format!(
                "`moe-merge swap`, `add`, `drop` and `calibrate` take `--stage`; then `moe-merge approve {}` (`.moe-merge/settings.json` \
                 sets the rule)",
                path.display()
            )),
            Self::NoGeneration { path, .. } => {
                Some(format!("`moe-merge history {}` lists them", path.display()))
            }
            Self::Outdated { .. } => {
                Some("run the command again, from what the model is now".into())
            }
            Self::NotAModel { .. } => {
                Some("remove it by hand, or choose another folder with `--out`".into())
            }
            Self::NotAGguf { .. } => Some("remove it by hand, or choose another file".into()),
            Self::OutputExists { path } if path.extension().is_some_and(|e| e == "gguf") => {
                Some("`--force` replaces it, `--gguf FILE` writes elsewhere".into())
            }
            Self::OutputExists { .. } => {
                Some("`--force` replaces it, `--out DIR` writes elsewhere".into())
            }
            _ => None,
        }
    }
}
