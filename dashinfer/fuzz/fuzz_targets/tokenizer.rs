//! Tokenizers: `tokenizer.json` with `tokenizer_config.json`, or the metadata of a GGUF file.
#![no_main]

use dashinfer::{SpecialTokens, Tokenizer};
use dashinfer_fuzz::{file, folder, parts, run};
use libfuzzer_sys::fuzz_target;

const TEXTS: [&str; 4] = [
    "",
    "Hello,  world!\r\n\t123 it's",
    "<s> naïve 日本語 👩‍💻 e\u{301}\u{0} </s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
];

fuzz_target!(|input: &[u8]| {
    run(|| {
        let tokenizer = if input.starts_with(b"GGUF") {
            Tokenizer::from_gguf(file("tokenizer.gguf", Some(input)))
        } else {
            let [tokenizer, config] = parts(input);
            file("tokenizer.json", Some(tokenizer));
            file("tokenizer_config.json", (!config.is_empty()).then_some(config));
            Tokenizer::from_folder(folder())
        };
        let Ok(tokenizer) = tokenizer else { return };
        let _ = tokenizer.chat_template();
        for text in TEXTS {
            for special in [SpecialTokens::With, SpecialTokens::Without] {
                if let Ok(ids) = tokenizer.encode(text, special) {
                    let _ = tokenizer.decode(&ids, special);
                }
            }
        }
        let mut detokenizer = tokenizer.detokenizer(SpecialTokens::With);
        let mut text = String::new();
        let len = tokenizer.vocab_size().min(1000) as u32;
        (0..len + 2).for_each(|id| detokenizer.push(id, &mut text));
        detokenizer.finish(&mut text);
    });
});
