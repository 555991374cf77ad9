use serde_json::json;

use super::*;

fn completion(body: Value) -> Result<Completion, Value> {
    Completion::parse(body.to_string().as_bytes()).map_err(|e| e.body()["error"].clone())
}

fn chat(body: Value) -> Result<Chat, Value> {
    Chat::parse(body.to_string().as_bytes()).map_err(|e| e.body()["error"].clone())
}

#[test]
fn defaults_are_those_of_openai() {
    let asked = completion(json!({"model": "m", "prompt": "a"})).unwrap();
    assert_eq!(asked.prompts, [PromptText::Text("a".into())]);
    let common = asked.common;
    assert_eq!((common.most, common.n, common.stream, common.usage), (None, 1, false, false));
    let sampling = common.choosing.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (1.0, 1.0, 0));
    assert_eq!(common.choosing.logprobs, None);
    let again = completion(json!({"model": "m", "prompt": "a"})).unwrap();
    assert_ne!(again.common.choosing.sampling.seed, sampling.seed, "seeds are made up");
    let seeded = completion(json!({"model": "m", "prompt": "a", "seed": -3, "user": "x"})).unwrap();
    assert_eq!(seeded.common.choosing.sampling.seed, -3i64 as u64);
}

#[test]
fn prompts_of_every_kind() {
    let prompts = |p: Value| completion(json!({"model": "m", "prompt": p})).map(|c| c.prompts);
    let text = |t: &str| PromptText::Text(t.into());
    let ids = |ids: &[u32]| PromptText::Tokens(ids.into());
    assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
    assert_eq!(prompts(json!([1, 2])).unwrap(), [ids(&[1, 2])]);
    assert_eq!(prompts(json!([[1], [2, 3]])).unwrap(), [ids(&[1]), ids(&[2, 3])]);
    for wrong in [json!(1), json!({}), json!([1, "a"]), json!([-1]), json!([1.5]), json!([true])] {
        assert_eq!(prompts(wrong.clone()).unwrap_err()["code"], "invalid_type", "{wrong}");
    }
    for empty in [json!([]), json!([[]])] {
        assert_eq!(prompts(empty).unwrap_err()["code"], "empty_array");
    }
}

#[test]
fn messages_of_every_kind() {
    let asked = chat(json!({"model": "m", "max_completion_tokens": 3, "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": null},
    ]}))
    .unwrap();
    let expected = [("system", "Be brief."), ("user", "ab"), ("assistant", "c")];
    assert_eq!(asked.messages, expected.map(|(role, text)| Message::new(role, text)));
    assert_eq!(asked.common.most, Some(3));
}

/// Parameters, then `param`, `code` and a part of the message of the error.
#[test]
fn errors_are_those_of_openai() {
    let base = json!({"model": "m", "messages": [{"role": "user", "content": "a"}]});
    for (change, param, code, says) in [
        (json!({"model": null}), json!(null), json!(null), "you must provide a model parameter"),
        (
            json!({"messages": null}),
            json!("messages"),
            json!("missing_required_parameter"),
            "Missing required parameter: 'messages'.",
        ),
        (
            json!({"messages": []}),
            json!("messages"),
            json!("empty_array"),
            "Invalid 'messages': empty array.",
        ),
        (
            json!({"messages": ["a"]}),
            json!("messages[0]"),
            json!("invalid_type"),
            "expected an object, but got a string",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            json!("messages[0].content"),
            json!("missing_required_parameter"),
            "'messages[0].content'",
        ),
        (
            json!({"messages": [{"role": "x", "content": "a"}]}),
            json!("messages[0].role"),
            json!("invalid_value"),
            "Invalid value: 'x'. Supported values are:",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "a"}]}),
            json!("messages[0].role"),
            json!("unsupported_parameter"),
            "Unsupported parameter",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            json!("messages[0].content[0].type"),
            json!("unsupported_value"),
            "\"image_url\"",
        ),
        (
            json!({"temperature": 3}),
            json!("temperature"),
            json!("decimal_above_max_value"),
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead.",
        ),
        (
            json!({"temperature": -0.5}),
            json!("temperature"),
            json!("decimal_below_min_value"),
            "Expected a value >= 0, but got -0.5 instead.",
        ),
        (
            json!({"temperature": "hot"}),
            json!("temperature"),
            json!("invalid_type"),
            "Invalid type for 'temperature': expected a decimal, but got a string instead.",
        ),
        (
            json!({"max_tokens": -5}),
            json!("max_tokens"),
            json!("integer_below_min_value"),
            "Expected a value >= 1, but got -5 instead.",
        ),
        (
            json!({"max_tokens": 1.5}),
            json!("max_tokens"),
            json!("invalid_type"),
            "expected an integer, but got a decimal number",
        ),
        (
            json!({"n": 18446744073709551615u64}),
            json!("n"),
            json!("integer_above_max_value"),
            "Expected a value <= 128",
        ),
        (
            json!({"stop": ["a", 1]}),
            json!("stop"),
            json!("invalid_type"),
            "expected a string or an array of strings",
        ),
        (
            json!({"stop": vec!["a"; 17]}),
            json!("stop"),
            json!("array_above_max_length"),
            "maximum length 16",
        ),
        (json!({"logit_bias": {"x": 1}}), json!("logit_bias"), json!("invalid_value"), "'x'"),
        (json!({"logit_bias": {"1": 101}}), json!("logit_bias"), json!("invalid_value"), "'1'"),
        (
            json!({"top_logprobs": 2}),
            json!("top_logprobs"),
            json!(null),
            "only allowed when 'logprobs' is enabled",
        ),
        (
            json!({"stream_options": {}}),
            json!("stream_options"),
            json!(null),
            "only allowed when 'stream' is enabled",
        ),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            json!("stream_options.x"),
            json!("unknown_parameter"),
            "Unrecognized request argument supplied: stream_options.x",
        ),
        (
            json!({"tools": [{"type": "function"}]}),
            json!("tools"),
            json!("unsupported_parameter"),
            "'tools' is not supported",
        ),
        (
            json!({"response_format": {"type": "json_object"}}),
            json!("response_format"),
            json!("unsupported_value"),
            "json_object",
        ),
        (
            json!({"temprature": 1}),
            json!("temprature"),
            json!("unknown_parameter"),
            "Unrecognized request argument supplied: temprature",
        ),
    ] {
        let mut body = base.clone();
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let error = chat(body).expect_err(&change.to_string());
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{change}");
        assert_eq!(error["type"], "invalid_request_error");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says), "`{says}` is not in `{message}`");
    }
}

#[test]
fn what_says_nothing_is_accepted() {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "a", "name": "Ada"}], "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "metadata": {"a": "b"}, "store": false, "logit_bias": {}, "stop": null, "n": null, "top_p": 0,
        "unknown": null, "parallel_tool_calls": true, "seed": null,
    });
    assert!(chat(body).unwrap().common.choosing.sampling.top_p > 0.0);
    let body = json!({"model": "m", "prompt": "a", "best_of": 1, "suffix": null, "max_tokens": 0,
        "stop": ["", "x"], "top_k": -1});
    let asked = completion(body).unwrap().common;
    assert_eq!(
        (asked.most, asked.stops, asked.choosing.sampling.top_k),
        (Some(0), vec!["x".into()], 0)
    );
}

#[test]
fn what_is_no_json_object_is_told_apart() {
    let deep = "[".repeat(100_000);
    for body in
        [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", b"{\"model\": \"\xc3\x28\"}", deep.as_bytes()]
    {
        let error = Completion::parse(body).unwrap_err().body();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(
            message.starts_with("We could not parse the JSON body of your request."),
            "{message}"
        );
    }
}
