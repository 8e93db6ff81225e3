//! What the pool takes from the standard library, or from loom, which runs a test in every order of
//! events that the memory model allows (`RUSTFLAGS="--cfg loom"`).

#[cfg(loom)]
pub use loom::{
    cell::UnsafeCell,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};
use std::time::Duration;
#[cfg(not(loom))]
pub use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

/// Looks again and again, for `time`, for what `ready` may find.
#[cfg(not(loom))]
pub fn spin<T>(time: Duration, ready: impl Fn() -> Option<T>) -> Option<T> {
    let start = std::time::Instant::now();
    loop {
        for _ in 0..64 {
            if let Some(found) = ready() {
                return Some(found);
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > time {
            return None;
        }
    }
}

/// Loom has no time: one look stands for any number of them.
#[cfg(loom)]
pub fn spin<T>(_time: Duration, ready: impl Fn() -> Option<T>) -> Option<T> {
    ready()
}

/// The standard cell with loom's interface, which records the accesses.
#[cfg(not(loom))]
pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub fn new(value: T) -> UnsafeCell<T> {
        UnsafeCell(std::cell::UnsafeCell::new(value))
    }

    pub fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    pub fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
