//! The command, from its start to its end.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::client::{get, post};
use crate::host;

#[path = "../cli/mod.rs"]
#[allow(dead_code)]
mod cli;

#[test]
fn it_says_where_it_listens_and_ends_when_it_is_told_to() {
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("moe-merge"))
        .args(["serve", "--port", "0", "--quiet", "--device", "cpu", "--name", "moe"])
        .arg(host::model())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.strip_prefix("`moe`, generation 0: http://").expect(&line);
    let address: SocketAddr = address.trim_end().strip_suffix("/v1").unwrap().parse().unwrap();
    assert_eq!(get(address, "/health").json()["model"], "moe");
    let asked = json!({"model": "moe", "prompt": "a", "max_tokens": 2});
    assert_eq!(post(address, "/v1/completions", &asked).status, 200);
    // A token was made up, so that there are admin routes.
    assert_eq!(get(address, "/admin/status").status, 401);
    let told = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(told.success());
    let end = child.wait_with_output().unwrap();
    assert_eq!((end.status.code(), String::from_utf8(end.stderr).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn what_keeps_it_from_starting_is_told() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = host::model().display().to_string();
    cli::run(&["serve", &model, "--port", &port])
        .fails(2, &["cannot listen on 127.0.0.1", "--port"]);
    cli::run(&["serve", "no/such/model"]).fails(3, &["no/such/model"]);
    let model = moe_merge_testkit::repository("recipes/qwen3_tiny").display().to_string();
    cli::run(&["serve", &model]).fails(3, &["the model has no tokenizer"]);
}
