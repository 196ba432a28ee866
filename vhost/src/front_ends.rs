//! The front ends that are connected to a disk: which of them the worker serves, and how to tell them of a change.
//!
//! Several may be connected, because the target of a live migration connects and asks its questions long before the
//! source lets go. The worker serves one: the one whose rings run. A front end takes the seat with its first ring and
//! gives it up with its last, or with its connection; one that finds the seat taken waits a while for it.
//!
//! A front end that gave us a channel for requests of ours (BACKEND_REQ) is told over it when the configuration has
//! changed. The message is sent without waiting for room or an answer: a front end that does not read misses it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Front ends connected to one disk at a time.
pub(crate) const FRONT_ENDS_MAX: usize = 4;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request 2, flags: version 1, no body.
const CONFIG_CHANGED: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Names a connection.
pub(crate) type FrontEndId = u64;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct FrontEnds {
    state: Mutex<State>,
    /// The seat became free.
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last_id: FrontEndId,
    served: Option<FrontEndId>,
    connected: Vec<FrontEnd>,
}

#[derive(Debug)]
struct FrontEnd {
    id: FrontEndId,
    channel: Option<UnixStream>,
}

impl FrontEnds {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A front end connected.
    pub(crate) fn enter(&self) -> FrontEndId {
        let mut state = self.lock();
        state.last_id += 1;
        let id = state.last_id;
        state.connected.push(FrontEnd { id, channel: None });
        id
    }

    /// A front end is gone, and the worker has forgotten its rings.
    pub(crate) fn leave(&self, id: FrontEndId) {
        self.release(id);
        self.lock().connected.retain(|front_end| front_end.id != id);
    }

    /// Number of front ends.
    pub(crate) fn count(&self) -> usize {
        self.lock().connected.len()
    }

    /// The worker serves this one.
    pub(crate) fn serves(&self, id: FrontEndId) -> bool {
        self.lock().served == Some(id)
    }

    /// Takes the seat for `id`, which must not have it, once it is free. False if it is not within `patience`.
    pub(crate) fn claim(&self, id: FrontEndId, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        while state.served.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.freed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.served = Some(id);
        true
    }

    /// Gives the seat up, if `id` has it.
    pub(crate) fn release(&self, id: FrontEndId) {
        let mut state = self.lock();
        if state.served == Some(id) {
            state.served = None;
            self.freed.notify_all();
        }
    }

    /// Where front end `id` takes requests of ours.
    pub(crate) fn set_channel(&self, id: FrontEndId, channel: UnixStream) {
        let mut state = self.lock();
        if let Some(front_end) = state.connected.iter_mut().find(|front_end| front_end.id == id) {
            front_end.channel = Some(channel);
        }
    }

    /// Tells every front end that can be told to read the configuration again.
    pub(crate) fn config_changed(&self) {
        for front_end in &self.lock().connected {
            front_end.tell();
        }
    }

    /// Tells front end `id` to read the configuration again, if it can be told.
    pub(crate) fn config_may_have_changed(&self, id: FrontEndId) {
        if let Some(front_end) = self.lock().connected.iter().find(|front_end| front_end.id == id) {
            front_end.tell();
        }
    }
}

impl FrontEnd {
    fn tell(&self) {
        let Some(channel) = &self.channel else { return };
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (message, len) = (CONFIG_CHANGED.as_ptr().cast(), CONFIG_CHANGED.len());
        // SAFETY: a plain system call on an open descriptor and a buffer of that length.
        let sent = unsafe { libc::send(channel.as_raw_fd(), message, len, flags) };
        if sent != len as isize {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, "a front end was not told that the disk's configuration has changed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_seat_is_one_front_ends_until_it_lets_go() {
        let front_ends = FrontEnds::default();
        let (first, second) = (front_ends.enter(), front_ends.enter());
        assert!(front_ends.claim(first, Duration::ZERO));
        assert!(!front_ends.claim(second, Duration::ZERO));
        front_ends.release(second);
        assert!(front_ends.serves(first));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| front_ends.claim(second, Duration::from_secs(60)));
            front_ends.leave(first);
            assert!(waiting.join().unwrap());
        });
        assert!(front_ends.serves(second) && front_ends.count() == 1);
    }

    #[test]
    fn a_front_end_that_does_not_read_holds_nobody_up() {
        let front_ends = FrontEnds::default();
        let id = front_ends.enter();
        front_ends.config_changed();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        front_ends.set_channel(id, ours);
        for _ in 0..100_000 {
            front_ends.config_changed();
        }
        let mut first = [0; 12];
        theirs.read_exact(&mut first).unwrap();
        assert_eq!(first, CONFIG_CHANGED);
        drop(theirs);
        front_ends.config_may_have_changed(id);
    }
}
