//! What a caller asks for: a prompt, and how to go on from it.

mod error;
mod resolve;

use serde::{Deserialize, Serialize};

pub use error::RequestError;
pub(crate) use resolve::{GenerationDefaults, ModelFacts, Resolved};

use crate::text::{ChatOptions, Message};

/// The most stop strings of a request.
pub const MAX_STOPS: usize = 32;

/// The most alternatives that [`Request::logprobs`] reports for each token.
pub const MAX_LOGPROBS: usize = 20;

/// Where a continuation starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prompt {
    /// Text to go on from as it stands.
    Text(String),
    /// A chat, written out by the checkpoint's template.
    Chat(Vec<Message>),
    /// Token ids, used as they are: no tokenizer is needed, and no special token is added.
    Tokens(Vec<u32>),
}

/// A prompt, and how to go on from it.
///
/// What is not said falls back to the checkpoint's `generation_config.json`, then to greedy decoding up to the end of the
/// context. As in `transformers`, the checkpoint's temperature is used only where it says `do_sample`; its `top_k`, `top_p` and
/// `min_p` are used whenever tokens are sampled, its `repetition_penalty` always.
///
/// ```
/// use dashinfer::{Message, Request};
///
/// let text = Request::text("Once upon a time").max_tokens(100);
/// let chat = Request::chat([Message::user("Why is the sky blue?")]).temperature(0.7).top_p(0.9).seed(42).stop("\n\n");
/// let tokens: Request = vec![1, 15043, 29892].into();
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Request {
    /// Where the continuation starts.
    pub prompt: Prompt,
    /// How a chat is written out.
    #[serde(default)]
    pub chat_options: ChatOptions,
    /// Whether the tokenizer's special tokens are put around a text.
    #[serde(default = "yes")]
    pub add_special_tokens: bool,
    #[serde(flatten)]
    settings: Settings,
}

fn yes() -> bool {
    true
}

/// What a request says about its continuation; `None` and empty are "not said".
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Settings {
    max_tokens: Option<usize>,
    min_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Vec<(u32, f32)>,
    seed: Option<u64>,
    stop: Vec<String>,
    stop_tokens: Vec<u32>,
    ignore_eos: bool,
    logprobs: Option<usize>,
    priority: i32,
}

impl Request {
    fn new(prompt: Prompt) -> Self {
        let chat_options = ChatOptions::default();
        Self { prompt, chat_options, add_special_tokens: true, settings: Settings::default() }
    }

    /// Goes on from `text`. Special tokens that are spelt out in it are read as such.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Prompt::Text(text.into()))
    }

    /// Answers a chat.
    pub fn chat(messages: impl IntoIterator<Item = Message>) -> Self {
        Self::new(Prompt::Chat(messages.into_iter().collect()))
    }

    /// Goes on from token ids.
    pub fn tokens(tokens: impl Into<Vec<u32>>) -> Self {
        Self::new(Prompt::Tokens(tokens.into()))
    }

    /// Generates at most so many tokens. Default: up to the end of the context, which always ends a continuation.
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.settings.max_tokens = Some(max_tokens);
        self
    }

    /// Generates at least so many tokens: end tokens are not sampled before, and stop strings not looked for.
    /// Default: 0.
    pub fn min_tokens(mut self, min_tokens: usize) -> Self {
        self.settings.min_tokens = Some(min_tokens);
        self
    }

    /// Divides the logits; 0 is greedy. Default: the checkpoint's if it samples, else 0.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.settings.temperature = Some(temperature);
        self
    }

    /// Samples among the `top_k` most likely tokens; 0 is all. Default: the checkpoint's, else all. Without effect on a
    /// greedy request.
    pub fn top_k(mut self, top_k: u32) -> Self {
        self.settings.top_k = Some(top_k);
        self
    }

    /// Samples among the fewest most likely tokens whose probabilities sum to at least this, in (0, 1]. Default: the
    /// checkpoint's, else 1. Without effect on a greedy request.
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.settings.top_p = Some(top_p);
        self
    }

    /// Samples among the tokens at least this likely relative to the most likely one, in [0, 1]. Default: the
    /// checkpoint's, else 0. Without effect on a greedy request.
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.settings.min_p = Some(min_p);
        self
    }

    /// Makes tokens of prompt and output less likely if above 1. Default: the checkpoint's, else 1.
    /// <https://arxiv.org/abs/1909.05858>
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.settings.repetition_penalty = Some(penalty);
        self
    }

    /// Subtracted from the logit of each token in the output. Default: 0.
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.settings.presence_penalty = Some(penalty);
        self
    }

    /// Subtracted from the logit of each token in the output, times its count. Default: 0.
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.settings.frequency_penalty = Some(penalty);
        self
    }

    /// Adds to the logit of a token; negative infinity bans it. Of several for one token, all are added.
    pub fn logit_bias(mut self, token: u32, bias: f32) -> Self {
        self.settings.logit_bias.push((token, bias));
        self
    }

    /// Makes sampling repeatable: the same request with the same seed gives the same tokens. Default: drawn at random and
    /// reported with the result.
    pub fn seed(mut self, seed: u64) -> Self {
        self.settings.seed = Some(seed);
        self
    }

    /// Ends the text before this string. May be called for up to [`MAX_STOPS`] strings.
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.settings.stop.push(stop.into());
        self
    }

    /// Ends the text with this token, as with the checkpoint's end tokens.
    pub fn stop_token(mut self, token: u32) -> Self {
        self.settings.stop_tokens.push(token);
        self
    }

    /// Goes on over the checkpoint's end tokens.
    pub fn ignore_eos(mut self) -> Self {
        self.settings.ignore_eos = true;
        self
    }

    /// Reports each token's log-probability, and those of the most likely `num_alternatives` (up to [`MAX_LOGPROBS`]) in
    /// its place. Default: no log-probabilities.
    pub fn logprobs(mut self, num_alternatives: usize) -> Self {
        self.settings.logprobs = Some(num_alternatives);
        self
    }

    /// Among waiting requests, those of higher priority run first. Default: 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.settings.priority = priority;
        self
    }

    /// Whether a text gets the tokenizer's special tokens, such as one that begins a text. Default: true. A chat's
    /// template writes its own.
    pub fn add_special_tokens(mut self, yes: bool) -> Self {
        self.add_special_tokens = yes;
        self
    }

    /// Whether a chat's prompt ends where the assistant is to speak. Default: true.
    pub fn add_generation_prompt(mut self, yes: bool) -> Self {
        self.chat_options.add_generation_prompt = yes;
        self
    }

    /// Sets a variable of the chat template, such as `enable_thinking` of Qwen3.
    pub fn chat_variable(mut self, name: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.chat_options = self.chat_options.variable(name, value);
        self
    }
}

impl From<&str> for Request {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for Request {
    fn from(text: String) -> Self {
        Self::text(text)
    }
}

impl From<Vec<u32>> for Request {
    fn from(tokens: Vec<u32>) -> Self {
        Self::tokens(tokens)
    }
}

impl From<Vec<Message>> for Request {
    fn from(messages: Vec<Message>) -> Self {
        Self::chat(messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_json_and_says_only_what_it_must() {
        let request = Request::chat([Message::system("Be brief."), Message::user("hi")])
            .max_tokens(5)
            .temperature(0.5)
            .logit_bias(3, -1.5)
            .stop("\n")
            .stop_token(2)
            .logprobs(2)
            .chat_variable("enable_thinking", false)
            .priority(-1);
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request);

        let short: Request = serde_json::from_str(r#"{"prompt": {"text": "hi"}, "max_tokens": 3}"#).unwrap();
        assert_eq!(short, Request::text("hi").max_tokens(3));
    }

    #[test]
    fn requests_are_made_from_what_callers_have() {
        fn assert_sendable<T: Clone + Send + Sync + std::fmt::Debug + 'static>(_: &T) {}
        assert_sendable(&Request::from("hi"));
        assert_eq!(Request::from("hi"), Request::from("hi".to_owned()));
        assert_eq!(Request::from(vec![1, 2]).prompt, Prompt::Tokens(vec![1, 2]));
        assert_eq!(Request::from(vec![Message::user("hi")]), Request::chat([Message::user("hi")]));
    }
}
