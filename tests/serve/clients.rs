//! Clients of others, unchanged.

use std::process::Command;

use moe_merge_serve::Options;
use serde_json::{Value, json};

use crate::client::post;
use crate::host::{self, Host};

#[test]
fn the_official_python_client_works() {
    let Some(python) = moe_merge_testkit::python("MOE_MERGE_PYTHON_OPENAI") else { return };
    let host = Host::of(host::model(), Options::default());
    let script = moe_merge_testkit::repository("tests/python/check_openai.py");
    let address = format!("http://{}", host.address);
    let output = Command::new(&python).arg(script).args([&address, "tiny-moe"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let body =
        json!({"model": "tiny-moe", "prompt": "The river", "max_tokens": 20, "temperature": 0});
    let ours = post(host.address, "/v1/completions", &body).json();
    assert_eq!(found["text"], ours["choices"][0]["text"]);
}
