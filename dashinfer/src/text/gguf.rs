//! A tokenizer from the metadata of a GGUF file: written out as a `tokenizer.json`, and read as such.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use dashinfer_models::{GgufTokenizer, TokenKind};
use serde_json::{Map, Value, json};

use super::TokenizerError;
use super::splits::{self, Splits};

/// What stands for a space in a SentencePiece vocabulary.
const SPACE: &str = "▁";

/// The text of the `tokenizer.json` that `facts` describe; `path` is for errors alone.
///
/// # Errors
/// [`TokenizerError::Unsupported`] for a kind of tokenizer, or a way to split, that is not known here.
pub(super) fn to_json(facts: &GgufTokenizer, path: &Path) -> Result<String, TokenizerError> {
    let parts = match facts.model.as_str() {
        "gpt2" => byte_level(facts, path)?,
        "llama" => sentence_piece(facts),
        other => {
            return Err(TokenizerError::Unsupported {
                path: path.to_owned(),
                what: "tokenizer.ggml.model",
                found: other.to_owned(),
                supported: "gpt2, llama",
            });
        }
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": added_tokens(facts),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": around(facts, parts.add_bos),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    Ok(json.to_string())
}

/// `bos_token` and its like, as templates and callers call them.
pub(super) fn special_tokens(facts: &GgufTokenizer) -> BTreeMap<String, String> {
    let roles =
        [("bos_token", facts.bos), ("eos_token", facts.eos), ("unk_token", facts.unk), ("pad_token", facts.pad)];
    let spelt = |(role, id): (&str, Option<u32>)| Some((role.to_owned(), spelling(facts, id?)?.to_owned()));
    roles.into_iter().filter_map(spelt).collect()
}

fn spelling(facts: &GgufTokenizer, id: u32) -> Option<&str> {
    facts.tokens.get(id as usize).map(String::as_str)
}

/// What sets the kinds of tokenizers apart.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether a text gets the first token where the file does not say.
    add_bos: bool,
}

/// Byte-level BPE.
fn byte_level(facts: &GgufTokenizer, path: &Path) -> Result<Parts, TokenizerError> {
    let pre = facts.pre.as_deref();
    let Some(Splits { expressions, compose, ignore_merges, add_bos }) = splits::named(pre) else {
        return Err(TokenizerError::Unsupported {
            path: path.to_owned(),
            what: "tokenizer.ggml.pre",
            found: pre.unwrap_or_default().to_owned(),
            supported: splits::NAMES,
        });
    };
    let split = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = expressions.iter().map(split).collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    // Two spellings and a space between; the first may be a space itself.
    let merges = facts.merges.iter().map(|merge| {
        let start = merge.chars().next().map_or(0, char::len_utf8);
        let at = merge[start..].find(' ').map_or(merge.len(), |at| start + at);
        json!([merge[..at], merge.get(at + 1..).unwrap_or_default()])
    });
    Ok(Parts {
        normalizer: if compose { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocabulary(facts), "merges": merges.collect::<Vec<_>>(),
        }),
        add_bos,
    })
}

/// SentencePiece, of the kind that merges: the pair that makes the token of the highest score first.
fn sentence_piece(facts: &GgufTokenizer) -> Parts {
    let prefix = facts.add_space_prefix.unwrap_or(true);
    let mut normalizers = Vec::new();
    if facts.remove_extra_whitespaces == Some(true) {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown =
        facts.unk.or_else(|| facts.kinds.iter().position(|kind| *kind == TokenKind::Unknown).map(|id| id as u32));
    Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.and_then(|id| spelling(facts, id)),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocabulary(facts), "merges": merges_of_scores(facts),
        }),
        add_bos: true,
    }
}

/// The longest token, in bytes, for which merges are looked for: the time that takes grows with the square of its length. Published
/// vocabularies have none of a tenth of it.
const MAX_MERGED_BYTES: usize = 1024;

/// Every way to make a token of two others, those of the highest score first.
fn merges_of_scores(facts: &GgufTokenizer) -> Vec<Value> {
    let pieces = facts.tokens.iter().enumerate().filter(|(id, _)| facts.kind(*id) == TokenKind::Normal);
    let ids: HashMap<&str, usize> = pieces.map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, &str, &str)> = Vec::new();
    for (&token, &id) in ids.iter().filter(|(token, _)| token.len() <= MAX_MERGED_BYTES) {
        let score = facts.scores.get(id).copied().unwrap_or(0.0);
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((score, id, left, right));
            }
        }
    }
    // Of two ways to make one token, the one that takes more from the left.
    merges.sort_by(|(a, a_id, a_left, _), (b, b_id, b_left, _)| {
        b.total_cmp(a).then(a_id.cmp(b_id)).then(b_left.len().cmp(&a_left.len()))
    });
    merges.into_iter().map(|(_, _, left, right)| json!([left, right])).collect()
}

/// Of two tokens of one spelling, the first is the one that a text can have. What converters put in where a model has rows and its
/// tokenizer no tokens, `[PAD7]` for row 7, is none.
fn vocabulary(facts: &GgufTokenizer) -> Map<String, Value> {
    let mut vocabulary = Map::new();
    for (id, token) in facts.tokens.iter().enumerate() {
        let filler = facts.kind(id) == TokenKind::Unused && *token == format!("[PAD{id}]");
        if !filler {
            vocabulary.entry(token.as_str()).or_insert_with(|| id.into());
        }
    }
    vocabulary
}

/// The tokens that are found in a text before anything else is done to it.
fn added_tokens(facts: &GgufTokenizer) -> Vec<Value> {
    let named = [facts.bos, facts.eos, facts.eot, facts.eom];
    let mut seen = std::collections::HashSet::new();
    let tokens = facts.tokens.iter().enumerate().filter_map(|(id, token)| {
        let special = match facts.kind(id) {
            TokenKind::Control | TokenKind::Unknown => true,
            _ if named.contains(&Some(id as u32)) => true,
            TokenKind::UserDefined => false,
            _ => return None,
        };
        (!token.is_empty() && seen.insert(token.as_str())).then(|| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special})
        })
    });
    tokens.collect()
}

/// The tokens around a text.
fn around(facts: &GgufTokenizer, add_bos: bool) -> Value {
    let wanted = |yes: Option<bool>, default, id: Option<u32>| id.filter(|_| yes.unwrap_or(default));
    let first = wanted(facts.add_bos, add_bos, facts.bos);
    let last = wanted(facts.add_eos, false, facts.eos);
    if first.is_none() && last.is_none() {
        return Value::Null;
    }
    let special = |id: Option<u32>| id.and_then(|id| Some((id, spelling(facts, id)?)));
    let mut tokens = Map::new();
    let mut template = |sequence: &str, type_id: u32| {
        let mut template = Vec::new();
        for (id, token) in [special(first)].into_iter().flatten() {
            tokens.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
            template.push(json!({"SpecialToken": {"id": token, "type_id": type_id}}));
        }
        template.push(json!({"Sequence": {"id": sequence, "type_id": type_id}}));
        for (id, token) in [special(last)].into_iter().flatten() {
            tokens.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
            template.push(json!({"SpecialToken": {"id": token, "type_id": type_id}}));
        }
        template
    };
    let (single, second) = (template("A", 0), template("B", 1));
    let pair: Vec<Value> = single.iter().cloned().chain(second).collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{check_expected, golden_folder};
    use super::*;
    use crate::{ChatOptions, Message, SpecialTokens, Tokenizer};

    const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/gguf");

    fn committed(name: &str) -> Tokenizer {
        Tokenizer::from_gguf(Path::new(COMMITTED).join(name)).unwrap()
    }

    #[test]
    fn byte_level_tokenizers_are_those_of_the_checkpoints() {
        for (file, case) in
            [("llama-v5-config.bf16.gguf", "llama-v5-config"), ("qwen2-yarn.q8_0-q4_0.gguf", "qwen2-yarn")]
        {
            check_expected(&committed(file), &golden_folder(case));
        }
    }

    #[test]
    fn sentence_piece_gives_the_ids_of_sentence_piece() {
        #[derive(serde::Deserialize)]
        struct Expected {
            text: String,
            ids: Vec<u32>,
        }
        let tokenizer = committed("sentencepiece.gguf");
        let json = std::fs::read_to_string(Path::new(COMMITTED).join("sentencepiece.json")).unwrap();
        let expected: Vec<Expected> = serde_json::from_str(&json).unwrap();
        assert!(expected.len() > 10);
        let bos = tokenizer.token_id("<s>").unwrap();
        for want in expected {
            if want.text.contains("<s>") {
                continue; // a special token here, as in `transformers`; plain text there
            }
            let found = tokenizer.encode(&want.text, SpecialTokens::Without).unwrap();
            assert_eq!(found, want.ids, "{:?}", want.text);
            assert_eq!(tokenizer.encode(&want.text, SpecialTokens::With).unwrap(), [&[bos][..], &want.ids].concat());
            assert_eq!(tokenizer.decode(&found, SpecialTokens::Without), want.text);
        }
        let template = tokenizer.chat_template().unwrap().unwrap();
        let text = template.render(&[Message::user("hi")], &ChatOptions::default()).unwrap();
        assert_eq!(text, "<s>[user] hi</s>");
        assert_eq!(tokenizer.special_token("unk_token"), Some("<unk>"));
    }

    /// A tokenizer of a few tokens.
    fn facts(model: &str) -> GgufTokenizer {
        let mut facts = GgufTokenizer::default();
        facts.model = model.to_owned();
        facts.tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab", "<think>", "a"].map(str::to_owned).to_vec();
        facts.kinds = vec![TokenKind::Normal; 10];
        facts.kinds[0] = TokenKind::Unknown;
        facts.kinds[1] = TokenKind::Control;
        facts.kinds[8] = TokenKind::UserDefined;
        facts.scores = (0..10).map(|id| -(id as f32)).collect();
        facts.merges = vec!["a b".to_owned()];
        (facts.bos, facts.eos) = (Some(1), Some(2));
        facts
    }

    fn ids(facts: &GgufTokenizer, text: &str, special: SpecialTokens) -> Vec<u32> {
        Tokenizer::of_gguf(facts, Path::new("m.gguf")).unwrap().encode(text, special).unwrap()
    }

    #[test]
    fn tokens_around_a_text_are_as_the_file_says() {
        let mut facts = facts("llama");
        assert_eq!(
            ids(&facts, "ab", SpecialTokens::With),
            [1, 7],
            "SentencePiece begins a text unless it is told not to"
        );
        facts.add_eos = Some(true);
        assert_eq!(ids(&facts, "ab", SpecialTokens::With), [1, 7, 2]);
        facts.add_bos = Some(false);
        assert_eq!(ids(&facts, "ab", SpecialTokens::With), [7, 2]);
        assert_eq!(ids(&facts, "ab", SpecialTokens::Without), [7]);
        facts.add_space_prefix = Some(false);
        assert_eq!(ids(&facts, "ab a<think>b</s>", SpecialTokens::Without), [6, 3, 4, 8, 5, 2]);
        facts.remove_extra_whitespaces = Some(true);
        assert_eq!(ids(&facts, " ab   ab ", SpecialTokens::Without), [6, 7]);

        let mut facts = self::facts("gpt2");
        facts.pre = Some("qwen2".to_owned());
        assert_eq!(ids(&facts, "aab", SpecialTokens::With), [4, 6]);
        facts.pre = Some("llama-bpe".to_owned());
        assert_eq!(ids(&facts, "aab", SpecialTokens::With), [1, 4, 6]);
    }

    #[test]
    fn what_is_not_known_is_named() {
        let error = |facts: &GgufTokenizer| Tokenizer::of_gguf(facts, Path::new("m.gguf")).unwrap_err().to_string();
        assert_eq!(
            error(&facts("t5")),
            "m.gguf: tokenizer.ggml.model `t5` is not supported; supported are gpt2, llama"
        );
        let mut facts = facts("gpt2");
        facts.pre = Some("bloom".to_owned());
        assert!(
            error(&facts).starts_with("m.gguf: tokenizer.ggml.pre `bloom` is not supported; supported are default,")
        );
        facts.pre = None;
        facts.merges = vec!["nonsense".to_owned()];
        assert_eq!(error(&facts), "m.gguf is no GGUF file with a tokenizer");
    }
}
