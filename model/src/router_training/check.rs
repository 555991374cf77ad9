//! What has to hold before the first step.

use super::network::Network;
use super::state::{Begun, TrainingState};
use super::windows::Pieces;
use super::{Gates, Objective, RouterTraining, TrainingError, TrainingText};

/// Options and texts against the model; the texts cut into windows.
pub(super) fn pieces(
    network: &Network,
    texts: &[TrainingText<'_>],
    options: &RouterTraining,
) -> Result<Pieces, TrainingError> {
    self::options(network, options)?;
    let experts = network.routers().map(|(_, moe)| moe.experts).min().unwrap_or(0);
    for (number, text) in texts.iter().enumerate() {
        let refused = |expected: String, found: String| TrainingError::Text {
            text: number.to_string(),
            expected,
            found,
        };
        match text.expert {
            Some(expert) if expert >= experts => {
                return Err(refused(format!("an expert below {experts}"), expert.to_string()));
            }
            None if options.objective == Objective::Distil => {
                let expected = "a text whose expert is known, for its output to be the aim";
                return Err(refused(expected.into(), "no expert".into()));
            }
            _ => {}
        }
        if text.skip + 2 > options.window {
            return Err(refused(
                format!(
                    "at most {} leading tokens in windows of {}",
                    options.window - 2,
                    options.window
                ),
                text.skip.to_string(),
            ));
        }
        if let Some(&token) = text.tokens.iter().find(|t| **t as usize >= network.spec.vocab) {
            let vocab = network.spec.vocab;
            return Err(crate::ModelError::Token { token, vocab }.into());
        }
    }
    Ok(Pieces::cut(texts, options.window))
}

fn options(network: &Network, options: &RouterTraining) -> Result<(), TrainingError> {
    let refused = |name, expected: String, found: String| {
        Err(TrainingError::Parameter { name, expected, found })
    };
    let rate = options.learning_rate;
    if !(rate.is_finite() && rate > 0.0) {
        return refused("learning_rate", "a number above 0".into(), rate.to_string());
    }
    for (name, weight) in [
        ("load_balance", options.load_balance),
        ("z_loss", options.z_loss),
        ("anchor", options.anchor),
    ] {
        if !(weight.is_finite() && weight >= 0.0) {
            return refused(name, "0 or more".into(), weight.to_string());
        }
    }
    for (name, count) in
        [("evaluate_every", options.evaluate_every), ("patience", options.patience)]
    {
        if count == 0 {
            return refused(name, "1 or more".into(), "0".into());
        }
    }
    let most = network.spec.max_positions;
    if options.window < 2 || options.window > most {
        let expected = format!("2 to {most}, the context of the model");
        return refused("window", expected, options.window.to_string());
    }
    let Some(experts) = network.routers().map(|(_, moe)| moe.experts).min() else {
        return Err(TrainingError::NoGradient {
            why: "the model has no layer with routed experts",
            hint: "give a MoE",
        });
    };
    if let Some(top_k) = options.top_k
        && !(1..=experts).contains(&top_k)
    {
        return refused("top_k", format!("1 to {experts}"), top_k.to_string());
    }
    for (layer, moe) in network.routers() {
        let top_k = options.top_k.unwrap_or(moe.router.top_k);
        if let Some((groups, kept)) = moe.router.groups
            && top_k > moe.experts / groups.max(1) * kept
        {
            let most = moe.experts / groups.max(1) * kept;
            let expected =
                format!("at most {most}: layer {layer} chooses from {kept} of {groups} groups");
            return refused("top_k", expected, top_k.to_string());
        }
    }
    let blind = network
        .routers()
        .all(|(_, moe)| moe.router.renormalise && options.top_k.unwrap_or(moe.router.top_k) == 1);
    if blind && options.load_balance == 0.0 && options.z_loss == 0.0 {
        return Err(TrainingError::NoGradient {
            why: "each token visits one expert, with weight 1 whatever the router says",
            hint: "train with `top_k` 2 or more; held-out losses still use the model's one expert",
        });
    }
    Ok(())
}

/// A state against model, options and texts; a new one is prepared for its first step.
pub(super) fn state(
    network: &Network,
    mut state: TrainingState,
    texts: &[TrainingText<'_>],
    options: &RouterTraining,
    pieces: &Pieces,
) -> Result<TrainingState, TrainingError> {
    let hidden = network.spec.hidden;
    let shapes: Vec<(usize, usize)> =
        network.routers().map(|(l, moe)| (l, moe.experts * hidden)).collect();
    let TrainingState { gates, best, start, first_moments, second_moments, .. } = &state;
    for (what, gates) in [
        ("gates", gates),
        ("best gates", best),
        ("gates at the start", start),
        ("first moments", first_moments),
        ("second moments", second_moments),
    ] {
        same_shapes(what, gates, &shapes)?;
    }
    let begun = Begun { options: options.clone(), texts: digest(texts) };
    match &state.begun {
        None => {
            state.drawn = vec![0; pieces.groups.len()];
            state.begun = Some(begun);
        }
        Some(before) if *before == begun => {
            if state.drawn.len() != pieces.groups.len() {
                return Err(misfit("groups of texts", pieces.groups.len(), state.drawn.len()));
            }
            let rms = shapes.iter().map(|(l, _)| (*l, 1)).collect::<Vec<_>>();
            if state.step > 0 {
                same_shapes("sizes of router inputs", &state.input_rms, &rms)?;
            }
        }
        Some(before) if before.options != *options => {
            let (expected, found) = (format!("{options:?}"), format!("{:?}", before.options));
            return Err(TrainingError::State { what: "options".into(), expected, found });
        }
        Some(before) => return Err(misfit("digest of the texts", begun.texts, before.texts)),
    }
    Ok(state)
}

fn misfit(what: &str, expected: impl ToString, found: impl ToString) -> TrainingError {
    let (expected, found) = (expected.to_string(), found.to_string());
    TrainingError::State { what: what.into(), expected, found }
}

fn same_shapes(what: &str, gates: &Gates, shapes: &[(usize, usize)]) -> Result<(), TrainingError> {
    let layers = |layers: Vec<usize>| format!("layers {layers:?}");
    let (found, expected): (Vec<usize>, Vec<usize>) =
        (gates.keys().copied().collect(), shapes.iter().map(|s| s.0).collect());
    if found != expected {
        return Err(misfit(what, layers(expected), layers(found)));
    }
    for (values, (layer, len)) in gates.values().zip(shapes) {
        if values.len() != *len {
            let what = format!("{what} of layer {layer}");
            return Err(misfit(&what, format!("{len} numbers"), values.len()));
        }
        if values.iter().any(|v| !v.is_finite()) {
            let what = format!("{what} of layer {layer}");
            return Err(misfit(&what, "finite numbers", "NaN or infinity"));
        }
    }
    Ok(())
}

/// FNV-1a over everything in the texts.
fn digest(texts: &[TrainingText<'_>]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |value: u64| {
        for byte in value.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for text in texts {
        add(text.tokens.len() as u64);
        text.tokens.iter().for_each(|t| add(u64::from(*t)));
        add(text.expert.map_or(u64::MAX, |e| e as u64));
        add(u64::from(text.held_out));
        add(text.skip as u64);
    }
    hash
}
