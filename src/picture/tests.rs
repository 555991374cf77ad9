//! Pictures of routing that no model was asked for.

use super::*;
use crate::render::Paint;
use moe_merge_router::traffic::{Choices, Traffic, judge};

/// Texts with nasty tokens on a model of so many layers and experts; every token goes to expert `i % experts` first.
fn routes(layers: usize, experts: usize, texts: &[&str]) -> Routes {
    let mut all = Vec::new();
    let mut list = Vec::new();
    for (n, text) in texts.iter().enumerate() {
        let label = n % experts;
        let mut traffic = Traffic::new(Some(label));
        let mut tokens: Vec<TokenRoutes> = text
            .split_inclusive(' ')
            .enumerate()
            .map(|(i, t)| TokenRoutes {
                id: i as u32,
                text: t.to_owned(),
                expert: i % experts,
                weight: 0.7,
                layers: Vec::new(),
            })
            .collect();
        for layer in 0..layers {
            for (i, token) in tokens.iter_mut().enumerate() {
                let (a, b) = ((i + layer / 2) % experts, (i + 1 + layer / 2) % experts);
                let mut row = vec![0.1 / experts as f32; experts];
                row[a] += 0.6;
                row[b] += 0.3;
                let ids = [a as u32, b as u32];
                let probabilities = &row;
                let choices = Choices {
                    experts,
                    top_k: 2,
                    ids: &ids,
                    weights: &[0.667, 0.333],
                    probabilities,
                    position: i,
                };
                traffic.add(layer, choices);
                token.layers.push(vec![(ids[0], 0.667), (ids[1], 0.333)]);
            }
        }
        list.push(TextRoutes {
            origin: format!("{n}<&>\u{1b}.txt"),
            label: Some(Label { expert: label, from: LabelFrom::Option }),
            windows: 1,
            traffic: traffic.report(),
            tokens,
        });
        all.push(traffic);
    }
    Routes {
        model: "a \"model\" & <more>".into(),
        family: "mixtral",
        experts: (0..experts).map(|e| format!("<e{e}>")).collect(),
        named: true,
        top_k: 2,
        shared: false,
        window: 512,
        texts: list,
        verdict: judge(&all),
    }
}

const NASTY: &str = "The <b>bold</b> & ]]> </script> \u{1b}[31m \u{0} \u{202e} 漢字 e\u{301} \n\t \u{ffff} 'x' \"y\" -- end";

/// Checks that `xml` is well-formed as far as these pictures go: elements nest, attributes are quoted and occur once, no
/// raw `<` or `&`, no character that XML forbids.
fn well_formed(xml: &str) {
    let mut rest = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").unwrap();
    let mut open: Vec<&str> = Vec::new();
    let mut roots = 0;
    while let Some(at) = rest.find('<') {
        text_is_clean(&rest[..at], !open.is_empty());
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else {
            let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |t| (t, true));
            let (name, mut attributes) = tag.split_once([' ', '\n']).unwrap_or((tag, ""));
            assert!(name.chars().all(char::is_alphanumeric), "{tag}");
            let mut seen = std::collections::BTreeSet::new();
            while !attributes.trim().is_empty() {
                let (key, after) = attributes.trim().split_once("=\"").expect(tag);
                assert!(seen.insert(key), "{tag}");
                let (value, after) = after.split_once('"').expect(tag);
                text_is_clean(value, true);
                attributes = after;
            }
            if open.is_empty() {
                roots += 1;
            }
            if !empty {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    text_is_clean(rest, false);
    assert_eq!((open.len(), roots), (0, 1));
}

fn text_is_clean(text: &str, anything: bool) {
    assert!(anything || text.trim().is_empty(), "{text}");
    for (i, _) in text.match_indices('&') {
        let known = ["&lt;", "&gt;", "&amp;", "&quot;", "&#39;"];
        assert!(known.iter().any(|k| text[i..].starts_with(k)), "{text}");
    }
    let allowed = |c: char| c >= ' ' && !('\u{7f}'..='\u{9f}').contains(&c) && c < '\u{fffe}';
    assert!(text.chars().all(|c| c == '\n' || allowed(c)), "{text:?}");
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}

#[test]
fn svg_is_well_formed_whatever_the_text_holds() {
    for (layers, experts) in [(1, 2), (6, 3), (30, 30), (4, 128)] {
        let svg = svg::render(&routes(layers, experts, &[NASTY, "two texts"]));
        well_formed(&svg);
        assert!(svg.contains("&lt;b&gt;bold&lt;/b&gt;·") && svg.contains("␛[31m·"), "{svg}");
    }
    let mut part = routes(2, 3, &["漢 x"]);
    part.texts[0].tokens[0].text.clear();
    assert!(svg::render(&part).contains("⋯ is a token that holds only a part"));
    let mut empty = routes(2, 3, &["x"]);
    empty.texts[0].tokens.clear();
    well_formed(&svg::render(&empty));
}

#[test]
fn a_page_needs_nothing_else_and_keeps_text_as_text() {
    let routes = routes(6, 9, &[NASTY, NASTY]);
    let page = html::render(&routes);
    assert_eq!(page, html::render(&routes));
    assert_eq!(page.matches("</script>").count(), 2);
    for outside in ["http:", "https:", "src=", "url(//", "@import", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("&lt;/script&gt;·") && !page.contains('\u{1b}'));
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    let tokens = routes.texts[0].tokens.len();
    assert_eq!(data["texts"][0]["visits"].as_array().unwrap().len(), tokens);
    assert_eq!(data["texts"][0]["visits"][1][0], serde_json::json!([1, 67, 2, 33]));
    assert_eq!(data["experts"][8], "<e8>");
    let boxes = page.matches("<span><b class=\"e").count();
    assert_eq!(boxes, 2 * tokens);
}

#[test]
fn layers_are_named_briefly() {
    assert_eq!(ranges(&[]), "");
    assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
}

#[test]
fn the_terminal_shows_letters_without_colours() {
    let text = terminal::render(&routes(6, 3, &[NASTY]), Paint::Plain);
    assert!(!text.contains('\u{1b}'), "{text}");
    assert!(text.contains("\n  The <b>bold</b> & ]]> "), "{text}");
    assert!(text.contains("\n  A   B           C A "), "{text}");
    let coloured = terminal::render(&routes(6, 3, &["one two"]), Paint::Colour);
    assert!(coloured.contains("\u{1b}[38;5;231;48;5;25mone \u{1b}[0m"), "{coloured}");
}

#[test]
fn the_terminal_keeps_to_eighty_columns() {
    let long = "word ".repeat(300);
    for (layers, experts) in [(6, 3), (30, 8), (3, 9), (30, 30), (2, 128)] {
        let text = terminal::render(&routes(layers, experts, &[&long]), Paint::Plain);
        for line in text.lines() {
            assert!(glyph::columns(line) <= 80, "{experts} experts: {line}");
        }
    }
}
