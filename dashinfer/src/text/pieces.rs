//! What each token adds to the text: the tokenizer's decoder, worked out once for every id.
//!
//! The decoders of language models look at one token at a time, but for two things: bytes of one character may come
//! as several tokens, and some strip a space from the start of the whole text. So a table of bytes and a few rules
//! say all of it, and decoding a token is a copy.

use std::path::Path;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Model};

use super::TokenizerError;

/// The most ids of a vocabulary, holes included: a damaged file must not ask for all memory. Published vocabularies have
/// up to some 260,000.
pub(super) const MAX_IDS: usize = 1 << 22;

/// The most bytes of all tokens' texts, and of one while it is worked out.
const MAX_BYTES: usize = 256 << 20;

/// How a token joins the text before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No token has this id.
    Absent,
    /// Bytes that may begin, continue or end a character.
    Bytes,
    /// Whole characters; an unfinished character before them stays unfinished.
    Text,
}

/// How many replacement characters stand for bytes that are no UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Replace {
    /// One for each longest beginning of a character, as `String::from_utf8_lossy` has it.
    #[default]
    Sequence,
    /// One for each byte.
    Byte,
}

impl Replace {
    /// How many replacement characters stand for one sequence of `num_bytes`.
    pub(super) fn count(self, num_bytes: usize) -> usize {
        match self {
            Self::Sequence => num_bytes.min(1),
            Self::Byte => num_bytes,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    end: u32,
    kind: Kind,
    special: bool,
}

/// The bytes of every token, by id.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    pub(super) replace: Replace,
    /// At most so many of this character are taken off the start of the text.
    pub(super) strip: (char, usize),
}

/// A token's part of the text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) kind: Kind,
    pub(super) special: bool,
}

impl Pieces {
    /// The table of `tokenizer`, which was read from `path`.
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer, path: &Path) -> Result<Self, TokenizerError> {
        let unsupported = |found| TokenizerError::UnsupportedDecoder { path: path.to_owned(), found };
        let too_large = || TokenizerError::TooLarge { path: path.to_owned() };
        let rules = Rules::of(tokenizer.get_decoder()).map_err(unsupported)?;
        let (added, model) = (tokenizer.get_added_vocabulary(), tokenizer.get_model());
        let num_ids = tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if num_ids > MAX_IDS {
            return Err(too_large());
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            entries: Vec::with_capacity(num_ids),
            replace: rules.replace,
            strip: rules.strip,
        };
        for id in 0..num_ids as u32 {
            // The very look-up that `tokenizers` decodes with.
            let token = added.simple_id_to_token(id).or_else(|| model.id_to_token(id));
            let special = token.as_ref().is_some_and(|token| added.is_special_token(token));
            let kind = match token {
                Some(token) if rules.longest(&token) > MAX_BYTES => return Err(too_large()),
                Some(token) => rules.append(token, &mut pieces.bytes).map_err(unsupported)?,
                None => Kind::Absent,
            };
            if pieces.bytes.len() > MAX_BYTES {
                return Err(too_large());
            }
            let end = u32::try_from(pieces.bytes.len()).map_err(|_| too_large())?;
            pieces.entries.push(Entry { end, kind, special });
        }
        Ok(pieces)
    }

    /// The piece of `id`. An id outside the vocabulary is absent.
    pub(super) fn get(&self, id: u32) -> Piece<'_> {
        let id = id as usize;
        let Some(entry) = self.entries.get(id) else {
            return Piece { bytes: &[], kind: Kind::Absent, special: false };
        };
        let start = if id == 0 { 0 } else { self.entries[id - 1].end as usize };
        Piece { bytes: &self.bytes[start..entry.end as usize], kind: entry.kind, special: entry.special }
    }
}

/// A decoder, taken apart.
#[derive(Debug, Default)]
struct Rules<'a> {
    byte_level: bool,
    byte_fallback: bool,
    /// Applied to each token by itself.
    replacements: Vec<&'a tokenizers::normalizers::Replace>,
    replace: Replace,
    strip: (char, usize),
}

impl<'a> Rules<'a> {
    fn of(decoder: Option<&'a DecoderWrapper>) -> Result<Self, String> {
        let mut steps = Vec::new();
        flatten(decoder.ok_or("none")?, &mut steps);
        let mut rules = Self { strip: (' ', 0), ..Self::default() };
        let mut fused = false;
        for (i, step) in steps.iter().enumerate() {
            match step {
                DecoderWrapper::ByteLevel(_) if steps.len() == 1 => rules.byte_level = true,
                DecoderWrapper::Replace(replace) if !rules.byte_fallback && !fused => rules.replacements.push(replace),
                DecoderWrapper::ByteFallback(_) if !rules.byte_fallback && !fused => {
                    (rules.byte_fallback, rules.replace) = (true, Replace::Byte);
                }
                DecoderWrapper::Fuse(_) => fused = true,
                DecoderWrapper::Strip(strip) if fused && strip.stop == 0 && i + 1 == steps.len() => {
                    rules.strip = (strip.content, strip.start);
                }
                _ => {
                    let names: Vec<_> = steps.iter().map(|step| name(step)).collect();
                    return Err(names.join(", "));
                }
            }
        }
        Ok(rules)
    }

    /// The most bytes that `token` can become.
    fn longest(&self, token: &str) -> usize {
        let replaced = |len: usize, replacement: &&tokenizers::normalizers::Replace| {
            len.saturating_add(1).saturating_mul(replacement.content.len().max(1))
        };
        self.replacements.iter().fold(token.len(), |len, replacement| len.max(replaced(len, replacement)))
    }

    /// Appends what `token` adds to the text.
    fn append(&self, token: String, bytes: &mut Vec<u8>) -> Result<Kind, String> {
        if self.byte_level {
            // A token with a character outside the alphabet stands for itself: added tokens, mostly.
            let start = bytes.len();
            for char in token.chars() {
                let Some(byte) = byte_of(char) else {
                    bytes.truncate(start);
                    bytes.extend_from_slice(token.as_bytes());
                    break;
                };
                bytes.push(byte);
            }
            return Ok(Kind::Bytes);
        }
        let mut token = token;
        for replacement in &self.replacements {
            token = replacement.decode(vec![token]).map_err(|error| error.to_string())?;
        }
        match fallback_byte(&token).filter(|_| self.byte_fallback) {
            Some(byte) => {
                bytes.push(byte);
                Ok(Kind::Bytes)
            }
            None => {
                bytes.extend_from_slice(token.as_bytes());
                Ok(Kind::Text)
            }
        }
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().for_each(|step| flatten(step, steps)),
        step => steps.push(step),
    }
}

fn name(decoder: &DecoderWrapper) -> &'static str {
    match decoder {
        DecoderWrapper::BPE(_) => "BPEDecoder",
        DecoderWrapper::ByteLevel(_) => "ByteLevel",
        DecoderWrapper::WordPiece(_) => "WordPiece",
        DecoderWrapper::Metaspace(_) => "Metaspace",
        DecoderWrapper::CTC(_) => "CTC",
        DecoderWrapper::Sequence(_) => "Sequence",
        DecoderWrapper::Replace(_) => "Replace",
        DecoderWrapper::Fuse(_) => "Fuse",
        DecoderWrapper::Strip(_) => "Strip",
        DecoderWrapper::ByteFallback(_) => "ByteFallback",
    }
}

/// The byte of a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` takes a sign, and so does the decoder that this must agree with.
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of the byte-level alphabet writes. Printable Latin-1 characters are themselves; the other
/// 68 bytes, in order, are the characters from U+0100 on. <https://github.com/openai/gpt-2/blob/master/src/encoder.py>
fn byte_of(char: char) -> Option<u8> {
    match u32::from(char) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fallback_tokens_are_bytes() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xff>"), Some(255));
        assert_eq!(fallback_byte("<0x0A"), None);
        assert_eq!(fallback_byte("<0x100>"), None);
        assert_eq!(fallback_byte("<unk>"), None);
    }

    #[test]
    fn an_unknown_decoder_is_named() {
        let decoder: DecoderWrapper =
            serde_json::from_str(r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###).unwrap();
        assert_eq!(Rules::of(Some(&decoder)).unwrap_err(), "WordPiece");
        assert_eq!(Rules::of(None).unwrap_err(), "none");
    }
}
