//! OpenAI's routes, stream and not.

use std::ops::ControlFlow;

use moe_merge_kernels::Exec;
use moe_merge_model::generate::{EndOfText, Generation, generate};
use moe_merge_model::{Model, Sampling, TextError, Tokenizer};
use moe_merge_serve::Options;
use serde_json::{Value, json};

use crate::client::{get, post, raw, request};
use crate::common;
use crate::host::{self, Host};

/// What `generate` writes after a prompt.
fn alone(prompt: &str, new: usize, sampling: Sampling) -> (String, Vec<u32>) {
    after(|tokenizer| tokenizer.encode_prompt(prompt), new, sampling)
}

fn after(
    prompt: impl Fn(&Tokenizer) -> Result<Vec<u32>, TextError>,
    new: usize,
    sampling: Sampling,
) -> (String, Vec<u32>) {
    let source = common::open(host::model());
    let model = Model::open_with(&source, Exec::fast()).unwrap();
    let tokenizer = Tokenizer::from_source(&source).unwrap();
    let generation = Generation { max_new_tokens: new, sampling, end_of_text: EndOfText::Stop };
    let prompt = prompt(&tokenizer).unwrap();
    let mut on = |_: &str| ControlFlow::Continue(());
    let found = generate(&model, &tokenizer, &prompt, generation, &mut on).unwrap();
    (found.text, found.tokens)
}

fn complete(host: &Host, change: Value) -> Value {
    let mut body = json!({"model": "tiny-moe", "prompt": "The river", "temperature": 0});
    for (key, value) in change.as_object().unwrap() {
        body[key] = value.clone();
    }
    let response = post(host.address, "/v1/completions", &body);
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()
}

#[test]
fn a_completion_is_what_generate_writes() {
    let host = Host::of(host::model(), Options::default());
    let (text, tokens) = alone("The river", 24, Sampling::default());
    let body =
        json!({"model": "tiny-moe", "prompt": "The river", "max_tokens": 24, "temperature": 0});
    let response = post(host.address, "/v1/completions", &body);
    assert_eq!(response.header("x-moe-merge-generation"), Some("0"));
    assert!(response.header("x-request-id").unwrap().starts_with("req-"));
    let found = response.json();
    assert_eq!(found["object"], "text_completion");
    assert!(found["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(found["model"], "tiny-moe");
    assert!(found["system_fingerprint"].as_str().unwrap().starts_with("fp_g0_"));
    assert_eq!(
        found["choices"],
        json!([
            {"text": text, "index": 0, "logprobs": null, "finish_reason": "length"}
        ])
    );
    let prompt = found["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        found["usage"],
        json!({
            "prompt_tokens": prompt, "completion_tokens": tokens.len(), "total_tokens": prompt + tokens.len() as u64,
        })
    );
    // Sampling too, from the same seed, for the first of several answers.
    let sampling = Sampling { temperature: 0.75, top_p: 0.875, seed: 7, ..Sampling::default() };
    let change = json!({"max_tokens": 24, "temperature": 0.75, "top_p": 0.875, "seed": 7, "n": 3});
    let found = complete(&host, change);
    let texts: Vec<&str> = (0..3).map(|i| found["choices"][i]["text"].as_str().unwrap()).collect();
    assert_eq!(texts[0], alone("The river", 24, sampling).0);
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
}

#[test]
fn streams_say_the_same_piece_by_piece() {
    let host = Host::of(host::model(), Options::default());
    let (text, tokens) = alone("The river", 24, Sampling::default());
    let body = json!({"model": "tiny-moe", "prompt": ["The river", "The river"], "max_tokens": 24,
        "temperature": 0, "stream": true, "stream_options": {"include_usage": true}});
    let response = post(host.address, "/v1/completions", &body);
    assert_eq!(response.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(response.header("x-moe-merge-generation"), Some("0"));
    let events = response.events();
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 2 * tokens.len());
    assert!(pieces.iter().all(|p| p["usage"].is_null() && p["id"] == last["id"]));
    for index in 0..2 {
        let own = || pieces.iter().map(|p| &p["choices"][0]).filter(|c| c["index"] == index);
        let joined: String = own().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(joined, text);
        let finish: Vec<&Value> =
            own().map(|c| &c["finish_reason"]).filter(|f| !f.is_null()).collect();
        assert_eq!(finish, [&json!("length")]);
        assert!(own().count() > 10, "piece by piece");
    }
}

#[test]
fn chats_go_through_the_template() {
    let host = Host::of(host::model(), Options::default());
    let rendered = |t: &Tokenizer| t.encode("user: The river\nassistant:");
    let (text, _) = after(rendered, 12, Sampling::default());
    let mut body = json!({"model": "tiny-moe", "messages": [{"role": "user", "content": "The river"}],
        "max_tokens": 12, "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let found = post(host.address, "/v1/chat/completions", &body).json();
    assert_eq!(found["object"], "chat.completion");
    let choice = &found["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], *text);
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 12);
    for token in content {
        // Greedy: the chosen token is the likeliest.
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["token"], token["top_logprobs"][0]["token"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert!(token["top_logprobs"][1]["logprob"].as_f64() <= token["logprob"].as_f64());
    }
    body["stream"] = json!(true);
    let events = post(host.address, "/v1/chat/completions", &body).events();
    assert!(events.iter().all(|e| e["object"] == "chat.completion.chunk"));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), text);
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
}

#[test]
fn stops_echo_and_logprobs_of_completions() {
    let host = Host::of(host::model(), Options::default());
    let (text, _) = alone("The river", 24, Sampling::default());
    // The second half of the text's own words.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(4).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let found = complete(&host, json!({"max_tokens": 24, "stop": [stop, "never said"]}));
    assert_eq!(found["choices"][0]["text"], *before);
    assert_eq!(found["choices"][0]["finish_reason"], "stop");
    assert!(found["usage"]["completion_tokens"].as_u64().unwrap() < 24);
    let found = complete(&host, json!({"max_tokens": 24, "echo": true}));
    assert_eq!(found["choices"][0]["text"], format!("The river{text}"));
    let found = complete(&host, json!({"max_tokens": 0, "echo": true}));
    assert_eq!(found["choices"][0]["text"], "The river");
    let found = complete(&host, json!({"max_tokens": 5, "logprobs": 3}));
    let logprobs = &found["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 5, "{logprobs}");
    }
    let tokens = logprobs["tokens"].as_array().unwrap();
    let joined: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(found["choices"][0]["text"], joined.as_str());
    // Bias decides.
    let biased =
        complete(&host, json!({"max_tokens": 3, "logit_bias": {"65": 100}, "logprobs": 0}));
    let tokens = &biased["choices"][0]["logprobs"]["tokens"];
    assert!(tokens[0] == tokens[1] && tokens[1] == tokens[2], "{tokens}");
}

#[test]
fn what_is_asked_together_is_answered_as_if_alone() {
    let host = Host::of(host::model(), Options::default());
    let prompts = ["The river", "fn main() {", "12 + 7 =", "x", "Once upon a time there was a"];
    let expected: Vec<String> =
        prompts.iter().map(|p| alone(p, 40, Sampling::default()).0).collect();
    std::thread::scope(|scope| {
        for round in 0..3 {
            for (prompt, expected) in prompts.iter().zip(&expected) {
                let host = &host;
                scope.spawn(move || {
                    let found = complete(host, json!({"prompt": prompt, "max_tokens": 40}));
                    assert_eq!(found["choices"][0]["text"], **expected, "{prompt} {round}");
                });
            }
        }
    });
}

#[test]
fn models_health_and_metrics() {
    let host = Host::of(host::model(), Options::default());
    let list = get(host.address, "/v1/models").json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny-moe")));
    let one = get(host.address, "/v1/models/tiny-moe").json();
    assert_eq!(one, list["data"][0]);
    assert_eq!(one["experts"], json!(["prose", "code", "math"]));
    let none = get(host.address, "/v1/models/other");
    assert_eq!((none.status, &none.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert_eq!(get(host.address, "/health").json()["status"], "ok");
    complete(&host, json!({"max_tokens": 9}));
    let text = get(host.address, "/metrics").text();
    let value = |name: &str| -> f64 {
        let line =
            text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}:\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(value("moe_merge_new_tokens_total"), 9.0);
    assert_eq!(value("moe_merge_generation "), 0.0);
    let tokens = value("moe_merge_prompt_tokens_total") + 8.0;
    let labels = "generation=\"0\",layer=\"5\"";
    assert_eq!(value(&format!("moe_merge_router_tokens_total{{{labels}}}")), tokens);
    let visits: f64 = ["prose", "code", "math"]
        .iter()
        .enumerate()
        .map(|(e, name)| {
            value(&format!(
                "moe_merge_expert_tokens_total{{{labels},expert=\"{e}\",name=\"{name}\"}}"
            ))
        })
        .sum();
    assert_eq!(visits, 2.0 * tokens);
    let entropy = value(&format!("moe_merge_router_entropy_nats_total{{{labels}}}"));
    assert!(entropy > 0.0 && entropy <= tokens * 3f64.ln() + 1e-6);
    assert_eq!(value("moe_merge_requests_total{route=\"/v1/completions\",status=\"200\"}"), 1.0);
}

#[test]
fn wrong_requests_get_openais_errors() {
    let host = Host::of(host::model(), Options::default());
    let completions = |body: Value| post(host.address, "/v1/completions", &body);
    let error = |r: &crate::client::Response| r.json()["error"].clone();
    let found = completions(json!({"model": "gpt-4", "prompt": "a"}));
    assert_eq!(found.status, 404);
    assert_eq!(
        error(&found),
        json!({
            "message": "The model `gpt-4` does not exist or you do not have access to it.",
            "type": "invalid_request_error", "param": null, "code": "model_not_found",
        })
    );
    let long = "river ".repeat(600);
    let found = completions(json!({"model": "tiny-moe", "prompt": long}));
    assert_eq!((found.status, &error(&found)["code"]), (400, &json!("context_length_exceeded")));
    let found = completions(json!({"model": "tiny-moe", "prompt": "a", "max_tokens": 600}));
    assert_eq!((found.status, &error(&found)["code"]), (400, &json!("context_length_exceeded")));
    let found = completions(json!({"model": "tiny-moe", "prompt": "a", "max_tokens": 100_000}));
    assert!(
        error(&found)["message"].as_str().unwrap().starts_with("max_tokens is too large: 100000.")
    );
    let found = completions(json!({"model": "tiny-moe", "prompt": [5000]}));
    assert_eq!((found.status, &error(&found)["code"]), (400, &json!("invalid_value")));
    let found = completions(json!({"model": "tiny-moe", "prompt": "a", "n": 100}));
    assert_eq!((found.status, &error(&found)["param"]), (400, &json!("n")));
    let found = get(host.address, "/v1/nothing");
    assert_eq!(
        (found.status, &error(&found)["message"]),
        (404, &json!("Invalid URL (GET /v1/nothing)"))
    );
    let found = get(host.address, "/v1/completions");
    assert_eq!((found.status, &error(&found)["code"]), (405, &json!("method_not_allowed")));
    let plain = request("POST", "/v1/completions", &[("content-type", "text/plain")], b"{}");
    assert_eq!(raw(host.address, &plain).unwrap().status, 415);
}

#[test]
fn keys_are_asked_for_where_there_is_one() {
    let options = Options { api_key: Some("secret".into()), ..Options::default() };
    let host = Host::of(host::model(), options);
    let with = |key: &str| {
        let bytes = request("GET", "/v1/models", &[("authorization", key)], b"");
        raw(host.address, &bytes).unwrap()
    };
    assert_eq!(with("Bearer secret").status, 200);
    for wrong in ["Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer ", "Bear"] {
        let found = with(wrong);
        assert_eq!(
            (found.status, &found.json()["error"]["code"]),
            (401, &json!("invalid_api_key"))
        );
    }
    assert_eq!(get(host.address, "/v1/models").status, 401);
    assert_eq!(get(host.address, "/metrics").status, 401);
    assert_eq!(get(host.address, "/health").status, 200);
}
