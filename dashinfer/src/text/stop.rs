//! Stop strings, found across pieces of text and never shown in part.

/// Watches a text that comes in pieces for the first of several stop strings.
///
/// The text ends at the first place where any stop is complete; of several complete at that place, the longest counts.
/// That is what a reader of the whole text, character by character, would see, however it is cut into pieces. Only what
/// may be the beginning of a stop is held back: the longest end of the text that begins one.
///
/// A byte of text costs a step of the Knuth-Morris-Pratt automaton for each stop.
/// <https://epubs.siam.org/doi/10.1137/0206024>
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text not given out yet: a beginning of some stop.
    held: String,
    matched: Option<usize>,
}

#[derive(Debug, Clone)]
struct Stop {
    text: Box<[u8]>,
    /// `fallback[n]`: the longest proper beginning of the stop that also ends its first `n + 1` bytes.
    fallback: Box<[usize]>,
    /// The longest beginning of the stop that ends the text so far.
    num_matched: usize,
}

impl StopMatcher {
    /// A matcher for `stops`. An empty stop never matches.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Self {
        let stops = stops.into_iter().map(|stop| Stop::new(stop.as_ref())).collect();
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes the next piece of text and appends to `out` what is certain not to be part of a stop.
    ///
    /// Returns the index of the stop that ended the text; neither it nor what follows it is given out. Later pieces
    /// are ignored then.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<usize> {
        if self.matched.is_some() || self.stops.is_empty() {
            if self.matched.is_none() {
                out.push_str(piece);
            }
            return self.matched;
        }
        for (i, &byte) in piece.as_bytes().iter().enumerate() {
            let mut complete: Option<(usize, usize)> = None;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.step(byte) && complete.is_none_or(|(_, len)| len < stop.text.len()) {
                    complete = Some((index, stop.text.len()));
                }
            }
            if let Some((index, len)) = complete {
                self.matched = Some(index);
                self.give(&piece[..=i], len, out);
                self.held.clear();
                return self.matched;
            }
        }
        let num_held = self.stops.iter().map(|stop| stop.num_matched).max().unwrap_or(0);
        self.give(piece, num_held, out);
        None
    }

    /// Appends what was held back: the text ended without it becoming a stop. Nothing after a match.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.stops.iter_mut().for_each(|stop| stop.num_matched = 0);
    }

    /// Gives out `held` and `piece` but for their last `num_kept` bytes, which stay held.
    fn give(&mut self, piece: &str, num_kept: usize, out: &mut String) {
        // A stop begins with the first byte of a character, so what is kept does too.
        if num_kept <= piece.len() {
            let (given, kept) = piece.split_at(piece.len() - num_kept);
            out.push_str(&self.held);
            out.push_str(given);
            self.held.clear();
            self.held.push_str(kept);
        } else {
            let num_given = self.held.len() + piece.len() - num_kept;
            out.push_str(&self.held[..num_given]);
            self.held.drain(..num_given);
            self.held.push_str(piece);
        }
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let text: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0; text.len()];
        let mut len = 0;
        for i in 1..text.len() {
            while len > 0 && text[i] != text[len] {
                len = fallback[len - 1];
            }
            len += usize::from(text[i] == text[len]);
            fallback[i] = len;
        }
        Self { text, fallback: fallback.into(), num_matched: 0 }
    }

    /// Reads one byte; true if the stop ends with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.num_matched > 0 && self.text.get(self.num_matched) != Some(&byte) {
            self.num_matched = self.fallback[self.num_matched - 1];
        }
        self.num_matched += usize::from(self.text.get(self.num_matched) == Some(&byte));
        self.num_matched == self.text.len() && !self.text.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the pieces give out one by one, the stop that matched, and the rest.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>, String) {
        let mut matcher = StopMatcher::new(stops);
        let mut matched = None;
        let given = pieces
            .iter()
            .map(|piece| {
                let mut out = String::new();
                matched = matcher.push(piece, &mut out);
                out
            })
            .collect();
        let mut rest = String::new();
        matcher.finish(&mut rest);
        (given, matched, rest)
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        assert_eq!(run(&["END"], &["a E", "N", "x"]), (vec!["a ".into(), "".into(), "ENx".into()], None, "".into()));
        assert_eq!(run(&["END"], &["a E", "N", "Dx"]), (vec!["a ".into(), "".into(), "".into()], Some(0), "".into()));
        assert_eq!(run(&["END"], &["a EN"]), (vec!["a ".into()], None, "EN".into()));
    }

    #[test]
    fn a_beginning_may_overlap_a_failed_one() {
        assert_eq!(run(&["aab"], &["aaa", "b"]), (vec!["a".into(), "".into()], Some(0), "".into()));
        assert_eq!(
            run(&["\n\n###"], &["\n\n\n", "##", "#"]),
            (vec!["\n".into(), "".into(), "".into()], Some(0), "".into())
        );
    }

    #[test]
    fn the_first_complete_stop_wins_and_the_longest_of_those_complete_together() {
        assert_eq!(run(&["abc", "ab"], &["xabc"]), (vec!["x".into()], Some(1), "".into()));
        assert_eq!(run(&["b", "ab"], &["xab"]), (vec!["x".into()], Some(1), "".into()));
        assert_eq!(run(&["abcd", "bc"], &["xab", "cd"]), (vec!["x".into(), "a".into()], Some(1), "".into()));
    }

    #[test]
    fn characters_are_never_cut() {
        // é and è begin with the same byte
        assert_eq!(
            run(&["é!"], &["caf", "è", "é", "?"]),
            (vec!["caf".into(), "è".into(), "".into(), "é?".into()], None, "".into())
        );
    }

    #[test]
    fn nothing_follows_a_match() {
        assert_eq!(run(&["."], &["a.b", "c"]), (vec!["a".into(), "".into()], Some(0), "".into()));
    }

    /// The definition: read character by character, end where any stop is complete, prefer the longest.
    fn naive<'a>(stops: &[String], text: &'a str) -> (&'a str, Option<usize>) {
        let ends = text.char_indices().map(|(i, char)| i + char.len_utf8());
        for end in ends {
            let complete = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
            if let Some((index, stop)) = complete.max_by_key(|&(index, stop)| (stop.len(), usize::MAX - index)) {
                return (&text[..end - stop.len()], Some(index));
            }
        }
        (text, None)
    }

    proptest! {
        #[test] // three letters, so that stops overlap, repeat and match often
        fn it_agrees_with_the_definition_however_the_text_is_cut(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abéc]{0,5}", 0..12),
        ) {
            let text = pieces.concat();
            let (want, want_matched) = naive(&stops, &text);
            let mut matcher = StopMatcher::new(&stops);
            let (mut given, mut seen, mut matched) = (String::new(), String::new(), None);
            for piece in &pieces {
                seen.push_str(piece);
                matched = matcher.push(piece, &mut given);
                if matched.is_some() {
                    break;
                }
                // Held back: exactly the longest end of the text that begins a stop.
                let held = (0..=seen.len()).filter(|&i| seen.is_char_boundary(i))
                    .find(|&i| stops.iter().any(|stop| stop.starts_with(&seen[i..]))).unwrap_or(seen.len());
                prop_assert_eq!(&given, &seen[..held]);
            }
            matcher.finish(&mut given);
            prop_assert_eq!((given.as_str(), matched), (want, want_matched));
        }
    }
}
