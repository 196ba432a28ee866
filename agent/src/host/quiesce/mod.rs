//! Guests that are frozen for a snapshot, and that this agent owes a thaw.
//!
//! A debt begins before the first byte of the freeze is sent, with a note in the run directory, and ends when the guest agent says that the
//! guest is thawed, or when there is no virtual machine any more. In between it is never without an owner:
//!
//! * the request, which thaws whatever became of freeze and snapshot, its caller gone or not;
//! * if that does not succeed in its time, or the request ends in any other way, a task that tries for as long as the agent lives;
//! * if the agent is killed, the note: the next agent in this run directory thaws. Until then the guest's disk stands still anyway, as it is
//!   this agent that serves it.
//!
//! `snapshots` takes snapshots meanwhile.

mod snapshots;
#[cfg(test)]
mod tests;

use super::notes::now_ms;
use crate::api::FrozenGuest;
use crate::error::{Failure, Kind, Result};
use crate::guest_agent::Times;
use crate::guest_agent::freezing::Guest;
use crate::guest_agent::wire::Trouble;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

const FILE: &str = "frozen-guests.json";
/// Between two attempts of a request.
const PAUSE: Duration = Duration::from_millis(200);
/// Between two attempts later on: the first, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

/// All guests that are in somebody's hands.
#[derive(Debug)]
pub(super) struct Quiescing {
    file: PathBuf,
    /// By the socket of their agents. Held for moments only.
    guests: Mutex<BTreeMap<PathBuf, InHand>>,
    /// Requests that have a guest in hand; and whether the agent is stopping, so that they are to let go.
    requests: watch::Sender<usize>,
    stopping: watch::Sender<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum InHand {
    /// It was not told to freeze yet.
    Asked,
    /// It was, and the request that did goes on.
    Frozen(Note),
    /// That request has ended; the last attempt to thaw failed for this reason.
    Owed(Note, String),
}

/// What the run directory remembers of a debt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// When it began, in milliseconds of UNIX time.
    since: u64,
}

impl InHand {
    fn note(&self) -> Option<&Note> {
        match self {
            Self::Asked => None,
            Self::Frozen(note) | Self::Owed(note, _) => Some(note),
        }
    }
}

/// What became of something that was done to a frozen guest.
#[derive(Debug)]
pub(super) struct Ended<T> {
    /// How many file systems froze; an error: nothing was done.
    pub frozen: Result<u64>,
    /// What was done, if they froze.
    pub done: Option<Result<T>>,
    /// Why they may have been thawed before it was done.
    pub not_held: Option<String>,
    /// From the answer to the freeze to the end of the thaw.
    pub time: Duration,
    /// An error: the guest may still be frozen; the agent goes on trying.
    pub thawed: Result<()>,
}

impl<T> Ended<T> {
    /// Before a thaw was owed.
    fn before(failure: Failure) -> Self {
        let (done, not_held, time) = (None, None, Duration::ZERO);
        Self { frozen: Err(failure), done, not_held, time, thawed: Ok(()) }
    }
}

impl Quiescing {
    /// Takes over what the last agent owed, and begins to pay it.
    pub fn open(run_dir: &Path) -> Arc<Self> {
        let file = run_dir.join(FILE);
        let notes = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(std::io::Error::from),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        let notes: BTreeMap<PathBuf, Note> = notes.unwrap_or_else(|error| {
            let file = file.display();
            tracing::error!(
                "{file} cannot be read ({error}): guests that were frozen for a snapshot when the last agent ended may still be; \
                 'echo j > /proc/sysrq-trigger' in a Linux guest thaws it"
            );
            BTreeMap::new()
        });
        let words = "the agent was ended before it had thawed it";
        let owed = |note| InHand::Owed(note, words.to_owned());
        let guests: BTreeMap<_, _> =
            notes.into_iter().map(|(socket, note)| (socket, owed(note))).collect();
        let sockets: Vec<_> = guests.keys().cloned().collect();
        let (requests, stopping) = (watch::Sender::new(0), watch::Sender::new(false));
        let quiescing = Arc::new(Self { file, guests: Mutex::new(guests), requests, stopping });
        for socket in sockets {
            tracing::warn!(guest_agent = %socket.display(), "a guest was frozen for a snapshot when the last agent ended: thawing it");
            let guest = Guest::new(&socket, Times::default());
            tokio::spawn(pay(Arc::clone(&quiescing), socket, guest, Duration::ZERO));
        }
        quiescing
    }

    /// Guests that are owed a thaw which did not succeed so far.
    pub fn owed(&self) -> Vec<FrozenGuest> {
        let guests = self.guests.lock();
        let owed = guests.iter().filter_map(|(socket, state)| match state {
            InHand::Owed(note, why) => Some(FrozenGuest {
                guest_agent: socket.clone(),
                since: note.since,
                why: why.clone(),
            }),
            _ => None,
        });
        owed.collect()
    }

    /// Has requests let go of their guests, and returns when they have thawed them, or at the deadline. What is owed then is
    /// the next agent's.
    pub async fn settle(&self, deadline: Instant) {
        self.stopping.send_replace(true);
        let mut requests = self.requests.subscribe();
        let _ = timeout_at(deadline, requests.wait_for(|requests| *requests == 0)).await;
        for (socket, _) in self.guests.lock().iter().filter(|(_, state)| state.note().is_some()) {
            tracing::error!(
                guest_agent = %socket.display(),
                "the agent stops, and a guest may still be frozen: start the agent again in the same run directory to have it thawed, \
                 or thaw it by 'echo j > /proc/sysrq-trigger' in a Linux guest"
            );
        }
    }

    /// Freezes the guest whose agent is at `socket`, does `what`, and thaws the guest, whatever came of either. To be run to its end.
    pub async fn frozen<T>(
        self: &Arc<Self>,
        socket: &Path,
        times: Times,
        what: impl Future<Output = Result<T>>,
    ) -> Ended<T> {
        let mut debt = match self.take_in_hand(socket, times) {
            Ok(debt) => debt,
            Err(failure) => return Ended::before(failure),
        };
        let mut stop = self.stopping.subscribe();
        let begun = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => Err(stopping()),
            prepared = debt.guest.prepare() => match prepared {
                Ok(false) => debt.begin(),
                Ok(true) => Err(Failure::new(
                    Kind::Conflict,
                    "the guest is frozen already, by something else: take the snapshot when that has thawed it; if nothing else \
                     froze it, 'echo j > /proc/sysrq-trigger' in a Linux guest thaws it",
                )),
                Err(trouble) => Err(advised(&trouble, times)),
            },
        };
        if let Err(failure) = begun {
            return Ended::before(failure.within(format_args!("guest agent {}", socket.display())));
        }
        let frozen = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => Err(stopping()),
            frozen = debt.guest.freeze() => match frozen {
                Ok(0) => Err(Failure::new(
                    Kind::Failed,
                    "it froze no file system: the guest has none mounted that it could freeze",
                )),
                Ok(count) => Ok(count),
                Err(trouble) => Err(advised(&trouble, times)),
            },
        };
        let frozen = frozen
            .map_err(|failure| failure.within(format_args!("guest agent {}", socket.display())));
        let since = Instant::now();
        let done = match frozen {
            Ok(_) => Some(tokio::select! {
                done = what => done,
                _ = stop.wait_for(|stop| *stop) => Err(Failure::new(
                    Kind::Unavailable,
                    "the agent is stopping; snapshots may be taken all the same, not known to be of a frozen guest: 'ballast snap \
                     list' shows them",
                )),
            }),
            Err(_) => None,
        };
        let thawed = debt.pay(times.thaw).await;
        let not_held = debt.guest.why_not_held();
        Ended { frozen, done, not_held, time: since.elapsed(), thawed }
    }

    fn take_in_hand(self: &Arc<Self>, socket: &Path, times: Times) -> Result<Debt> {
        let mut guests = self.guests.lock();
        let agent = socket.display();
        let words = match guests.get(socket) {
            None => {
                guests.insert(socket.to_owned(), InHand::Asked);
                drop(guests);
                self.requests.send_modify(|requests| *requests += 1);
                let (quiescing, guest) = (Arc::clone(self), Guest::new(socket, times));
                let debt = Debt { quiescing, guest, socket: socket.to_owned(), paid: false };
                // Looked at after the request was counted: `settle` waits for it, or it ends here.
                return if *self.stopping.borrow() { Err(stopping()) } else { Ok(debt) };
            }
            Some(InHand::Owed(_, why)) => format!(
                "the guest with the agent {agent} may still be frozen for an earlier snapshot ({why}): see 'ballast status'"
            ),
            Some(_) => {
                format!("another snapshot with the guest agent {agent} is under way: try again")
            }
        };
        Err(Failure::new(Kind::Conflict, words))
    }

    /// Changes how a guest is, and the notes with it; None: it is in nobody's hands any more.
    fn set(&self, socket: &Path, state: Option<InHand>) -> std::io::Result<()> {
        let mut guests = self.guests.lock();
        match state {
            Some(state) => guests.insert(socket.to_owned(), state),
            None => guests.remove(socket),
        };
        let notes: BTreeMap<&PathBuf, &Note> =
            guests.iter().filter_map(|(socket, state)| Some((socket, state.note()?))).collect();
        // Of a host that fails no guest is left, so that a kill is all that the note must survive.
        let beside = self.file.with_extension("json.new");
        let text = serde_json::to_vec_pretty(&notes)?;
        std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, &self.file))
    }

    fn forget(&self, socket: &Path) {
        if let Err(error) = self.set(socket, None) {
            // The next agent thaws a guest that is not frozen, which does nothing.
            tracing::warn!("cannot write {}: {error}", self.file.display());
        }
    }

    fn owe(&self, socket: &Path, why: String) {
        let known = self.guests.lock().get(socket).and_then(|state| state.note().cloned());
        let note = known.unwrap_or_else(|| Note { since: now_ms() });
        if let Err(error) = self.set(socket, Some(InHand::Owed(note, why))) {
            tracing::warn!("cannot write {}: {error}", self.file.display());
        }
    }
}

/// A guest in the hands of a request. Dropped before it is thawed, as by a panic, it is thawed by a task of its own.
#[derive(Debug)]
struct Debt {
    quiescing: Arc<Quiescing>,
    socket: PathBuf,
    guest: Guest,
    /// The guest is in nobody's hands any more, or already in another's.
    paid: bool,
}

impl Debt {
    /// From here on a thaw is owed.
    fn begin(&self) -> Result<()> {
        let note = Note { since: now_ms() };
        self.quiescing.set(&self.socket, Some(InHand::Frozen(note))).map_err(|error| {
            // Nothing is owed: nothing was sent.
            self.quiescing.guests.lock().insert(self.socket.clone(), InHand::Asked);
            let file = self.quiescing.file.display();
            let words = format!("without a note in {file} no guest is frozen ({error})");
            Failure::new(Kind::Failed, words)
        })
    }

    /// Thaws, in `patience` at most; what is left to do is then left to a task.
    async fn pay(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let mut why = None;
        loop {
            match timeout_at(deadline, self.guest.thaw()).await {
                Ok(Ok(())) => break,
                Ok(Err(Trouble::Absent(_))) => {
                    tracing::warn!(
                        guest_agent = %self.socket.display(),
                        "a frozen guest is gone: nothing is to be thawed, unless it was migrated, or its socket was removed"
                    );
                    break;
                }
                Ok(Err(trouble)) => why = Some(trouble.to_string()),
                Err(_) => {
                    let why = why.unwrap_or_else(|| format!("no answer within {patience:?}"));
                    tracing::error!(
                        guest_agent = %self.socket.display(),
                        "a guest was frozen for a snapshot and could not be thawed ({why}): trying on; \
                         'echo j > /proc/sysrq-trigger' in a Linux guest thaws it"
                    );
                    self.quiescing.owe(&self.socket, why.clone());
                    return Err(Failure::new(Kind::GuestFrozen, why));
                }
            }
            let _ = timeout_at(deadline, tokio::time::sleep(PAUSE)).await;
        }
        self.paid = true;
        self.quiescing.forget(&self.socket);
        Ok(())
    }
}

impl Drop for Debt {
    fn drop(&mut self) {
        self.quiescing.requests.send_modify(|requests| *requests -= 1);
        if self.paid {
            return;
        }
        let state = self.quiescing.guests.lock().get(&self.socket).cloned();
        match state {
            None => {}
            Some(InHand::Asked) => self.quiescing.forget(&self.socket),
            Some(InHand::Frozen(_) | InHand::Owed(..)) => {
                if matches!(state, Some(InHand::Frozen(_))) {
                    self.quiescing.owe(&self.socket, "its request ended early".into());
                }
                let guest =
                    std::mem::replace(&mut self.guest, Guest::new(&self.socket, Times::default()));
                let (quiescing, socket) = (Arc::clone(&self.quiescing), self.socket.clone());
                // Outside of the runtime the process is ending, and the note stays.
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(pay(quiescing, socket, guest, PAUSES[0]));
                }
            }
        }
    }
}

/// Thaws a guest, however long that takes.
async fn pay(quiescing: Arc<Quiescing>, socket: PathBuf, mut guest: Guest, first: Duration) {
    let (mut wait, agent) = (first, socket.display());
    loop {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).clamp(PAUSES[0], PAUSES[1]);
        match guest.thaw().await {
            Ok(()) => tracing::info!(guest_agent = %agent, "the guest is thawed"),
            Err(Trouble::Absent(_)) => {
                tracing::info!(guest_agent = %agent, "the guest is gone: nothing is to be thawed");
            }
            Err(trouble) => {
                tracing::debug!(guest_agent = %agent, "not thawed yet: {trouble}");
                quiescing.owe(&socket, trouble.to_string());
                continue;
            }
        }
        return quiescing.forget(&socket);
    }
}

fn stopping() -> Failure {
    Failure::new(Kind::Unavailable, "the agent is stopping; try again when it has started")
}

/// Trouble with a guest agent before anything was frozen for good, and what helps.
fn advised(trouble: &Trouble, times: Times) -> Failure {
    let (kind, advice) = match trouble {
        Trouble::Absent(_) => (
            Kind::NotFound,
            "give the socket on which QEMU has its channel org.qemu.guest_agent.0, of a virtual machine that runs".to_owned(),
        ),
        Trouble::Silent { asked: "guest-fsfreeze-freeze", .. } => (
            Kind::Failed,
            "the guest did not write everything out in that time: try again when it is less busy, or with a longer \
             --freeze-timeout".to_owned(),
        ),
        Trouble::Silent { .. } => (
            Kind::Failed,
            format!(
                "either no qemu-ga runs in the guest, or something else holds the socket, as libvirt does: for its virtual \
                 machines use 'virsh domfsfreeze' and 'virsh domfsthaw' around 'ballast snap create' (waited {:?})",
                times.answer
            ),
        ),
        Trouble::Refused { .. } => (
            Kind::Failed,
            "see the settings of qemu-ga in the guest, and its hooks".to_owned(),
        ),
        Trouble::Broken(_) | Trouble::Garbled { .. } => (
            Kind::Failed,
            "is this the socket of a guest agent, and used by nobody else?".to_owned(),
        ),
    };
    Failure::new(kind, format!("{trouble}; {advice}"))
}
