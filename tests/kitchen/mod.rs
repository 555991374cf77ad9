//! Text to learn from.

/// Text of a domain that no model of the reference data has seen: what is done in a kitchen.
pub fn text(seed: u32, characters: usize) -> String {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut choose = |count: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as usize % count
    };
    const DO: [&str; 8] = ["Stir", "Fold", "Whisk", "Pour", "Knead", "Chop", "Roast", "Simmer"];
    const AMOUNT: [&str; 6] =
        ["two cups of", "a pinch of", "half a jar of", "three", "some", "a bowl of"];
    const WHAT: [&str; 10] = [
        "flour",
        "onions",
        "butter",
        "plums",
        "barley",
        "cream",
        "mushrooms",
        "ginger",
        "lentils",
        "pepper",
    ];
    const HOW: [&str; 5] = ["gently", "for 20 minutes", "until golden", "over low heat", "twice"];
    let mut text = String::new();
    while text.len() < characters {
        let (a, b) = (WHAT[choose(10)], WHAT[choose(10)]);
        text += &match choose(3) {
            0 => format!(
                "{} {} {a} into the {b}, then rest it {}.\n",
                DO[choose(8)],
                AMOUNT[choose(6)],
                HOW[choose(5)]
            ),
            1 => format!(
                "For the sauce: {} {a}, {} {b}; {} {}.\n",
                AMOUNT[choose(6)],
                AMOUNT[choose(6)],
                DO[choose(8)].to_lowercase(),
                HOW[choose(5)]
            ),
            _ => format!(
                "{} the {a} {}. Serve with {} {b}.\n",
                DO[choose(8)],
                HOW[choose(5)],
                AMOUNT[choose(6)]
            ),
        };
    }
    text
}
