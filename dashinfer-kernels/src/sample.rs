//! Picking a token from a row of logits.

/// How a request picks its tokens. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the `k` most likely tokens.
    pub top_k: Option<std::num::NonZeroU32>,
    /// Keep the fewest most likely tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits of tokens seen in prompt or output, multiplies negative ones; 1 is off. <https://arxiv.org/abs/1909.05858>
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logit of every token in the output, times its count.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seeds the counter-based generator; the other half of the counter is the position.
    pub seed: u64,
    /// Report the chosen token's log-probability, and those of this many most likely tokens.
    pub logprobs: Option<usize>,
}

impl Default for SampleParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// One row to sample: whose logits, by which rules, after which tokens.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// The row of the logits tensor.
    pub logits_row: usize,
    /// The rules.
    pub params: &'a SampleParams,
    /// The position that the sampled token will have.
    pub position: u64,
    /// The prompt's tokens (for the repetition penalty).
    pub prompt: &'a [u32],
    /// The tokens generated so far (for all penalties).
    pub generated: &'a [u32],
    /// Tokens that must not be picked (end tokens before `min_tokens`).
    pub banned: &'a [u32],
}

/// A sampled token. Log-probabilities are those of the model: of the logits before penalties, bias and temperature.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with their log-probabilities, most likely first, if asked for.
    pub top: Vec<(u32, f32)>,
}
