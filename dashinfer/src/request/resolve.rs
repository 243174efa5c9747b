//! A request and the checkpoint's defaults, checked and merged into what the engine works with.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;

use dashinfer_kernels::SampleParams;

use super::{MAX_LOGPROBS, MAX_STOPS, Prompt, Request, RequestError};
use crate::Error;
use crate::text::{SpecialTokens, Tokenizer};

/// What a checkpoint's `generation_config.json` says about continuations.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GenerationDefaults {
    /// `do_sample`: whether a request that says nothing is sampled. Default: greedy.
    pub sample: bool,
    /// The temperature of such a request; 1 if not said.
    pub temperature: Option<f32>,
    /// See [`Request::top_p`].
    pub top_p: Option<f32>,
    /// See [`Request::top_k`]; 0 is all.
    pub top_k: Option<u32>,
    /// See [`Request::min_p`].
    pub min_p: Option<f32>,
    /// See [`Request::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct ModelFacts<'a> {
    /// None if the model was loaded without one: it takes token ids only.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The checkpoint's defaults.
    pub defaults: &'a GenerationDefaults,
    /// The number of rows of the model's logits.
    pub vocab_size: usize,
    /// The most tokens of prompt and continuation together.
    pub context: usize,
}

/// A request that can be served, with nothing left unsaid.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Resolved {
    /// The prompt's tokens; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are picked, with the seed that is in use.
    pub params: SampleParams,
    /// Tokens that end the text, sorted: the checkpoint's, unless ignored, and the request's.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the text.
    pub stop_strings: Vec<String>,
    /// Neither end token nor stop string ends the text before so many tokens.
    pub min_tokens: usize,
    /// The text ends after so many tokens; prompt and continuation fit the context.
    pub max_tokens: usize,
    /// Higher runs first.
    pub priority: i32,
}

impl Request {
    /// Checks the request and fills in what it does not say.
    ///
    /// Tokenizes the prompt, so it takes time in proportion to a text's length. A seed that was not given is drawn anew by
    /// each call.
    ///
    /// # Errors
    /// [`Error::Request`] if the request does not fit the model or contradicts itself; [`Error::Template`] or
    /// [`Error::Tokenizer`] if the prompt cannot be turned into tokens.
    pub fn resolve(&self, model: &ModelFacts<'_>) -> Result<Resolved, Error> {
        let said = &self.settings;
        // First what costs nothing to check.
        let params = self.params(model)?;
        let stop_tokens = self.stop_tokens(model)?;
        if said.max_tokens == Some(0) {
            return Err(RequestError::NothingToGenerate.into());
        }
        if said.stop.len() > MAX_STOPS {
            return Err(RequestError::TooManyStops { found: said.stop.len() }.into());
        }
        if let Some(index) = said.stop.iter().position(String::is_empty) {
            return Err(RequestError::EmptyStop { index }.into());
        }
        if !said.stop.is_empty() && model.tokenizer.is_none() {
            return Err(RequestError::NoTokenizer { needed_by: "a stop string" }.into());
        }

        let prompt = self.prompt_tokens(model)?;
        check_tokens("prompt", prompt.iter(), model.vocab_size)?;
        if prompt.is_empty() {
            return Err(RequestError::EmptyPrompt.into());
        }
        let room = model.context.saturating_sub(prompt.len());
        if room == 0 {
            return Err(RequestError::PromptTooLong { len: prompt.len(), context: model.context }.into());
        }
        let max_tokens = said.max_tokens.map_or(room, |max| max.min(room));
        let min_tokens = said.min_tokens.unwrap_or(0);
        if min_tokens > max_tokens {
            return Err(RequestError::MinTokens { min: min_tokens, max: max_tokens }.into());
        }
        Ok(Resolved {
            prompt,
            params,
            stop_tokens,
            stop_strings: said.stop.clone(),
            min_tokens,
            max_tokens,
            priority: said.priority,
        })
    }

    fn prompt_tokens(&self, model: &ModelFacts<'_>) -> Result<Vec<u32>, Error> {
        let tokenizer = |needed_by| model.tokenizer.ok_or(RequestError::NoTokenizer { needed_by });
        match &self.prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => {
                let special = if self.add_special_tokens { SpecialTokens::With } else { SpecialTokens::Without };
                Ok(tokenizer("a text")?.encode(text, special)?)
            }
            Prompt::Chat(messages) if messages.is_empty() => Err(RequestError::NoMessages.into()),
            Prompt::Chat(messages) => {
                let tokenizer = tokenizer("a chat")?;
                let template = tokenizer.chat_template()?.ok_or(RequestError::NoChatTemplate)?;
                tokenizer.encode_chat(template, messages, &self.chat_options)
            }
        }
    }

    fn params(&self, model: &ModelFacts<'_>) -> Result<SampleParams, RequestError> {
        let (said, defaults) = (&self.settings, model.defaults);
        let unsaid_temperature = if defaults.sample { defaults.temperature.unwrap_or(1.0) } else { 0.0 };
        let params = SampleParams {
            temperature: said.temperature.unwrap_or(unsaid_temperature),
            top_k: said.top_k.or(defaults.top_k).and_then(NonZeroU32::new),
            top_p: said.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: said.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: said.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: said.presence_penalty.unwrap_or(0.0),
            frequency_penalty: said.frequency_penalty.unwrap_or(0.0),
            logit_bias: said.logit_bias.clone(),
            seed: said.seed.unwrap_or_else(random_seed),
            logprobs: said.logprobs,
        };
        check("temperature", params.temperature, "a finite number of at least 0", |t| t.is_finite() && t >= 0.0)?;
        check("top_p", params.top_p, "a number in (0, 1]", |p| p > 0.0 && p <= 1.0)?;
        check("min_p", params.min_p, "a number in [0, 1]", |p| (0.0..=1.0).contains(&p))?;
        check("repetition_penalty", params.repetition_penalty, "a finite number above 0", |p| {
            p.is_finite() && p > 0.0
        })?;
        check("presence_penalty", params.presence_penalty, "a finite number", f32::is_finite)?;
        check("frequency_penalty", params.frequency_penalty, "a finite number", f32::is_finite)?;
        check_tokens("logit_bias", params.logit_bias.iter().map(|(id, _)| id), model.vocab_size)?;
        if let Some(&(id, found)) = params.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            return Err(RequestError::LogitBias { id, found });
        }
        if let Some(found) = params.logprobs.filter(|&num| num > MAX_LOGPROBS) {
            return Err(RequestError::TooManyLogprobs { found });
        }
        Ok(params)
    }

    fn stop_tokens(&self, model: &ModelFacts<'_>) -> Result<Vec<u32>, RequestError> {
        check_tokens("stop_token", self.settings.stop_tokens.iter(), model.vocab_size)?;
        let mut stop_tokens = self.settings.stop_tokens.clone();
        if !self.settings.ignore_eos {
            stop_tokens.extend(&model.defaults.eos_token_ids);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(stop_tokens)
    }
}

fn check(name: &'static str, found: f32, wanted: &'static str, ok: impl Fn(f32) -> bool) -> Result<(), RequestError> {
    if ok(found) { Ok(()) } else { Err(RequestError::OutOfRange { name, found, wanted }) }
}

fn check_tokens<'a>(
    place: &'static str,
    mut ids: impl Iterator<Item = &'a u32>,
    vocab_size: usize,
) -> Result<(), RequestError> {
    match ids.find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(RequestError::UnknownToken { place, id, vocab_size }),
        None => Ok(()),
    }
}

/// A seed that differs from call to call: the standard library keys its hash maps from the system's randomness.
fn random_seed() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Message;

    const SAMPLING: fn() -> GenerationDefaults = || GenerationDefaults {
        sample: true,
        temperature: Some(0.7),
        top_p: Some(0.8),
        top_k: Some(20),
        min_p: None,
        repetition_penalty: Some(1.05),
        eos_token_ids: vec![9, 2],
        bos_token_id: None,
    };

    fn facts(defaults: &GenerationDefaults) -> ModelFacts<'_> {
        ModelFacts { tokenizer: None, defaults, vocab_size: 100, context: 16 }
    }

    fn resolve(request: Request, defaults: &GenerationDefaults) -> Resolved {
        request.resolve(&facts(defaults)).unwrap()
    }

    fn tokens() -> Request {
        Request::tokens([1, 2, 3])
    }

    #[test]
    fn a_silent_request_takes_the_checkpoints_settings() {
        let params = resolve(tokens(), &SAMPLING()).params;
        let want = SampleParams {
            temperature: 0.7,
            top_p: 0.8,
            top_k: NonZeroU32::new(20),
            repetition_penalty: 1.05,
            seed: params.seed,
            ..SampleParams::default()
        };
        assert_eq!(params, want);
        let unsaid = GenerationDefaults { temperature: None, ..SAMPLING() };
        assert_eq!(resolve(tokens(), &unsaid).params.temperature, 1.0);
    }

    #[test]
    fn a_silent_request_to_a_silent_checkpoint_is_greedy_up_to_the_end_of_the_context() {
        let resolved = resolve(tokens().seed(5), &GenerationDefaults::default());
        assert_eq!(resolved.params, SampleParams { seed: 5, ..SampleParams::default() });
        assert_eq!((resolved.min_tokens, resolved.max_tokens), (0, 13));
        assert_eq!(resolved.stop_tokens, [0; 0]);
        // a temperature alone makes no sampling
        let unsampled = GenerationDefaults { sample: false, ..SAMPLING() };
        assert_eq!(resolve(tokens(), &unsampled).params.temperature, 0.0);
    }

    #[test]
    fn what_a_request_says_comes_first() {
        let params = resolve(tokens().temperature(1.5).top_p(1.0).top_k(0).repetition_penalty(1.0), &SAMPLING()).params;
        assert_eq!((params.temperature, params.top_p, params.top_k, params.repetition_penalty), (1.5, 1.0, None, 1.0));
        assert_eq!(resolve(tokens().temperature(0.0), &SAMPLING()).params.temperature, 0.0);
        // a temperature alone leaves the checkpoint's other settings, and adds none
        let params = resolve(tokens().temperature(1.5), &SAMPLING()).params;
        assert_eq!((params.top_p, params.top_k), (0.8, NonZeroU32::new(20)));
        let params = resolve(tokens().temperature(1.5), &GenerationDefaults::default()).params;
        assert_eq!((params.top_p, params.top_k, params.min_p), (1.0, None, 0.0));
    }

    #[test]
    fn end_tokens_are_the_checkpoints_and_the_requests() {
        assert_eq!(resolve(tokens(), &SAMPLING()).stop_tokens, [2, 9]);
        assert_eq!(resolve(tokens().stop_token(5).stop_token(2), &SAMPLING()).stop_tokens, [2, 5, 9]);
        assert_eq!(resolve(tokens().stop_token(5).ignore_eos(), &SAMPLING()).stop_tokens, [5]);
    }

    #[test]
    fn a_continuation_is_cut_to_the_context() {
        let resolve = |request: Request| resolve(request, &GenerationDefaults::default());
        assert_eq!(resolve(tokens().max_tokens(5).min_tokens(5)).max_tokens, 5);
        assert_eq!(resolve(tokens().max_tokens(500)).max_tokens, 13);
        assert_eq!(resolve(Request::tokens([1; 15])).max_tokens, 1);
    }

    #[test]
    fn seeds_are_drawn_anew_unless_given() {
        let seed = || resolve(tokens(), &GenerationDefaults::default()).params.seed;
        assert_ne!(seed(), seed());
        assert_eq!(resolve(tokens().seed(7), &GenerationDefaults::default()).params.seed, 7);
    }

    #[test]
    fn a_text_and_a_chat_go_through_the_tokenizer() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/goldens/llama-mha");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let defaults = GenerationDefaults::default();
        let model = ModelFacts { tokenizer: Some(&tokenizer), defaults: &defaults, vocab_size: 389, context: 256 };
        let prompt = |request: Request| request.resolve(&model).unwrap().prompt;
        assert_eq!(prompt("Hello".into()), tokenizer.encode("Hello", SpecialTokens::With).unwrap());
        let plain = Request::text("Hello").add_special_tokens(false);
        assert_eq!(prompt(plain), tokenizer.encode("Hello", SpecialTokens::Without).unwrap());
        let chat = prompt(Request::chat([Message::user("Hello")]));
        assert_eq!(tokenizer.decode(&chat, SpecialTokens::With), "<s> [INST] Hello [/INST]");
        assert_eq!(Request::text("a").stop("b").resolve(&model).unwrap().stop_strings, ["b"]);

        let check = |request: Request, want: &str| {
            assert_eq!(request.resolve(&model).unwrap_err().to_string(), want);
        };
        check(Request::chat([]), "the chat has no messages; at least one is needed");
        check(
            Request::text("").add_special_tokens(false),
            "the prompt has no tokens; at least one is needed to go on from",
        );
        assert_eq!(prompt(Request::text("")), [1], "a text may begin with nothing but its first special token");
        let small = ModelFacts { vocab_size: 5, ..model };
        let error = Request::text("Hello").resolve(&small).unwrap_err();
        assert!(error.to_string().starts_with("prompt names token 345; the vocabulary has 5 tokens"), "{error}");
    }

    #[test]
    fn an_error_names_what_was_wanted_and_what_was_found() {
        let defaults = GenerationDefaults::default();
        let check = |request: Request, want: &str| {
            assert_eq!(request.resolve(&facts(&defaults)).unwrap_err().to_string(), want);
        };
        let unknown = "the vocabulary has 100 tokens, numbered from 0";
        check(Request::tokens([]), "the prompt has no tokens; at least one is needed to go on from");
        let too_long = "tokens does not fit: a context of 16 has room for 15 and one to generate";
        check(Request::tokens([1; 16]), &format!("prompt of 16 {too_long}"));
        check(Request::tokens([1; 17]), &format!("prompt of 17 {too_long}"));
        check(Request::tokens([1, 100]), &format!("prompt names token 100; {unknown}"));
        check(tokens().stop_token(u32::MAX), &format!("stop_token names token 4294967295; {unknown}"));
        check(tokens().logit_bias(100, 1.0), &format!("logit_bias names token 100; {unknown}"));
        check(tokens().logit_bias(3, f32::NAN), "the logit_bias of token 3 is NaN, wanted a number or -inf");
        check(tokens().logit_bias(3, f32::INFINITY), "the logit_bias of token 3 is inf, wanted a number or -inf");
        assert!(tokens().logit_bias(3, f32::NEG_INFINITY).resolve(&facts(&defaults)).is_ok());
        for (temperature, found) in [(-0.5, "-0.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let want = format!("temperature is {found}, wanted a finite number of at least 0");
            check(tokens().temperature(temperature), &want);
        }
        check(tokens().top_p(0.0), "top_p is 0, wanted a number in (0, 1]");
        check(tokens().top_p(1.5), "top_p is 1.5, wanted a number in (0, 1]");
        check(tokens().top_p(f32::NAN), "top_p is NaN, wanted a number in (0, 1]");
        check(tokens().min_p(-0.1), "min_p is -0.1, wanted a number in [0, 1]");
        check(tokens().min_p(f32::NAN), "min_p is NaN, wanted a number in [0, 1]");
        check(tokens().repetition_penalty(0.0), "repetition_penalty is 0, wanted a finite number above 0");
        check(tokens().repetition_penalty(f32::INFINITY), "repetition_penalty is inf, wanted a finite number above 0");
        check(tokens().presence_penalty(f32::NAN), "presence_penalty is NaN, wanted a finite number");
        check(tokens().frequency_penalty(f32::INFINITY), "frequency_penalty is inf, wanted a finite number");
        check(tokens().max_tokens(0), "max_tokens is 0, wanted at least 1");
        check(tokens().max_tokens(4).min_tokens(5), "min_tokens is 5, more than the 4 tokens that may be generated");
        check(tokens().min_tokens(14), "min_tokens is 14, more than the 13 tokens that may be generated");
        check(tokens().stop("a").stop(""), "stop string 1 is empty");
        let many = (0..=MAX_STOPS).fold(tokens(), |request, i| request.stop(i.to_string()));
        check(many, "33 stop strings, wanted at most 32");
        check(tokens().logprobs(21), "logprobs of 21 alternatives, wanted at most 20");
        check(
            tokens().stop("a"),
            "a stop string needs a tokenizer, and the model was loaded without one; send token ids",
        );
        check("hi".into(), "a text needs a tokenizer, and the model was loaded without one; send token ids");
        let chat = Request::chat([Message::user("hi")]);
        check(chat, "a chat needs a tokenizer, and the model was loaded without one; send token ids");
    }

    #[test]
    fn a_chat_needs_a_template() {
        let folder = std::env::temp_dir().join(format!("dashinfer-no-template-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../dashinfer-models/tests/goldens/qwen3/tokenizer.json");
        std::fs::copy(golden, folder.join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let defaults = GenerationDefaults::default();
        let model = ModelFacts { tokenizer: Some(&tokenizer), ..facts(&defaults) };
        let error = Request::chat([Message::user("hi")]).resolve(&model).unwrap_err();
        let want = "a chat needs a chat template, and the checkpoint has none; send text or token ids";
        assert_eq!(error.to_string(), want);
    }
}
