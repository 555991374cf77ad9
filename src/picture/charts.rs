//! Parts of pictures as SVG elements. Inks are classes (`k` text, `m` quiet text, `l` lines), so that a page can be dark.

use std::fmt::Write;

use super::colour::{self, Rgb, hex};
use super::glyph::{self, PART, Spaces, columns, escape};
use super::{Routes, TextRoutes, percent};

/// Width of a picture.
pub const WIDTH: f64 = 1280.0;
/// Free space around it.
pub const MARGIN: f64 = 36.0;

/// SVG elements, with the height that they take.
#[derive(Debug, Default)]
pub struct Part {
    /// The elements.
    pub svg: String,
    /// Their height.
    pub height: f64,
}

/// Where a text stands in relation to its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

impl Part {
    /// A text; `class` names its ink and size.
    pub fn text(&mut self, x: f64, y: f64, class: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let text = escape(text);
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\"{anchor}>{text}</text>\n"
        ));
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.svg.write_fmt(element);
    }

    fn rect(&mut self, [x, y, w, h]: [f64; 4], fill: &str, more: &str) {
        self.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\"{more}/>\n"
        ));
    }

    /// A box in the look of an expert: its colour, and its pattern where it has one.
    fn expert_box(&mut self, at: [f64; 4], expert: usize, round: &str) {
        self.rect(at, &hex(colour::of_expert(expert)), round);
        if colour::pattern(expert) > 0 {
            self.rect(at, &format!("url(#p{})", pattern_name(expert)), round);
        }
    }

    fn on(&mut self, x: f64, y: f64, class: &str, ground: Rgb, text: &str) {
        let (ink, text) = (hex(colour::ink_on(ground)), escape(text));
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" fill=\"{ink}\" text-anchor=\"middle\">{text}</text>\n"
        ));
    }

    fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], class: &str) {
        self.put(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>\n"
        ));
    }

    /// Adds `part` below.
    pub fn stack(&mut self, part: &Part, gap: f64) {
        let y = self.height + gap;
        self.put(format_args!("<g transform=\"translate(0 {y:.1})\">\n{}</g>\n", part.svg));
        self.height = y + part.height;
    }
}

/// Name of the pattern of an expert: direction, and whether lines are light or dark.
fn pattern_name(expert: usize) -> String {
    let dark = colour::ink_on(colour::of_expert(expert)) != [0xff; 3];
    format!("{}{}", colour::pattern(expert), if dark { "d" } else { "l" })
}

/// Definitions of the patterns that `experts` experts need.
pub fn patterns(experts: usize) -> String {
    let mut names: Vec<(usize, String)> = (0..experts)
        .filter(|&e| colour::pattern(e) > 0)
        .map(|e| (colour::pattern(e), pattern_name(e)))
        .collect();
    names.sort();
    names.dedup();
    let mut svg = String::from("<defs>\n");
    for (kind, name) in names {
        let ink = if name.ends_with('d') { "#000" } else { "#fff" };
        let (angle, shape) = match kind {
            1 => (45, "<rect width=\"1.5\" height=\"6\""),
            2 => (135, "<rect width=\"1.5\" height=\"6\""),
            _ => (0, "<circle cx=\"3\" cy=\"3\" r=\"1.3\""),
        };
        let _ = writeln!(
            svg,
            "<pattern id=\"p{name}\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate({angle})\">\
{shape} fill=\"{ink}\" fill-opacity=\"0.36\"/></pattern>"
        );
    }
    svg + "</defs>\n"
}

/// Which colour and sign mean which expert.
pub fn legend(routes: &Routes) -> Part {
    let mut part = Part::default();
    let (mut x, mut y) = (MARGIN, 0.0);
    for (e, name) in routes.experts.iter().enumerate() {
        let mark = routes.mark(e);
        let name = if routes.has_names() { glyph::shortened(name, 32) } else { String::new() };
        let wide = 34.0 + if routes.has_names() { 8.0 * columns(&name) as f64 + 26.0 } else { 6.0 };
        if x + wide > WIDTH - MARGIN && x > MARGIN {
            (x, y) = (MARGIN, y + 32.0);
        }
        part.expert_box([x, y, 34.0, 24.0], e, " rx=\"4\"");
        part.on(x + 17.0, y + 17.0, "b s13", colour::of_expert(e), &mark);
        part.text(x + 42.0, y + 17.0, "k s14", Anchor::Start, &name);
        x += wide;
    }
    part.height = y + 24.0;
    part
}

/// Load by layer and expert, entropy by layer, and agreement by layer where there is a label; they share the layers.
pub fn layers(routes: &Routes, text: &TextRoutes, largest: f64) -> Part {
    let rows = text.traffic.layers.len().max(1) as f64;
    let grid = Grid {
        left: MARGIN + 52.0,
        top: 56.0,
        row: (480.0 / rows).clamp(10.0, 24.0),
        cell: (680.0 / routes.experts.len().max(1) as f64).min(92.0),
    };
    let mut part = Part::default();
    heat_map(&mut part, &grid, routes, text, largest);
    let heat_right = grid.left + grid.cell * routes.experts.len() as f64;
    let room = (WIDTH - MARGIN - heat_right) / 2.0 - 2.0 * GAP;
    let panel = Panel { x: heat_right + GAP, width: room.clamp(120.0, 280.0) };
    entropy(&mut part, &grid, routes, text, &panel);
    if text.label.is_some() {
        let panel = Panel { x: panel.x + panel.width + 2.0 * GAP, ..panel };
        agreement(&mut part, &grid, routes, text, &panel);
    }
    part.height = grid.bottom(text) + grid.row + 20.0;
    part
}

/// Free space beside a panel; numbers stand in it.
const GAP: f64 = 44.0;

/// Where entropy and agreement are drawn.
struct Panel {
    x: f64,
    width: f64,
}

struct Grid {
    left: f64,
    top: f64,
    row: f64,
    cell: f64,
}

impl Grid {
    fn bottom(&self, text: &TextRoutes) -> f64 {
        self.top + self.row * text.traffic.layers.len() as f64
    }

    fn middle(&self, row: usize) -> f64 {
        self.top + self.row * (row as f64 + 0.5)
    }

    /// Size class of numbers in a row.
    fn numbers(&self) -> &'static str {
        if self.row >= 15.0 { "s11" } else { "s9" }
    }
}

fn heat_map(part: &mut Part, grid: &Grid, routes: &Routes, text: &TextRoutes, largest: f64) {
    part.text(MARGIN, 14.0, "k b s14", Anchor::Start, "load");
    let scale = format!(
        "% of top-{} places; even is {}",
        routes.top_k,
        percent(1.0 / routes.experts.len().max(1) as f64)
    );
    part.text(MARGIN + 40.0, 14.0, "m s12", Anchor::Start, &scale);
    for (e, name) in routes.experts.iter().enumerate() {
        let x = grid.left + grid.cell * e as f64;
        part.expert_box([x + 1.0, grid.top - 24.0, grid.cell - 2.0, 20.0], e, " rx=\"3\"");
        let fits = |t: &str| 7.0 * columns(t) as f64 <= grid.cell - 8.0;
        let (mark, ground) = (routes.mark(e), colour::of_expert(e));
        let whole = format!("{mark} {name}");
        let label = if routes.has_names() && fits(&whole) { whole } else { mark };
        if fits(&label) || columns(&label) == 1 && grid.cell >= 10.0 {
            part.on(x + grid.cell / 2.0, grid.top - 10.0, "s12", ground, &label);
        }
    }
    let every = if grid.row >= 14.0 { 1 } else { 5 };
    for (i, layer) in text.traffic.layers.iter().enumerate() {
        if i.is_multiple_of(every) {
            let y = grid.middle(i) + 4.0;
            part.text(grid.left - 8.0, y, "m s11", Anchor::End, &layer.layer.to_string());
        }
        shares(part, grid, i, &layer.load, largest);
    }
    let last = text.traffic.layers.len();
    part.text(grid.left - 8.0, grid.middle(last) + 10.0, "k s11", Anchor::End, "mean");
    let below = Grid { top: grid.top + 6.0, ..*grid };
    shares(part, &below, last, &text.traffic.load, largest);
    part.text(MARGIN, grid.top - 10.0, "m s11", Anchor::Start, "layer");
}

fn shares(part: &mut Part, grid: &Grid, row: usize, shares: &[f64], largest: f64) {
    for (e, &share) in shares.iter().enumerate() {
        let (x, y) = (grid.left + grid.cell * e as f64, grid.top + grid.row * row as f64);
        let ground = colour::of_share(share, largest);
        let gap = if grid.cell >= 12.0 { 1.0 } else { 0.3 };
        part.rect(
            [x + gap, y + gap, grid.cell - 2.0 * gap, grid.row - 2.0 * gap],
            &hex(ground),
            "",
        );
        if grid.cell >= 20.0 {
            let y = y + grid.row / 2.0 + 3.8;
            part.on(x + grid.cell / 2.0, y, grid.numbers(), ground, &percent(share));
        }
    }
}

fn entropy(part: &mut Part, grid: &Grid, routes: &Routes, text: &TextRoutes, panel: &Panel) {
    let x = panel.x;
    let most = (routes.experts.len().max(2) as f64).ln();
    part.text(x, 14.0, "k b s14", Anchor::Start, "entropy");
    part.text(x + 66.0, 14.0, "m s12", Anchor::Start, "nats");
    part.text(x, grid.top - 10.0, "m s11", Anchor::Start, "0 sure");
    part.text(
        x + panel.width,
        grid.top - 10.0,
        "m s11",
        Anchor::End,
        &format!("undecided {most:.2}"),
    );
    let bottom = grid.bottom(text);
    part.line([x, grid.top, x, bottom], "l");
    part.line([x + panel.width, grid.top, x + panel.width, bottom], "l dash");
    for (i, layer) in text.traffic.layers.iter().enumerate() {
        let wide = (layer.entropy / most).clamp(0.0, 1.0) * panel.width;
        let thick = grid.row * 0.56;
        let y = grid.middle(i) - thick / 2.0;
        part.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"{thick:.1}\" class=\"bar\"/>\n"
        ));
        if grid.row >= 14.0 {
            let y = grid.middle(i) + 4.0;
            let value = format!("{:.2}", layer.entropy);
            part.text(x + panel.width + 8.0, y, "m s11", Anchor::Start, &value);
        }
    }
    let mean = format!("mean {:.2}", text.traffic.entropy);
    part.text(x, bottom + 6.0 + grid.row / 2.0 + 4.0, "k s11", Anchor::Start, &mean);
}

fn agreement(part: &mut Part, grid: &Grid, routes: &Routes, text: &TextRoutes, panel: &Panel) {
    let x = panel.x;
    let Some(label) = text.label else { return };
    let name = format!("{} chosen", glyph::shortened(&routes.experts[label.expert], 14));
    part.text(x, 14.0, "k b s14", Anchor::Start, &name);
    let poor = routes.chance_layers();
    let key = format!("● first   ○ in top-{}", routes.top_k);
    part.text(x, grid.top - 26.0, "m s11", Anchor::Start, &key);
    part.text(x, grid.top - 10.0, "m s11", Anchor::Start, "0 %");
    part.text(x + panel.width, grid.top - 10.0, "m s11", Anchor::End, "100 %");
    let bottom = grid.bottom(text);
    part.line([x, grid.top, x, bottom], "l");
    part.line([x + panel.width, grid.top, x + panel.width, bottom], "l");
    let chance = routes.verdict.as_ref().map(|v| v.chance);
    if let Some(chance) = chance {
        let at = x + chance * panel.width;
        part.line([at, grid.top, at, bottom], "l dash");
        let note = format!("chance {}", percent(chance));
        part.text(at, bottom + 6.0 + grid.row / 2.0 + 4.0, "m s11", Anchor::Middle, &note);
    }
    if !poor.is_empty() {
        let y = bottom + grid.row / 2.0 + 25.0;
        part.text(x, y, "m s11", Anchor::Start, "! no better than chance");
    }
    for (i, layer) in text.traffic.layers.iter().enumerate() {
        let Some(found) = layer.agreement else { continue };
        let (y, r) = (grid.middle(i), (grid.row * 0.3).min(5.0));
        let (first, any) = (x + found.first * panel.width, x + found.any * panel.width);
        part.line([first, y, any, y], "l");
        part.put(format_args!(
            "<circle cx=\"{any:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\" class=\"open\"/>\n"
        ));
        part.put(format_args!(
            "<circle cx=\"{first:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\" class=\"full\"/>\n"
        ));
        if grid.row >= 14.0 {
            let warn = if poor.contains(&layer.layer) { " !" } else { "" };
            let value = format!("{}{warn}", percent(found.first));
            part.text(x + panel.width + 8.0, y + 4.0, "m s11", Anchor::Start, &value);
        }
    }
}

/// Width of a character of a token.
const CHARACTER: f64 = 8.0;
/// Height of a token's box: its text, and the sign of its expert below.
const BOX: f64 = 34.0;

/// Height of a layer in the strip below a token.
pub fn strip_row(layers: usize) -> f64 {
    (48.0 / layers.max(1) as f64).clamp(2.0, 5.0)
}

/// What a token's box says.
pub fn token_text(text: &str) -> String {
    if text.is_empty() { PART.to_string() } else { glyph::visible(text, Spaces::Dotted) }
}

/// The text, each token in a box of its expert's look, and below it the first choice of every layer.
pub fn tokens(routes: &Routes, text: &TextRoutes) -> Part {
    let mut part = Part::default();
    let depth = text.traffic.layers.len();
    let row = strip_row(depth);
    let line = BOX + 2.0 + row * depth as f64 + 12.0;
    let left = MARGIN + 40.0;
    let (mut x, mut y) = (left, 0.0);
    for (i, token) in text.tokens.iter().enumerate() {
        let shown = glyph::shortened(&token_text(&token.text), 60);
        let mark = routes.mark(token.expert);
        let wide = (CHARACTER * columns(&shown) as f64 + 6.0).max(7.0 * mark.len() as f64 + 4.0);
        if x + wide > WIDTH - MARGIN && x > left {
            (x, y) = (left, y + line);
        }
        if x == left {
            part.text(left - 10.0, y + 18.0, "m s11", Anchor::End, &i.to_string());
        }
        let ground = colour::of_expert(token.expert);
        part.expert_box([x, y, wide, BOX], token.expert, " rx=\"3\"");
        let ink = hex(colour::ink_on(ground));
        let (middle, length) = (x + wide / 2.0, CHARACTER * columns(&shown) as f64);
        let shown = escape(&shown);
        part.put(format_args!(
            "<text x=\"{middle:.1}\" y=\"{:.1}\" class=\"t\" fill=\"{ink}\" text-anchor=\"middle\" textLength=\"{length:.0}\" \
lengthAdjust=\"spacingAndGlyphs\">{shown}</text>\n",
            y + 16.0
        ));
        part.on(middle, y + 29.5, "s9", ground, &mark);
        strip(&mut part, token, [x, y + BOX + 2.0, wide, row]);
        x += wide + 2.0;
    }
    part.height = y + line;
    part
}

/// First choices, first layer on top; equal neighbours are one rectangle.
fn strip(part: &mut Part, token: &super::TokenRoutes, [x, y, wide, row]: [f64; 4]) {
    let first: Vec<usize> =
        token.layers.iter().map(|l| l.first().map_or(0, |c| c.0 as usize)).collect();
    let mut from = 0;
    for run in first.chunk_by(|a, b| a == b) {
        let at = [x, y + row * from as f64, wide, row * run.len() as f64];
        part.expert_box(at, run[0], "");
        from += run.len();
    }
}
