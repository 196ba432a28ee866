//! What the store's bitmaps say, beside what was reached.

use super::marks::{Holders, Marks, Reached};
use super::{Amount, StoreSizes};
use blockstore::format::bitmap::{BitmapPage, PAGE_BITS};
use blockstore::format::extent::ExtentType;
use blockstore::slot::Content;
use blockstore::types::{BLOCK_SIZE, Gba};
use blockstore::{Result, Store, StoreError, StoreErrorKind, Walk};

/// Blocks of an extent.
#[derive(Default)]
struct Counted {
    used: u64,
    reachable: u64,
    present: u64,
    clone_sources: u64,
    garbage: u64,
}

/// All but what needs more than marks and bitmaps.
pub(super) async fn measure(
    store: &Store,
    ground: Option<&Walk>,
    marks: &Marks,
) -> Result<StoreSizes> {
    let geometry = &store.superblock().geometry;
    let usable = (geometry.extent_blocks - geometry.extent_overhead()) * BLOCK_SIZE as u64;
    let mut sizes = StoreSizes::default();
    for (number, view) in (0..).zip(store.scan_extents().await?) {
        let kind = match &view.content {
            Content::Unused => ExtentType::Unused,
            Content::Valid(head) if head.record.kind == ExtentType::System => continue,
            Content::Valid(head) if !head.record.ready => ExtentType::Unused,
            Content::Valid(head) => head.record.kind,
            Content::Damaged(damage) => {
                return Err(StoreError::new(
                    StoreErrorKind::Damaged,
                    format!("{}, record of extent {number}", store.url()),
                    format!(
                        "what the extent holds is not known, and no sizes were computed: {damage}; 'ballast store check' says more"
                    ),
                ));
            }
        };
        sizes.capacity += usable;
        if kind == ExtentType::Unused {
            continue;
        }
        let of_kind: fn(&mut Amount) -> &mut u64 = match kind {
            ExtentType::Metadata => |amount| &mut amount.metadata,
            _ => |amount| &mut amount.data,
        };
        let counted = count(store, ground, marks, number).await?;
        let add = |to: &mut Amount, blocks| *of_kind(to) += blocks * BLOCK_SIZE as u64;
        add(&mut sizes.used, counted.used);
        add(&mut sizes.reachable, counted.reachable);
        add(&mut sizes.present, counted.present);
        add(&mut sizes.snapshots, counted.reachable - counted.present);
        add(&mut sizes.clone_sources, counted.clone_sources);
        add(&mut sizes.reclaimable, counted.garbage);
    }
    sizes.in_hand = sizes.used - sizes.reachable - sizes.reclaimable;
    Ok(sizes)
}

async fn count(
    store: &Store,
    ground: Option<&Walk>,
    marks: &Marks,
    extent: u32,
) -> Result<Counted> {
    let geometry = &store.superblock().geometry;
    let (mut counted, mut unreached) = (Counted::default(), Vec::new());
    for (page, content) in (0..).zip(store.read_bmap(extent).await?) {
        // As the allocator takes a damaged one.
        let content = content.unwrap_or_else(|_| BitmapPage::full());
        let first = geometry.extent_base(extent).plus(u64::from(page) * PAGE_BITS);
        for bit in 0..geometry.page_bits(page) {
            let gba: Gba = first.plus(bit);
            let (allocated, reached) = (content.get(bit), marks.reached(gba) != Reached::Never);
            if !(allocated || reached) || !geometry.is_allocatable(gba) {
                continue;
            }
            counted.used += u64::from(allocated);
            if reached {
                let holders = marks.holders(gba);
                let present = holders.has(Holders::PRESENT);
                counted.reachable += 1;
                counted.present += u64::from(present);
                counted.clone_sources += u64::from(!present && holders.has(Holders::CLONED));
            } else {
                unreached.push(gba);
            }
        }
    }
    counted.garbage = match ground {
        Some(walk) => walk.count_garbage(unreached.into_iter())?,
        None => unreached.len() as u64,
    };
    Ok(counted)
}
