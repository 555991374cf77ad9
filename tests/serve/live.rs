//! Generations come and go under a running server.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moe_merge_adapt::{DropRequest, Edit};
use moe_merge_checkpoint::publish::Interrupt;
use moe_merge_checkpoint::weight::OwnedWeight;
use moe_merge_checkpoint::write::Watch as Progress;
use moe_merge_checkpoint::{Change, Dtype, NewTensors, WeightRef, generation};
use moe_merge_serve::{Options, Watch};
use serde_json::{Value, json};

use crate::client::{self, Response, get, post, raw, request};
use crate::common;
use crate::host::{self, Host};

pub const TOKEN: &str = "a token";

/// Replaces every router by numbers made from `seed`: the next generation.
pub fn replace(folder: &Path, seed: usize) -> u32 {
    let source = common::open(folder);
    let routers = source.tensors.iter().filter(|(name, _)| name.ends_with("moe.gate.weight"));
    let tensors: Vec<(String, WeightRef)> = routers
        .map(|(name, old)| {
            let values: Vec<f32> =
                (0..old.len()).map(|i| ((i * seed) as f32 * 0.37).sin() * 0.2).collect();
            let new = OwnedWeight::from_f32(name, &values, old.shape(), Dtype::F32);
            (name.clone(), Arc::new(new) as WeightRef)
        })
        .collect();
    let change = Change {
        action: "calibrate",
        message: Some("for a test"),
        tensors: vec![NewTensors { role: "router".into(), tensors }],
        ..Change::default()
    };
    let watch = Progress { interrupt: &Interrupt::default(), progress: &|_| {} };
    generation::commit(folder, &change, watch).unwrap().number
}

pub fn admin(host: &Host, path: &str) -> Response {
    let token = format!("Bearer {TOKEN}");
    raw(host.address, &request("GET", path, &[("authorization", &token)], b"")).unwrap()
}

pub fn admin_post(host: &Host, path: &str, body: &Value) -> Response {
    let token = format!("Bearer {TOKEN}");
    let headers = [("authorization", token.as_str()), ("content-type", "application/json")];
    raw(host.address, &request("POST", path, &headers, body.to_string().as_bytes())).unwrap()
}

pub fn options() -> Options {
    let watch = Watch::Every(Duration::from_millis(10));
    Options { admin_token: Some(TOKEN.into()), watch, ..Options::default() }
}

/// Waits until a question has the answer that it should have.
#[track_caller]
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let clock = Instant::now();
    while !is() {
        assert!(clock.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn live(host: &Host) -> Value {
    get(host.address, "/health").json()["generation"].clone()
}

fn body(stream: bool, new: usize) -> Value {
    json!({"model": "copy", "prompt": "The river", "max_tokens": new, "temperature": 0,
        "ignore_eos": true, "stream": stream})
}

fn text(host: &Host) -> (String, Value) {
    let response = post(host.address, "/v1/completions", &body(false, 60));
    let generation: u32 = response.header("x-moe-merge-generation").unwrap().parse().unwrap();
    let found = response.json();
    assert!(
        found["system_fingerprint"].as_str().unwrap().starts_with(&format!("fp_g{generation}_"))
    );
    (found["choices"][0]["text"].as_str().unwrap().to_owned(), json!(generation))
}

/// Mappings of files below a folder, each once for every place in memory.
fn mappings(folder: &Path) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let folder = folder.display().to_string();
    maps.lines().filter_map(|l| Some(l[l.find(&folder)?..].to_owned())).collect()
}

#[test]
fn requests_end_on_the_generation_they_began_with() {
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    let host = Host::of(&folder, options());
    let (before, generation) = text(&host);
    assert_eq!(generation, 0);
    // A long answer, the beginning of which is read before the change.
    let json = ("content-type", "application/json");
    let long = body(true, 480);
    let mut stream = client::connect(host.address);
    let bytes = request("POST", "/v1/completions", &[json], long.to_string().as_bytes());
    stream.write_all(&bytes).unwrap();
    let mut answer = vec![0; 2000];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(replace(&folder, 3), 1);
    until("generation 1", || live(&host) == 1);
    let (after, generation) = text(&host);
    assert_eq!(generation, 1);
    assert_ne!(after, before, "the change changes what is written");
    let shared = mappings(&folder);
    let mut once = shared.clone();
    once.dedup();
    assert_eq!(shared, once, "a file that both generations have is mapped once");
    stream.read_to_end(&mut answer).unwrap();
    let response = client::parse(&answer).unwrap();
    assert_eq!(response.header("x-moe-merge-generation"), Some("0"));
    let events = response.events();
    let pieces = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap());
    let whole: String = pieces.collect();
    assert!(whole.starts_with(&before), "{whole}");
    assert_eq!(events.iter().filter(|e| !e["choices"][0]["finish_reason"].is_null()).count(), 1);
    // Nobody works with the old one any more: it goes, and with it what only it had.
    until("the end of generation 0", || {
        admin(&host, "/admin/status").json()["in_memory"] == json!([1])
    });
    assert_eq!(text(&host), (after, json!(1)));
    let routers = mappings(&folder).into_iter().filter(|m| m.contains("router")).count();
    assert_eq!(routers, 1, "{:?}", mappings(&folder));
}

#[test]
fn a_broken_folder_leaves_the_old_generation_live() {
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    let host = Host::of(&folder, options());
    let (before, _) = text(&host);
    let index = folder.join("model.safetensors.index.json");
    let good = std::fs::read(&index).unwrap();
    let put = |bytes: &[u8]| {
        std::fs::write(folder.join("beside"), bytes).unwrap();
        std::fs::rename(folder.join("beside"), &index).unwrap();
    };
    put(b"{\"weight_map\": 3}");
    let refused = || {
        let text = get(host.address, "/metrics").text();
        let line = text.lines().find(|l| l.starts_with("moe_merge_switches_refused_total"));
        line.unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    until("a refusal", || refused() > 0);
    assert_eq!(text(&host), (before, json!(0)));
    let found = admin_post(&host, "/admin/refresh", &json!({}));
    assert_eq!((found.status, &found.json()["error"]["code"]), (400, &json!("not_opened")));
    put(&good);
    until("the folder as it was", || admin_post(&host, "/admin/refresh", &json!({})).status == 200);
    assert_eq!(replace(&folder, 3), 1);
    until("generation 1", || live(&host) == 1);
}

#[test]
fn admin_routes_tell_what_there_is() {
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    replace(&folder, 3);
    let host = Host::of(&folder, Options { watch: Watch::Off, ..options() });
    text(&host);
    let status = admin(&host, "/admin/status").json();
    assert_eq!(status["experts"], json!(["prose", "code", "math"]));
    assert_eq!((&status["generation"], &status["in_memory"]), (&json!(1), &json!([1])));
    let layers = status["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for layer in layers {
        let visits = layer["experts"].as_array().unwrap().iter().map(|e| e.as_u64().unwrap());
        assert_eq!(visits.sum::<u64>(), 2 * layer["tokens"].as_u64().unwrap());
    }
    let listed = admin(&host, "/admin/generations").json();
    assert_eq!(listed["live"], 1);
    let lines = listed["generations"].as_array().unwrap();
    assert_eq!((&lines[0]["action"], &lines[1]["action"]), (&json!("build"), &json!("calibrate")));
    assert_eq!((&lines[1]["message"], &lines[1]["live"]), (&json!("for a test"), &json!(true)));
    // Nobody looks at the disk but for the one who asks.
    replace(&folder, 5);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(live(&host), 1);
    assert_eq!(admin_post(&host, "/admin/refresh", &json!({})).json()["generation"], 2);
    assert_eq!(live(&host), 2);
}

#[test]
fn an_expert_is_swapped_and_comes_back_while_the_server_runs() {
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    let host = Host::of(&folder, Options { watch: Watch::Off, ..options() });
    let (before, _) = text(&host);
    let prose = moe_merge_testkit::repository("recipes/quickstart/prose");
    let asked = json!({"expert": "code", "with": prose, "name": "tales", "message": "a test"});
    let found = admin_post(&host, "/admin/swap", &asked).json();
    assert_eq!(
        (&found["generation"], &found["report"]["expert"]),
        (&json!(1), &json!(1)),
        "{found}"
    );
    assert!(found["report"]["bytes_written"].as_u64() > found["report"]["expert_bytes"].as_u64());
    let (swapped, generation) = text(&host);
    assert_eq!(generation, 1);
    assert_ne!(swapped, before);
    assert_eq!(admin(&host, "/admin/status").json()["experts"], json!(["prose", "tales", "math"]));
    let found = admin_post(&host, "/admin/rollback", &json!({"to": 0})).json();
    assert_eq!((&found["generation"], &found["report"]["to"]), (&json!(2), &json!(0)));
    assert_eq!(text(&host), (before, json!(2)));
    for (path, asked) in [
        ("swap", json!({"expert": "none", "with": prose})),
        ("swap", json!({"expert": 0, "with": "no/such/model"})),
        ("swap", json!({"expert": 0})),
        ("swap", json!({"expert": 0, "with": prose, "layers": [1]})),
        ("rollback", json!({"to": 99})),
        ("rollback", json!({"to": -1})),
    ] {
        let found = admin_post(&host, &format!("/admin/{path}"), &asked);
        assert_eq!(found.status, 400, "{asked}: {}", found.text());
        assert!(found.json()["error"]["message"].as_str().unwrap().len() > 10);
    }
    assert_eq!(live(&host), 2);
}

#[test]
fn an_expert_goes_while_the_server_runs() {
    let temp = tempfile::tempdir().unwrap();
    let folder = host::copy(temp.path());
    let host = Host::of(&folder, options());
    let (before, _) = text(&host);
    let asked = DropRequest {
        folder: folder.display().to_string(),
        expert: "code".into(),
        message: None,
        interrupt: Interrupt::default(),
    };
    let dropped = Edit::drop(asked).unwrap().run(&|_| {}).unwrap();
    assert_eq!(dropped.change.generation, Some(1));
    until("generation 1", || live(&host) == 1);
    assert_ne!(text(&host).0, before);
    let status = admin(&host, "/admin/status").json();
    assert_eq!(status["experts"], json!(["prose", "math"]));
    let layers = status["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["experts"].as_array().unwrap().len() == 2));
    assert_eq!(admin_post(&host, "/admin/rollback", &json!({})).json()["generation"], 2);
    assert_eq!(text(&host), (before, json!(2)));
}

#[test]
fn the_way_of_a_prompt_is_what_its_routers_say() {
    let host = Host::of(host::model(), options());
    let asked = json!({"prompt": "fn main() {", "max_tokens": 4});
    let found = admin_post(&host, "/admin/route", &asked).json();
    let tokens = found["tokens"].as_array().unwrap();
    let prompt = tokens.iter().filter(|t| t["written"] == false).count();
    assert_eq!(tokens.len(), prompt + 4);
    let layers = found["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for layer in layers {
        // The last token has not gone through the model.
        assert_eq!(layer["experts"].as_array().unwrap().len(), tokens.len() - 1);
        for (experts, weights) in
            layer["experts"].as_array().unwrap().iter().zip(layer["weights"].as_array().unwrap())
        {
            let experts: Vec<u64> =
                experts.as_array().unwrap().iter().map(|e| e.as_u64().unwrap()).collect();
            assert!(
                experts.len() == 2 && experts[0] != experts[1] && experts.iter().all(|e| *e < 3)
            );
            let sum: f64 = weights.as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).sum();
            assert!((sum - 1.0).abs() < 1e-5);
        }
    }
    let found = admin_post(&host, "/admin/route", &json!({"prompt": 3}));
    assert_eq!((found.status, &found.json()["error"]["code"]), (400, &json!("invalid_type")));
}

#[test]
fn admin_routes_need_the_token_and_are_not_there_without_one() {
    let host = Host::of(host::model(), options());
    for path in ["/admin/status", "/admin/generations"] {
        assert_eq!(get(host.address, path).status, 401, "{path}");
        let wrong = request("GET", path, &[("authorization", "Bearer a toke")], b"");
        assert_eq!(raw(host.address, &wrong).unwrap().status, 401, "{path}");
        assert_eq!(admin(&host, path).status, 200, "{path}");
    }
    assert_eq!(post(host.address, "/admin/refresh", &json!({})).status, 401);
    let page = get(host.address, "/");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(
        !page.text().contains("http://") && !page.text().contains("https://"),
        "no outside resources"
    );
    let none = Host::of(host::model(), Options::default());
    for path in ["/admin/status", "/admin/generations", "/admin/refresh"] {
        assert_eq!(admin(&none, path).status, 404, "{path}");
    }
}
