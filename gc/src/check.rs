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
use crate::collect::Progress;
use crate::mark::{Holds, Marks, Problems, take_page};
use blockstore::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use blockstore::format::extent::ExtentType;
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::slot::Content;
use blockstore::{Cure, Fix, Result, Store};
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
    /// Pages of reclaim bitmaps that are damaged: they name nothing, until a cycle of garbage collection writes them anew.
    pub reclaim_pages_damaged: u64,
    /// The store was in use and kept changing; problems may be due to that.
    pub changed_during_check: bool,
    /// What is wrong, in sentences.
    pub problems: Vec<String>,
    /// For each of them what the operator can do; none: it is repaired by `store repair`.
    pub advice: Vec<Option<&'static str>>,
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
    fn report(&mut self, problem: String, advice: Option<&'static str>) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
            self.advice.push(advice);
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
    check_with(store, options, &Progress::default()).await
}

/// As [`check`], and tells how far it is.
///
/// # Errors
/// The device's. Damage is in the report.
pub async fn check_with(
    store: &Store,
    options: CheckOptions,
    progress: &Progress,
) -> Result<Report> {
    let mut attempt = 1;
    loop {
        let Examined { mut report, heads, .. } = examine(store, options, progress).await?;
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

/// One look at everything.
pub(crate) struct Examined {
    pub(crate) report: Report,
    heads: Heads,
    /// What was reached.
    pub(crate) marks: Marks,
    /// Blocks of the tables that have one right content.
    pub(crate) fixes: Vec<Fix>,
}

pub(crate) const VDI_ADVICE: &str = "the disk cannot be reached, others go on, and nothing is collected: put the block back from a copy \
     of the device. 'store dump' shows what is there";
const TWINS_ADVICE: &str =
    "both are reached by their UUIDs; copy one out with 'store export', and delete it";

pub(crate) async fn examine(
    store: &Store,
    options: CheckOptions,
    progress: &Progress,
) -> Result<Examined> {
    let mut report =
        Report { store: store.uuid(), url: store.url().to_owned(), ..Report::default() };
    let (mut fixes, mut hidden) = (Vec::new(), 0);
    for problem in store.verify_tables().await? {
        hidden += u64::from(problem.hides_disks);
        match problem.cure {
            Cure::Write(fix) => {
                fixes.push(fix);
                report.report(problem.what, None);
            }
            Cure::Advice(advice) => report.report(problem.what, Some(advice)),
        }
    }
    // Heads before bitmaps: what a root reaches was allocated before the root was written.
    let registry = store.scan_vdis().await?;
    let heads = registry.iter().map(|(slot, view)| (*slot, view.sequence())).collect();
    let mut marks = load_bitmaps(store, &mut report).await?;
    let mut names: HashMap<String, Uuid> = HashMap::new();
    for (slot, view) in registry {
        match &view.content {
            Content::Unused => {}
            Content::Damaged(damage) => {
                hidden += 1;
                let at = view.slot.first;
                let words =
                    format!("The VDI record in slot {slot} (block {at}) is damaged: {damage}.");
                report.report(words, Some(VDI_ADVICE));
            }
            Content::Valid(head) if is_root(&head.record) => {
                let head = &head.record;
                let name = store.read_name_block(head).await?;
                marks.mark(&store.reader(), &name, head, options.data, &mut report).await?;
                progress.note(marks.nodes, marks.reached.len());
                report.vdis += 1;
                let Ok(name) = name else { continue };
                if let Some(other) = names.insert(name.clone(), head.uuid) {
                    let own = head.uuid;
                    let words = format!("The VDIs {other} and {own} are both named '{name}'.");
                    report.report(words, Some(TWINS_ADVICE));
                }
            }
            Content::Valid(_) => {}
        }
    }
    marks.doubts += hidden;
    report.snapshots = marks.snapshots;
    report.nodes = marks.nodes;
    report.data_blocks_checked = marks.data_checked;
    report.blocks_reachable = marks.reached.len();
    report.blocks_allocated = marks.allocated.len();
    report.blocks_leaked = marks.allocated.count_without(&marks.reached);
    Ok(Examined { report, heads, marks, fixes })
}

/// A disk that is being created is a root already, one that is being deleted is none any more.
pub(crate) fn is_root(head: &VdiHead) -> bool {
    matches!(head.state, VdiState::Active | VdiState::Creating)
}

async fn load_bitmaps(store: &Store, report: &mut Report) -> Result<Marks> {
    let geometry = store.superblock().geometry.clone();
    let mut allocated = Bits::new(geometry.total_blocks());
    let mut kinds = Vec::new();
    for (number, view) in (0..).zip(store.scan_extents().await?) {
        let holds = match &view.content {
            Content::Damaged(_) => Holds::Unknown,
            Content::Unused => Holds::Nothing(ExtentType::Unused),
            Content::Valid(head) => match head.record.kind {
                kind @ (ExtentType::Data | ExtentType::Metadata) if head.record.ready => {
                    Holds::Blocks(kind)
                }
                kind => Holds::Nothing(kind),
            },
        };
        kinds.push(holds);
        if !matches!(holds, Holds::Blocks(_)) {
            continue;
        }
        for (page, content) in (0..).zip(store.read_bmap(number).await?) {
            let content = content.unwrap_or_else(|damage| {
                tracing::warn!(extent = number, page, %damage, "damaged BMap page");
                report.bitmap_pages_damaged += 1;
                BitmapPage::full()
            });
            let first = geometry.extent_base(number).plus(u64::from(page) * PAGE_BITS);
            let own = |bit: &u64| !geometry.is_allocatable(first.plus(*bit));
            if (0..geometry.page_bits(page)).filter(own).any(|bit| !content.get(bit)) {
                let at = geometry.bmap_page(number, page);
                report.report(
                    format!(
                        "Blocks of extent {number} that hold its header or bitmaps are marked free in page {page} of its \
                         bitmap (block {at})."
                    ),
                    None,
                );
            }
            take_page(&mut allocated, &geometry, number, page, &content);
        }
        let reclaim = store.read_bitmap(BitmapKind::Reclaim, number).await?;
        report.reclaim_pages_damaged += reclaim.iter().filter(|page| page.is_err()).count() as u64;
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
