//! Clones that leave this host again: given up (`giving_up.rs`), or detached (`detaching.rs`), and then deleted, rolled back (`rolling_back.rs`) or
//! simply attached again; and those that get another name in the store (`taken.rs`).
//!
//! The simulator stands in for the agent's host layer here: what is done, and in which order, is that of the agent's
//! `host/clones.rs`, `host/served.rs`, `host/requests.rs` and `host/rewind.rs`. A machine that uses a disk is stopped first.

use crate::crew::Crew;
use crate::host::{Agent, Refused, again, few};
use crate::model::{Model, Rollback};
use crate::serving::Manner;
use crate::taken::Takers;
use crate::worker::Worker;
use blockstore::format::vdi::Origin;
use blockstore::{SnapshotHold, SnapshotHolds};
use cache::disk::AttachedDisk;
use cache::{AttachedRecord, CacheError};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use uuid::Uuid;

/// What is drawn for this begins with the seed and this.
const PARTS: u64 = 0x9a27;
/// So much longer a life may last for what happens to clones, milliseconds.
const LASTS_MS: u64 = 60_000;

/// What of this a seed has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Others take the names of clones that the store does not know of.
    pub takes_names: bool,
    /// Clones that the store does not know of are given up.
    pub gives_up: bool,
    /// Clones are detached, and deleted or attached again.
    pub detaches: bool,
    /// Those that are detached are rolled back.
    pub rolls_back: bool,
}

impl Plan {
    /// Of a seed in which clones are served.
    pub fn draw(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ PARTS);
        if !rng.random_bool(0.7) {
            return Self::default();
        }
        let detaches = rng.random_bool(0.6);
        Self {
            takes_names: rng.random_bool(0.5),
            gives_up: rng.random_bool(0.5),
            detaches,
            rolls_back: detaches && rng.random_bool(0.6),
        }
    }

    pub fn is_any(self) -> bool {
        self.takes_names || self.gives_up || self.detaches
    }
}

/// What happened to clones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub renamed: u64,
    pub given_up: u64,
    pub detached: u64,
    pub deleted: u64,
    pub rolled_back: u64,
}

/// What outlives the agent.
#[derive(Debug)]
pub struct Lasting {
    pub rng: SmallRng,
    pub takers: Takers,
    pub tally: Arc<Mutex<Tally>>,
}

impl Lasting {
    pub fn new(seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(!seed ^ PARTS);
        Self { rng, takers: Takers::default(), tally: Arc::default() }
    }
}

/// What is known of a disk that leaves this host.
#[derive(Clone, Debug, Default)]
pub struct Parted {
    /// It is given up, and nobody heard how that went.
    pub may_be_given_up: bool,
    /// Its deletion was asked for, likewise.
    pub may_be_deleted: bool,
    /// It is none, and may be in the store all the same: what was asked of that last had no answer.
    pub may_be_in_store: bool,
    /// The cache has nothing of it: that was answered.
    pub left_cache: bool,
    /// The cache may have nothing of it: it was detached, and has not come back.
    pub may_have_left: bool,
    /// The name that the cache has noted durably, if it is not the first one.
    pub name_here: Option<String>,
    pub rollback: Option<Rollback>,
    /// It was rolled back since it was detached.
    pub was_rolled_back: bool,
}

/// How a disk's worker ends before its life does.
#[derive(Debug, Default)]
pub struct Exit {
    guest_is_gone: Cell<bool>,
    is_asked: Cell<bool>,
    disk: RefCell<Option<AttachedDisk>>,
    left: Notify,
}

impl Exit {
    /// The machine was stopped: nobody waits for answers.
    pub fn guest_is_gone(&self) -> bool {
        self.guest_is_gone.get()
    }

    /// The server is to end.
    pub fn is_asked(&self) -> bool {
        self.is_asked.get()
    }

    /// The worker has ended, and its log is sealed.
    pub fn leave(&self, disk: AttachedDisk) {
        *self.disk.borrow_mut() = Some(disk);
        self.left.notify_one();
    }

    async fn stopped(&self) -> AttachedDisk {
        self.guest_is_gone.set(true);
        self.is_asked.set(true);
        loop {
            if let Some(disk) = self.disk.take() {
                return disk;
            }
            self.left.notified().await;
        }
    }
}

/// A clone on this host, as the agent's `Served`.
#[derive(Debug, Default)]
pub struct Seat {
    /// Held during a transition.
    pub handle: tokio::sync::Mutex<()>,
    pub is_gone: Cell<bool>,
    /// This agent made it, and has not told the store of it.
    pub is_known_here_only: Cell<bool>,
    /// The store was told of it, and has not said how that went.
    pub is_unsure: Cell<bool>,
    exit: RefCell<Option<Rc<Exit>>>,
    hold: RefCell<Option<SnapshotHold>>,
}

impl Seat {
    pub fn guest_leaves(&self) {
        if let Some(exit) = &*self.exit.borrow() {
            exit.guest_is_gone.set(true);
        }
    }

    /// False if there is no server that it could come back to.
    fn guest_returns(&self) -> bool {
        self.exit.borrow().as_ref().map(|exit| exit.guest_is_gone.set(false)).is_some()
    }
}

/// Of one life.
#[derive(Debug)]
pub struct Parting {
    pub plan: Plan,
    rng: RefCell<SmallRng>,
    seats: RefCell<BTreeMap<usize, Rc<Seat>>>,
    /// Clones that are being made of disks, by these.
    pub being_cloned: RefCell<BTreeMap<usize, u32>>,
    pub takers: Takers,
    tally: Arc<Mutex<Tally>>,
}

impl Parting {
    pub fn new(plan: Plan, lasting: &mut Lasting) -> Self {
        Self {
            plan,
            rng: RefCell::new(SmallRng::seed_from_u64(lasting.rng.random())),
            seats: RefCell::default(),
            being_cloned: RefCell::default(),
            takers: Arc::clone(&lasting.takers),
            tally: Arc::clone(&lasting.tally),
        }
    }

    /// One of its own for whatever comes next.
    pub fn rng(&self) -> SmallRng {
        SmallRng::seed_from_u64(self.rng.borrow_mut().random())
    }

    pub fn seat(&self, n: usize) -> Rc<Seat> {
        Rc::clone(self.seats.borrow_mut().entry(n).or_default())
    }

    /// Whoever still holds its seat is late.
    pub fn left(&self, n: usize) {
        if let Some(seat) = self.seats.borrow_mut().remove(&n) {
            seat.is_gone.set(true);
            seat.hold.take();
        }
    }

    pub fn count(&self, what: impl FnOnce(&mut Tally)) {
        what(&mut self.tally.lock());
    }

    /// A new worker's exit, if there are any in this seed.
    pub fn exit(&self, n: usize) -> Option<Rc<Exit>> {
        let exit = self.plan.is_any().then(Rc::<Exit>::default)?;
        *self.seat(n).exit.borrow_mut() = Some(Rc::clone(&exit));
        Some(exit)
    }

    /// Holds what a clone began as until the store knows of it; elsewhere the caller does.
    pub fn hold(
        &self,
        n: usize,
        holds: &Arc<SnapshotHolds>,
        origin: Origin,
    ) -> Option<SnapshotHold> {
        let hold = holds.hold(origin.vdi, origin.lsn);
        if !self.plan.is_any() {
            return Some(hold);
        }
        *self.seat(n).hold.borrow_mut() = Some(hold);
        None
    }

    /// The store knows of it.
    pub fn let_go_of_origin(&self, n: usize) {
        self.seat(n).hold.take();
    }

    /// A clone of a disk is made out of its log: it does not leave meanwhile.
    pub async fn begin_cloning(&self, n: usize) -> Option<BeingCloned<'_>> {
        if !self.plan.is_any() {
            return None;
        }
        let seat = self.seat(n);
        let _handle = seat.handle.lock().await;
        *self.being_cloned.borrow_mut().entry(n).or_default() += 1;
        Some(BeingCloned { parting: self, n })
    }
}

/// While a clone is made.
pub struct BeingCloned<'a> {
    parting: &'a Parting,
    n: usize,
}

impl Drop for BeingCloned<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.parting.being_cloned.borrow_mut().get_mut(&self.n) {
            *count -= 1;
        }
    }
}

/// What the cache has of disks that left it, and as what it knows those that were renamed.
pub fn check_parted(records: &[AttachedRecord], model: &Model, may_have_lost: bool) {
    let uuid = model.uuid;
    let Some(record) = records.iter().find(|record| Some(record.vdi) == uuid) else { return };
    let (name, parted) = (&model.name, &model.parted);
    assert!(!parted.left_cache || may_have_lost, "{name} left the cache, and is there");
    if let Some(known) = parted.name_here.as_ref().filter(|_| record.was_served) {
        let found = &record.name;
        assert!(found == known || may_have_lost, "{known} is called {found} in the cache again");
    }
}

impl Agent {
    /// A disk is served until its life ends, or it leaves.
    pub async fn run(&self, worker: Worker) -> Option<Worker> {
        worker.run().await.leave()
    }

    pub fn uuid_of(&self, n: usize) -> Uuid {
        self.models.get(n).lock().uuid.expect("it was served")
    }

    /// Has clones leave, now and then, for ever. A life of a few requests may be too short for that: it lasts for a while longer.
    pub async fn part_with_clones(&self, manner: &Manner, crew: &Crew) -> Result<(), Refused> {
        let mut rng = self.parting.rng();
        let lasts = Duration::from_millis(rng.random_range(0..=LASTS_MS));
        let orders = &manner.orders;
        orders.wanting.update(|wanting| wanting + 1);
        let lasting = async {
            tokio::time::sleep(lasts).await;
            orders.wanting.update(|wanting| wanting.saturating_sub(1));
            std::future::pending().await
        };
        tokio::select! {
            biased;
            refused = self.part_with_some(manner, crew) => refused,
            () = lasting => Ok(()),
        }
    }

    async fn part_with_some(&self, manner: &Manner, crew: &Crew) -> Result<(), Refused> {
        let mut rng = self.parting.rng();
        for round in 0_u32.. {
            let pause = Duration::from_millis(few(&mut rng, 8_000));
            tokio::time::sleep(pause * (1 + round / 50)).await;
            if manner.last || manner.orders.wind_down.get() {
                break;
            }
            let mut there = self.served_clones();
            there.retain(|n| self.parting.plan.detaches && self.vdis.lock().contains_key(n));
            if !there.is_empty() {
                let n = there[rng.random_range(0..there.len())];
                self.part_with(n, &mut rng, manner, crew).await?;
            }
        }
        std::future::pending().await
    }

    async fn part_with(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        if rng.random_bool(0.6) {
            self.cut_alone(n, self.uuid_of(n)).await;
        }
        self.parting.seat(n).guest_leaves();
        if !self.detach(n, rng, manner).await? {
            return self.go_on(n, rng, manner, crew).await;
        }
        self.parting.count(|tally| tally.detached += 1);
        match rng.random_range(0..10) {
            0..3 if self.delete(n, rng, manner).await? => return Ok(()),
            3.. if self.parting.plan.rolls_back => self.roll_back(n, rng, manner).await?,
            _ => {}
        }
        let own = SmallRng::seed_from_u64(rng.random());
        self.serve_joined(n, own, manner, crew).await
    }

    /// What was refused: the guest comes back, to its server or, if that is gone, to a new one.
    pub async fn go_on(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        let (seat, uuid) = (self.parting.seat(n), self.uuid_of(n));
        if seat.guest_returns() {
            return Ok(());
        }
        let _handle = seat.handle.lock().await;
        // Or somebody else brought it back, or took it away.
        if seat.is_gone.get() || seat.guest_returns() || self.cache.vdi_status(uuid).is_none() {
            return Ok(());
        }
        let identity = self.cache.identity().await;
        let (log_id, _) = self.cache.log_of(uuid).await.expect("it is here");
        let stated = self.stated(identity.cache, uuid, log_id);
        let attached = loop {
            match self.cache.reopen(uuid).await {
                Ok(attached) => break attached,
                Err(error) => again("reopening a log", &error, self.may_have_lost).await?,
            }
        };
        self.models.get(n).lock().recovered(attached.disk.staged_lsn().0, stated);
        self.begin_guest(n, attached, rng, manner, crew);
        Ok(())
    }

    /// Ends its server and seals its log; the flusher goes on. Does nothing if there is none.
    pub async fn stop_server(&self, n: usize) -> Result<(), CacheError> {
        let exit = self.parting.seat(n).exit.take();
        let Some(exit) = exit else { return Ok(()) };
        let disk = exit.stopped().await;
        self.cache.release(self.uuid_of(n), disk).await?;
        let model = self.models.get(n);
        let mut model = model.lock();
        model.flushed = model.last_lsn();
        Ok(())
    }
}
