//! The facts of a tokenizer in the metadata of a GGUF file.

use super::value::Metadata;
use crate::ConfigError;

/// A tokenizer as a GGUF file describes it. Lists are empty where the file has none; if it has them, they are as long as the tokens.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GgufTokenizer {
    /// The kind of model: `gpt2` (byte-level BPE), `llama` (SentencePiece), and others.
    pub model: String,
    /// How a text is split before merging, by the name of a tokenizer that does so.
    pub pre: Option<String>,
    /// The spelling of each token, by id.
    pub tokens: Vec<String>,
    /// What each token is.
    pub kinds: Vec<TokenKind>,
    /// The score of each token (SentencePiece).
    pub scores: Vec<f32>,
    /// The merges, best first: two spellings and a space between (BPE).
    pub merges: Vec<String>,
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// The token that ends a turn of a chat.
    pub eot: Option<u32>,
    /// The token that ends a message of a chat.
    pub eom: Option<u32>,
    /// The token for what has no other.
    pub unk: Option<u32>,
    /// The token that fills up.
    pub pad: Option<u32>,
    /// Whether a text gets [`bos`](Self::bos), if the file says so.
    pub add_bos: Option<bool>,
    /// Whether a text gets [`eos`](Self::eos), if the file says so.
    pub add_eos: Option<bool>,
    /// Whether a space is put before a text, if the file says so (SentencePiece).
    pub add_space_prefix: Option<bool>,
    /// Whether runs of spaces become one, if the file says so (SentencePiece).
    pub remove_extra_whitespaces: Option<bool>,
    /// The chat template.
    pub chat_template: Option<String>,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// What stands for all that has no token.
    Unknown,
    /// A mark that is no text, such as the end of a turn.
    Control,
    /// A text that is one token wherever it occurs.
    UserDefined,
    /// Never made of a text.
    Unused,
    /// One byte.
    Byte,
}

impl TokenKind {
    fn of_number(number: u32) -> Option<Self> {
        Some(match number {
            // 0 is "undefined": no list of kinds, or a token that nobody said anything about.
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

impl GgufTokenizer {
    pub(super) fn read(metadata: Metadata<'_>) -> Result<Option<Self>, ConfigError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let Some(model) = metadata.text(&key("model"))? else { return Ok(None) };
        if model == "none" {
            return Ok(None);
        }
        let tokens = metadata.texts(&key("tokens"))?;
        let kinds = metadata.whole_numbers(&key("token_type"))?;
        let kinds = kinds.into_iter().map(|number| {
            let unknown = || ConfigError::value(key("token_type"), "kinds of tokens, 1 to 6", number);
            TokenKind::of_number(number).ok_or_else(unknown)
        });
        let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
        let scores = metadata.numbers(&key("scores"))?;
        for (name, len) in [("token_type", kinds.len()), ("scores", scores.len())] {
            if len != 0 && len != tokens.len() {
                return Err(ConfigError::value(key(name), format!("one for each of {} tokens", tokens.len()), len));
            }
        }
        let special = |name: &str| -> Result<Option<u32>, ConfigError> {
            let id = metadata.token_id(&key(name))?;
            match id {
                Some(id) if id as usize >= tokens.len() => {
                    Err(ConfigError::value(key(name), format!("a token id below {}", tokens.len()), id))
                }
                other => Ok(other),
            }
        };
        let flag = |name: &str| metadata.flag(&key(name));
        Ok(Some(Self {
            model: model.to_owned(),
            pre: metadata.text(&key("pre"))?.map(str::to_owned),
            bos: special("bos_token_id")?,
            eos: special("eos_token_id")?,
            eot: special("eot_token_id")?,
            eom: special("eom_token_id")?,
            unk: special("unknown_token_id")?,
            pad: special("padding_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
            remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
            chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
            merges: metadata.texts(&key("merges"))?,
            tokens,
            kinds,
            scores,
        }))
    }

    /// What token `id` is: [`Normal`](TokenKind::Normal) where the file does not say.
    #[must_use]
    pub fn kind(&self, id: usize) -> TokenKind {
        self.kinds.get(id).copied().unwrap_or(TokenKind::Normal)
    }

    /// The tokens after which a continuation ends: those that the file names, and the control tokens that end a text or a turn in
    /// published models, since many files name one of several.
    #[must_use]
    pub fn end_tokens(&self) -> Vec<u32> {
        const SPELLINGS: [&str; 8] = [
            "<|endoftext|>",
            "<|end_of_text|>",
            "<|im_end|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|end|>",
            "<end_of_turn>",
            "<｜end▁of▁sentence｜>",
        ];
        let mut ends: Vec<u32> = [self.eos, self.eot, self.eom].into_iter().flatten().collect();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.kind(id) == TokenKind::Control && SPELLINGS.contains(&token.as_str()) {
                ends.push(id as u32);
            }
        }
        ends.sort_unstable();
        ends.dedup();
        ends
    }
}
