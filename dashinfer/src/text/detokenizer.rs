//! Tokens to text, one token at a time.

use std::sync::Arc;

use super::SpecialTokens;
use super::pieces::{Kind, Pieces};

/// Turns sampled tokens into text as they come. [`Tokenizer::detokenizer`](super::Tokenizer::detokenizer) makes one.
///
/// Text is given as soon as it is certain and never cut within a character: what a token leaves unfinished, at most
/// three bytes, waits for the next one. Bytes that cannot become a character are replaced by U+FFFD when that is known,
/// or at [`finish`](Self::finish). A token costs a copy of its bytes; nothing is decoded twice.
///
/// The pieces add up to [`Tokenizer::decode`](super::Tokenizer::decode) of the tokens. `transformers` says the same, but
/// for one case: where a run of byte tokens (`<0x0A>`) of a SentencePiece-like tokenizer is no UTF-8 as a whole, it
/// replaces the run's good characters too, which would mean to hold every character back until its run ends.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    special: SpecialTokens,
    /// Bytes of an unfinished character.
    pending: Vec<u8>,
    start: Start,
}

/// Takes a character off the start of the text.
#[derive(Debug, Clone, Copy)]
struct Start {
    char: char,
    /// At most so many times yet.
    left: usize,
}

impl Start {
    fn strip<'a>(&mut self, mut text: &'a str) -> &'a str {
        while self.left > 0 && !text.is_empty() {
            match text.strip_prefix(self.char) {
                Some(rest) => (text, self.left) = (rest, self.left - 1),
                None => self.left = 0,
            }
        }
        text
    }

    fn replace(&mut self, times: usize, out: &mut String) {
        for _ in 0..times {
            out.push_str(self.strip("\u{fffd}"));
        }
    }
}

impl Detokenizer {
    pub(super) fn new(pieces: Arc<Pieces>, special: SpecialTokens) -> Self {
        let (char, left) = pieces.strip;
        // Room for nearly any token and what was left before it, so that steady state allocates nothing.
        Self { pieces, special, pending: Vec::with_capacity(64), start: Start { char, left } }
    }

    /// Stands behind `prompt`, as if its tokens had been pushed and their text thrown away.
    ///
    /// The text of the next token then goes on from the prompt: a SentencePiece-like tokenizer keeps the space before
    /// a word, which it drops from the start of a text, and a character that the prompt began is finished.
    pub fn skip(&mut self, prompt: &[u32]) {
        // Four tokens with text decide: an unfinished character has at most three bytes, and any text is past the start.
        let mut last = [0; 4];
        let mut from = last.len();
        for &id in prompt.iter().rev().filter(|&&id| self.adds_text(id)).take(last.len()) {
            from -= 1;
            last[from] = id;
        }
        let mut text = String::new();
        last[from..].iter().for_each(|&id| self.push(id, &mut text));
    }

    fn adds_text(&self, id: u32) -> bool {
        let piece = self.pieces.get(id);
        !piece.bytes.is_empty() && (!piece.special || self.special == SpecialTokens::With)
    }

    /// Appends to `out` the text that `token` makes certain; possibly none. A token outside the vocabulary has no text.
    pub fn push(&mut self, token: u32, out: &mut String) {
        let piece = self.pieces.get(token);
        if piece.special && self.special == SpecialTokens::Without {
            return;
        }
        match piece.kind {
            Kind::Absent => {}
            Kind::Bytes => {
                self.pending.extend_from_slice(piece.bytes);
                self.drain(out);
            }
            Kind::Text => {
                let num_replaced = self.pieces.replace.count(self.pending.len());
                self.pending.clear();
                self.start.replace(num_replaced, out);
                let text = std::str::from_utf8(piece.bytes).expect("`Kind::Text` is made from a str");
                out.push_str(self.start.strip(text));
            }
        }
    }

    /// Appends what still waits, replaced: nothing more will finish it.
    pub fn finish(&mut self, out: &mut String) {
        self.start.replace(self.pieces.replace.count(self.pending.len()), out);
        self.pending.clear();
    }

    /// Gives out the pending bytes, up to a character that the next token may finish.
    fn drain(&mut self, out: &mut String) {
        let mut num_done = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(self.start.strip(chunk.valid()));
            num_done += chunk.valid().len();
            let invalid = chunk.invalid();
            if num_done + invalid.len() == self.pending.len() && may_be_finished(invalid) {
                break;
            }
            num_done += invalid.len();
            self.start.replace(self.pieces.replace.count(invalid.len()), out);
        }
        self.pending.drain(..num_done);
    }
}

/// Whether more bytes could make `bytes` a character.
fn may_be_finished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::Tokenizer;
    use crate::text::tokenizer::tests::{bundled, golden};

    fn pieces(tokenizer: &Tokenizer, special: SpecialTokens, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = tokenizer.detokenizer(special);
        let mut pieces: Vec<String> = Vec::new();
        for &id in ids {
            let mut out = String::new();
            detokenizer.push(id, &mut out);
            assert!(detokenizer.pending.len() < 4, "more than one character is held back: {:?}", detokenizer.pending);
            pieces.push(out);
        }
        let mut rest = String::new();
        detokenizer.finish(&mut rest);
        pieces.push(rest);
        pieces
    }

    const REPLACEMENT: char = '\u{fffd}';

    /// How a tokenizer with byte tokens should decode: each run of them by itself, one replacement for each bad byte.
    fn keep_good_bytes(tokenizer: &Tokenizer, ids: &[u32], special: SpecialTokens) -> String {
        let pieces = ids.iter().map(|&id| tokenizer.pieces().get(id));
        let shown: Vec<_> = pieces
            .filter(|piece| piece.kind != Kind::Absent && (special == SpecialTokens::With || !piece.special))
            .collect();
        let mut text = String::new();
        for run in shown.chunk_by(|a, b| a.kind == b.kind) {
            let bytes = run.iter().map(|piece| piece.bytes).collect::<Vec<_>>().concat();
            for chunk in bytes.utf8_chunks() {
                text.push_str(chunk.valid());
                text.extend(std::iter::repeat_n(REPLACEMENT, chunk.invalid().len()));
            }
        }
        text.strip_prefix(' ').unwrap_or(&text).to_owned()
    }

    /// The ids of `bytes`, each as a token by itself.
    fn byte_ids(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
        bytes
            .iter()
            .map(|&byte| {
                let is_byte = |id: &u32| {
                    let piece = tokenizer.pieces().get(*id);
                    piece.kind == Kind::Bytes && piece.bytes == [byte]
                };
                (0..tokenizer.vocab_size() as u32).find(is_byte).expect("every byte has a token")
            })
            .collect()
    }

    #[test]
    fn a_character_of_several_tokens_comes_whole_with_its_last() {
        for tokenizer in [golden("qwen3"), golden("llama-mha"), bundled()] {
            let ids = byte_ids(&tokenizer, "é🦀".as_bytes());
            assert_eq!(pieces(&tokenizer, SpecialTokens::Without, &ids), ["", "é", "", "", "", "🦀", ""]);
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced_as_soon_as_they_are_known() {
        // An unfinished character, broken off by a letter; a byte that begins none; an unfinished one at the end.
        let bytes = [0xe5, 0x8f, b'a', 0xff, 0xf0, 0x9f];
        let run = |case| {
            let tokenizer = golden(case);
            pieces(&tokenizer, SpecialTokens::Without, &byte_ids(&tokenizer, &bytes))
        };
        assert_eq!(run("qwen3"), ["", "", "\u{fffd}a", "\u{fffd}", "", "", "\u{fffd}"]);
        // One for each byte where `<0xE5>` are tokens of their own.
        assert_eq!(run("llama-mha"), ["", "", "\u{fffd}\u{fffd}a", "\u{fffd}", "", "", "\u{fffd}\u{fffd}"]);
    }

    #[test]
    fn a_space_is_stripped_from_the_start_of_a_text_but_not_behind_a_prompt() {
        let tokenizer = golden("llama-mha");
        let ids = tokenizer.encode("the wall", SpecialTokens::With).unwrap();
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Without), "the wall");
        let behind = |prompt: &[u32]| {
            let mut detokenizer = tokenizer.detokenizer(SpecialTokens::Without);
            detokenizer.skip(prompt);
            let mut text = String::new();
            ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
            text
        };
        assert_eq!(behind(&tokenizer.encode("Under", SpecialTokens::With).unwrap()), " the wall");
        assert_eq!(behind(&ids[..1]), "the wall", "a prompt of special tokens alone has no text");
    }

    #[test]
    fn a_token_outside_the_vocabulary_has_no_text() {
        let tokenizer = golden("qwen3");
        assert_eq!(pieces(&tokenizer, SpecialTokens::With, &[u32::MAX, 39, 379, 40]).concat(), "HI");
    }

    proptest! {
        #[test]
        fn random_tokens_decode_as_the_reference_has_them(
            case in prop::sample::select(vec!["qwen3", "llama-gqa-rope-scaling", "llama-mha", "mistral-sliding-window", ""]),
            seeds in prop::collection::vec(any::<u32>(), 0..40),
            special in prop::sample::select(vec![SpecialTokens::With, SpecialTokens::Without]),
        ) {
            let tokenizer = if case.is_empty() { bundled() } else { golden(case) };
            // a few ids beyond the vocabulary
            let ids: Vec<u32> = seeds.iter().map(|seed| seed % (tokenizer.vocab_size() as u32 + 8)).collect();
            let want = tokenizer.reference_decode(&ids, special);
            let got = pieces(&tokenizer, special, &ids).concat();
            prop_assert_eq!(&got, &tokenizer.decode(&ids, special));
            // Good characters of a run of byte tokens that is broken elsewhere are kept here and replaced there.
            let want = if want.contains(REPLACEMENT) && got != want { keep_good_bytes(&tokenizer, &ids, special) } else { want };
            prop_assert_eq!(got, want);
        }

        #[test]
        fn text_behind_a_prompt_goes_on_from_it(
            case in prop::sample::select(vec!["qwen3", "llama-mha", "mistral-sliding-window"]),
            text in "[a-z é🦀]{0,20}",
            cut in 0usize..60,
        ) {
            let tokenizer = golden(case);
            let ids = tokenizer.encode(&text, SpecialTokens::With).unwrap();
            let (prompt, generated) = ids.split_at(cut.min(ids.len()));
            let mut whole = String::new();
            let mut detokenizer = tokenizer.detokenizer(SpecialTokens::Without);
            prompt.iter().for_each(|&id| detokenizer.push(id, &mut whole));
            let mut behind = tokenizer.detokenizer(SpecialTokens::Without);
            behind.skip(prompt);
            generated.iter().for_each(|&id| behind.push(id, &mut whole));
            behind.finish(&mut whole);
            prop_assert_eq!(whole, tokenizer.decode(&ids, SpecialTokens::Without));
        }
    }
}
