//! `generate PATH --prompt TEXT`: continues a text, or answers a message.

use std::ops::ControlFlow;

use serde_json::json;

use moe_merge_model::chat::{AssistantTurn, Message};
use moe_merge_model::generate::{EndOfText, Generation, Stop, generate};
use moe_merge_model::{ChatTemplate, Sampling, Tokenizer};

use crate::args::{Common, GenerateArgs};
use crate::exit::{self, Outcome};
use crate::render::{self, Failure};

/// Streams the text, then tells speeds on stderr; with `--json` one document.
pub fn run(args: &GenerateArgs, common: &Common) -> Result<Outcome, Failure> {
    let source = super::open(&args.path, common)?;
    let tokenizer = Tokenizer::from_source(&source)?;
    let prompt = if args.chat {
        let template = ChatTemplate::from_source(&source, &tokenizer)?;
        let messages = [Message::new("user", &args.prompt)];
        tokenizer.encode(&template.render(&messages, AssistantTurn::Open)?)?
    } else {
        tokenizer.encode_prompt(&args.prompt)?
    };
    let generation = Generation {
        max_new_tokens: args.max_new_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
        },
        end_of_text: if args.ignore_eos { EndOfText::Ignore } else { EndOfText::Stop },
    };
    let model =
        super::device::open_model(&source, args.accuracy.exec(), args.experts_per_token, common)?;
    let interrupt = exit::interrupt();
    let mut broken = None;
    let mut show = |piece: &str| {
        if !common.json
            && let Err(e) = render::out(piece)
        {
            broken = Some(e);
            return ControlFlow::Break(());
        }
        if interrupt.check().is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let found = generate(&model, &tokenizer, &prompt, generation, &mut show)?;
    if let Some(failure) = broken {
        return Err(failure);
    }
    if common.json {
        render::json(&json!({
            "version": 1,
            "text": found.text,
            "prompt_tokens": found.prompt_tokens,
            "new_tokens": found.tokens.len(),
            "stop": found.stop.name(),
            "tokens": found.tokens,
            "prefill_tokens_per_second": found.prefill_tokens_per_second(),
            "decode_tokens_per_second": found.decode_tokens_per_second(),
        }))?;
    } else {
        render::out("\n")?;
        if !common.quiet {
            render::note(&format!(
                "{} tokens, ended by {}; prompt {} tokens at {:.0}/s, answer at {:.1}/s",
                found.tokens.len(),
                found.stop.name().replace('_', " "),
                found.prompt_tokens,
                found.prefill_tokens_per_second(),
                found.decode_tokens_per_second()
            ));
        }
    }
    Ok(if found.stop == Stop::Asked { Outcome::Interrupted } else { Outcome::Done })
}
