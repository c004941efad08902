//! An object that is sent from front to back: in parts, several at once; it is there when all of them are.
//!
//! What is shorter than a part goes by one request. Invariants: the object is made by one last request, or not at all;
//! an upload that has begun is completed or given up; memory is bounded by the parts under way.
//!
//! Lock order: `state` is a leaf, never held while a request is under way.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::protocols::url::again::{self, Trouble};
use crate::storage::outgoing::Outgoing;
use crate::storage::{Error, Result};

/// The shortest part: stores take none below 5 MiB, but the last.
const SHORTEST: u64 = 8 << 20;
/// Parts of an object: stores take 10,000, or more.
const MOST_PARTS: u64 = 9_999;
/// Lengths of parts are multiples of this.
const STEP: u64 = 1 << 20;
/// What the parts under way may take, all together; one is under way in any case.
const MEMORY: u64 = 128 << 20;
/// The most parts that are under way.
const MOST_WORKERS: u64 = 4;

/// How a store takes an object. Each request can be sent again.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Takes all of it by one request.
    fn put(&self, bytes: &[u8]) -> std::result::Result<(), Trouble>;

    /// Begins to take it in parts. Returns what that upload is called.
    fn begin(&self) -> std::result::Result<String, Trouble>;

    /// Takes a part; the first has the number 1. Returns what it is called.
    fn put_part(&self, upload: &str, number: u32, bytes: &[u8]) -> std::result::Result<String, Trouble>;

    /// Makes the object of its parts, in that order.
    fn complete(&self, upload: &str, parts: &[String]) -> std::result::Result<(), Trouble>;

    /// Forgets the parts.
    fn give_up(&self, upload: &str) -> std::result::Result<(), Trouble>;
}

/// See the module.
pub struct Upload {
    shared: Arc<Shared>,
    part_len: usize,
    /// The part that is being filled, and its number.
    part: Vec<u8>,
    number: u32,
    way: Stage,
}

struct Shared {
    store: Box<dyn Store>,
    state: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    /// What the parts are called that have been sent, and their numbers.
    sent: Vec<(u32, String)>,
    failed: Option<String>,
}

/// How far it is.
enum Stage {
    /// Less than a part so far.
    Short,
    /// In parts.
    InParts { upload: String, sender: Option<SyncSender<(u32, Vec<u8>)>>, workers: Vec<JoinHandle<()>> },
    /// The object is there, or never will be.
    Ended,
}

impl Upload {
    /// Of so many bytes, or fewer.
    pub fn new(store: Box<dyn Store>, len: u64) -> Self {
        let part_len = part_len(len);
        let shared = Arc::new(Shared { store, state: Mutex::default() });
        Self { shared, part_len, part: Vec::new(), number: 1, way: Stage::Short }
    }

    /// Gives a whole part away.
    fn send_part(&mut self) -> Result<()> {
        if matches!(self.way, Stage::Short) {
            self.way = self.begin()?;
        }
        let Stage::InParts { upload, sender, .. } = &self.way else {
            return Err(Error::Other("it has ended".to_owned()));
        };
        let part = std::mem::take(&mut self.part);
        let number = self.number;
        self.number += 1;
        match sender {
            // Nobody takes it where a part has failed, which is told below.
            Some(sender) => drop(sender.send((number, part))),
            None => self.shared.send(upload, number, &part),
        }
        self.shared.look()
    }

    fn begin(&self) -> Result<Stage> {
        let upload = again::open(|| self.shared.store.begin())?;
        let workers = (MEMORY / self.part_len as u64).clamp(1, MOST_WORKERS);
        let (sender, receiver) = sync_channel(0);
        let receiver = Arc::new(Mutex::new(receiver));
        let workers: Vec<_> = (0..workers)
            .map_while(|_| {
                let (shared, receiver, upload) = (self.shared.clone(), receiver.clone(), upload.clone());
                std::thread::Builder::new().spawn(move || shared.work(&upload, &receiver)).ok()
            })
            .collect();
        // Without a thread parts are sent by whoever fills them.
        let sender = (!workers.is_empty()).then_some(sender);
        Ok(Stage::InParts { upload, sender, workers })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, Parts> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) -> Result<()> {
        self.state().failed.as_ref().map_or(Ok(()), |text| Err(Error::Other(text.clone())))
    }

    /// Sends parts until there are no more, or one fails.
    fn work(&self, upload: &str, receiver: &Mutex<Receiver<(u32, Vec<u8>)>>) {
        loop {
            let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match next {
                Ok((number, part)) if self.look().is_ok() => self.send(upload, number, &part),
                // What comes after a failure is let go, so that nobody waits.
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn send(&self, upload: &str, number: u32, part: &[u8]) {
        let sent = again::repeat(|| self.store.put_part(upload, number, part));
        let mut state = self.state();
        match sent {
            Ok(name) => state.sent.push((number, name)),
            Err(error) => drop(state.failed.get_or_insert(format!("part {number}: {error}"))),
        }
    }
}

impl Outgoing for Upload {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.part_len - self.part.len()));
            if self.part.capacity() == 0 {
                self.part.reserve_exact(self.part_len);
            }
            self.part.extend_from_slice(now);
            bytes = later;
            if self.part.len() == self.part_len {
                self.send_part()?;
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        if matches!(self.way, Stage::Short) {
            again::repeat(|| self.shared.store.put(&self.part))?;
            self.way = Stage::Ended;
            return Ok(());
        }
        if !self.part.is_empty() {
            self.send_part()?;
        }
        let Stage::InParts { upload, sender, workers } = &mut self.way else { return Ok(()) };
        drop(sender.take());
        for worker in workers.drain(..) {
            worker.join().map_err(|_| Error::Other("a thread has died".to_owned()))?;
        }
        self.shared.look()?;
        let mut sent = std::mem::take(&mut self.shared.state().sent);
        sent.sort_unstable_by_key(|(number, _)| *number);
        let sent: Vec<String> = sent.into_iter().map(|(_, name)| name).collect();
        again::repeat(|| self.shared.store.complete(upload, &sent))?;
        self.way = Stage::Ended;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Stage::InParts { upload, sender, workers } = &mut self.way {
            self.shared.state().failed.get_or_insert_with(String::new);
            drop(sender.take());
            workers.drain(..).for_each(|worker| drop(worker.join()));
            // Who cannot be told forgets them when the store's own rules say so.
            let _ = self.shared.store.give_up(upload);
        }
    }
}

/// So long that the whole fits in as many parts as stores take.
fn part_len(len: u64) -> usize {
    let len = len.div_ceil(MOST_PARTS).max(SHORTEST);
    usize::try_from(len.checked_next_multiple_of(STEP).unwrap_or(len)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes everything, or nothing from a part on.
    #[derive(Debug, Default, Clone)]
    struct Shelf(Arc<Mutex<Kept>>);

    #[derive(Debug, Default)]
    struct Kept {
        parts: Vec<(u32, Vec<u8>)>,
        object: Option<Vec<u8>>,
        given_up: bool,
        bad: u32,
    }

    impl Store for Shelf {
        fn put(&self, bytes: &[u8]) -> std::result::Result<(), Trouble> {
            self.0.lock().unwrap().object = Some(bytes.to_vec());
            Ok(())
        }

        fn begin(&self) -> std::result::Result<String, Trouble> {
            Ok("u".to_owned())
        }

        fn put_part(&self, upload: &str, number: u32, bytes: &[u8]) -> std::result::Result<String, Trouble> {
            assert_eq!(upload, "u");
            let mut kept = self.0.lock().unwrap();
            if number == kept.bad {
                return Err(Trouble::lasting("full"));
            }
            kept.parts.push((number, bytes.to_vec()));
            Ok(number.to_string())
        }

        fn complete(&self, _upload: &str, parts: &[String]) -> std::result::Result<(), Trouble> {
            let mut kept = self.0.lock().unwrap();
            let of = |name: &String| {
                let (_, bytes) = kept.parts.iter().find(|(number, _)| number.to_string() == *name).unwrap();
                bytes.clone()
            };
            kept.object = Some(parts.iter().flat_map(of).collect());
            Ok(())
        }

        fn give_up(&self, _upload: &str) -> std::result::Result<(), Trouble> {
            self.0.lock().unwrap().given_up = true;
            Ok(())
        }
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 4096) as u8).collect()
    }

    #[test]
    fn an_object_is_there_when_it_is_whole() {
        for len in [0, 100, 8 << 20, (8 << 20) + 1, (40 << 20) + 7] {
            let shelf = Shelf::default();
            let mut upload = Upload::new(Box::new(shelf.clone()), len as u64);
            let bytes = bytes(len);
            for piece in bytes.chunks(3_000_001) {
                upload.put(piece).unwrap();
            }
            assert!(shelf.0.lock().unwrap().object.is_none());
            upload.complete().unwrap();
            drop(upload);
            let kept = shelf.0.lock().unwrap();
            assert!(kept.object.as_ref().is_some_and(|object| *object == bytes) && !kept.given_up, "{len}");
        }
    }

    #[test]
    fn what_ends_early_is_given_up() {
        let shelf = Shelf::default();
        let mut upload = Upload::new(Box::new(shelf.clone()), 40 << 20);
        upload.put(&bytes(20 << 20)).unwrap();
        drop(upload);
        let kept = shelf.0.lock().unwrap();
        assert!(kept.given_up && kept.object.is_none());
    }

    #[test]
    fn a_part_that_fails_ends_it() {
        let shelf = Shelf::default();
        shelf.0.lock().unwrap().bad = 2;
        let mut upload = Upload::new(Box::new(shelf.clone()), 80 << 20);
        let put = upload.put(&bytes(80 << 20)).and_then(|()| upload.complete());
        assert_eq!(put.unwrap_err().to_string(), "part 2: full");
        drop(upload);
        let kept = shelf.0.lock().unwrap();
        assert!(kept.given_up && kept.object.is_none());
    }

    #[test]
    fn parts_suffice() {
        assert_eq!(part_len(0), 8 << 20);
        assert!(part_len(1 << 40) as u64 * MOST_PARTS >= 1 << 40 && part_len(1 << 40) < 128 << 20);
    }
}
