//! One page that needs nothing besides itself: figures and tokens as they are, a token's layers on hover and focus.

use std::fmt::Write;

use serde_json::{Value, json};

use super::charts::{self, MARGIN, WIDTH, strip_row, token_text};
use super::colour::{self, hex};
use super::glyph::escape;
use super::{Routes, TextRoutes, TokenRoutes, percent, svg};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The whole page.
pub fn render(routes: &Routes) -> String {
    let title = escape(&format!("Routing of {}", routes.model));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
<title>{title}</title>\n<style>\n{STYLE}{}</style>\n</head>\n<body>\n\
<h1>Which experts the tokens visit</h1>\n<p>{}  ·  {}</p>\n<ul class=\"legend\">\n",
        looks(routes),
        escape(&routes.model),
        escape(&routes.summary()),
    );
    for (e, name) in routes.experts.iter().enumerate() {
        let name = if routes.has_names() { escape(name) } else { String::new() };
        let _ = writeln!(page, "<li><b class=\"e{e}\">{}</b>{name}</li>", routes.mark(e));
    }
    page += "</ul>\n";
    let largest = svg::largest_load(routes);
    let _ = writeln!(
        page,
        "<svg width=\"0\" height=\"0\" style=\"position:absolute;min-width:0;width:0\" aria-hidden=\"true\">{}</svg>",
        charts::patterns(routes.experts.len())
    );
    for text in &routes.texts {
        section(&mut page, routes, text, largest);
    }
    let data = json!({
        "experts": routes.experts.iter().map(|n| shown(n)).collect::<Vec<_>>(),
        "marks": (0..routes.experts.len()).map(|e| routes.mark(e)).collect::<Vec<_>>(),
        "texts": routes.texts.iter().map(data).collect::<Vec<_>>(),
    });
    // Inside a script element only `<` could end it.
    let data = data.to_string().replace('<', "\\u003c");
    page += &format!(
        "<aside id=\"told\" aria-live=\"polite\" hidden></aside>\n\
<script type=\"application/json\" id=\"data\">{data}</script>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    );
    page
}

fn shown(name: &str) -> String {
    super::glyph::visible(name, super::glyph::Spaces::Kept)
}

/// One style per expert.
fn looks(routes: &Routes) -> String {
    let mut css = String::new();
    for e in 0..routes.experts.len() {
        let ground = colour::of_expert(e);
        let ink = colour::ink_on(ground);
        let lines = if ink == [0xff; 3] { "#ffffff60" } else { "#00000060" };
        let line = |angle| {
            format!(
                ";background-image:repeating-linear-gradient({angle}deg,{lines} 0 1.5px,#0000 1.5px 6px)"
            )
        };
        let image = match colour::pattern(e) {
            0 => String::new(),
            1 => line(45),
            2 => line(135),
            _ => format!(
                ";background-image:radial-gradient({lines} 1.3px,#0000 1.6px);background-size:6px 6px"
            ),
        };
        let _ =
            writeln!(css, ".e{e}{{background-color:{};color:{}{image}}}", hex(ground), hex(ink));
    }
    css
}

fn section(page: &mut String, routes: &Routes, text: &TextRoutes, largest: f64) {
    let chart = charts::layers(routes, text, largest);
    let facts: Vec<String> = svg::facts(routes, text).iter().map(|f| escape(f)).collect();
    let _ = write!(
        page,
        "<section>\n<h2>{}</h2>\n<p>{}</p>\n<figure>\n<svg viewBox=\"{MARGIN:.0} 0 {:.0} {:.0}\" role=\"img\" \
aria-label=\"load by layer and expert, entropy by layer; the table below has the numbers\">\n{}</svg>\n</figure>\n",
        escape(&text.origin),
        facts.join("  ·  "),
        WIDTH - 2.0 * MARGIN,
        chart.height,
        chart.svg,
    );
    table(page, routes, text);
    let _ = write!(
        page,
        "<p>{} <span class=\"how\" hidden>Point at a token for its layers, or go to the text with Tab and through it with the arrow keys.</span></p>\n\
<div class=\"tokens\" role=\"group\" aria-label=\"tokens of {}\">\n",
        svg::about_tokens(text),
        escape(&text.origin),
    );
    let depth = text.traffic.layers.len();
    text.tokens.iter().for_each(|t| token(page, routes, t, depth));
    *page += "</div>\n</section>\n";
}

/// The numbers of the heat map, for eyes that do not see it.
fn table(page: &mut String, routes: &Routes, text: &TextRoutes) {
    *page += "<details>\n<summary>the same in numbers: load in percent, entropy in nats</summary>\n<div class=\"scroll\"><table>\n<tr><th scope=\"col\">layer</th>";
    for name in &routes.experts {
        let _ = write!(page, "<th scope=\"col\">{}</th>", escape(name));
    }
    *page += "<th scope=\"col\">entropy</th></tr>\n";
    let means = ("mean".to_owned(), &text.traffic.load, text.traffic.entropy);
    let layers = text.traffic.layers.iter().map(|l| (l.layer.to_string(), &l.load, l.entropy));
    for (name, load, entropy) in layers.chain([means]) {
        let _ = write!(page, "<tr><th scope=\"row\">{name}</th>");
        for &share in load {
            let _ = write!(page, "<td>{}</td>", percent(share));
        }
        let _ = writeln!(page, "<td>{entropy:.2}</td></tr>");
    }
    *page += "</table></div>\n";
    if let (Some(label), false) = (text.label, text.traffic.positions.is_empty()) {
        positions(page, routes, text, &routes.experts[label.expert]);
    }
    *page += "</details>\n";
}

/// How often the text's own expert was chosen, by position in the window.
fn positions(page: &mut String, routes: &Routes, text: &TextRoutes, name: &str) {
    let _ = write!(
        page,
        "<p>{} chosen, in percent, by position in the window</p>\n<div class=\"scroll\"><table>\n\
<tr><th scope=\"col\">position</th><th scope=\"col\">tokens</th><th scope=\"col\">first</th>\
<th scope=\"col\">in top-{}</th></tr>\n",
        escape(name),
        routes.top_k,
    );
    for p in &text.traffic.positions {
        let (first, any) = (percent(p.agreement.first), percent(p.agreement.any));
        let _ = writeln!(
            page,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{first}</td><td>{any}</td></tr>",
            super::range(p.from, p.to),
            p.tokens
        );
    }
    *page += "</table></div>\n";
}

fn token(page: &mut String, routes: &Routes, token: &TokenRoutes, depth: usize) {
    let (e, row) = (token.expert, strip_row(depth));
    let mut stops = Vec::new();
    let mut from = 0;
    let first: Vec<usize> =
        token.layers.iter().map(|l| l.first().map_or(0, |c| c.0 as usize)).collect();
    for run in first.chunk_by(|a, b| a == b) {
        let to = from + run.len();
        let colour = hex(colour::of_expert(run[0]));
        stops.push(format!("{colour} {:.1}px {:.1}px", row * from as f64, row * to as f64));
        from = to;
    }
    let _ = writeln!(
        page,
        "<span><b class=\"e{e}\">{}</b><small class=\"e{e}\">{}</small><i style=\"height:{:.1}px;background:linear-gradient({})\"></i></span>",
        escape(&token_text(&token.text)),
        routes.mark(e),
        row * depth as f64,
        if stops.len() == 1 { format!("{0},{0}", stops[0]) } else { stops.join(",") },
    );
}

/// What the script shows of a text: per token and layer, expert and weight in percent in turn.
fn data(text: &TextRoutes) -> Value {
    let visits = |t: &TokenRoutes| -> Vec<Vec<u32>> {
        let layer = |l: &Vec<(u32, f32)>| {
            l.iter().flat_map(|&(e, w)| [e, (100.0 * w).round() as u32]).collect()
        };
        t.layers.iter().map(layer).collect()
    };
    json!({
        "layers": text.traffic.layers.iter().map(|l| l.layer).collect::<Vec<_>>(),
        "experts": text.tokens.iter().map(|t| t.expert).collect::<Vec<_>>(),
        "weights": text.tokens.iter().map(|t| (100.0 * t.weight).round() as u32).collect::<Vec<_>>(),
        "visits": text.tokens.iter().map(visits).collect::<Vec<_>>(),
    })
}
