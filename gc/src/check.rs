//! `store check`: is the store sound? Read-only.
//!
//! Errors are what could lose or has lost data: a damaged structure, a reachable block that is marked
//! free, a block that two trees hold as their own. Blocks that are allocated but unreachable are
//! counted, not errors: a crash leaves them, and the garbage collector takes them back. Neither are
//! damaged pages of a BMap, which a power loss leaves where a page was being written: all their blocks
//! count as allocated, so that they leak and nothing is lost.
//!
//! A store in use changes under the check. When problems were found and a head has changed meanwhile,
//! the check starts over, a few times; then it says so.

use crate::bits::Bits;
use crate::mark::{Marks, Problems, take_page};
use blockstore::format::bitmap::BitmapPage;
use blockstore::format::extent::ExtentType;
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::slot::Content;
use blockstore::{Result, Store};
use serde::Serialize;
use std::collections::HashMap;
use uuid::Uuid;

/// How often the check starts over when the store changes under it.
const ATTEMPTS: u32 = 3;
/// Problems that a report lists; the rest is only counted.
const PROBLEMS_MAX: usize = 1000;

/// What to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Read and check data blocks too, not only the metadata.
    pub data: bool,
}

/// Outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The store.
    pub store: Uuid,
    /// Its device.
    pub url: String,
    /// Disks walked.
    pub vdis: u64,
    /// Their snapshots.
    pub snapshots: u64,
    /// Nodes read and checked.
    pub nodes: u64,
    /// Data blocks read and checked.
    pub data_blocks_checked: u64,
    /// Blocks that the disks reach.
    pub blocks_reachable: u64,
    /// Blocks marked allocated, those of bitmaps and headers not counted.
    pub blocks_allocated: u64,
    /// Blocks allocated but not reachable: claimed by a running host, or left by a crash.
    pub blocks_leaked: u64,
    /// Pages of BMaps that a power loss, or rot, left damaged: their free blocks are among the leaked.
    pub bitmap_pages_damaged: u64,
    /// The store was in use and kept changing; problems may be due to that.
    pub changed_during_check: bool,
    /// What is wrong, in sentences.
    pub problems: Vec<String>,
    /// Problems found beyond those listed.
    pub problems_not_listed: u64,
}

impl Report {
    /// True if nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

impl Problems for Report {
    fn report(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        } else {
            self.problems_not_listed += 1;
        }
    }
}

/// Checks a store.
///
/// # Errors
/// The device's. Damage is in the report.
pub async fn check(store: &Store, options: CheckOptions) -> Result<Report> {
    let mut attempt = 1;
    loop {
        let (mut report, heads) = check_once(store, options).await?;
        if report.is_sound() || !changed(store, &heads).await? {
            return Ok(report);
        }
        if attempt == ATTEMPTS {
            report.changed_during_check = true;
            return Ok(report);
        }
        attempt += 1;
    }
}

/// Sequence numbers of the heads that were walked, by slot.
type Heads = Vec<(u32, u64)>;

async fn changed(store: &Store, heads: &Heads) -> Result<bool> {
    let now = store.scan_vdis().await?;
    Ok(now.iter().map(|(slot, view)| (*slot, view.sequence())).ne(heads.iter().copied()))
}

async fn check_once(store: &Store, options: CheckOptions) -> Result<(Report, Heads)> {
    let mut report =
        Report { store: store.uuid(), url: store.url().to_owned(), ..Report::default() };
    for problem in store.verify_tables().await? {
        report.report(problem);
    }
    // Heads before bitmaps: what a root reaches was allocated before the root was written.
    let registry = store.scan_vdis().await?;
    let heads = registry.iter().map(|(slot, view)| (*slot, view.sequence())).collect();
    let mut marks = load_bitmaps(store, &mut report).await?;
    let mut names: HashMap<String, Uuid> = HashMap::new();
    for (slot, view) in registry {
        match &view.content {
            Content::Unused => {}
            Content::Damaged(damage) => report.report(format!(
                "The VDI record in slot {slot} (block {}) is damaged: {damage}.",
                view.slot.first
            )),
            Content::Valid(head) if is_root(&head.record) => {
                let head = &head.record;
                let name = store.read_name(head).await?;
                marks.mark(&store.reader(), &name, head, options.data, &mut report).await?;
                report.vdis += 1;
                if let Some(other) = names.insert(name.clone(), head.uuid) {
                    let own = head.uuid;
                    report.report(format!("The VDIs {other} and {own} are both named '{name}'."));
                }
            }
            Content::Valid(_) => {}
        }
    }
    report.snapshots = marks.snapshots;
    report.nodes = marks.nodes;
    report.data_blocks_checked = marks.data_checked;
    report.blocks_reachable = marks.reached.len();
    report.blocks_allocated = marks.allocated.len();
    report.blocks_leaked = marks.allocated.count_without(&marks.reached);
    Ok((report, heads))
}

/// A disk that is being created is a root already, one that is being deleted is none any more.
fn is_root(head: &VdiHead) -> bool {
    matches!(head.state, VdiState::Active | VdiState::Creating)
}

async fn load_bitmaps(store: &Store, report: &mut Report) -> Result<Marks> {
    let geometry = store.superblock().geometry.clone();
    let mut allocated = Bits::new(geometry.total_blocks());
    let mut kinds = Vec::new();
    for (number, view) in (0..).zip(store.scan_extents().await?) {
        let record = view.record();
        let kind = record.map_or(ExtentType::Unused, |record| record.kind);
        kinds.push(kind);
        let holds_blocks = matches!(kind, ExtentType::Data | ExtentType::Metadata);
        if !holds_blocks || record.is_none_or(|record| !record.ready) {
            continue;
        }
        for (page, content) in (0..).zip(store.read_bmap(number).await?) {
            let content = content.unwrap_or_else(|damage| {
                tracing::warn!(extent = number, page, %damage, "damaged BMap page");
                report.bitmap_pages_damaged += 1;
                BitmapPage::full()
            });
            take_page(&mut allocated, &geometry, number, page, &content);
        }
    }
    Ok(Marks::new(kinds, without_overhead(allocated, &geometry), &geometry))
}

/// Bits of headers and bitmaps do not count.
fn without_overhead(allocated: Bits, geometry: &blockstore::format::geometry::Geometry) -> Bits {
    let mut allocated = allocated;
    for extent in 0..geometry.extent_count {
        for block in 0..geometry.extent_overhead() {
            allocated.remove(geometry.extent_base(extent).plus(block));
        }
    }
    allocated
}
