//! Routing in a terminal of 80 columns.

use super::charts::token_text;
use super::colour;
use super::glyph::{self, Spaces, columns, shortened, visible};
use super::svg::{facts, largest_load};
use super::{Routes, TextRoutes, percent, range, ranges};
use crate::render::{Paint, count};

/// Columns that lines may take.
const WIDTH: usize = 80;
/// Experts that are listed one by one; of more, those with the largest load.
const LISTED: usize = 16;
/// Experts whose loads have numbers in the heat map.
const NUMBERED: usize = 8;

/// Everything about all texts.
pub fn render(routes: &Routes, paint: Paint) -> String {
    let mut out = format!("{}  {}\n", shown(&routes.model), routes.summary());
    for text in &routes.texts {
        let origin = shown(&text.origin);
        out += &format!("\n{origin}\n  {}\n\n", facts(routes, text).join(", "));
        out += &experts(routes, text);
        out += &positions(routes, text);
        out += &layers(routes, text);
        out += &tokens(routes, text, paint);
    }
    out + &verdict(routes)
}

fn shown(text: &str) -> String {
    visible(text, Spaces::Kept)
}

fn label(routes: &Routes, expert: usize) -> String {
    let mark = routes.mark(expert);
    if !routes.has_names() {
        return mark;
    }
    format!("{mark} {}", shortened(&shown(&routes.experts[expert]), 24))
}

/// `text` in at least so many columns.
fn padded(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(columns(text))))
}

fn experts(routes: &Routes, text: &TextRoutes) -> String {
    let traffic = &text.traffic;
    let mut order: Vec<usize> = (0..routes.experts.len()).collect();
    if order.len() > LISTED {
        order.sort_by(|&a, &b| traffic.load[b].total_cmp(&traffic.load[a]).then(a.cmp(&b)));
    }
    let listed = &order[..order.len().min(LISTED)];
    let names: Vec<String> = listed.iter().map(|&e| label(routes, e)).collect();
    let width = names.iter().map(|n| columns(n)).max().unwrap_or(0);
    let mut out =
        format!("  {:width$}   load  weight  first choice  most often second to it\n", "");
    for (&e, name) in listed.iter().zip(&names) {
        let rival = traffic.rivals[e].map_or("-".into(), |r| {
            format!("{} {} %", shortened(&shown(&routes.experts[r.expert]), 24), percent(r.share))
        });
        let [load, weight, first] =
            [&traffic.load, &traffic.weight, &traffic.first].map(|shares| percent(shares[e]));
        out += &format!(
            "  {}  {load:>3} %  {weight:>4} %  {first:>10} %  {rival}\n",
            padded(name, width)
        );
    }
    if order.len() > LISTED {
        let rest: f64 = order[LISTED..].iter().map(|&e| traffic.load[e]).sum();
        let left_out = order.len() - LISTED;
        out += &format!("  and {left_out} more with {} % of the load together\n", percent(rest));
    }
    out
}

fn positions(routes: &Routes, text: &TextRoutes) -> String {
    let Some(found) = text.label else { return String::new() };
    let name = shortened(&shown(&routes.experts[found.expert]), 24);
    let top_k = format!("in top-{}", routes.top_k);
    let mut out = format!("\n  {name} chosen, by position in the window, percent\n");
    let mut rest = text.traffic.positions.as_slice();
    while !rest.is_empty() {
        let mut rows = ["position", "first", &top_k].map(|r| format!("  {r:10}"));
        let mut done = 0;
        for p in rest {
            let range = range(p.from, p.to);
            let width = range.len().max(3) + 1;
            if rows[0].len() + width > WIDTH {
                break;
            }
            rows[0] += &format!("{range:>width$}");
            rows[1] += &format!("{:>width$}", percent(p.agreement.first));
            rows[2] += &format!("{:>width$}", percent(p.agreement.any));
            done += 1;
        }
        rows.iter().for_each(|r| out += &format!("{r}\n"));
        rest = &rest[done.max(1)..];
    }
    out
}

/// A block as high as the share of the largest.
fn block(share: f64, largest: f64) -> char {
    const BLOCKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let height = (share / largest.max(f64::MIN_POSITIVE) * 8.0).round().clamp(0.0, 8.0);
    // A load that is there at all should be seen.
    BLOCKS[(height as usize).max(usize::from(share > 0.0))]
}

fn layers(routes: &Routes, text: &TextRoutes) -> String {
    let largest = largest_load(routes);
    let count = routes.experts.len();
    let numbered = count <= NUMBERED;
    let cell = if numbered {
        5
    } else if count <= 20 {
        2
    } else {
        1
    };
    let panel = 40 / cell;
    let mut out = format!("\n  load by layer and expert, a full block is {} %\n", percent(largest));
    let poor = routes.chance_layers();
    for from in (0..count).step_by(panel) {
        let shown = from..count.min(from + panel);
        let mut head = String::from("  layer  ");
        if cell == 1 {
            let ticks = shown.clone().step_by(8).map(|e| format!("{:8}", routes.mark(e)));
            head += &format!("{:w$}", ticks.collect::<String>().trim_end(), w = shown.len());
        } else {
            shown.clone().for_each(|e| head += &format!("{:cell$}", routes.mark(e)));
        }
        head += "  entropy";
        if text.label.is_some() {
            head += &format!("  first  in top-{}", routes.top_k);
        }
        out += &format!("{head}\n");
        for layer in &text.traffic.layers {
            let mut line = format!("  {:>5}  ", layer.layer);
            for e in shown.clone() {
                let share = layer.load.get(e).copied().unwrap_or(0.0);
                let block = block(share, largest);
                line += &match (numbered, cell) {
                    (true, _) => format!("{block}{:>3} ", percent(share)),
                    (false, 2) => format!("{block} "),
                    _ => block.to_string(),
                };
            }
            if cell == 1 {
                line +=
                    &" ".repeat(head.find("  entropy").unwrap_or(0).saturating_sub(columns(&line)));
            }
            line += &format!("  {:>7.2}", layer.entropy);
            if let Some(found) = layer.agreement {
                let note = if poor.contains(&layer.layer) { "  !" } else { "" };
                let (first, any) = (percent(found.first), percent(found.any));
                line += &format!("  {first:>3} %  {any:>6} %{note}");
            }
            out += &format!("{}\n", line.trim_end());
        }
    }
    out
}

/// One token as it stands in the terminal.
struct Cell {
    shown: String,
    mark: String,
    expert: usize,
    ends_line: bool,
}

fn tokens(routes: &Routes, text: &TextRoutes, paint: Paint) -> String {
    if text.tokens.is_empty() {
        return String::new();
    }
    let mut out =
        "\n  each token with the expert of the largest mean weight over layers".to_owned();
    let left_out = text.traffic.tokens.saturating_sub(text.tokens.len());
    if left_out > 0 {
        out += &format!("; the first {} of {}", text.tokens.len(), count(text.traffic.tokens));
    }
    out += "\n";
    let cells = text.tokens.iter().map(|t| {
        let shown = if t.text.is_empty() { token_text("") } else { visible(&t.text, Spaces::Kept) };
        Cell {
            shown: shortened(&shown, WIDTH - 6),
            mark: routes.mark(t.expert),
            expert: t.expert,
            ends_line: t.text.contains('\n'),
        }
    });
    let (mut line, mut used) = (Vec::new(), 0);
    for cell in cells {
        let wide = width(&cell, paint);
        if used + wide > WIDTH - 4 {
            out += &write_line(&line, paint);
            (line, used) = (Vec::new(), 0);
        }
        used += wide;
        let ends = cell.ends_line;
        line.push(cell);
        if ends {
            out += &write_line(&line, paint);
            (line, used) = (Vec::new(), 0);
        }
    }
    out += &write_line(&line, paint);
    if paint == Paint::Colour {
        let key =
            (0..routes.experts.len()).map(|e| coloured(&format!(" {} ", label(routes, e)), e));
        out += &format!("  {}\n", key.take(LISTED).collect::<Vec<_>>().join(" "));
    }
    out
}

/// Columns of a token: without colours its mark needs room, and a space from the next where it has several digits.
fn width(cell: &Cell, paint: Paint) -> usize {
    let mark = cell.mark.len() + usize::from(cell.mark.len() > 1);
    match paint {
        Paint::Colour => columns(&cell.shown),
        Paint::Plain => columns(&cell.shown).max(mark),
    }
}

fn write_line(cells: &[Cell], paint: Paint) -> String {
    if cells.is_empty() {
        return String::new();
    }
    if paint == Paint::Colour {
        let line: String = cells.iter().map(|c| coloured(&c.shown, c.expert)).collect();
        return format!("  {line}\n");
    }
    let row = |of: &dyn Fn(&Cell) -> &str| -> String {
        cells.iter().map(|c| padded(of(c), width(c, paint))).collect()
    };
    let (text, marks) = (row(&|c| &c.shown), row(&|c| &c.mark));
    format!("  {}\n  {}\n", text.trim_end(), marks.trim_end())
}

fn coloured(text: &str, expert: usize) -> String {
    let ground = colour::of_expert_in_terminal(expert);
    let ink = if colour::ink_on(colour::of_expert(expert)) == [0xff; 3] { 231 } else { 16 };
    format!("\u{1b}[38;5;{ink};48;5;{ground}m{text}\u{1b}[0m")
}

fn verdict(routes: &Routes) -> String {
    let Some(verdict) = &routes.verdict else { return String::new() };
    let names: Vec<String> = verdict.experts.iter().map(|e| label(routes, e.expert)).collect();
    let width = names.iter().map(|n| columns(n)).max().unwrap_or(0);
    let top_k = format!("in its top-{}", routes.top_k);
    let mut out = format!("\nagreement with labels, chance is {} %\n", percent(verdict.chance));
    out += &format!("  {:width$}   tokens  first choice  {top_k}  nearest rival\n", "");
    for (e, name) in verdict.experts.iter().zip(&names) {
        let rival = e.rival.map_or("-".into(), |r| {
            let name = glyph::shortened(&shown(&routes.experts[r.expert]), 20);
            format!("{name} {} %", percent(r.share))
        });
        let (first, any) = (percent(e.agreement.first), percent(e.agreement.any));
        out += &format!(
            "  {}  {:>7}  {first:>10} %  {any:>w$} %  {rival}\n",
            padded(name, width),
            count(e.tokens),
            w = top_k.len() - 2,
        );
    }
    let poor = ranges(&routes.chance_layers());
    if !poor.is_empty() {
        out += &format!("  ! no better than chance: layers {poor}\n");
    }
    out
}
