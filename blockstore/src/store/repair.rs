//! Holding a store alone, to repair it.
//!
//! Order: the host table says that nobody uses the store, or the operator does; the repair enters the table, as one more host, so
//! that agents are refused from here on; nothing has changed since the store was examined; only then blocks are written.
//! A repair that is killed leaves its record up: agents are refused until a repair on the same machine came to its end.
//!
//! Hosts that the table says are up, and are not by the operator's word, may have commands under way: a head that lands late would
//! name blocks that were found unreachable. So their records are set down and every head is raised by one compare-and-write first,
//! as a host does that returns (rule C2).

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::bitmap::BitmapKind;
use crate::format::gc::GcRecord;
use crate::format::head::{Damage, Record};
use crate::format::host::{HostRecord, HostState};
use crate::format::vdi::VdiHead;
use crate::io::now_ms;
use crate::slot::{Content, Slot, Swap, View};
use crate::store::verify::Fix;
use crate::store::{OpenOptions, Store, hosts};
use crate::types::Gba;
use std::sync::Arc;
use uuid::Uuid;

/// The host that a repair is, in the host table.
pub const REPAIR_HOST: Uuid = Uuid::from_u128(0x8a11_a570_0000_4000_8000_0000_00ee_a112);

/// Blocks written, and flushed, at once.
const BATCH: usize = 64;

/// Who repairs.
#[derive(Clone, Debug, Default)]
pub struct Repairer {
    /// The machine's name, for people.
    pub host_name: String,
    /// Tells one machine from another. A repair goes on where one of the same machine was killed.
    pub machine: String,
    /// The operator's word that no agent uses the store, though the host table says so, or cannot be read.
    pub no_host_runs: bool,
}

/// What the store's records were at one moment: while it stays the same, nobody has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    hosts: Vec<(u64, u64)>,
    heads: Vec<(u32, u64)>,
    extents: Vec<u64>,
}

/// A store that is held alone.
#[derive(Debug)]
pub struct Held {
    store: Arc<Store>,
}

impl Store {
    /// What the records are now.
    ///
    /// # Errors
    /// The device's.
    pub async fn fingerprint(&self) -> Result<Fingerprint> {
        let hosts = self.scan_hosts().await?;
        let hosts = hosts.iter().filter(|view| view.record().is_none_or(|r| r.uuid != REPAIR_HOST));
        let hosts = hosts.map(|view| (view.slot.first.0, view.sequence())).collect();
        let heads = self.scan_vdis().await?;
        let heads = heads.iter().map(|(slot, view)| (*slot, view.sequence())).collect();
        let extents = self.scan_extents().await?.iter().map(View::sequence).collect();
        Ok(Fingerprint { hosts, heads, extents })
    }

    /// Makes sure that this version knows all that stands in the store's tables: what it does not know is not damaged.
    ///
    /// # Errors
    /// `NewerVersion` naming the block; the device's.
    pub async fn refuse_if_newer(&self) -> Result<()> {
        let gc = Slot { first: Gba(self.core.geometry().gc_start), paired: true };
        let gc: View<GcRecord> = self.core.records.read(&self.control_io, gc).await?;
        self.known(&gc, "the GC record")?;
        for view in self.scan_hosts().await? {
            self.known(&view, "the host record")?;
        }
        for (_, view) in self.scan_vdis().await? {
            self.known(&view, "the VDI record")?;
        }
        for (number, view) in (0..).zip(self.scan_extents().await?) {
            self.known(&view, "the extent record")?;
            if view.record().is_none_or(|record| !record.ready || record.owner.is_none()) {
                continue;
            }
            for kind in [BitmapKind::Allocation, BitmapKind::Reclaim] {
                for page in self.read_bitmap(kind, number).await? {
                    if let Err(Damage::Newer(version)) = page {
                        return Err(self.newer(&format!("a bitmap of extent {number}"), version));
                    }
                }
            }
        }
        Ok(())
    }

    fn known<T: Record>(&self, view: &View<T>, what: &str) -> Result<()> {
        match view.content {
            Content::Damaged(Damage::Newer(version)) => {
                Err(self.newer(&format!("{what} at block {}", view.slot.first), version))
            }
            _ => Ok(()),
        }
    }

    fn newer(&self, what: &str, version: u16) -> StoreError {
        let words = format!(
            "{what} has version {version}, which this program does not know; repair the store with the version of Ballast that wrote \
             it"
        );
        StoreError::new(StoreErrorKind::NewerVersion, self.url(), words)
    }

    /// Makes sure that nobody uses the store, as far as the host table tells.
    ///
    /// # Errors
    /// `InUse` naming who does; the device's.
    pub async fn refuse_if_used(&self, by: &Repairer) -> Result<()> {
        if by.no_host_runs {
            return Ok(());
        }
        for view in self.scan_hosts().await? {
            match &view.content {
                Content::Valid(head) if is_in_the_way(&head.record, by) => {
                    return Err(self.used(&head.record));
                }
                Content::Damaged(damage) => {
                    let at = view.slot.first;
                    return Err(self.in_the_way(format!(
                        "the host record at block {at} is damaged ({damage}): which host it was, and whether its agent \
                         runs, is not known"
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn used(&self, host: &HostRecord) -> StoreError {
        let age = |ms: u64| now_ms().saturating_sub(ms) / 1000;
        self.in_the_way(format!(
            "the store is in use by host '{}' ({}), up for {} s, last heartbeat {} s ago by its clock",
            host.name,
            host.uuid,
            age(host.up_since_ms),
            age(host.heartbeat_ms)
        ))
    }

    fn in_the_way(&self, what: String) -> StoreError {
        let advice = "stop its agent in good order (SIGTERM), if need be after starting it once more; or, if no agent runs on \
             any host for certain, give --no-host-runs";
        StoreError::new(StoreErrorKind::InUse, self.url(), format!("{what}; {advice}"))
    }

    /// Takes the store for a repair, if it still is what `examined` shows. It must have been opened to be only read, on
    /// a device that may be written, and be held against other processes of this machine.
    ///
    /// # Errors
    /// `InUse` naming who uses it; `Changed`; `Invalid` if the device lacks what the store needs; the device's.
    pub async fn hold(self: &Arc<Self>, by: &Repairer, examined: &Fingerprint) -> Result<Held> {
        let core = &self.core;
        if !core.superblock.single_host && !core.io.device().info().compare_and_write {
            return Err(StoreError::new(
                StoreErrorKind::Invalid,
                self.url(),
                "the store needs compare-and-write, which this path to the device does not offer; use another path",
            ));
        }
        self.refuse_if_used(by).await?;
        self.refuse_if_changed(examined).await?;
        // Heads first: a repair that is cut short leaves the hosts up, and the next one raises the heads again.
        let fence = by.no_host_runs && self.others_may_run().await?;
        let heads = if fence { self.raise_heads(examined).await? } else { examined.heads.clone() };
        if fence {
            self.set_others_down().await?;
        }
        let options = OpenOptions {
            host_uuid: REPAIR_HOST,
            host_name: format!("store repair on {}", by.host_name),
            host_address: by.machine.clone(),
            ..OpenOptions::default()
        };
        hosts::register(&core.io, &core.records, core.geometry(), &options).await?;
        let held = Held { store: Arc::clone(self) };
        match self.still_alone(examined, &heads, fence).await {
            Ok(()) => Ok(held),
            Err(error) => {
                held.release().await?;
                Err(error)
            }
        }
    }

    /// An agent that came just before the repair has changed its host record, at least.
    async fn still_alone(
        &self,
        examined: &Fingerprint,
        heads: &[(u32, u64)],
        fence: bool,
    ) -> Result<()> {
        for view in self.scan_hosts().await? {
            let other = view.record().filter(|r| r.uuid != REPAIR_HOST);
            if let Some(other) = other.filter(|r| r.state == HostState::Up) {
                return Err(self.used(other));
            }
        }
        let now = self.fingerprint().await?;
        let same_hosts = fence || now.hosts == examined.hosts;
        if same_hosts && now.heads == heads && now.extents == examined.extents {
            Ok(())
        } else {
            Err(self.changed())
        }
    }

    async fn refuse_if_changed(&self, examined: &Fingerprint) -> Result<()> {
        if self.fingerprint().await? == *examined { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> StoreError {
        let words = "the store changed after it was examined: somebody uses it. Nothing was repaired; try again";
        StoreError::new(StoreErrorKind::Changed, self.url(), words)
    }

    /// Anyone may have commands under way, as far as the host table tells.
    async fn others_may_run(&self) -> Result<bool> {
        Ok(self.scan_hosts().await?.iter().any(|view| match &view.content {
            Content::Damaged(_) => true,
            Content::Valid(head) => {
                head.record.state == HostState::Up && head.record.uuid != REPAIR_HOST
            }
            Content::Unused => false,
        }))
    }

    /// On the operator's word.
    async fn set_others_down(&self) -> Result<()> {
        for view in self.scan_hosts().await? {
            let Some(host) = view.record().filter(|r| r.state == HostState::Up) else { continue };
            if host.uuid == REPAIR_HOST {
                continue;
            }
            tracing::warn!(host = %host.uuid, name = host.name, "set down on the operator's word");
            let down = HostRecord { state: HostState::Down, ..host.clone() };
            let swap = self.core.records.swap(&self.core.io, &view, down).await?;
            swap.done(|| format!("{}, host '{}'", self.url(), host.name))?;
        }
        Ok(())
    }

    /// Commands of a former life that are still under way find other heads than they expect, and an agent that lives in spite
    /// of the operator's word finds that it is not attached any more. Returns the sequences then.
    async fn raise_heads(&self, examined: &Fingerprint) -> Result<Vec<(u32, u64)>> {
        // With two slots in turn, a late write of the next one lands on the slot that one raise has written.
        let times = if self.core.superblock.single_host { 2 } else { 1 };
        let mut raised = Vec::new();
        let views = self.scan_vdis().await?;
        if !views.iter().map(|(slot, view)| (*slot, view.sequence())).eq(examined.heads.clone()) {
            return Err(self.changed());
        }
        for (slot, mut view) in views {
            for _ in 0..times {
                let Some(head) = view.record() else { break };
                let attachment = head.attachment.plus(u64::from(head.owner.is_some()));
                let next = VdiHead { attachment, ..head.clone() };
                match self.core.records.swap(&self.core.io, &view, next).await? {
                    Swap::Done(done) => view = done,
                    Swap::Lost(_) => return Err(self.changed()),
                }
            }
            raised.push((slot, view.sequence()));
        }
        Ok(raised)
    }
}

/// A repair that was killed on this very machine is not.
fn is_in_the_way(host: &HostRecord, by: &Repairer) -> bool {
    host.state == HostState::Up && (host.uuid != REPAIR_HOST || host.address != by.machine)
}

impl Held {
    /// The store.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Writes blocks durably, in this order, some at once.
    ///
    /// # Errors
    /// The device's. Some blocks may be written.
    pub async fn write(&self, fixes: &[Fix]) -> Result<()> {
        for batch in fixes.chunks(BATCH) {
            let writes: Vec<_> =
                batch.iter().map(|fix| (fix.address, vec![fix.block.clone()])).collect();
            self.store.core.io.write_durable(&writes).await?;
        }
        Ok(())
    }

    /// Lets others use the store again.
    ///
    /// # Errors
    /// The device's. Agents are refused until another repair has ended.
    pub async fn release(self) -> Result<()> {
        let store = &self.store;
        let hosts = store.scan_hosts().await?;
        let own = hosts.iter().find(|v| v.record().is_some_and(|r| r.uuid == REPAIR_HOST));
        let Some((view, host)) = own.and_then(|view| Some((view, view.record()?))) else {
            return Ok(());
        };
        let down = HostRecord { state: HostState::Down, heartbeat_ms: now_ms(), ..host.clone() };
        let swap = store.core.records.swap(&store.core.io, view, down).await?;
        swap.done(|| format!("{}, the repair's host record", store.url()))?;
        Ok(())
    }
}
