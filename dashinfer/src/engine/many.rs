//! Many requests as one stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::SelectAll;

use super::{Engine, TokenStream};
use crate::{Chunk, Error, Request};

/// A chunk, and the number of its request in the order in which requests were given, from 0.
#[derive(Debug)]
#[non_exhaustive]
pub struct Tagged {
    /// Which request.
    pub index: usize,
    /// Its next chunk, or the error that ended it.
    pub chunk: Result<Chunk, Error>,
}

/// The chunks of a stream of requests, as they come; of [`Engine::generate_stream`].
#[must_use = "streams do nothing unless polled"]
#[derive(Debug)]
pub struct GenerateStream<S> {
    engine: Engine,
    /// None when it has ended.
    requests: Option<S>,
    in_flight: SelectAll<TaggedStream>,
    max_in_flight: usize,
    next_index: usize,
}

impl<S: Stream<Item = Request> + Unpin> GenerateStream<S> {
    pub(super) fn new(engine: Engine, requests: S, max_in_flight: usize) -> Self {
        Self { engine, requests: Some(requests), in_flight: SelectAll::new(), max_in_flight, next_index: 0 }
    }

    /// Takes as many requests as may be in flight, and as are there.
    fn take_requests(&mut self, cx: &mut Context<'_>) {
        while self.in_flight.len() < self.max_in_flight
            && let Some(requests) = &mut self.requests
        {
            match Pin::new(requests).poll_next(cx) {
                Poll::Ready(Some(request)) => {
                    let stream = self.engine.generate(request);
                    self.in_flight.push(TaggedStream { index: self.next_index, stream });
                    self.next_index += 1;
                }
                Poll::Ready(None) => self.requests = None,
                Poll::Pending => return,
            }
        }
    }
}

impl<S: Stream<Item = Request> + Unpin> Stream for GenerateStream<S> {
    type Item = Tagged;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Tagged>> {
        loop {
            self.take_requests(cx);
            let num_in_flight = self.in_flight.len();
            match Pin::new(&mut self.in_flight).poll_next(cx) {
                Poll::Ready(Some(tagged)) => return Poll::Ready(Some(tagged)),
                Poll::Ready(None) if self.requests.is_none() => return Poll::Ready(None),
                // Some have ended, which makes room for others; they must be asked for before there is nothing to be woken by.
                _ if self.in_flight.len() < num_in_flight && self.requests.is_some() => {}
                _ => return Poll::Pending,
            }
        }
    }
}

#[derive(Debug)]
struct TaggedStream {
    index: usize,
    stream: TokenStream,
}

impl Stream for TaggedStream {
    type Item = Tagged;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Tagged>> {
        let index = self.index;
        Pin::new(&mut self.stream).poll_next(cx).map(|chunk| chunk.map(|chunk| Tagged { index, chunk }))
    }
}
