//! Routing as one JSON document.

use moe_merge_router::traffic::{Agreement, Rival, Verdict};
use serde_json::{Value, json};

use crate::picture::{Routes, TextRoutes, TokenRoutes};

/// The document; `tokens` lists every token with its visits.
pub fn of(routes: &Routes, tokens: bool) -> Value {
    json!({
        "version": 1,
        "model": routes.model,
        "family": routes.family,
        "experts": routes.experts,
        "experts_per_token": routes.top_k,
        "window": routes.window,
        "texts": routes.texts.iter().map(|t| text(routes, t, tokens)).collect::<Vec<_>>(),
        "agreement": routes.verdict.as_ref().map(|v| verdict(routes, v)),
    })
}

fn text(routes: &Routes, text: &TextRoutes, tokens: bool) -> Value {
    let traffic = &text.traffic;
    let layers = traffic.layers.iter().map(|l| {
        json!({
            "layer": l.layer,
            "load": l.load,
            "top1": l.first,
            "weight": l.weight,
            "entropy": l.entropy,
            "agreement": l.agreement.map(agreement),
        })
    });
    let positions = traffic.positions.iter().map(|p| {
        json!({
            "from": p.from,
            "to": p.to,
            "tokens": p.tokens,
            "top1": p.agreement.first,
            "top_k": p.agreement.any,
        })
    });
    let mut document = json!({
        "origin": text.origin,
        "tokens": traffic.tokens,
        "windows": text.windows,
        "label": text.label.map(|l| &routes.experts[l.expert]),
        "label_from": text.label.map(|l| l.from.name()),
        "load": traffic.load,
        "top1": traffic.first,
        "weight": traffic.weight,
        "entropy": traffic.entropy,
        "rivals": traffic.rivals.iter().map(|r| r.map(|r| rival(routes, r))).collect::<Vec<_>>(),
        "agreement": traffic.agreement.map(agreement),
        "positions": positions.collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
    });
    if tokens {
        document["token_routing"] = text.tokens.iter().map(token).collect();
    }
    document
}

fn agreement(found: Agreement) -> Value {
    json!({"top1": found.first, "top_k": found.any})
}

fn rival(routes: &Routes, rival: Rival) -> Value {
    json!({"expert": routes.experts[rival.expert], "share": rival.share})
}

fn token(token: &TokenRoutes) -> Value {
    let layer = |visits: &Vec<(u32, f32)>| {
        let (experts, weights): (Vec<u32>, Vec<f32>) = visits.iter().copied().unzip();
        json!({"experts": experts, "weights": weights})
    };
    json!({
        "id": token.id,
        "text": token.text,
        "expert": token.expert,
        "weight": token.weight,
        "layers": token.layers.iter().map(layer).collect::<Vec<_>>(),
    })
}

fn verdict(routes: &Routes, verdict: &Verdict) -> Value {
    let experts = verdict.experts.iter().map(|e| {
        json!({
            "expert": routes.experts[e.expert],
            "tokens": e.tokens,
            "top1": e.agreement.first,
            "top_k": e.agreement.any,
            "rival": e.rival.map(|r| rival(routes, r)),
        })
    });
    let layers = verdict.layers.iter().map(|l| {
        json!({
            "layer": l.layer,
            "top1": l.agreement.first,
            "top_k": l.agreement.any,
            "better_than_chance": l.better_than_chance,
        })
    });
    json!({
        "chance": verdict.chance,
        "experts": experts.collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
        "layers_no_better_than_chance": routes.chance_layers(),
    })
}
