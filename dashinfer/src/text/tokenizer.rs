//! A checkpoint's tokenizer: `tokenizer.json`, `tokenizer_config.json` and the chat template beside them, or the metadata of a GGUF
//! file.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dashinfer_models::{Gguf, GgufTokenizer};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::config::{Config, parse_error, read, read_if_there};
use super::pieces::{MAX_IDS, Pieces};
use super::{ChatOptions, ChatTemplate, Detokenizer, Message, TemplateError, gguf};

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file is missing or cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file is not what its name says.
    #[error("{path} is no {wanted}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the file was read as.
        wanted: &'static str,
        /// Where and why reading failed.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The tokenizer turns tokens to text in a way that is not known here.
    #[error(
        "{path} has the decoder `{found}`; supported are ByteLevel, and sequences of Replace, ByteFallback, Fuse and Strip"
    )]
    UnsupportedDecoder {
        /// The file.
        path: PathBuf,
        /// The decoder's type, or those of its steps.
        found: String,
    },
    /// A GGUF file asks for what is not known here.
    #[error("{path}: {what} `{found}` is not supported; supported are {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key of its metadata.
        what: &'static str,
        /// Its value.
        found: String,
        /// What is known.
        supported: &'static str,
    },
    /// The vocabulary has an id that is larger than any sensible vocabulary.
    #[error("{path} has a token id or text too large, wanted ids below {MAX_IDS} and at most 256 MiB of text")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The tokenizer's model or rules failed on a text.
    #[error("cannot tokenize a text of {num_bytes} bytes")]
    Encode {
        /// The length of the text.
        num_bytes: usize,
        /// What the tokenizer said.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// What becomes of special tokens, such as those which begin a text or end a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Encoding adds those that the tokenizer puts around a text; decoding shows them.
    With,
    /// Encoding adds none; decoding leaves them out.
    Without,
}

/// Text to token ids and back, as the checkpoint has it.
///
/// Special tokens that are spelt out in a text are read as such, as in `transformers`. Nothing here uses a thread pool.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
    vocab_size: usize,
    special_tokens: BTreeMap<String, String>,
    /// A broken template is reported to those who chat; others can do without.
    chat_template: Result<Option<ChatTemplate>, TemplateError>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `folder`, and, where they are, `tokenizer_config.json` (special tokens, chat template)
    /// and `chat_template.jinja`, which comes before the template in the former.
    ///
    /// # Errors
    /// [`TokenizerError`] if a file cannot be read or understood. A chat template that cannot be compiled is no such
    /// error: [`chat_template`](Self::chat_template) reports it.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let inner = parse(&path, &read(&path)?, TOKENIZER)?;
        let config = Config::read(&folder.join("tokenizer_config.json"))?;
        let template = match read_if_there(&folder.join("chat_template.jinja"))? {
            Some(template) => Some(template),
            None => config.template(),
        };
        Self::new(inner, &path, config.special_tokens(), template)
    }

    /// Reads the tokenizer in the metadata of a GGUF file: byte-level BPE (`gpt2`) and SentencePiece (`llama`).
    ///
    /// It gives the ids of the tokenizer that the file was made from, as far as the format can say what that does: spaces that a
    /// special token swallows beside it are lost.
    ///
    /// # Errors
    /// [`TokenizerError::Parse`] if the file cannot be read or has no tokenizer, [`TokenizerError::Unsupported`] if it has one of another
    /// kind. A chat template that cannot be compiled is no such error: [`chat_template`](Self::chat_template) reports it.
    pub fn from_gguf(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let file = Gguf::open(path).map_err(|source| parse_error(path, GGUF_TOKENIZER, source))?;
        let facts = file.tokenizer().map_err(|source| parse_error(path, GGUF_TOKENIZER, source))?;
        let none = || parse_error(path, GGUF_TOKENIZER, "there is no key tokenizer.ggml.model");
        Self::of_gguf(&facts.ok_or_else(none)?, path)
    }

    /// [`from_gguf`](Self::from_gguf), of what was read.
    pub(super) fn of_gguf(facts: &GgufTokenizer, path: &Path) -> Result<Self, TokenizerError> {
        let inner = parse(path, &gguf::to_json(facts, path)?, GGUF_TOKENIZER)?;
        Self::new(inner, path, gguf::special_tokens(facts), facts.chat_template.clone())
    }

    fn new(
        mut inner: tokenizers::Tokenizer,
        path: &Path,
        special_tokens: BTreeMap<String, String>,
        template: Option<String>,
    ) -> Result<Self, TokenizerError> {
        // Some files carry the limits of a training run; a prompt is neither cut nor padded.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|source| parse_error(path, TOKENIZER, source))?;
        let pieces = Pieces::new(&inner, path)?;
        let vocab_size = inner.get_vocab_size(true);
        let chat_template = template.map(|source| ChatTemplate::new(source, special_tokens.clone())).transpose();
        Ok(Self { inner, pieces: Arc::new(pieces), vocab_size, special_tokens, chat_template })
    }

    /// The number of tokens, added ones too. The model's own count is often larger, rounded up.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a special token by its role: `bos_token`, `eos_token`, `pad_token` and what else
    /// `tokenizer_config.json` names so.
    pub fn special_token(&self, role: &str) -> Option<&str> {
        self.special_tokens.get(role).map(String::as_str)
    }

    /// The chat template, if the checkpoint has one.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] if it has one which cannot be compiled.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>, TemplateError> {
        self.chat_template.as_ref().map(Option::as_ref).map_err(Clone::clone)
    }

    /// The ids of `text`. Takes time in proportion to its length.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the tokenizer's rules fail on this text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TokenizerError> {
        // It may panic for rules that it has read without complaint.
        let encode = AssertUnwindSafe(|| self.inner.encode_fast(text, special == SpecialTokens::With));
        let encoding = catch_unwind(encode)
            .unwrap_or_else(|_| Err("its rules panicked".into()))
            .map_err(|source| TokenizerError::Encode { num_bytes: text.len(), source: source.into() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a chat, written by `template`. No special tokens are added to those that the template writes.
    ///
    /// # Errors
    /// [`TemplateError`] or [`TokenizerError::Encode`], as the SDK's [`Error`](crate::Error).
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, crate::Error> {
        let text = template.render(messages, options)?;
        Ok(self.encode(&text, SpecialTokens::Without)?)
    }

    /// The text of `ids`. Ids outside the vocabulary have none.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> String {
        let mut detokenizer = self.detokenizer(special);
        let mut text = String::new();
        ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
        detokenizer.finish(&mut text);
        text
    }

    /// Decodes a text as its tokens come.
    pub fn detokenizer(&self, special: SpecialTokens) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.pieces), special)
    }
}

const TOKENIZER: &str = "tokenizer in the format of Hugging Face `tokenizers`";
const GGUF_TOKENIZER: &str = "GGUF file with a tokenizer";

/// The most that a tokenizer's rules may make of each byte of a text before it is cut into tokens. Published ones reach 128 as [`growth`]
/// counts.
const MAX_GROWTH: usize = 1024;

/// How much longer a step of a tokenizer, and those in it, can make a text, counted generously: some dozens of steps that double it
/// would take all memory.
fn growth(step: &Value) -> usize {
    let len = |key: &str| step.get(key).and_then(Value::as_str).map_or(0, str::len);
    let own = match step.get("type").and_then(Value::as_str) {
        Some("Replace") => 1 + len("content"),
        Some("ByteLevel") => 2,
        Some("Metaspace") => 3,
        Some("Precompiled") => 16,
        _ => 1,
    };
    let steps = ["normalizers", "pretokenizers"].into_iter().filter_map(|key| step.get(key)?.as_array()).flatten();
    steps.map(growth).fold(own, usize::saturating_mul)
}

/// Reads the text of a `tokenizer.json`; `path` and what was `wanted` there are for errors.
fn parse(path: &Path, json: &str, wanted: &'static str) -> Result<tokenizers::Tokenizer, TokenizerError> {
    /// The sections whose readers in `tokenizers` panic on what is not even JSON.
    #[derive(Deserialize)]
    struct Sections {
        #[serde(default, rename = "decoder")]
        _decoder: Value,
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        pre_tokenizer: Value,
        #[serde(default, rename = "model")]
        _model: IgnoredAny,
    }
    let sections: Sections = serde_json::from_str(json).map_err(|source| parse_error(path, wanted, source))?;
    let growth = growth(&sections.normalizer).saturating_mul(growth(&sections.pre_tokenizer));
    if growth > MAX_GROWTH {
        let found = format!("its rules make a text up to {growth} times as long, wanted {MAX_GROWTH} at most");
        return Err(parse_error(path, wanted, found));
    }
    // They panic on some contents too, such as a damaged `Precompiled` normalizer.
    catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(json)))
        .unwrap_or_else(|_| Err("its reader panicked".into()))
        .map_err(|source| parse_error(path, wanted, source))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;

    use super::*;

    const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/goldens");
    const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");

    /// A golden's tokenizer, loaded once for all tests.
    pub(in crate::text) fn golden(case: &str) -> Arc<Tokenizer> {
        static LOADED: Mutex<BTreeMap<PathBuf, Arc<Tokenizer>>> = Mutex::new(BTreeMap::new());
        let folder = Path::new(GOLDENS).join(case);
        let mut loaded = LOADED.lock().unwrap();
        let load = || Arc::new(Tokenizer::from_folder(&folder).unwrap());
        Arc::clone(loaded.entry(folder.clone()).or_insert_with(load))
    }

    /// The tokenizer of the model in `examples/`.
    pub(in crate::text) fn bundled() -> Arc<Tokenizer> {
        golden(BUNDLED)
    }

    impl Tokenizer {
        pub(in crate::text) fn pieces(&self) -> &Pieces {
            &self.pieces
        }

        pub(in crate::text) fn reference_decode(&self, ids: &[u32], special: SpecialTokens) -> String {
            self.inner.decode(ids, special == SpecialTokens::Without).unwrap()
        }
    }

    #[derive(Deserialize)]
    struct Expected {
        vocab_size: usize,
        strings: Vec<ExpectedString>,
        chats: Vec<ExpectedChat>,
    }

    #[derive(Deserialize)]
    struct ExpectedString {
        text: String,
        ids: Vec<u32>,
        ids_with_special: Vec<u32>,
        decoded: String,
        decoded_skip_special: String,
    }

    #[derive(Deserialize)]
    struct ExpectedChat {
        messages: Vec<Message>,
        rendered: String,
        rendered_no_generation_prompt: String,
        ids: Vec<u32>,
    }

    /// The folder of a golden.
    pub(in crate::text) fn golden_folder(case: &str) -> PathBuf {
        Path::new(GOLDENS).join(case)
    }

    /// That `tokenizer` does what the golden in `folder` expects.
    #[track_caller]
    pub(in crate::text) fn check_expected(tokenizer: &Tokenizer, folder: &Path) {
        let json = std::fs::read_to_string(folder.join("tokenizer_expected.json")).unwrap();
        let expected: Expected = serde_json::from_str(&json).unwrap();
        assert_eq!(tokenizer.vocab_size(), expected.vocab_size, "{folder:?}");
        for want in &expected.strings {
            let what = format!("{folder:?}: {:?}", want.text);
            assert_eq!(tokenizer.encode(&want.text, SpecialTokens::Without).unwrap(), want.ids, "{what}");
            assert_eq!(tokenizer.encode(&want.text, SpecialTokens::With).unwrap(), want.ids_with_special, "{what}");
            assert_eq!(tokenizer.decode(&want.ids, SpecialTokens::With), want.decoded, "{what}");
            assert_eq!(tokenizer.decode(&want.ids, SpecialTokens::Without), want.decoded_skip_special, "{what}");
        }
        let template = tokenizer.chat_template().unwrap().unwrap();
        for want in &expected.chats {
            let what = format!("{folder:?}: {:?}", want.messages);
            let options = ChatOptions::default();
            assert_eq!(template.render(&want.messages, &options).unwrap(), want.rendered, "{what}");
            assert_eq!(tokenizer.encode_chat(template, &want.messages, &options).unwrap(), want.ids, "{what}");
            let closed = ChatOptions::default().add_generation_prompt(false);
            let rendered = template.render(&want.messages, &closed).unwrap();
            assert_eq!(rendered, want.rendered_no_generation_prompt, "{what}");
        }
    }

    #[test]
    fn every_golden_is_reproduced() {
        let mut num_cases = 0;
        for entry in std::fs::read_dir(GOLDENS).unwrap() {
            let folder = entry.unwrap().path();
            if folder.join("tokenizer_expected.json").is_file() {
                check_expected(&Tokenizer::from_folder(&folder).unwrap(), &folder);
                num_cases += 1;
            }
        }
        assert!(num_cases >= 10, "only {num_cases} goldens were found");
    }

    #[test]
    fn the_bundled_model_is_reproduced() {
        #[derive(Deserialize)]
        struct Expected {
            prompts: Vec<Prompt>,
        }
        #[derive(Deserialize)]
        struct Prompt {
            text: String,
            num_tokens: usize,
        }
        let tokenizer = bundled();
        let json = std::fs::read_to_string(Path::new(BUNDLED).join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_str(&json).unwrap();
        for prompt in &expected.prompts {
            let ids = tokenizer.encode(&prompt.text, SpecialTokens::With).unwrap();
            assert_eq!(ids.len(), prompt.num_tokens);
            assert_eq!(tokenizer.decode(&ids, SpecialTokens::With), prompt.text);
        }
        let template = tokenizer.chat_template().unwrap().unwrap();
        let chat = [Message::user("Explain error E0382.")];
        assert_eq!(template.render(&chat, &ChatOptions::default()).unwrap(), expected.prompts[1].text);
        assert_eq!(tokenizer.special_token("eos_token"), Some("<|im_end|>"));
        assert_eq!(tokenizer.special_token("bos_token"), None);
        assert_eq!(tokenizer.token_id("<|im_end|>"), Some(2));
    }

    /// A folder with a golden's files, changed by `change`.
    fn changed(name: &str, change: impl FnOnce(&Path)) -> Result<Tokenizer, TokenizerError> {
        let folder = std::env::temp_dir().join(format!("dashinfer-tokenizer-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(Path::new(GOLDENS).join("qwen3").join(file), folder.join(file)).unwrap();
        }
        change(&folder);
        let result = Tokenizer::from_folder(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        result
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Tokenizer::from_folder("/nowhere").unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nowhere/tokenizer.json");
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn damaged_files_are_errors() {
        let error = changed("config", |folder| std::fs::write(folder.join("tokenizer_config.json"), "[]").unwrap());
        assert!(error.unwrap_err().to_string().ends_with("tokenizer_config.json is no tokenizer configuration"));

        let json = std::fs::read_to_string(Path::new(GOLDENS).join("qwen3/tokenizer.json")).unwrap();
        let cuts = (0..json.len()).step_by(97).chain(json.find("\"decoder\"").map(|at| at + 20));
        for cut in cuts.filter(|&cut| json.is_char_boundary(cut)) {
            let error = parse(Path::new("tokenizer.json"), &json[..cut], TOKENIZER).unwrap_err();
            assert_eq!(error.to_string(), format!("tokenizer.json is no {TOKENIZER}"));
        }
        let precompiled = r#"{"type":"Precompiled","precompiled_charsmap":"AAAA"}"#;
        let damaged = json.replacen(r#"{"type":"NFC"}"#, precompiled, 1).replacen(
            "{\n    \"type\": \"NFC\"\n  }",
            precompiled,
            1,
        );
        assert_ne!(damaged, json);
        assert!(parse(Path::new("tokenizer.json"), &damaged, TOKENIZER).is_err());
    }

    /// Each step is good by itself.
    #[test]
    fn rules_that_make_texts_ever_longer_are_refused() {
        let repeated = |section: &'static str, steps: &'static str, step: Value| {
            changed("growth", move |folder| {
                let path = folder.join("tokenizer.json");
                let mut json: Value = serde_json::from_str(&read(&path).unwrap()).unwrap();
                json[section] = serde_json::json!({"type": "Sequence", steps: vec![step; 40]});
                std::fs::write(path, json.to_string()).unwrap();
            })
            .unwrap_err()
        };
        let replace = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        for error in [
            repeated("normalizer", "normalizers", replace.clone()),
            repeated("pre_tokenizer", "pretokenizers", byte_level),
        ] {
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.ends_with("times as long, wanted 1024 at most"), "{source}");
        }
        assert!(matches!(repeated("decoder", "decoders", replace), TokenizerError::TooLarge { .. }));
    }

    #[test]
    fn an_unsupported_decoder_is_named() {
        let error = changed("decoder", |folder| {
            let path = folder.join("tokenizer.json");
            let mut json: Value = serde_json::from_str(&read(&path).unwrap()).unwrap();
            json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
            std::fs::write(path, json.to_string()).unwrap();
        })
        .unwrap_err();
        assert!(error.to_string().contains("has the decoder `WordPiece`; supported are ByteLevel"), "{error}");
    }

    #[test]
    fn an_id_out_of_all_proportion_is_refused() {
        let error = changed("sparse", |folder| {
            let path = folder.join("tokenizer.json");
            let mut json: Value = serde_json::from_str(&read(&path).unwrap()).unwrap();
            json["model"]["vocab"]["far away"] = u32::MAX.into();
            std::fs::write(path, json.to_string()).unwrap();
        })
        .unwrap_err();
        assert!(error.to_string().ends_with("wanted ids below 4194304 and at most 256 MiB of text"), "{error}");
    }

    #[test]
    fn a_template_file_comes_before_the_configuration_and_limits_are_ignored() {
        let tokenizer = changed("template", |folder| {
            std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}!\n").unwrap();
            let path = folder.join("tokenizer.json");
            let mut json: Value = serde_json::from_str(&read(&path).unwrap()).unwrap();
            json["truncation"] = serde_json::json!(
                {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            std::fs::write(path, json.to_string()).unwrap();
        })
        .unwrap();
        let template = tokenizer.chat_template().unwrap().unwrap();
        assert_eq!(template.render(&[Message::user("hi")], &ChatOptions::default()).unwrap(), "hi!");
        assert!(tokenizer.encode("Hello, world!", SpecialTokens::With).unwrap().len() > 2);
    }

    #[test]
    fn a_broken_template_does_not_keep_others_from_loading() {
        let template = |template: Value| {
            changed("broken", move |folder| {
                let config = serde_json::json!({"chat_template": template});
                std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
            })
            .unwrap()
        };
        let broken = template("{% for %}".into());
        assert!(matches!(broken.chat_template(), Err(TemplateError::Syntax { .. })));
        let named = template(serde_json::json!([
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]));
        let rendered = named.chat_template().unwrap().unwrap().render(&[], &ChatOptions::default()).unwrap();
        assert_eq!(rendered, "plain");
        assert!(template(Value::Null).chat_template().unwrap().is_none());
    }
}
