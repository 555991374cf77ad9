//! `finetune`: the forms in which its data may come.

#[allow(dead_code)]
mod cli;
mod common;
mod tuning;

use std::path::{Path, PathBuf};

use moe_merge_testkit::repository;
use serde_json::{Value, json};
use tuning::{finetune, report};

/// A chat template of marks between turns, as a folder's own.
const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}<assistant> {% endif %}";

/// A dense model of the quickstart, with a chat template.
fn chatting(temp: &Path) -> PathBuf {
    let folder = temp.join("chatting");
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(repository("recipes/quickstart/base")).unwrap().flatten() {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    std::fs::write(folder.join("chat_template.jinja"), TEMPLATE).unwrap();
    folder
}

fn two_steps(model: &Path, data: &str, out: &Path) -> cli::Run {
    let out = out.display().to_string();
    let steps = ["--steps", "2", "--window", "64", "--batch-tokens", "256"];
    finetune(model, &[&["--data", data, "--out", &out], &steps[..]].concat())
}

fn parquet(name: &str) -> String {
    repository("tests/data/parquet").join(name).display().to_string()
}

#[test]
fn parquet_trains_as_the_same_lines_of_json() {
    let temp = tempfile::tempdir().unwrap();
    let model = chatting(temp.path());
    for (name, documents, bad, empty) in
        [("chats", 12, 2, 0), ("exchanges", 12, 0, 0), ("texts", 16, 1, 1)]
    {
        let read = |form: &str| {
            let out = temp.path().join(format!("{name}-{form}"));
            let run = two_steps(&model, &parquet(&format!("{name}.{form}")), &out);
            let data = report(&run)["data"].take();
            (data, std::fs::read(out.join("adapter_model.safetensors")).unwrap())
        };
        let ((lines, wanted), (rows, found)) = (read("jsonl"), read("parquet"));
        assert!(found == wanted, "{name}: the same factors");
        for (key, value) in [("documents", documents), ("bad", bad), ("empty", empty)] {
            assert_eq!((&rows[key], &lines[key]), (&json!(value), &json!(value)), "{name} {key}");
        }
        let numbers = |report: &Value, form: &str| -> Vec<String> {
            let told = report["bad_lines"].as_array().unwrap();
            told.iter().map(|l| l.as_str().unwrap().replace(&format!(".{form}:"), ":")).collect()
        };
        assert_eq!(numbers(&rows, "parquet"), numbers(&lines, "jsonl"));
        if name == "chats" {
            let told = numbers(&rows, "parquet");
            assert!(told[0].contains("chats:13: ") && told[1].contains("chats:14: "), "{told:?}");
        }
    }
}

#[test]
fn parquet_that_cannot_be_used_is_told() {
    let temp = tempfile::tempdir().unwrap();
    let model = repository("recipes/quickstart/base");
    let run = |name: &str, bytes: &[u8]| {
        let data = cli::file(temp.path(), name, bytes);
        two_steps(&model, &data, &temp.path().join("out"))
    };
    let whole = std::fs::read(parquet("texts.parquet")).unwrap();
    let short = run("short.parquet", &whole[..whole.len() - 100]);
    short.fails(3, &["a Parquet file cannot be read", "short.parquet", "cut short"]);
    run("none.parquet", b"{\"text\": \"no Parquet\"}").fails(3, &["none.parquet"]);
    run("empty.parquet", b"").fails(3, &["empty.parquet"]);
    // A page in the middle that was overwritten.
    let mut holed = whole.clone();
    holed[30..90].fill(0xff);
    run("holed.parquet", &holed).fails(3, &["a Parquet file cannot be read", "row "]);
    // `text` has the number of bytes of `when`: in the footer and in the pages no column is called so.
    let mut other = whole.clone();
    for at in 0..other.len() - 4 {
        if other[at..].starts_with(b"text") {
            other[at..at + 4].copy_from_slice(b"when");
        }
    }
    run("other.parquet", &other).fails(
        3,
        &["without text", "`messages`", "columns `when` (BYTE_ARRAY)", "rename the column"],
    );
    // Conversations need a template.
    let chats = two_steps(&model, &parquet("chats.parquet"), &temp.path().join("out"));
    chats.fails(2, &["chats.parquet:1", "chat template"]);
    assert!(!temp.path().join("out").exists());
}

#[test]
fn of_a_conversation_only_answers_are_learnt() {
    let temp = tempfile::tempdir().unwrap();
    let model = chatting(temp.path());
    let turns = [
        ("user", "Stir two cups of flour?"),
        ("assistant", "Fold it gently."),
        ("user", "And the plums 17?"),
        ("assistant", "Roast the plums for 20 minutes, twice."),
    ];
    let messages: Vec<Value> =
        turns.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
    let line = json!({"messages": messages}).to_string();
    let data = cli::file(temp.path(), "chat.jsonl", format!("{line}\n").as_bytes());
    // By hand, what the template writes, and which bytes of it answer: with the end of the turn, without what opens it.
    let (mut text, mut spans) = (String::new(), Vec::new());
    for (role, said) in turns {
        text += &format!("<{role}> ");
        let from = text.len();
        text += &format!("{said}\n");
        if role == "assistant" {
            spans.push(from..text.len());
        }
    }
    let source = common::open(&model);
    let tokenizer = moe_merge_model::Tokenizer::from_source(&source).unwrap();
    let (tokens, offsets) = tokenizer.encode_spans(&text).unwrap();
    let answers: Vec<usize> = (0..tokens.len())
        .filter(|i| spans.iter().any(|s| offsets[*i].0 < s.end && offsets[*i].1 > s.start))
        .collect();
    assert!(answers.len() > 10 && answers.len() < tokens.len() - 10, "{answers:?}");
    let logits = common::logits(&moe_merge_model::Model::open(&source).unwrap(), &tokens);
    let vocabulary = logits.len() / tokens.len();
    let nats = |at: usize| {
        let row = &logits[(at - 1) * vocabulary..at * vocabulary];
        let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
        sum.ln() - f64::from(row[tokens[at] as usize])
    };
    let wanted = answers.iter().map(|at| nats(*at)).sum::<f64>() / answers.len() as f64;
    let out = temp.path().join("out").display().to_string();
    let chat = format!("chat={data}");
    let args = ["--data", &data, "--out", &out, "--eval", &chat, "--accuracy", "exact"];
    let found =
        report(&finetune(&model, &[&args[..], &["--window", "256", "--steps", "1"]].concat()));
    let domain = &found["domains"][0];
    assert_eq!(domain["tokens"], json!(answers.len()));
    assert!((domain["before"].as_f64().unwrap().ln() - wanted).abs() < 1e-4, "{domain} {wanted}");
    assert!((found["loss"][0].as_f64().unwrap() - wanted).abs() < 1e-4, "{found} {wanted}");
}
