//! Clients that are wrong, slow, greedy or gone. Whatever they do, the server goes on.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use moe_merge_serve::{Limits, Options};
use serde_json::{Value, json};

use crate::client::{connect, get, parse, post, raw, request};
use crate::host::{self, Host};
use crate::live::until;

fn limited(limits: Limits) -> Options {
    Options { limits, ..Options::default() }
}

fn body(new: usize) -> Value {
    json!({"model": "tiny-moe", "prompt": "The river", "max_tokens": new, "temperature": 0,
        "ignore_eos": true})
}

fn metric(host: &Host, name: &str) -> u64 {
    let text = get(host.address, "/metrics").text();
    let line = text.lines().find(|l| l.starts_with(&format!("{name} "))).expect(name);
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[track_caller]
fn is_well(host: &Host) {
    assert_eq!(get(host.address, "/health").status, 200);
    let found = post(host.address, "/v1/completions", &body(3));
    assert_eq!(found.status, 200, "{}", found.text());
}

/// Bytes of a request that an HTTP library would not send.
#[test]
fn what_is_no_request_is_refused_or_dropped() {
    let host = Host::of(host::model(), Options::default());
    let long = format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let many = format!("GET /health HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(1000));
    let cases: &[(&str, &[u8])] = &[
        ("nothing", b""),
        ("noise", b"\x00\xff\x13\x37\r\n\r\n"),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("a long header", long.as_bytes()),
        ("many headers", many.as_bytes()),
        ("two lengths", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 2\r\ncontent-length: 30\r\n\r\n{}"),
        ("a negative length", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n{}"),
        ("a broken chunk", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        ("a zero byte in a header", b"GET /health HTTP/1.1\r\nhost: a\x00b\r\n\r\n"),
        ("a line break in a path", b"GET /hea\nlth HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("a path upwards", b"GET /v1/models/../../../etc/passwd HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"),
        ("an unknown method", b"FROBNICATE /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"),
    ];
    for (name, bytes) in cases {
        let mut stream = connect(host.address);
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        if let Some(found) = parse(&answer) {
            assert!(
                (400..500).contains(&found.status),
                "{name}: {} {}",
                found.status,
                found.text()
            );
        }
        is_well(&host);
    }
    // Two framings at once are how requests are smuggled past proxies.
    let both = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let mut stream = connect(host.address);
    stream.write_all(both).unwrap();
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(parse(&answer).is_none_or(|found| (400..500).contains(&found.status)));
    is_well(&host);
}

#[test]
fn bodies_that_cannot_be_read_get_4xx() {
    let host = Host::of(host::model(), Options::default());
    let json = ("content-type", "application/json; charset=utf-8");
    let send = |body: &[u8]| {
        raw(host.address, &request("POST", "/v1/completions", &[json], body)).unwrap()
    };
    let deep = [b"[".repeat(50_000), b"]".repeat(50_000)].concat();
    for body in [&b""[..], b"{", b"nul", b"{\"model\": \"\xff\"}", b"\xef\xbb\xbf{}", &deep] {
        let found = send(body);
        assert_eq!(
            (found.status, &found.json()["error"]["type"]),
            (400, &json!("invalid_request_error"))
        );
    }
    let twice = br#"{"model": "tiny-moe", "model": "other", "prompt": "a"}"#;
    assert_eq!(send(twice).status, 404, "the last of two equal keys counts");
    for changed in [
        json!({"max_tokens": -1}),
        json!({"max_tokens": 1e30}),
        json!({"n": 0}),
        json!({"temperature": -1}),
        json!({"temperature": 1e300}),
        json!({"top_p": 2}),
        json!({"logprobs": 1000}),
        json!({"seed": 0.5}),
        json!({"prompt": {"a": 1}}),
        json!({"prompt": [[[1]]]}),
        json!({"prompt": [4_294_967_296u64]}),
        json!({"logit_bias": {"-1": 1}}),
        json!({"stream": "yes"}),
    ] {
        let mut body = body(3);
        for (key, value) in changed.as_object().unwrap() {
            body[key] = value.clone();
        }
        let found = post(host.address, "/v1/completions", &body);
        assert_eq!(found.status, 400, "{changed}: {}", found.text());
        assert!(found.json()["error"]["param"].is_string(), "{changed}");
    }
    is_well(&host);
}

#[test]
fn large_bodies_are_refused_before_they_are_read() {
    let host = Host::of(host::model(), limited(Limits { body_bytes: 1000, ..Limits::default() }));
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n";
    let sized = [&head[..], b"content-length: 99999999999\r\n\r\n"].concat();
    let mut stream = connect(host.address);
    stream.write_all(&sized).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    // Without a length it is read up to the limit.
    let mut stream = connect(host.address);
    stream.write_all(&[&head[..], b"transfer-encoding: chunked\r\n\r\n"].concat()).unwrap();
    let chunk = [&b"190\r\n"[..], &[b' '; 400], b"\r\n"].concat();
    while stream.write_all(&chunk).is_ok() {}
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 413"));
    is_well(&host);
}

#[test]
fn slow_clients_run_out_of_time() {
    let time = Duration::from_millis(300);
    let limits = Limits { header_time: time, body_time: time, ..Limits::default() };
    let host = Host::of(host::model(), limited(limits));
    let slow = |bytes: &[u8]| {
        let mut stream = connect(host.address);
        let clock = Instant::now();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(clock.elapsed() < Duration::from_secs(30), "the connection stays open");
        answer
    };
    slow(b"GET /hea");
    slow(b"GET /health HTTP/1.1\r\nhost: a\r\nx: y");
    let half =
        request("POST", "/v1/completions", &[("content-type", "application/json")], &[b' '; 50]);
    let answer = slow(&half[..half.len() - 20]);
    assert_eq!(parse(&answer).unwrap().status, 408);
    is_well(&host);
}

#[test]
fn clients_that_leave_are_not_worked_for() {
    let host = Host::of(host::model(), Options::default());
    let json = ("content-type", "application/json");
    for stream in [true, false] {
        let before = metric(&host, "moe_merge_cancelled_total");
        let mut body = body(480);
        body["stream"] = json!(stream);
        body["n"] = json!(8);
        let mut client = connect(host.address);
        client
            .write_all(&request("POST", "/v1/completions", &[json], body.to_string().as_bytes()))
            .unwrap();
        until("work", || metric(&host, "moe_merge_running") > 0);
        drop(client);
        until("its end", || metric(&host, "moe_merge_running") == 0);
        assert!(metric(&host, "moe_merge_cancelled_total") > before, "{stream}");
        is_well(&host);
    }
}

#[test]
fn more_than_the_queue_holds_is_refused() {
    let limits = Limits { sequences: 1, waiting: 2, ..Limits::default() };
    let host = Host::of(host::model(), limited(limits));
    let mut many = body(400);
    many["n"] = json!(4);
    let found = post(host.address, "/v1/completions", &many);
    assert_eq!((found.status, found.header("retry-after")), (503, Some("1")));
    assert_eq!(found.json()["error"]["code"], "overloaded");
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let ask = || post(host.address, "/v1/completions", &body(300)).status;
        let threads: Vec<_> = (0..12).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(statuses.iter().all(|s| [200, 503].contains(s)), "{statuses:?}");
    assert!(statuses.contains(&200) && statuses.contains(&503), "{statuses:?}");
    assert_eq!(
        (metric(&host, "moe_merge_waiting"), metric(&host, "moe_merge_cancelled_total")),
        (0, 0)
    );
    is_well(&host);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let host = Host::of(host::model(), limited(Limits { connections: 2, ..Limits::default() }));
    let idle: Vec<_> = (0..2).map(|_| connect(host.address)).collect();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| get(host.address, "/health").status);
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished());
        drop(idle);
        assert_eq!(waiting.join().unwrap(), 200);
    });
}

#[test]
fn answers_that_take_too_long_are_given_up() {
    let limits = Limits { answer_time: Duration::from_millis(30), ..Limits::default() };
    let host = Host::of(host::model(), limited(limits));
    let mut body = body(480);
    body["n"] = json!(16);
    let found = post(host.address, "/v1/completions", &body);
    assert_eq!((found.status, &found.json()["error"]["code"]), (504, &json!("timeout")));
    body["stream"] = json!(true);
    let found = post(host.address, "/v1/completions", &body);
    assert_eq!(found.status, 200);
    assert_eq!(found.events().last().unwrap()["error"]["code"], "timeout");
    until("its end", || metric(&host, "moe_merge_running") == 0);
}

#[test]
fn a_server_that_stops_ends_what_it_began() {
    let mut host = Host::of(host::model(), Options::default());
    let (address, mut long) = (host.address, body(480));
    long["stream"] = json!(true);
    let answering = std::thread::spawn(move || post(address, "/v1/completions", &long));
    until("work", || metric(&host, "moe_merge_running") > 0);
    host.stop();
    let found = answering.join().unwrap();
    let events = found.events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn a_server_that_has_to_stop_does_not_wait_for_ever() {
    let limits = Limits { drain_time: Duration::from_millis(50), ..Limits::default() };
    let mut host = Host::of(host::model(), limited(limits));
    let (address, mut long) = (host.address, body(480));
    long["n"] = json!(30);
    let answering = std::thread::spawn(move || {
        let json = ("content-type", "application/json");
        let bytes = request("POST", "/v1/completions", &[json], long.to_string().as_bytes());
        raw(address, &bytes).is_none()
    });
    until("work", || metric(&host, "moe_merge_running") > 0);
    let clock = Instant::now();
    host.stop();
    assert!(clock.elapsed() < Duration::from_secs(10), "{:?}", clock.elapsed());
    assert!(answering.join().unwrap(), "the answer was given up");
}
