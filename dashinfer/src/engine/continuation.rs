//! A request in flight: from sampled tokens to chunks, up to whatever ends it.

use std::time::Instant;

use dashinfer_kernels::Sampled;

use super::step_loop::NewRequest;
use super::stream::Writer;
use crate::text::{Detokenizer, StopMatcher};
use crate::{Chunk, Finish, FinishReason, Resolved, TokenLogprob, Usage};

/// What a token did to its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// More are wanted.
    Continues,
    /// It was the last one.
    Ended,
}

/// The state of a request between its tokens.
pub(super) struct Continuation {
    /// But for the prompt, which the scheduler has.
    pub(super) resolved: Resolved,
    prompt_len: usize,
    pub(super) writer: Writer,
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    num_generated: usize,
    arrived: Instant,
    first_token: Option<Instant>,
    /// What the detokenizer gave for one token; kept for its memory.
    piece: String,
}

impl Continuation {
    pub(super) fn new(new: NewRequest, prompt_len: usize) -> Self {
        let stops = StopMatcher::new(&new.resolved.stop_strings);
        Self {
            resolved: new.resolved,
            prompt_len,
            writer: new.writer,
            detokenizer: new.detokenizer,
            stops,
            num_generated: 0,
            arrived: new.arrived,
            first_token: None,
            piece: String::new(),
        }
    }

    /// The request is being computed.
    pub(super) fn leave_queue(&mut self) {
        self.writer.place = None;
    }

    /// Whether each of its tokens must be seen before the next one is sampled. So far nothing asks for that; a grammar will.
    pub(super) fn needs_host(&self) -> bool {
        false
    }

    /// Tokens that must not come next, behind `num_pending` that were sampled and not pushed yet.
    pub(super) fn banned(&self, num_pending: usize) -> &[u32] {
        if self.num_generated + num_pending < self.resolved.min_tokens { &self.resolved.stop_tokens } else { &[] }
    }

    /// Takes the next token and sends what it makes certain.
    pub(super) fn push(&mut self, sampled: Sampled, cached_tokens: usize) -> Progress {
        self.num_generated += 1;
        self.first_token.get_or_insert_with(Instant::now);
        let mut chunk = Chunk { tokens: vec![sampled.id], ..Chunk::default() };
        if let Some(logprob) = sampled.logprob {
            chunk.logprobs.push(TokenLogprob::new(sampled.id, logprob, sampled.top));
        }
        let reason = self.read_token(sampled.id, &mut chunk.text);
        let progress = if reason.is_some() { Progress::Ended } else { Progress::Continues };
        if let Some(reason) = reason {
            chunk.finish = Some(Finish::new(reason, self.usage(cached_tokens), self.resolved.params.seed));
        }
        self.writer.send(chunk);
        progress
    }

    /// Appends to `text` what the token makes certain; a reason if it is the last one.
    fn read_token(&mut self, token: u32, text: &mut String) -> Option<FinishReason> {
        let may_stop = self.num_generated > self.resolved.min_tokens;
        if may_stop && self.resolved.stop_tokens.binary_search(&token).is_ok() {
            return Some(self.end_of_text(text).unwrap_or(FinishReason::StopToken(token)));
        }
        if let Some(detokenizer) = &mut self.detokenizer {
            self.piece.clear();
            detokenizer.push(token, &mut self.piece);
            if self.num_generated < self.resolved.min_tokens {
                // Stop strings are not looked for yet.
                text.push_str(&self.piece);
            } else if let Some(stop) = self.stops.push(&self.piece, text) {
                return Some(self.stop_string(stop));
            }
        }
        if self.num_generated >= self.resolved.max_tokens {
            return Some(self.end_of_text(text).unwrap_or(FinishReason::Length));
        }
        None
    }

    /// Gives out what the detokenizer and the stop matcher have kept. The last character may complete a stop string.
    fn end_of_text(&mut self, text: &mut String) -> Option<FinishReason> {
        if let Some(detokenizer) = &mut self.detokenizer {
            self.piece.clear();
            detokenizer.finish(&mut self.piece);
            if let Some(stop) = self.stops.push(&self.piece, text) {
                return Some(self.stop_string(stop));
            }
        }
        self.stops.finish(text);
        None
    }

    fn stop_string(&self, index: usize) -> FinishReason {
        FinishReason::StopString(self.resolved.stop_strings[index].clone())
    }

    fn usage(&self, cached_tokens: usize) -> Usage {
        let now = Instant::now();
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens,
            generated_tokens: self.num_generated,
            time_to_first_token: self.first_token.unwrap_or(now) - self.arrived,
            total: now - self.arrived,
        }
    }
}
