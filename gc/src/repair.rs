//! `store repair`: writes what has one right answer, and nothing else.
//!
//! That is what the store has twice, or what follows from the rest of it: a superblock from its copy, the header of an extent from
//! the catalogue, the record of extent 0, the GC record, and bits of BMaps from what disks and snapshots reach. Every fix is one
//! block, written over the one that is wrong; in between the store is as it was or as it should be, so that a repair that is killed
//! is simply begun again. (A page of a BMap that is torn reads as all allocated.)
//!
//! * A bit is set whenever its block is reached.
//! * A bit is cleared only if everything reachable is known: nothing that could hide a disk, a snapshot or a part of a map is
//!   damaged. Claims of a host that was killed are freed so, too: see docs/operations.md, "Repairing a store".

use crate::check::{CheckOptions, Report, check_with, examine as look};
use crate::collect::Progress;
use crate::mark::{Holds, Marks};
use blockstore::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use blockstore::{Fingerprint, Fix, Repairer, Result, Store};
use bytes::Bytes;
use serde::Serialize;
use std::sync::Arc;

/// What `store repair` would do.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// What the check says.
    pub check: Report,
    /// What has one right answer: for each block that is to be written, what that does.
    pub repairs: Vec<String>,
    /// Blocks that are reached and marked free: their bits are to be set.
    pub blocks_to_mark: u64,
    /// Blocks that are allocated and not reached: their bits are to be cleared.
    pub blocks_to_free: u64,
    /// Why blocks that are not reached are not freed.
    pub not_freed_because: Option<&'static str>,
    #[serde(skip)]
    fixes: Vec<Fix>,
    #[serde(skip)]
    fingerprint: Fingerprint,
}

impl Findings {
    /// Problems that have no one right answer, each with what the operator can do.
    pub fn left(&self) -> impl Iterator<Item = (&str, &str)> {
        let problems = self.check.problems.iter().zip(&self.check.advice);
        problems.filter_map(|(problem, advice)| Some((problem.as_str(), (*advice)?)))
    }
}

/// What `store repair` did.
#[derive(Clone, Debug, Serialize)]
pub struct Repaired {
    /// Blocks written.
    pub blocks_written: usize,
    /// What the check says now.
    pub check: Report,
}

const IN_DOUBT: &str =
    "not all that disks and snapshots reach is known, because of what is damaged";

/// Checks the store, and finds out what can be repaired. Writes nothing.
///
/// # Errors
/// `InUse` naming the host that uses the store; `NewerVersion` naming what this version does not know; the device's.
pub async fn examine(store: &Store, by: &Repairer, progress: &Progress) -> Result<Findings> {
    store.refuse_if_newer().await?;
    store.refuse_if_used(by).await?;
    let fingerprint = store.fingerprint().await?;
    let found = look(store, CheckOptions::default(), progress).await?;
    let mut findings = Findings {
        check: found.report,
        repairs: Vec::new(),
        blocks_to_mark: 0,
        blocks_to_free: 0,
        not_freed_because: None,
        fixes: found.fixes,
        fingerprint,
    };
    let marks = found.marks;
    if marks.doubts > 0 && findings.check.blocks_leaked > 0 {
        findings.not_freed_because = Some(IN_DOUBT);
    }
    for (number, holds) in (0..).zip(&marks.extents) {
        if matches!(holds, Holds::Blocks(_)) {
            fix_extent(store, &marks, number, &mut findings).await?;
        }
    }
    findings.repairs = findings.fixes.iter().map(|fix| fix.what.clone()).collect();
    Ok(findings)
}

/// The pages of an extent's bitmaps that are not as they should be.
async fn fix_extent(
    store: &Store,
    marks: &Marks,
    extent: u32,
    findings: &mut Findings,
) -> Result<()> {
    let g = &store.superblock().geometry;
    for (page, found) in (0..).zip(store.read_bmap(extent).await?) {
        let may_free = marks.doubts == 0;
        let (before, damaged) = match found {
            Ok(before) => (before, None),
            // All of it counts as allocated, which is right as long as it is not known better.
            Err(_) if !may_free => continue,
            Err(damage) => (BitmapPage::full(), Some(damage)),
        };
        let mut after = before.clone();
        let base = g.extent_base(extent).plus(u64::from(page) * PAGE_BITS);
        let (mut marked, mut freed) = (0, 0);
        for bit in 0..PAGE_BITS {
            let gba = base.plus(bit);
            // What is no block of disks is always set.
            let in_use =
                bit >= g.page_bits(page) || !g.is_allocatable(gba) || marks.reached.contains(gba);
            match (before.get(bit), in_use) {
                (false, true) => marked += 1,
                (true, false) if may_free => freed += 1,
                _ => continue,
            }
            after.set(bit, in_use);
        }
        if damaged.is_none() && marked + freed == 0 {
            continue;
        }
        let address = g.bmap_page(extent, page);
        let mut does = Vec::new();
        if let Some(damage) = damaged {
            does.push(format!("write it anew, as it is damaged ({damage})"));
        }
        if marked > 0 {
            does.push(format!("mark {marked} blocks allocated that are in use"));
        }
        if freed > 0 {
            does.push(format!("free {freed} blocks that nothing reaches"));
        }
        let what = format!(
            "in page {page} of the bitmap of extent {extent} (block {address}) {}",
            does.join(", ")
        );
        after.sequence = before.sequence + 1;
        let block = Bytes::from(after.encode(BitmapKind::Allocation, store.uuid(), address));
        findings.fixes.push(Fix { address, what, block });
        findings.blocks_to_mark += marked;
        findings.blocks_to_free += freed;
    }
    for (page, found) in (0..).zip(store.read_bitmap(BitmapKind::Reclaim, extent).await?) {
        let Err(damage) = found else { continue };
        let address = g.reclaim_page(extent, page);
        // Of no cycle: never applied.
        let empty = BitmapPage::clear().with_sequence(1);
        let block = Bytes::from(empty.encode(BitmapKind::Reclaim, store.uuid(), address));
        let what = format!(
            "empty page {page} of the reclaim bitmap of extent {extent} (block {address}), as it is damaged ({damage})"
        );
        findings.fixes.push(Fix { address, what, block });
    }
    Ok(())
}

/// Carries out what was found, if the store did not change since, and checks it again.
///
/// # Errors
/// `InUse` naming who uses the store; `Changed`; `Invalid` if the device lacks what the store needs; the device's. Some blocks
/// may be written then: the same again ends what was begun.
pub async fn repair(
    store: &Arc<Store>,
    by: &Repairer,
    findings: &Findings,
    progress: &Progress,
) -> Result<Repaired> {
    let held = store.hold(by, &findings.fingerprint).await?;
    let outcome = async {
        held.write(&findings.fixes).await?;
        check_with(store, CheckOptions::default(), progress).await
    }
    .await;
    let released = held.release().await;
    let check = outcome?;
    released?;
    Ok(Repaired { blocks_written: findings.fixes.len(), check })
}
