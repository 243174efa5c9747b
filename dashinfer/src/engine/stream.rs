//! The reader's end of a request, and what it shares with the engine's thread.
//!
//! ```text
//!   engine thread ──try_send──▶ bounded channel ──poll_recv──▶ TokenStream
//!        ▲ sets `paused` when the buffer is full                    │
//!        └────── Resume (half empty again), Cancel (dropped) ───────┘
//! ```
//!
//! The channel has one place more than the buffer, for a token that is under way when the buffer becomes full.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::task::{Context, Poll};

use futures::{Stream, StreamExt};
use tokio::sync::mpsc as channel;

use super::step_loop::Command;
use super::{RequestId, hub::QueuePlace};
use crate::{Chunk, Completion, Error};

/// Places of the channel beyond the buffer: what an executor of depth 1 gives after its request has paused.
const SPARE: usize = 1;

/// What the two ends of a request share besides the channel.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// The engine has left the sequence out of its plans until the reader makes room.
    pub(super) paused: AtomicBool,
    /// Why the engine gave the request up, when the channel had no room to say so.
    pub(super) failure: OnceLock<Error>,
}

/// The engine's end of a request.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) id: RequestId,
    pub(super) chunks: channel::Sender<Result<Chunk, Error>>,
    pub(super) link: Arc<Link>,
    /// Given back when the request leaves the queue.
    pub(super) place: Option<QueuePlace>,
}

impl Writer {
    /// Whether the reader has gone.
    pub(super) fn is_closed(&self) -> bool {
        self.chunks.is_closed()
    }

    /// Sends a chunk. The engine plans nothing for a request whose buffer is full, so there is room.
    pub(super) fn send(&self, chunk: Chunk) {
        let sent = self.chunks.try_send(Ok(chunk));
        // A reader that has gone cancels the request by a command of its own.
        debug_assert!(!matches!(sent, Err(channel::error::TrySendError::Full(_))), "a chunk is lost");
    }

    /// Ends the request with an error.
    pub(super) fn fail(self, error: Error) {
        if self.chunks.try_send(Err(error.clone())).is_err() {
            // The channel is full, or the reader has gone; a reader who is late finds it after the last chunk.
            let _ = self.link.failure.set(error);
        }
    }

    /// Whether the reader is so late that the sequence must pause. Sets the flag which makes the reader say that it is back.
    pub(super) fn must_pause(&self) -> bool {
        if self.chunks.capacity() > SPARE {
            return false;
        }
        self.link.paused.store(true, Ordering::SeqCst);
        // The reader may have read in between and not seen the flag. Whoever clears it knows of the other.
        let buffer = self.chunks.max_capacity() - SPARE;
        let half_empty = self.chunks.capacity().saturating_sub(SPARE) >= buffer.div_ceil(2);
        !(half_empty && self.link.paused.swap(false, Ordering::SeqCst))
    }
}

/// The tokens of one request, as they are sampled.
///
/// Dropping it cancels the request: its blocks are free when the next step is planned. A reader that does not poll pauses its
/// own request when its buffer is full, and slows nobody else. `next` is cancel-safe: a dropped future loses no chunk. After
/// the chunk with [`finish`](Chunk::finish), or after an error, the stream ends.
#[must_use = "dropping a `TokenStream` cancels its request"]
#[derive(Debug)]
pub struct TokenStream {
    chunks: channel::Receiver<Result<Chunk, Error>>,
    link: Arc<Link>,
    id: RequestId,
    commands: mpsc::Sender<Command>,
    ended: bool,
}

impl TokenStream {
    pub(super) fn new(
        id: RequestId,
        buffer: usize,
        commands: mpsc::Sender<Command>,
        place: QueuePlace,
    ) -> (Self, Writer) {
        let (sender, chunks) = channel::channel(buffer + SPARE);
        let link = Arc::new(Link::default());
        let writer = Writer { id, chunks: sender, link: Arc::clone(&link), place: Some(place) };
        (Self { chunks, link, id, commands, ended: false }, writer)
    }

    /// Waits for the whole continuation.
    ///
    /// Dropping the future cancels the request.
    ///
    /// # Errors
    /// What the stream gives.
    pub async fn complete(mut self) -> Result<Completion, Error> {
        let mut whole = Chunk::default();
        while let Some(chunk) = self.next().await {
            whole.append(chunk?);
        }
        Completion::try_from(whole).map_err(|_| Error::Closed)
    }

    /// Tells the engine that there is room again, if it waits for that.
    fn make_room_known(&self) {
        let buffer = self.chunks.max_capacity() - SPARE;
        if self.chunks.len() <= buffer / 2 && self.link.paused.swap(false, Ordering::SeqCst) {
            // Without an engine there is nothing to resume.
            let _ = self.commands.send(Command::Resume(self.id));
        }
    }
}

impl Stream for TokenStream {
    type Item = Result<Chunk, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let received = std::task::ready!(self.chunks.poll_recv(cx));
        self.make_room_known();
        let item = received.unwrap_or_else(|| Err(self.link.failure.get().cloned().unwrap_or(Error::Closed)));
        self.ended = item.as_ref().map_or(true, |chunk| chunk.finish.is_some());
        Poll::Ready(Some(item))
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.ended {
            // Closed first: a request that comes to the engine's thread behind its own cancellation is known by that.
            self.chunks.close();
            // Without an engine there is nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}
