//! Chat templates: compiled, and rendered for a fixed chat.
#![no_main]

use std::collections::BTreeMap;

use dashinfer::{ChatOptions, ChatTemplate, Message};
use dashinfer_fuzz::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|template: &str| {
    run(|| {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let tokens = BTreeMap::from(tokens.map(|(name, token)| (name.to_owned(), token.to_owned())));
        let Ok(template) = ChatTemplate::new(template, tokens) else { return };
        let messages = [
            Message::system("Be brief."),
            Message::user("What is 2 + 2? <b>&amp;</b>"),
            Message::assistant("<think>\nnaïve\n</think>\n4"),
            Message::user(" And then? "),
        ];
        let options = ChatOptions::default().variable("enable_thinking", true);
        for messages in [&messages[..], &messages[1..2], &[]] {
            let _ = template.render(messages, &options);
        }
    });
});
