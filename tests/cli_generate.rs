//! `generate` on the tiny base model.

#[allow(dead_code)]
mod cli;

use cli::{base, copy_without, run};

#[test]
fn greedy_text_is_the_same_every_time() {
    let Some(base) = base() else { return };
    let args = ["generate", &base, "--prompt", "The river", "--max-new-tokens", "12"];
    let found = run(&args);
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(found.stderr.starts_with("note: 12 tokens, ended by max new tokens; prompt "));
    assert!(found.stdout.ends_with('\n') && found.stdout.len() > 12, "{:?}", found.stdout);
    let document = run(&[&args[..], &["--json"]].concat()).json();
    assert_eq!(format!("{}\n", document["text"].as_str().unwrap()), found.stdout);
    assert_eq!(
        (&document["new_tokens"], &document["stop"]),
        (&12.into(), &"max_new_tokens".into())
    );
    assert!(document["prompt_tokens"].as_u64().unwrap() > 1);
    for speed in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(document[speed].as_f64().unwrap() > 0.0);
    }
    let quiet = run(&[&args[..], &["-q"]].concat());
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (found.stdout, ""));
}

#[test]
fn a_seed_decides_what_is_sampled() {
    let Some(base) = base() else { return };
    let sample = |seed: &str| {
        let args = ["generate", &base, "--prompt", "The", "--max-new-tokens", "10", "--json"];
        let more = ["--temperature", "1.5", "--top-p", "0.95", "--top-k", "200", "--seed", seed];
        run(&[&args[..], &more[..]].concat()).json()["tokens"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn a_chat_template_is_applied() {
    let Some(base) = base() else { return };
    let dir = copy_without(&base, &[]);
    std::fs::write(
        dir.path().join("chat_template.jinja"),
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )
    .unwrap();
    let path = dir.path().to_str().unwrap();
    let tokens = |more: &[&str]| {
        let args = ["generate", path, "--max-new-tokens", "4", "--json", "--prompt"];
        run(&[&args[..], more].concat()).json()
    };
    let (chat, plain) = (tokens(&["Hello", "--chat"]), tokens(&["user: Hello\n"]));
    assert_eq!(
        (&chat["tokens"], &chat["prompt_tokens"]),
        (&plain["tokens"], &plain["prompt_tokens"])
    );
    let without = run(&["generate", &base, "--prompt", "x", "--chat"]);
    without.fails(3, &["the model has no chat template", "hint: leave `--chat` away"]);
}

#[test]
fn what_cannot_be_generated_is_explained() {
    let Some(base) = base() else { return };
    run(&["generate", &base, "--prompt", "x", "--temperature", "NaN"])
        .fails(2, &["`temperature` is out of range"]);
    run(&["generate", &base, "--prompt", "x", "--top-p", "0"])
        .fails(2, &["`top_p` is out of range", "above 0, at most 1"]);
    let long = "river ".repeat(600);
    run(&["generate", &base, "--prompt", &long])
        .fails(2, &["prompt is longer than the context", "at most 511 tokens"]);
    let dir = copy_without(&base, &["tokenizer.json"]);
    run(&["generate", dir.path().to_str().unwrap(), "--prompt", "x"])
        .fails(3, &["the model has no tokenizer", "`tokenizer.json`", "hint: copy"]);
}
