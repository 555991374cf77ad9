//! The generations of a model that are in memory: the live one, and those that requests still work with.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use moe_merge_checkpoint::generation::{self, Current};
use moe_merge_checkpoint::manifest::{Manifest, hash_bytes};
use moe_merge_checkpoint::{CheckpointError, SideContent, Source, SourceRef};
use moe_merge_model::{ChatTemplate, Model, ModelError, Steady, TextError, Tokenizer};

use crate::error::ServeError;
use crate::metrics::Routers;

/// Opens a model in the way that whoever starts the server wants: device, accuracy, experts per token.
pub type Opener = Box<dyn Fn(&Source) -> Result<Model, ModelError> + Send + Sync>;

/// One generation of the model, opened.
#[derive(Debug)]
pub struct Generation {
    /// Its number.
    pub number: u32,
    /// What tells it from any other: goes into `system_fingerprint`.
    pub fingerprint: String,
    /// The model.
    pub model: Steady,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, or why there is none.
    pub template: Arc<Result<ChatTemplate, TextError>>,
    /// Names of its experts.
    pub experts: Vec<String>,
    /// When it was opened, in seconds since 1970.
    pub created: u64,
    /// Where its tokens went.
    pub routers: Routers,
    current: Current,
    /// The side files that tokenizer and template were made from.
    side: String,
}

/// A model whose generations come and go.
pub struct Live {
    reference: SourceRef,
    base_dir: PathBuf,
    opener: Opener,
    /// The folder or file of the model.
    pub path: PathBuf,
    now: RwLock<Arc<Generation>>,
    /// All that may be in memory, the live one too.
    all: Mutex<Vec<Weak<Generation>>>,
    /// Held while another generation is opened.
    opening: Mutex<()>,
}

impl Live {
    /// Opens the generation that is live now.
    ///
    /// # Errors
    /// [`ServeError`] if it cannot be opened, run, or read and write text.
    pub fn open(
        reference: &SourceRef,
        base_dir: &Path,
        opener: Opener,
    ) -> Result<Self, ServeError> {
        let (source, current) = generation::open(reference, base_dir, None)?;
        let first = Arc::new(Generation::of(&source, current, &opener, None)?);
        Ok(Self {
            reference: reference.clone(),
            base_dir: base_dir.to_owned(),
            opener,
            path: source.path,
            all: Mutex::new(vec![Arc::downgrade(&first)]),
            now: RwLock::new(first),
            opening: Mutex::new(()),
        })
    }

    /// The live generation. Whoever holds it keeps it in memory.
    pub fn now(&self) -> Arc<Generation> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All generations in memory, oldest first.
    pub fn in_memory(&self) -> Vec<Arc<Generation>> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|generation| generation.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }

    /// Makes the generation on disk the live one, if it is another; requests that come from now on get it.
    ///
    /// # Errors
    /// [`ServeError`] if it cannot be opened; the one before stays live.
    pub fn refresh(&self) -> Result<Option<Arc<Generation>>, ServeError> {
        let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.now();
        if !generation::is_replaced(&self.path, &before.current) {
            return Ok(None);
        }
        let (source, current) =
            generation::open(&self.reference, &self.base_dir, Some(&self.path))?;
        if current == before.current {
            return Ok(None);
        }
        let next = Arc::new(Generation::of(&source, current, &self.opener, Some(&before))?);
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&next));
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = next.clone();
        Ok(Some(next))
    }
}

impl Generation {
    /// Opens what `source` holds; tokenizer and template are those of `before` if their files are the same.
    fn of(
        source: &Source,
        current: Current,
        opener: &Opener,
        before: Option<&Generation>,
    ) -> Result<Self, ServeError> {
        let model = Steady::new(&opener(source)?);
        let side = side_files(source)?;
        let (tokenizer, template) = match before.filter(|b| b.side == side) {
            Some(before) => (before.tokenizer.clone(), before.template.clone()),
            None => {
                let tokenizer = Tokenizer::from_source(source)?;
                let template = ChatTemplate::from_source(source, &tokenizer);
                (Arc::new(tokenizer), Arc::new(template))
            }
        };
        let most = model.spec().moe_layers().map(|(_, moe)| moe.experts).max().unwrap_or(0);
        let named = Manifest::load(&source.path).ok().flatten().map(|m| m.experts);
        let named = named.filter(|names| names.len() == most);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Ok(Self {
            number: current.number,
            fingerprint: fingerprint(&current),
            experts: named.unwrap_or_else(|| (0..most).map(|e| e.to_string()).collect()),
            created,
            routers: Routers::of(model.spec()),
            model,
            tokenizer,
            template,
            current,
            side,
        })
    }
}

/// `fp_g3_0123456789ab`: the number, and the beginning of the hash.
fn fingerprint(current: &Current) -> String {
    let hash = current.hash.get(..12).unwrap_or(&current.hash);
    format!("fp_g{}_{hash}", current.number)
}

/// What tells the files that tokenizer and template are made from from others.
fn side_files(source: &Source) -> Result<String, ServeError> {
    let mut all = source.config.model_type().to_owned();
    for file in &source.side {
        let content = match &file.content {
            SideContent::File(path) => {
                let meta = std::fs::metadata(path);
                let meta = meta.map_err(|e| CheckpointError::io("reading", path, e))?;
                format!("{} {} {:?}", meta.ino(), meta.len(), meta.modified().ok())
            }
            SideContent::Bytes(bytes) => hash_bytes(bytes),
        };
        all += &format!("\0{}\0{content}", file.name);
    }
    Ok(all)
}
