//! The host table: who uses the store. One agent per store for now.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::geometry::Geometry;
use crate::format::host::{HostRecord, HostState};
use crate::io::{Io, now_ms};
use crate::slot::{Content, Records, Slot, Swap, View};
use crate::store::{OpenOptions, REPAIR_HOST};
use crate::types::Generation;

/// How often a host tries to enter the table while its place there changes.
const REGISTER_ATTEMPTS: u32 = 8;

/// Slots that are read at once by who does not need all of the table.
const RUN_SLOTS: u32 = 4;

/// Every used slot of the host table.
pub(super) async fn scan(
    io: &Io,
    records: &Records,
    g: &Geometry,
) -> Result<Vec<View<HostRecord>>> {
    Ok(read_table(io, records, g)
        .await?
        .into_iter()
        .filter(|v| v.content != Content::Unused)
        .collect())
}

/// The places of the host table up to the first that was never used, that one among them: who enters takes it, or has one of
/// those before.
pub(super) async fn read_used(
    io: &Io,
    records: &Records,
    g: &Geometry,
) -> Result<Vec<View<HostRecord>>> {
    let mut views: Vec<View<HostRecord>> = Vec::new();
    while (views.len() as u32) < g.host_slots {
        let next = views.len() as u32;
        let first = Slot { first: g.host_slot(next), paired: true };
        let count = RUN_SLOTS.min(g.host_slots - next);
        for view in records.read_run(io, first, u64::from(count)).await? {
            let is_last = view.content == Content::Unused;
            views.push(view);
            if is_last {
                return Ok(views);
            }
        }
    }
    Ok(views)
}

async fn read_table(io: &Io, records: &Records, g: &Geometry) -> Result<Vec<View<HostRecord>>> {
    let first = Slot { first: g.host_slot(0), paired: true };
    records.read_run(io, first, u64::from(g.host_slots)).await
}

/// Enters this host in the table, one generation on, and returns that generation.
///
/// The record that is found may be one that changes once more: a command of an earlier incarnation, or of an attempt that
/// failed, may land late, and what one that died did not flush may be gone when the target restarts. Then the table is read
/// again and judged anew.
///
/// # Errors
/// `InUse` by another host, `NoSpace`, `NotOwner` if this host was evicted; the device's.
pub(super) async fn register(
    io: &Io,
    records: &Records,
    g: &Geometry,
    options: &OpenOptions,
) -> Result<Generation> {
    let mut attempts_left = REGISTER_ATTEMPTS;
    loop {
        attempts_left -= 1;
        match try_register(io, records, g, options).await? {
            (generation, Swap::Done(_)) => return Ok(generation),
            (_, Swap::Lost(_)) if attempts_left > 0 => {
                tracing::info!(
                    store = io.url(),
                    "the host table changed meanwhile; reading it again"
                );
            }
            (generation, lost) => {
                lost.done(|| format!("{}, host record", io.url()))?;
                return Ok(generation);
            }
        }
    }
}

/// Enters this host, unless its place in the table changed since the table was read.
async fn try_register(
    io: &Io,
    records: &Records,
    g: &Geometry,
    options: &OpenOptions,
) -> Result<(Generation, Swap<HostRecord>)> {
    let mut table = read_table(io, records, g).await?;
    for view in &mut table {
        let Some(other) = view.record().filter(|r| r.uuid != options.host_uuid) else { continue };
        if other.state != HostState::Up {
            continue;
        }
        if options.take_over_host != Some(other.uuid) {
            return Err(in_use(io, other));
        }
        tracing::warn!(host = %other.uuid, name = other.name, "taken over on the operator's order");
        let down = HostRecord { state: HostState::Down, ..other.clone() };
        let swap = records.swap(io, view, down).await?;
        *view = swap.done(|| format!("{}, host record", io.url()))?;
    }
    let own = table.iter().find(|v| v.record().is_some_and(|r| r.uuid == options.host_uuid));
    let place = own.or_else(|| table.iter().find(|v| v.content == Content::Unused));
    let Some(place) = place else {
        return Err(StoreError::new(
            StoreErrorKind::NoSpace,
            io.url(),
            format!("the host table's {} places are all taken", g.host_slots),
        ));
    };
    let before = place.record();
    if before.is_some_and(|r| r.state == HostState::Evicted) {
        return Err(StoreError::new(
            StoreErrorKind::NotOwner,
            io.url(),
            format!(
                "host {} ({}) was evicted from the store; give the host a new identity to use it again",
                options.host_name, options.host_uuid
            ),
        ));
    }
    let generation = before.map_or(Generation(0), |r| r.generation).plus(1);
    let now = now_ms();
    let record = HostRecord {
        uuid: options.host_uuid,
        state: HostState::Up,
        generation,
        up_since_ms: now,
        heartbeat_ms: now,
        gc_epoch_acknowledged: before.map_or(0, |r| r.gc_epoch_acknowledged),
        name: options.host_name.clone(),
        address: options.host_address.clone(),
    };
    Ok((generation, records.swap(io, place, record).await?))
}

fn in_use(io: &Io, other: &HostRecord) -> StoreError {
    let age = |ms: u64| now_ms().saturating_sub(ms) / 1000;
    let advice = match other.uuid {
        REPAIR_HOST => {
            "wait for it, or, if it was killed, run 'ballast store repair' there once more"
                .to_owned()
        }
        host => format!(
            "stop the agent there, or, if that host is dead for certain, give --take-over-host {host}"
        ),
    };
    StoreError::new(
        StoreErrorKind::InUse,
        io.url(),
        format!(
            "the store is in use by host '{}' ({}), up for {} s, last heartbeat {} s ago by its clock; {advice}",
            other.name,
            other.uuid,
            age(other.up_since_ms),
            age(other.heartbeat_ms),
        ),
    )
}
