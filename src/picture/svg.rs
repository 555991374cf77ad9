//! One SVG file: for each text the layers, then the tokens.

use super::charts::{self, Anchor, MARGIN, Part, WIDTH};
use super::glyph::{PART, shortened};
use super::{Routes, TextRoutes, percent};

/// Inks and sizes. Fonts that every system has something for; lengths of token texts are fixed, so the font matters little.
const STYLE: &str = "\
text{font-family:Inter,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif}
.t{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:13px;white-space:pre}
.k{fill:#16181d}.m{fill:#5a606b}.b{font-weight:600}
.s9{font-size:9px}.s11{font-size:11px}.s12{font-size:12px}.s13{font-size:13px}.s14{font-size:14px}.s18{font-size:18px}.s24{font-size:24px}
.l{stroke:#9aa0aa;stroke-width:1}.dash{stroke-dasharray:3 3}
.bar{fill:#5a606b}.full{fill:#16181d}.open{fill:#fff;stroke:#16181d;stroke-width:1.5}
";

/// The whole picture.
pub fn render(routes: &Routes) -> String {
    let mut page = Part::default();
    let mut head = Part { height: 62.0, ..Part::default() };
    head.text(MARGIN, 26.0, "k b s24", Anchor::Start, "Which experts the tokens visit");
    let model = format!("{}  ·  {}", shortened(&routes.model, 90), routes.summary());
    head.text(MARGIN, 50.0, "m s14", Anchor::Start, &model);
    page.stack(&head, 24.0);
    page.stack(&charts::legend(routes), 14.0);
    let largest = largest_load(routes);
    for text in &routes.texts {
        let mut title = Part { height: 46.0, ..Part::default() };
        title.text(MARGIN, 18.0, "k b s18", Anchor::Start, &shortened(&text.origin, 100));
        title.text(MARGIN, 40.0, "m s13", Anchor::Start, &facts(routes, text).join("  ·  "));
        page.stack(&title, 34.0);
        page.stack(&charts::layers(routes, text, largest), 18.0);
        let mut about = Part { height: 18.0, ..Part::default() };
        about.text(MARGIN, 12.0, "m s12", Anchor::Start, &about_tokens(text));
        page.stack(&about, 26.0);
        page.stack(&charts::tokens(routes, text), 10.0);
    }
    let height = page.height + 24.0;
    let title = super::glyph::escape(&format!("Routing of {}", routes.model));
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" role=\"img\">\n\
<title>{title}</title>\n<style>\n{STYLE}</style>\n{}\
<rect width=\"{WIDTH:.0}\" height=\"{height:.0}\" fill=\"#fff\"/>\n{}</svg>\n",
        charts::patterns(routes.experts.len()),
        page.svg,
    )
}

/// The largest load in any layer of any text: the dark end of all heat maps.
pub fn largest_load(routes: &Routes) -> f64 {
    let all = routes.texts.iter().flat_map(|t| &t.traffic.layers).flat_map(|l| &l.load);
    all.fold(0.0, |m, &l| f64::max(m, l))
}

/// What is known about a text, in a few words each.
pub fn facts(routes: &Routes, text: &TextRoutes) -> Vec<String> {
    let mut facts = vec![crate::render::count(text.traffic.tokens) + " tokens"];
    if text.windows > 1 {
        facts.push(format!("{} windows of {}", text.windows, routes.window));
    }
    if let (Some(label), Some(found)) = (text.label, text.traffic.agreement) {
        let name = &routes.experts[label.expert];
        facts.push(format!("label {name} ({})", label.from.name()));
        let (first, any) = (percent(found.first), percent(found.any));
        facts.push(format!("{first} % first choice, {any} % in top-{}", routes.top_k));
    }
    facts
}

/// How to read the tokens, and what of them is left out.
pub fn about_tokens(text: &TextRoutes) -> String {
    let mut about = "Each token in the look of the expert with the largest mean weight over layers; below it the first choice of every layer, first layer on top.".to_owned();
    let left_out = text.traffic.tokens - text.tokens.len().min(text.traffic.tokens);
    if left_out > 0 {
        about += &format!(
            " The first {} tokens; {} more are in the figures only.",
            crate::render::count(text.tokens.len()),
            crate::render::count(left_out)
        );
    }
    if text.tokens.iter().any(|t| t.text.is_empty()) {
        about += &format!(" {PART} is a token that holds only a part of a character.");
    }
    about
}
