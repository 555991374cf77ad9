use super::*;
use moe_merge_checkpoint::Explain;

fn parse(text: &str) -> ChatTemplate {
    ChatTemplate::parse(text, "chat_template.jinja".into(), Some("<s>"), Some("</s>")).unwrap()
}

fn conversation(value: &serde_json::Value) -> Vec<Message> {
    let text = |m: &serde_json::Value, key: &str| m[key].as_str().unwrap().to_owned();
    let messages = value.as_array().unwrap();
    messages
        .iter()
        .map(|m| Message { role: text(m, "role"), content: text(m, "content") })
        .collect()
}

/// Three templates (SmolLM2's own, one in the manner of Llama 3, one in that of Mistral), rendered by
/// transformers 5.23.0.
#[test]
fn renders_as_transformers_does() {
    let data: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/data/chat_templates.json")).unwrap();
    let cases = data["expected"].as_array().unwrap();
    assert_eq!(cases.len(), 12);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = parse(data["templates"][name].as_str().unwrap());
        let messages = conversation(&data["conversations"][case["conversation"].as_str().unwrap()]);
        let turn = match case["generation_prompt"].as_bool().unwrap() {
            true => AssistantTurn::Open,
            false => AssistantTurn::Absent,
        };
        let text = template.render(&messages, turn).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap(), "{name} {}", case["conversation"]);
    }
}

#[test]
fn what_a_template_raises_is_told() {
    let template = parse("{{ raise_exception('roles must alternate') }}");
    let error = template.render(&[], AssistantTurn::Absent).unwrap_err();
    assert!(error.fields().contains(&("found", "roles must alternate".into())), "{error:?}");
}

#[test]
fn a_syntax_error_names_the_line() {
    let error = ChatTemplate::parse("a\n{% for %}", "t.jinja".into(), None, None).unwrap_err();
    assert!(matches!(&error, TextError::ChatTemplate { line: Some(2), .. }), "{error:?}");
}

#[test]
fn an_endless_template_runs_out_of_fuel() {
    let template =
        parse("{% for a in range(9000) %}{% for b in range(9000) %}x{% endfor %}{% endfor %}");
    let error = template.render(&[], AssistantTurn::Absent).unwrap_err();
    assert!(error.fields().iter().any(|f| f.1.contains("fuel")), "{error:?}");
}

#[test]
fn json_is_written_as_python_does() {
    let template = parse(
        r#"{{ {"b": [1, 2.5, none, true], "a": "é\"\n"} | tojson }} {{ {"b": 1, "a": "é"} | tojson(sort_keys=true, ensure_ascii=true, separators=[",", ":"]) }}"#,
    );
    let text = template.render(&[], AssistantTurn::Absent).unwrap();
    assert_eq!(text, r#"{"b": [1, 2.5, null, true], "a": "é\"\n"} {"a":"\u00e9","b":1}"#);
}

#[test]
fn loop_controls_and_methods_of_python_work() {
    let template = parse(
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content.split('|')[0].upper() }}{% endfor %}",
    );
    let messages = [Message::new("tool", "x"), Message::new("user", "a|b")];
    assert_eq!(template.render(&messages, AssistantTurn::Absent).unwrap(), "A");
}
