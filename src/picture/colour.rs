//! Colours that stay apart for colour-blind eyes and in black and white.

/// Red, green, blue.
pub type Rgb = [u8; 3];

/// Colours of experts, after Okabe and Ito; lightness is stretched so that each differs from the others without colour, too.
const EXPERTS: [Rgb; 8] = [
    [0x00, 0x72, 0xb2],
    [0xe6, 0x9f, 0x00],
    [0x00, 0x4d, 0x3a],
    [0xf0, 0xe4, 0x42],
    [0xd5, 0x5e, 0x00],
    [0x7c, 0xcb, 0xf5],
    [0xcc, 0x79, 0xa7],
    [0x3b, 0x1c, 0x4a],
];

/// The nearest of the 256 colours of terminals, in the same order.
const TERMINAL: [u8; 8] = [25, 214, 22, 227, 166, 117, 175, 53];

/// Light to dark, for shares.
const SHARES: [Rgb; 4] =
    [[0xf7, 0xf9, 0xfc], [0xa9, 0xc9, 0xe6], [0x2f, 0x78, 0xb7], [0x08, 0x25, 0x4d]];

/// Patterns over the colours, so that more experts than colours stay apart: plain, lines in two directions, dots.
pub const PATTERNS: usize = 4;

/// The colour of an expert; they repeat after eight, with another [`pattern`].
pub fn of_expert(expert: usize) -> Rgb {
    EXPERTS[expert % EXPERTS.len()]
}

/// The colour of an expert among the 256 of a terminal.
pub fn of_expert_in_terminal(expert: usize) -> u8 {
    TERMINAL[expert % TERMINAL.len()]
}

/// Which of [`PATTERNS`] lies over the colour of an expert.
pub fn pattern(expert: usize) -> usize {
    expert / EXPERTS.len() % PATTERNS
}

/// The colour of a share, given the largest that is shown.
pub fn of_share(share: f64, largest: f64) -> Rgb {
    let at = (share / largest.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0) * (SHARES.len() - 1) as f64;
    let low = (at as usize).min(SHARES.len() - 2);
    let part = at - low as f64;
    let mix = |i: usize| {
        let (a, b) = (f64::from(SHARES[low][i]), f64::from(SHARES[low + 1][i]));
        (a + (b - a) * part).round() as u8
    };
    [mix(0), mix(1), mix(2)]
}

/// Black or white, whichever reads better on `ground`.
pub fn ink_on(ground: Rgb) -> Rgb {
    let light = luminance(ground);
    // Contrast ratios of WCAG 2: (lighter + 0.05) / (darker + 0.05).
    if 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 { [0xff; 3] } else { [0x11; 3] }
}

/// Relative luminance after WCAG 2, 0 to 1.
fn luminance(colour: Rgb) -> f64 {
    let linear = colour.map(|v| {
        let v = f64::from(v) / 255.0;
        if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
    });
    0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
}

/// As CSS writes it.
pub fn hex(colour: Rgb) -> String {
    format!("#{:02x}{:02x}{:02x}", colour[0], colour[1], colour[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CIE lightness, 0 to 100.
    fn lightness(colour: Rgb) -> f64 {
        116.0 * luminance(colour).cbrt() - 16.0
    }

    #[test]
    fn experts_differ_in_black_and_white() {
        let mut all: Vec<f64> = EXPERTS.map(lightness).to_vec();
        all.sort_by(f64::total_cmp);
        for pair in all.windows(2) {
            assert!(pair[1] - pair[0] >= 5.0, "{all:?}");
        }
    }

    #[test]
    fn experts_differ_for_colour_blind_eyes() {
        // Linear RGB as seen without red, green or blue cones: Machado, Oliveira, Fernandes 2009, severity 1.
        let eyes = [
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ],
            [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ],
            [
                [1.255528, -0.076749, -0.178779],
                [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900],
            ],
        ];
        for eye in eyes {
            let seen = EXPERTS.map(|c| {
                let linear = c.map(|v| (f64::from(v) / 255.0).powf(2.2));
                eye.map(|row| {
                    let sum: f64 = row.iter().zip(linear).map(|(m, v)| m * v).sum();
                    255.0 * sum.clamp(0.0, 1.0).powf(1.0 / 2.2)
                })
            });
            for a in 0..seen.len() {
                for b in 0..a {
                    let squares = (0..3).map(|i| (seen[a][i] - seen[b][i]).powi(2));
                    let distance = squares.sum::<f64>().sqrt();
                    assert!(distance > 30.0, "experts {a} and {b}: {distance}");
                }
            }
        }
    }

    #[test]
    fn more_experts_than_colours_have_patterns() {
        let looks: std::collections::BTreeSet<_> =
            (0..32).map(|e| (of_expert(e), pattern(e))).collect();
        assert_eq!(looks.len(), 32);
    }

    #[test]
    fn text_is_readable_on_every_colour() {
        for ground in EXPERTS.into_iter().chain((0..=20).map(|i| of_share(f64::from(i), 20.0))) {
            let (a, b) = (luminance(ground) + 0.05, luminance(ink_on(ground)) + 0.05);
            assert!(f64::max(a, b) / f64::min(a, b) >= 4.0, "{}", hex(ground));
        }
        assert_eq!(hex(of_share(0.0, 0.5)), "#f7f9fc");
        assert_eq!(hex(of_share(0.9, 0.5)), "#08254d");
        let shares: Vec<f64> = (0..=20).map(|i| lightness(of_share(f64::from(i), 20.0))).collect();
        assert!(shares.windows(2).all(|p| p[0] > p[1]), "{shares:?}");
    }
}
