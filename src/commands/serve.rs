//! `serve PATH`: answers OpenAI's clients over HTTP.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use moe_merge_serve::{Limits, Opener, Options, Server, Watch};
use serde_json::json;

use crate::args::{Common, ServeArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure};

/// Serves until it is interrupted, then ends answers under way.
pub fn run(args: &ServeArgs, common: &Common) -> Result<Outcome, Failure> {
    let options = options(args);
    let admin = options.admin_token.clone();
    let server = Server::open(&args.path.parse()?, Path::new("."), opener(args, common)?, options)?;
    let address = format!("http://{}", server.address());
    let page = admin.map(|token| format!("{address}/#token={token}"));
    if common.json {
        render::json(&json!({
            "version": 1, "address": address, "model": server.name(), "generation": server.generation(),
            "page": page,
        }))?;
    } else {
        let (name, generation) = (server.name(), server.generation());
        render::out(&format!("`{name}`, generation {generation}: {address}/v1\n"))?;
        if let Some(page) = page.filter(|_| !common.quiet) {
            render::note(&format!("page with admin rights: {page}"));
        }
    }
    server.run(exit::interrupt());
    Ok(Outcome::Done)
}

fn options(args: &ServeArgs) -> Options {
    let token = match args.no_admin {
        true => None,
        false => args.token.clone().or_else(|| args.host.is_loopback().then(made_up)),
    };
    let usual = Options::default();
    Options {
        address: SocketAddr::new(args.host, args.port),
        name: args.name.clone(),
        api_key: args.api_key.clone(),
        admin_token: token,
        watch: if args.no_watch { Watch::Off } else { usual.watch },
        limits: Limits {
            new_tokens: args.max_new_tokens,
            prompt_tokens: args.max_prompt_tokens.unwrap_or(usize::MAX),
            sequences: args.batch.into(),
            waiting: args.queue,
            cache_bytes: args.cache.saturating_mul(1 << 20),
            answer_time: Duration::from_secs(args.timeout),
            ..usual.limits
        },
    }
}

/// Opens generations where, and as exact as, the command line says.
fn opener(args: &ServeArgs, common: &Common) -> Result<Opener, Failure> {
    let (exec, experts) = (args.accuracy.exec(), args.experts_per_token);
    let place = super::device::Place::find(common)?;
    Ok(Box::new(move |source| {
        let mut model = place.open(source, exec)?;
        if let Some(experts) = experts {
            model.set_experts_per_token(experts)?;
        }
        Ok(model)
    }))
}

/// A token that nobody can guess: 128 bits from the system's random numbers.
fn made_up() -> String {
    let bits = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", bits(), bits())
}
