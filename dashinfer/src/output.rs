//! What comes back: chunks as they are generated, and the whole.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The next part of a continuation: what one step gave.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Chunk {
    /// Text that has become certain. It may lag behind the tokens: a character may need several, and what may be the
    /// beginning of a stop string is held back.
    pub text: String,
    /// The tokens, with the one that ended the text.
    pub tokens: Vec<u32>,
    /// For each token, if the request asks for log-probabilities.
    pub logprobs: Vec<TokenLogprob>,
    /// In the last chunk, and only there.
    pub finish: Option<Finish>,
}

impl Chunk {
    /// Puts the chunk that follows behind this one.
    pub fn append(&mut self, next: Chunk) {
        self.text.push_str(&next.text);
        self.tokens.extend(next.tokens);
        self.logprobs.extend(next.logprobs);
        self.finish = next.finish;
    }
}

/// The log-probability of a token: by the model's logits, before penalties, bias and temperature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TokenLogprob {
    /// The token that was picked.
    pub id: u32,
    /// Its natural logarithm of probability.
    pub logprob: f32,
    /// The most likely tokens in its place with theirs, most likely first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprob {
    /// The log-probability of `id`, and of the most likely tokens in its place.
    pub fn new(id: u32, logprob: f32, top: Vec<(u32, f32)>) -> Self {
        Self { id, logprob, top }
    }
}

/// How a continuation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
    /// The seed in use: with it, the same request gives the same tokens.
    pub seed: u64,
}

impl Finish {
    /// The end of a continuation.
    pub fn new(reason: FinishReason, usage: Usage, seed: u64) -> Self {
        Self { reason, usage, seed }
    }
}

/// Why a continuation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinishReason {
    /// This token ended it: one of the checkpoint's end tokens or of the request's stop tokens. It is the last of the
    /// tokens and has no part in the text.
    StopToken(u32),
    /// This stop string ended it. The text ends before it; the tokens go on to the one that completed it.
    StopString(String),
    /// `max_tokens` were generated, or the context is full.
    Length,
    /// It was given up from outside, such as by the engine's shutdown. A dropped stream sees no end at all.
    Cancelled,
}

/// What a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, with the one that ended the text.
    pub generated_tokens: usize,
    /// From the request's arrival to its first token.
    pub time_to_first_token: Duration,
    /// From the request's arrival to its end.
    pub total: Duration,
}

/// A whole continuation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Completion {
    /// The text.
    pub text: String,
    /// The tokens, with the one that ended the text.
    pub tokens: Vec<u32>,
    /// For each token, if the request asks for log-probabilities.
    pub logprobs: Vec<TokenLogprob>,
    /// How it ended.
    pub finish: Finish,
}

/// All chunks of a continuation, appended to one another, are its completion; without the last one they are returned.
impl TryFrom<Chunk> for Completion {
    type Error = Chunk;

    fn try_from(mut chunk: Chunk) -> Result<Self, Chunk> {
        match chunk.finish.take() {
            Some(finish) => Ok(Self { text: chunk.text, tokens: chunk.tokens, logprobs: chunk.logprobs, finish }),
            None => Err(chunk),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_add_up_to_a_completion() {
        let mut whole = Chunk { text: "the ".into(), tokens: vec![5], ..Chunk::default() };
        let logprobs = vec![TokenLogprob::new(6, -0.5, vec![(6, -0.5)])];
        whole.append(Chunk { text: "wall".into(), tokens: vec![6], logprobs: logprobs.clone(), finish: None });
        let unfinished = Completion::try_from(whole).unwrap_err();
        assert_eq!(unfinished.text, "the wall");

        let mut whole = unfinished;
        let finish = Finish::new(FinishReason::StopToken(2), Usage::default(), 7);
        whole.append(Chunk { tokens: vec![2], finish: Some(finish.clone()), ..Chunk::default() });
        let completion = Completion::try_from(whole).unwrap();
        let want = Completion { text: "the wall".into(), tokens: vec![5, 6, 2], logprobs, finish };
        assert_eq!(completion, want);
        let json = serde_json::to_string(&completion).unwrap();
        assert_eq!(serde_json::from_str::<Completion>(&json).unwrap(), completion);
    }
}
