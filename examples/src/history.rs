//! What a conversation remembers.

use dashinfer::Message;

/// The turns of a conversation: the user's and the model's in turn, behind an optional word to the model about its task.
#[derive(Debug, Clone, Default)]
pub struct History {
    messages: Vec<Message>,
    /// Messages that are never forgotten: 1 with a system message, else 0.
    num_kept: usize,
}

impl History {
    /// An empty conversation.
    #[must_use]
    pub fn new(system: Option<String>) -> Self {
        let messages: Vec<_> = system.map(Message::system).into_iter().collect();
        Self { num_kept: messages.len(), messages }
    }

    /// All that is remembered.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Appends a turn.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Takes the last turn back.
    pub fn pop(&mut self) {
        if self.messages.len() > self.num_kept {
            self.messages.pop();
        }
    }

    /// Forgets the oldest question and its answer, as often as it takes for `count(messages)` to be at most `max`, but never the
    /// last message. Returns how many messages were forgotten.
    ///
    /// # Errors
    /// Those of `count`.
    pub fn fit<E>(&mut self, max: usize, count: impl Fn(&[Message]) -> Result<usize, E>) -> Result<usize, E> {
        let mut num_forgotten = 0;
        while self.messages.len() > self.num_kept + 2 && count(&self.messages)? > max {
            self.messages.drain(self.num_kept..self.num_kept + 2);
            num_forgotten += 2;
        }
        Ok(num_forgotten)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn texts(history: &History) -> Vec<&str> {
        history.messages().iter().map(|message| message.content.as_str()).collect()
    }

    fn length(messages: &[Message]) -> Result<usize, Infallible> {
        Ok(messages.iter().map(|message| message.content.len()).sum())
    }

    #[test]
    fn the_oldest_pairs_are_forgotten_but_neither_the_system_message_nor_the_last_question() {
        let mut history = History::new(Some("sss".into()));
        for turn in ["q1", "q2", "q3"] {
            history.push(Message::user(turn));
            history.push(Message::assistant("answer"));
        }
        history.push(Message::user("last"));
        assert_eq!(history.fit(100, length), Ok(0));
        assert_eq!(history.fit(3 + 2 * 8 + 4, length), Ok(2));
        assert_eq!(texts(&history), ["sss", "q2", "answer", "q3", "answer", "last"]);
        assert_eq!(history.fit(0, length), Ok(4));
        assert_eq!(texts(&history), ["sss", "last"]);
        history.pop();
        history.pop();
        assert_eq!(texts(&history), ["sss"]);
    }
}
