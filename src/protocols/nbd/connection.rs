//! One connection, on which any number of threads have requests under way at once.
//!
//! Whoever has a request sends it and waits. Of those that wait one receives: it reads the start of the next reply,
//! and if that is another one's, hands the receiving half on to that one, which reads what follows to where it wants
//! it. So no thread is there for receiving alone, no byte is copied on the way, and nobody who waits for a reply keeps
//! others from sending or receiving.
//!
//! Lock order: the sending half, then the state; the state is held for looks alone, the sending half while a request
//! goes out. Invariants: the receiving half is in the state, or with one thread; whoever takes it out brings it back,
//! or the connection is lost; a lost one stays so, and everybody learns why.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::handshake::{Export, Ready};
use super::layout::command;
use super::requests::{Ask, Lost, Reply, ReplyHead, Sink};
use super::stream::{ReceiveHalf, SendHalf};
use crate::protocols::server::Socket;

/// See the module.
#[derive(Debug)]
pub struct Connection {
    export: Export,
    socket: Arc<Socket>,
    send: Mutex<SendHalf>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next_cookie: u64,
    /// Those who have a request under way.
    waiting: HashMap<u64, Waiter>,
    receive: Option<Receiver>,
    lost: Option<Lost>,
}

#[derive(Debug)]
struct Waiter {
    wake: Arc<Condvar>,
    /// It sleeps, and may be woken to receive.
    asleep: bool,
}

/// The receiving half, and the start of a reply that was read already.
#[derive(Debug)]
struct Receiver {
    half: ReceiveHalf,
    head: Option<ReplyHead>,
}

/// What a request comes to, if not to what was asked for.
#[derive(Debug)]
pub enum Failure {
    /// The server says no.
    Refused(Errno),
    /// There was no answer.
    Lost(Lost),
}

impl From<Lost> for Failure {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl Connection {
    /// One that has just been made.
    pub fn new(ready: Ready) -> Self {
        let Ready { send, receive, export } = ready;
        let receive = Some(Receiver { half: receive, head: None });
        let state = State { next_cookie: 1, waiting: HashMap::new(), receive, lost: None };
        let socket = send.socket().clone();
        Self { export, socket, send: Mutex::new(send), state: Mutex::new(state) }
    }

    /// Does one thing.
    pub fn request(&self, ask: &Ask<'_>, sink: Sink<'_>) -> Result<(), Failure> {
        let wake = Arc::new(Condvar::new());
        let cookie = self.enrol(&wake)?;
        let sent = self.sending().send(&ask.head(&self.export, cookie), ask.data);
        if let Err(error) = sent {
            self.lose(error.into());
        }
        let mut reply = Reply::new(ask, sink);
        let done = self.await_reply(cookie, &wake, &mut reply).and_then(|()| reply.finish());
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(errno)) => Err(Failure::Refused(errno)),
            Err(lost) => {
                let lost = self.lose(lost);
                self.state().waiting.remove(&cookie);
                Err(lost.into())
            }
        }
    }

    fn enrol(&self, wake: &Arc<Condvar>) -> Result<u64, Lost> {
        let mut state = self.state();
        if let Some(lost) = &state.lost {
            return Err(lost.clone());
        }
        let cookie = state.next_cookie;
        state.next_cookie += 1;
        state.waiting.insert(cookie, Waiter { wake: wake.clone(), asleep: false });
        Ok(cookie)
    }

    /// Returns when the whole reply has come.
    fn await_reply(&self, cookie: u64, wake: &Condvar, reply: &mut Reply<'_>) -> Result<(), Lost> {
        loop {
            let mut receiver = self.wait(cookie, wake)?;
            loop {
                let head = match receiver.head.take() {
                    Some(head) => head,
                    None => ReplyHead::read(&mut receiver.half, &self.export)?,
                };
                if head.cookie != cookie {
                    receiver.head = Some(head);
                    self.hand_to(head.cookie, receiver)?;
                    break;
                }
                if reply.take(&head, &mut receiver.half, &self.export)? {
                    self.hand_on(cookie, receiver);
                    return Ok(());
                }
            }
        }
    }

    /// Waits for the receiving half, if what comes next may be for `cookie`.
    fn wait(&self, cookie: u64, wake: &Condvar) -> Result<Receiver, Lost> {
        let mut state = self.state();
        loop {
            if let Some(lost) = &state.lost {
                return Err(lost.clone());
            }
            let mine = |receiver: &mut Receiver| receiver.head.is_none_or(|head| head.cookie == cookie);
            if let Some(receiver) = state.receive.take_if(mine) {
                return Ok(receiver);
            }
            state.set_asleep(cookie, true);
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.set_asleep(cookie, false);
        }
    }

    /// Gives the receiving half to the one whose reply comes next.
    fn hand_to(&self, cookie: u64, receiver: Receiver) -> Result<(), Lost> {
        let mut state = self.state();
        let waiter = state.waiting.get(&cookie).ok_or_else(|| Lost {
            text: "the server answers a request that was never sent".to_owned(),
            passing: false,
        })?;
        waiter.wake.notify_one();
        state.receive = Some(receiver);
        Ok(())
    }

    /// Gives the receiving half to anyone who sleeps; who does not will look for it.
    fn hand_on(&self, cookie: u64, receiver: Receiver) {
        let mut state = self.state();
        state.waiting.remove(&cookie);
        if let Some(waiter) = state.waiting.values().find(|waiter| waiter.asleep) {
            waiter.wake.notify_one();
        }
        state.receive = Some(receiver);
    }

    /// Ends it for everybody. The first reason is the one that is told.
    fn lose(&self, lost: Lost) -> Lost {
        let mut state = self.state();
        let first = state.lost.get_or_insert(lost).clone();
        state.waiting.values().for_each(|waiter| waiter.wake.notify_one());
        drop(state);
        self.socket.shut_down();
        first
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sending(&self) -> MutexGuard<'_, SendHalf> {
        self.send.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn set_asleep(&mut self, cookie: u64, asleep: bool) {
        if let Some(waiter) = self.waiting.get_mut(&cookie) {
            waiter.asleep = asleep;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.state().lost.is_none() {
            let goodbye = Ask::new(command::DISCONNECT, 0, 0).head(&self.export, 0);
            // It ends in any case.
            let _ = self.sending().send(&goodbye, &[]);
        }
    }
}
