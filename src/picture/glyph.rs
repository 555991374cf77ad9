//! Text that is safe to show: every character visible, one column count known, nothing that a terminal or a browser obeys.

use unicode_width::UnicodeWidthChar;

/// How spaces are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spaces {
    /// As they are.
    Kept,
    /// As `·`.
    Dotted,
}

/// Shown for a token that holds a part of a character only.
pub const PART: char = '⋯';
/// Shown for characters without a picture of their own that would change how their neighbours look.
const HIDDEN: char = '◇';

/// `text` with a visible glyph for every character: `⏎` for a line feed, `⇥` for a tab, control pictures for other
/// control characters, `◇` for marks that are invisible or turn the direction of writing.
pub fn visible(text: &str, spaces: Spaces) -> String {
    text.chars().map(|c| glyph(c, spaces)).collect()
}

fn glyph(c: char, spaces: Spaces) -> char {
    match c {
        ' ' if spaces == Spaces::Dotted => '·',
        ' ' => ' ',
        '\n' => '⏎',
        '\t' => '⇥',
        '\0'..='\u{1f}' => char::from_u32(0x2400 + c as u32).unwrap_or(HIDDEN),
        '\u{7f}' => '␡',
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{180e}' => HIDDEN,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => HIDDEN,
        '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}' => HIDDEN,
        '\u{fffe}' | '\u{ffff}' | '\u{e0000}'..='\u{e0fff}' => HIDDEN,
        c if c.is_whitespace() => '·',
        c => c,
    }
}

/// Columns that `text` takes in a font whose characters are equally wide, at least one.
pub fn columns(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(1)).sum::<usize>().max(1)
}

/// `text` for the inside of an XML or HTML element or of a quoted attribute, every character visible.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars().map(|c| glyph(c, Spaces::Kept)) {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// The end of `text` in so many columns, `…` for what is left out: of a path, the end says most.
pub fn shortened(text: &str, limit: usize) -> String {
    if columns(text) <= limit {
        return text.to_owned();
    }
    let mut kept: Vec<char> = Vec::new();
    let mut used = 1;
    for c in text.chars().rev() {
        used += c.width().unwrap_or(1);
        if used > limit {
            break;
        }
        kept.push(c);
    }
    std::iter::once('…').chain(kept.into_iter().rev()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_stays_invisible() {
        assert_eq!(visible(" a\n\t\u{1b}[0m\r\0", Spaces::Dotted), "·a⏎⇥␛[0m␍␀");
        assert_eq!(visible(" \u{a0}\u{202e}\u{feff}\u{ffff}\u{85}", Spaces::Kept), " ·◇◇◇◇");
        let all: String = (0..=0xffff).filter_map(char::from_u32).collect();
        let shown = visible(&all, Spaces::Kept);
        assert!(!shown.chars().any(|c| c.is_control() || c == '\u{ffff}'));
    }

    #[test]
    fn markup_is_text() {
        assert_eq!(escape("<a b=\"c\">&'\u{1}"), "&lt;a b=&quot;c&quot;&gt;&amp;&#39;␁");
    }

    #[test]
    fn columns_of_wide_and_combining_characters() {
        assert_eq!(["ab", "漢", "e\u{301}", "\u{301}"].map(columns), [2, 2, 1, 1]);
        assert_eq!(shortened("models/tiny/eval.txt", 9), "…eval.txt");
        assert_eq!(shortened("short", 9), "short");
    }
}
