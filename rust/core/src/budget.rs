//! A ceiling on the bytes that a model and its sessions hold.

use crate::error::{Error, Result, readable};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the bytes that are held, and refuses those beyond a limit.
pub struct Budget {
    limit: usize,
    held: AtomicUsize,
}

impl Budget {
    /// No limit if none is given.
    pub fn new(limit: Option<usize>) -> Arc<Budget> {
        Arc::new(Budget { limit: limit.unwrap_or(usize::MAX), held: AtomicUsize::new(0) })
    }

    /// Bytes that are held now.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Holds bytes, which are not taken yet.
    pub fn hold(self: &Arc<Budget>, bytes: usize) -> Result<Held> {
        let mut held = Held { budget: self.clone(), bytes: 0 };
        held.grow(bytes)?;
        Ok(held)
    }
}

/// Bytes that somebody holds; they are given back when it is dropped.
pub struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Held {
    /// Holds more bytes; an error leaves it as it was.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        let Budget { limit, held } = &*self.budget;
        // Nothing but the sum depends on the order.
        held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes).filter(|sum| sum <= limit)
        })
        .map_err(|held| Error::MemoryLimit {
            limit: *limit,
            needed: held.saturating_add(bytes),
            text: format!(
                "{} more were asked for, the model, its sessions and snapshots hold {}; drop \
                 sessions and snapshots that are not needed, or raise the limit",
                readable(bytes),
                readable(held)
            ),
        })?;
        self.bytes += bytes;
        Ok(())
    }

    /// Holds at least this many bytes.
    pub fn grow_to(&mut self, bytes: usize) -> Result<()> {
        self.grow(bytes.saturating_sub(self.bytes))
    }

    /// Hands over some of its bytes. Panics if it holds fewer.
    pub fn split(&mut self, bytes: usize) -> Held {
        assert!(bytes <= self.bytes, "{bytes} of {} bytes", self.bytes);
        self.bytes -= bytes;
        Held { budget: self.budget.clone(), bytes }
    }

    /// As many bytes again.
    pub fn again(&self) -> Result<Held> {
        self.budget.hold(self.bytes)
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn bytes_are_held_until_they_are_dropped() {
        let budget = Budget::new(Some(100));
        let mut a = budget.hold(60).unwrap();
        let Err(Error::MemoryLimit { limit: 100, needed: 101, .. }) = a.grow(41) else {
            panic!("a refusal")
        };
        assert_eq!(budget.held(), 60);
        a.grow_to(50).unwrap();
        a.grow_to(70).unwrap();
        let part = a.split(30);
        assert!(a.again().is_err() && part.again().is_ok());
        assert_eq!(budget.held(), 70);
        drop(a);
        assert_eq!(budget.held(), 30);
        drop(part);
        assert_eq!(budget.held(), 0);
        let unlimited = Budget::new(None);
        let _most = unlimited.hold(usize::MAX).unwrap();
        assert!(unlimited.hold(1).is_err());
    }

    #[test]
    fn threads_never_hold_more_than_the_limit() {
        let budget = Budget::new(Some(1000));
        let hold = || {
            let mut held: Vec<Held> = Vec::new();
            while let Ok(more) = budget.hold(7) {
                held.push(more);
                assert!(budget.held() <= 1000);
            }
            held
        };
        let held: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(hold)).collect();
            threads.into_iter().map(|t| t.join().expect("no panic").len()).sum()
        });
        // Each stopped when fewer than 7 were left; what they gave back came later.
        assert!(held * 7 <= 4 * 1000 && budget.held() == 0);
    }
}
