//! The vocabulary and the chat template that a dense merge is to have.

use super::node::{Node, Value};
use super::reader::{Object, Reader, join};
use super::schema;
use super::source::{Place, SourceSpec};

/// The vocabulary of the result.
#[derive(Debug, Clone)]
pub struct TokenizerSpec {
    /// What it starts from.
    pub source: VocabularySource,
    /// Tokens whose rows come from elsewhere than the rules say.
    pub tokens: Vec<TokenSpec>,
    /// The number of rows is rounded up to a multiple of this.
    pub pad_to_multiple_of: Option<usize>,
    /// Where it stands.
    pub place: Place,
}

/// What a vocabulary starts from.
#[derive(Debug, Clone)]
pub enum VocabularySource {
    /// All tokens of all models, those of the base first.
    Union,
    /// That of the base, without entries beyond its rows.
    Base,
    /// That of one model.
    Model(SourceSpec),
}

/// Where the rows of one token come from.
#[derive(Debug, Clone)]
pub struct TokenSpec {
    /// Its text in the vocabulary.
    pub text: String,
    /// The source; by the rules without one.
    pub source: Option<RowSpec>,
    /// Whether models that have the token get these rows too.
    pub force: bool,
    /// Where it stands.
    pub place: Place,
}

/// A row of embedding and head.
#[derive(Debug, Clone)]
pub enum RowSpec {
    /// That of the same token in this model.
    Model(SourceSpec),
    /// That of another token, by its text.
    Token(SourceSpec, String),
    /// That with this number.
    Id(SourceSpec, usize),
    /// Zeros.
    Zero,
}

/// Chat templates that have a name.
pub const CHAT_TEMPLATES: &[&str] = &["auto", "alpaca", "chatml", "exaone", "llama3", "mistral"];

impl Reader {
    /// `tokenizer`, or the older `tokenizer_source`.
    pub fn tokenizer(&mut self, object: &Object) -> Option<TokenizerSpec> {
        if object.has("tokenizer") && object.has("tokenizer_source") {
            let what = "both `tokenizer` and `tokenizer_source` are given";
            self.error(object.at, &join(&object.path, "tokenizer_source"), what);
            return None;
        }
        if let Some((node, path)) = object.get("tokenizer_source") {
            let source = self.vocabulary(node, &path)?;
            let place = self.place(node.at, &path);
            return Some(TokenizerSpec {
                source,
                tokens: Vec::new(),
                pad_to_multiple_of: None,
                place,
            });
        }
        let (node, path) = object.get("tokenizer")?;
        let place = self.place(node.at, &path);
        let object = self.object(node, &path, schema::TOKENIZER, "a vocabulary")?;
        let source = match object.get("source") {
            Some((node, path)) => self.vocabulary(node, &path)?,
            None => VocabularySource::Union,
        };
        let multiple = object.get("pad_to_multiple_of");
        let multiple = multiple.and_then(|(n, p)| self.integer(n, &p, 1..=1 << 20));
        let tokens = self.token_specs(&object);
        Some(TokenizerSpec {
            source,
            tokens,
            pad_to_multiple_of: multiple.map(|m| m as usize),
            place,
        })
    }

    fn vocabulary(&mut self, node: &Node, path: &str) -> Option<VocabularySource> {
        Some(match &node.value {
            Value::Text(text) if text == "union" => VocabularySource::Union,
            Value::Text(text) if text == "base" => VocabularySource::Base,
            _ => VocabularySource::Model(self.source(node, path)?),
        })
    }

    fn token_specs(&mut self, object: &Object) -> Vec<TokenSpec> {
        let mut tokens = Vec::new();
        let Some((node, path)) = object.get("tokens") else { return tokens };
        let Value::Map(entries) = &node.value else {
            self.wrong(node, &path, "a mapping of tokens to where their rows come from");
            return tokens;
        };
        for (key, value) in entries {
            let path = join(&path, &key.text);
            let place = self.place(key.at, &path);
            let mut token = TokenSpec { text: key.text.clone(), source: None, force: false, place };
            if !matches!(value.value, Value::Null) {
                let Some(object) = self.object(value, &path, schema::TOKEN, "a token") else {
                    continue;
                };
                if let Some((node, path)) = object.get("source") {
                    token.source = self.row(node, &path);
                }
                let force = object.get("force");
                token.force = force.and_then(|(n, p)| self.boolean(n, &p)).unwrap_or(false);
            }
            tokens.push(token);
        }
        tokens
    }

    fn row(&mut self, node: &Node, path: &str) -> Option<RowSpec> {
        let has_kind = |entries: &[(super::node::Key, Node)]| {
            entries
                .iter()
                .any(|(k, _)| k.text == "kind" || k.text == "token" || k.text == "token_id")
        };
        match &node.value {
            Value::Map(entries) if has_kind(entries) => {}
            _ => return Some(RowSpec::Model(self.source(node, path)?)),
        }
        let object = self.object(node, path, schema::ROW, "the source of a row")?;
        let kind = match object.get("kind") {
            Some((node, path)) => self.one_of(node, &path, &["zero", "model_token"])?,
            None => "model_token".to_owned(),
        };
        if kind == "zero" {
            return Some(RowSpec::Zero);
        }
        if !object.has("model") {
            self.error(node.at, &join(path, "model"), "`model` is missing");
            return None;
        }
        let model = self.source_at(&object, "model")?;
        match (object.get("token"), object.get("token_id")) {
            (Some((node, path)), None) => Some(RowSpec::Token(model, self.text(node, &path)?)),
            (None, Some((node, path))) => {
                Some(RowSpec::Id(model, self.integer(node, &path, 0..=u32::MAX.into())? as usize))
            }
            (token, _) => {
                let what = if token.is_some() {
                    "both `token` and `token_id` are given"
                } else {
                    "`token` is missing"
                };
                self.error(node.at, path, what).expected =
                    Some("one of `token` and `token_id`".into());
                None
            }
        }
    }

    /// The chat template: a name, or Jinja text.
    pub fn chat_template(&mut self, object: &Object) -> Option<String> {
        let (node, path) = object.get("chat_template")?;
        let text = self.text(node, &path)?;
        let jinja = text.contains('{') && text.chars().count() >= 20;
        if jinja || CHAT_TEMPLATES.contains(&text.as_str()) {
            return Some(text);
        }
        self.unknown_name(node, &path, &text, CHAT_TEMPLATES);
        if let Some(error) = self.errors.last_mut().filter(|e| e.hint.is_none()) {
            error.hint = Some(
                "a template of your own is Jinja text of at least 20 characters, with a `{`".into(),
            );
        }
        None
    }
}
