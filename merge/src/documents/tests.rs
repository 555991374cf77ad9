use std::fs;
use std::path::PathBuf;

use moe_merge_checkpoint::Source;
use moe_merge_testkit::shared;

use super::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn read(&self, name: &str, text: impl AsRef<[u8]>) -> Result<PromptFile, DocumentError> {
        PromptFile::read(&self.write(name, text))
    }
}

fn texts(file: &PromptFile) -> Vec<String> {
    file.documents
        .iter()
        .map(|d| match &d.content {
            Content::Text(text) => text.clone(),
            Content::Chat(messages) => {
                messages.iter().map(|m| format!("{}={};", m.role, m.content)).collect()
            }
            Content::Exchange { prompt, completion } => format!("{prompt}|{completion:?}"),
        })
        .collect()
}

#[test]
fn blocks_are_divided_by_blank_lines() {
    let file = Folder::new().read("p.txt", "\u{feff}\n\na\n b\n\n \nc\r\n").unwrap();
    assert_eq!(texts(&file), ["a\n b", "c"]);
    let at: Vec<_> = file.documents.iter().map(|d| d.at).collect();
    assert_eq!(at, [At::Line(3), At::Line(7)]);
}

#[test]
fn lines_of_every_kind() {
    let lines = r#"{"text": "a\nb", "label": 0}

{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}], "domain": "code"}
{"prompt": "q", "completion": "c", "expert": "prose"}
{"prompt": "q", "response": "r"}
{"prompt": "q", "text": null}
{"prompt": [{"role": "system", "content": "s"}], "completion": [{"role": "assistant", "content": "t"}]}
{"text": "  "}
"#;
    let file = Folder::new().read("p.JSONL", lines).unwrap();
    assert_eq!(
        texts(&file),
        [
            "a\nb",
            "user=q;assistant=xy;",
            "q|Some(\"c\")",
            "q|Some(\"r\")",
            "q|None",
            "system=s;assistant=t;"
        ]
    );
    assert_eq!(file.empty, 1);
    let labels: Vec<_> =
        file.documents[..4].iter().map(|d| d.label.clone().map(|l| (l.text, l.certain))).collect();
    assert_eq!(
        labels,
        [
            Some(("0".into(), false)),
            Some(("code".into(), false)),
            Some(("prose".into(), true)),
            None
        ]
    );
}

#[test]
fn lists_of_json() {
    let folder = Folder::new();
    let file = folder.read("p.json", r#"["a", {"text": "b"}, {"prompt": "c"}]"#).unwrap();
    assert_eq!(texts(&file), ["a", "b", "c|None"]);
    let file = folder.read("q.json", r#"{"prose": ["a"], "code": [{"text": "b"}, ""]}"#).unwrap();
    let labels: Vec<_> = file.documents.iter().map(|d| d.label.clone().unwrap().text).collect();
    assert_eq!((labels.join(" "), file.empty), ("prose code".into(), 1));
}

#[test]
fn what_is_no_document_is_named_with_its_line() {
    let folder = Folder::new();
    let cases: &[(&str, &[u8], &str, &str)] = &[
        ("a.jsonl", b"{\"text\": \"a\"}\n{}", "a line is no document", ":2"),
        ("a.jsonl", b"\n\nx", "a line is not JSON", ":3"),
        ("a.jsonl", b"\"bare\"", "a line is no document", ":1"),
        ("a.jsonl", b"{\"txt\": \"a\"}", "a line is no document", ":1"),
        ("a.jsonl", b"{\"text\": 5}", "`text` is no text", ":1"),
        ("a.jsonl", b"{\"messages\": []}", "`messages` is empty", ":1"),
        ("a.jsonl", b"{\"messages\": [{\"content\": \"a\"}]}", "message 0 has no `role`", ":1"),
        (
            "a.jsonl",
            b"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
            "message 0 has no text",
            ":1",
        ),
        ("a.jsonl", b"{\"prompt\": 5}", "`prompt` is no text", ":1"),
        ("a.jsonl", b"{\"prompt\": \"a\", \"completion\": {}}", "`completion` is no text", ":1"),
        ("a.jsonl", b"{\"text\": \"a\", \"expert\": true}", "`expert` names no expert", ":1"),
        ("a.json", b"[{}]", "a line is no document", "[0]"),
        ("a.json", b"\n{", "not JSON", ":2"),
        ("a.json", b"5", "no list of texts", ""),
        ("a.json", b"{\"prose\": \"a\"}", "`prose` holds no list", ""),
        ("a.txt", b"ok\nca\xe9", "not UTF-8", ":2"),
        ("a.txt", b" \n\n", "holds no text", ""),
        ("a.jsonl", b"{\"text\": \"\"}", "holds no text", ""),
        ("a.yaml", b"a", "YAML", ""),
    ];
    for (name, bytes, what, at) in cases {
        let error = folder.read(name, bytes).unwrap_err();
        assert!(error.what.contains(what), "{error:?}");
        assert_eq!(error.at.to_string(), *at, "{error:?}");
        assert!(error.fields()[0].1.contains(name));
    }
    let gone = PromptFile::read(&folder.0.path().join("gone.txt")).unwrap_err();
    assert_eq!(gone.kind(), Kind::Input);
    assert!(PromptFile::read(folder.0.path()).is_err());
}

fn names() -> Vec<String> {
    ["prose", "code", "math"].map(String::from).to_vec()
}

fn counts(found: &[LabelledPrompts]) -> Vec<(usize, usize)> {
    found.iter().map(|f| (f.positive.len(), f.negative.len())).collect()
}

#[test]
fn labels_are_names_or_numbers() {
    let folder = Folder::new();
    let path = folder.write(
        "all.jsonl",
        r#"{"text": "a", "expert": "code"}
{"text": "b", "label": 0}
{"text": "c", "domain": "math"}
{"text": "d", "label": "2"}
{"text": " ", "label": "2"}"#,
    );
    let (found, notes) = read_labelled(&path, &names(), Unprompted::Refused).unwrap();
    assert_eq!(counts(&found), [(1, 0), (1, 0), (2, 0)]);
    assert_eq!((found[1].expert, found[1].label.as_str(), notes.len()), (1, "code", 1));
}

fn refused(path: &Path, names: &[String]) -> String {
    let error = read_labelled(path, names, Unprompted::Refused).unwrap_err();
    let fields: Vec<_> = error.fields().into_iter().map(|(k, v)| format!("{k} {v}")).collect();
    format!("{error}; {}; {:?}", fields.join("; "), error.hint())
}

#[test]
fn unknown_missing_and_absent_labels_are_refused() {
    let folder = Folder::new();
    let say = |lines: &str| refused(&folder.write("all.jsonl", lines), &names());
    let unknown = say("{\"text\": \"a\", \"expert\": \"cod\"}");
    assert!(unknown.contains("`cod`") && unknown.contains("did you mean `code`?"), "{unknown}");
    assert!(unknown.contains("all.jsonl:1"), "{unknown}");
    assert!(say("{\"text\": \"a\", \"label\": 3}").contains("no expert is called `3`"));
    assert!(say("{\"text\": \"a\"}").contains("does not say which expert"));
    let without = say("{\"text\": \"a\", \"label\": 1}");
    assert!(without.contains("2 experts have no prompts: `prose`, `math`"), "{without}");
    let path = folder.write("all.jsonl", "{\"text\": \"a\", \"label\": 1}");
    let (found, _) = read_labelled(&path, &names(), Unprompted::Allowed).unwrap();
    assert_eq!(counts(&found), [(0, 0), (1, 0), (0, 0)]);
    let twins = ["x", "x"].map(String::from);
    let path = folder.write("all.json", "{\"x\": [\"a\"]}");
    assert!(refused(&path, &twins).contains("several experts are called `x`"));
}

#[test]
fn a_recipe_gives_its_prompts() {
    let folder = Folder::new();
    folder.write("more.txt", "b\n\nc\n");
    let recipe = "base_model: nowhere
experts:
  - {source_model: org/math, positive_prompts: [x], align: true}
  - {name: code, source_model: y, prompts_file: more.txt, negative_prompts: [no such]}
  - {name: prose, positive_prompts: [a]}
gate_mode: hidden
";
    let path = folder.write("r.yaml", recipe);
    assert!(refused(&path, &names()).contains("unknown key `align`"));
    let path = folder.write("r.yaml", recipe.replace(", align: true", ""));
    let (found, _) = read_labelled(&path, &names(), Unprompted::Refused).unwrap();
    assert_eq!(counts(&found), [(1, 0), (2, 1), (1, 0)]);
    // A folder without manifest knows its experts by number only: the recipe's order is theirs.
    let numbers = ["0", "1", "2"].map(String::from);
    let (found, _) = read_labelled(&path, &numbers, Unprompted::Refused).unwrap();
    assert_eq!(counts(&found), [(1, 0), (2, 1), (1, 0)]);
    let two = ["0", "1"].map(String::from);
    assert!(refused(&path, &two).contains("no expert is called `math`"));
    let path = folder.write("r.yaml", "experts:\n  - {positive_prompts: [x]}\n");
    assert!(refused(&path, &names()).contains("r.yaml:2"), "{}", refused(&path, &names()));
    let path = folder.write("r.yaml", "base_model: [\n");
    assert!(refused(&path, &names()).contains("YAML"));
}

#[test]
fn the_prompts_of_the_tiny_models() {
    let Some(path) = shared("models/tiny/prompts.json") else { return };
    let names = ["prose", "code", "math", "facts"].map(String::from);
    let (found, notes) = read_labelled(&path, &names, Unprompted::Refused).unwrap();
    assert_eq!(counts(&found), [(6, 0); 4]);
    assert!(notes.is_empty());
}

fn tiny(folder: &Folder, template: Option<&str>) -> Option<Source> {
    let base = shared("models/tiny/base")?;
    for entry in fs::read_dir(&base).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.0.path().join(path.file_name().unwrap())).unwrap();
    }
    if let Some(text) = template {
        folder.write("chat_template.jinja", text);
    }
    Some(
        Source::open(&folder.0.path().display().to_string().parse().unwrap(), "".as_ref()).unwrap(),
    )
}

fn document(content: Content) -> Document {
    Document { content, file: Path::new("p.jsonl").into(), at: At::Line(4), label: None }
}

fn exchange() -> Document {
    document(Content::Exchange { prompt: "the mill".into(), completion: Some(" seemed".into()) })
}

#[test]
fn chats_are_rendered_and_bos_stands_once() {
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let folder = Folder::new();
    let Some(source) = tiny(&folder, Some(template)) else { return };
    let encoder = Encoder::new(&source).unwrap();
    let bos = encoder.tokenizer().bos().unwrap();
    let text = |ids: &[u32]| encoder.tokenizer().decode(ids).unwrap();
    let ids = encoder.document(&exchange()).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == bos).count(), 1);
    assert_eq!(ids[0], bos);
    assert_eq!(text(&ids), "[user] the mill\n[assistant]  seemed\n");
    let open = document(Content::Chat(vec![Message::new("user", "hi")]));
    assert_eq!(text(&encoder.document(&open).unwrap()), "[user] hi\n[assistant]");
    let plain = document(Content::Text("the mill".into()));
    assert_eq!(encoder.document(&plain).unwrap()[0], bos);
}

#[test]
fn a_model_without_template_joins_exchanges_and_refuses_chats() {
    let folder = Folder::new();
    let Some(source) = tiny(&folder, None) else { return };
    let encoder = Encoder::new(&source).unwrap();
    let ids = encoder.document(&exchange()).unwrap();
    assert_eq!(ids, encoder.text("the mill seemed").unwrap());
    let chat = document(Content::Chat(vec![Message::new("user", "hi")]));
    let error = encoder.document(&chat).unwrap_err();
    assert!(error.to_string().contains("chat template"), "{error:?}");
    assert_eq!(error.fields()[0].1, "p.jsonl:4");
}

#[test]
fn a_template_that_refuses_names_the_line() {
    let folder = Folder::new();
    let Some(source) = tiny(&folder, Some("{{ raise_exception('no system role') }}")) else {
        return;
    };
    let error = Encoder::new(&source).unwrap().document(&exchange()).unwrap_err();
    assert_eq!(error.fields()[0].1, "p.jsonl:4");
    assert!(error.fields()[1].1.contains("no system role"), "{error:?}");
}

/// Documents of so many tokens each: the words of the tiny vocabulary are found by trial.
fn documents(encoder: &Encoder<'_>, lengths: &[usize]) -> Vec<Document> {
    let word = " the";
    assert_eq!(encoder.tokenizer().encode(&word.repeat(7)).unwrap().len(), 7);
    lengths.iter().map(|&n| document(Content::Text(word.repeat(n)))).collect()
}

fn cut(encoder: &Encoder<'_>, lengths: &[usize], budget: usize) -> (Pieces, Vec<usize>) {
    let documents = documents(encoder, lengths);
    let all: Vec<_> = documents.iter().collect();
    let made = encoder.pieces(&all, Cutting::Budget(budget)).unwrap();
    let bos = encoder.tokenizer().bos();
    assert!(made.tokens.iter().all(|t| t.first().copied() == bos && t.len() <= 512));
    let lengths = made.tokens.iter().map(|t| t.len() - 1).collect();
    (made, lengths)
}

#[test]
fn budgets_are_filled_in_order_and_the_rest_is_told() {
    let folder = Folder::new();
    let Some(source) = tiny(&folder, None) else { return };
    let encoder = Encoder::new(&source).unwrap();
    let (made, lengths) = cut(&encoder, &[20, 30], 1000);
    assert_eq!((lengths, made.note("x", (1000, "prompt_tokens"))), (vec![20, 30], None));
    // 1100 = 511 + 511 + 78
    let (made, lengths) = cut(&encoder, &[20, 1100, 30], 2000);
    assert_eq!(lengths, [20, 511, 511, 78, 30]);
    assert_eq!(made.document, [0, 1, 1, 1, 2]);
    assert_eq!(
        made.note("x", (2000, "prompt_tokens")).unwrap(),
        "x: 1 of 3 documents cut into pieces of 512 tokens"
    );
    let (made, lengths) = cut(&encoder, &[20, 1100, 30, 40], 600);
    assert_eq!(lengths, [20, 511, 69]);
    assert_eq!(
        made.note("expert `code`", (600, "prompt_tokens")).unwrap(),
        "expert `code`: 1 of 4 documents cut into pieces of 512 tokens, 1 cut short, 2 left out: budget of 600 \
         tokens (`prompt_tokens`)"
    );
    // What is left for the second, 5 tokens, is too little to say anything.
    let (made, lengths) = cut(&encoder, &[20, 30, 40], 25);
    assert_eq!((lengths, made.short, made.left_out), (vec![20], 0, 2));
    assert_eq!(
        made.note("x", (25, "prompt_tokens")).unwrap(),
        "x: 2 of 3 left out: budget of 25 tokens (`prompt_tokens`)"
    );
    let (made, lengths) = cut(&encoder, &[20, 30], 0);
    assert_eq!((lengths.len(), made.left_out), (0, 2));
}

#[test]
fn whole_documents_have_to_fit() {
    let folder = Folder::new();
    let Some(source) = tiny(&folder, None) else { return };
    let encoder = Encoder::new(&source).unwrap();
    let long = documents(&encoder, &[20, encoder.context()]);
    let all: Vec<_> = long.iter().collect();
    let made = encoder.pieces(&all[..1], Cutting::Whole).unwrap();
    assert_eq!((made.tokens[0].len(), made.note("x", (0, "prompt_tokens"))), (21, None));
    let error = encoder.pieces(&all, Cutting::Whole).unwrap_err();
    assert!(error.to_string().contains("longer than the context"));
}

#[test]
fn labelled_prompts_are_encoded_with_their_notes() {
    let folder = Folder::new();
    let Some(source) = tiny(&folder, None) else { return };
    let Some(path) = shared("models/tiny/prompts.json") else { return };
    let names = ["prose", "code", "math", "facts"].map(String::from);
    let (found, _) = read_labelled(&path, &names, Unprompted::Refused).unwrap();
    let encoder = Encoder::new(&source).unwrap();
    let (all, notes) = encode_labelled(&encoder, &found, Cutting::Budget(20_000)).unwrap();
    assert!(notes.is_empty() && all.iter().all(|p| p.positive.len() == 6));
    let (some, notes) = encode_labelled(&encoder, &found, Cutting::Budget(100)).unwrap();
    assert_eq!(notes.len(), 4);
    for prompts in some {
        let tokens: usize = prompts.positive.iter().map(|p| p.len() - 1).sum();
        assert!((93..=100).contains(&tokens), "{tokens}");
    }
}
