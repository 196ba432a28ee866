//! Applying what a cycle of collection found: the extent's owner clears the bits of its own BMap.

use super::{Pages, page_base};
use crate::alloc::Territory;
use crate::alloc::runs::merge;
use crate::error::Result;
use crate::format::bitmap::{BitmapKind, BitmapPage};
use crate::format::extent::ExtentRecord;
use crate::io::Io;
use crate::types::{BLOCK_SIZE, Gba};
use roaring::RoaringTreemap;

impl Pages {
    /// Frees what the reclaim bitmap of an own extent names, if it was made by cycle `epoch` for the extent as it is now and was
    /// not applied before (rule G2), and `untouched` lets it pass. How many blocks that were.
    ///
    /// Not flushed, since a loss only leaks: what is freed here no root reaches.
    pub(in crate::alloc) async fn apply(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
        epoch: u64,
        untouched: &(dyn Fn(RoaringTreemap) -> RoaringTreemap + Sync),
    ) -> Result<u64> {
        let g = &territory.geometry;
        let Some(extent) = self.extents.get(&number) else { return Ok(0) };
        let (kind, sequence) = (extent.kind, extent.view.sequence());
        let Some(record) = extent.view.record().filter(|record| record.sweep_epoch < epoch) else {
            return Ok(0);
        };
        let made_for = (epoch, sequence, record.owner_generation.0);
        let found = io.read(g.reclaim_page(number, 0), u64::from(g.bmap_pages())).await?;
        let (mut freed, mut changed) = (0, Vec::new());
        for (page, block) in (0..).zip(found.chunks_exact(BLOCK_SIZE)) {
            let (address, store) = (g.reclaim_page(number, page), territory.records.store);
            let reclaim = match BitmapPage::decode(block, BitmapKind::Reclaim, store, address) {
                Ok(reclaim) => reclaim,
                Err(damage) => {
                    tracing::warn!(extent = number, page, %damage, "damaged reclaim page: left to the next cycle");
                    continue;
                }
            };
            if (reclaim.gc_epoch, reclaim.extent_sequence, reclaim.owner_generation) != made_for {
                continue;
            }
            self.load(io, territory, number, page).await?;
            let Some(content) = self.loaded.get(&(number, page)) else { continue };
            let base = page_base(territory, number, page);
            let candidates = (0..g.page_bits(page)).filter(|&bit| {
                reclaim.get(bit) && content.get(bit) && g.is_allocatable(base.plus(bit))
            });
            let free = untouched(candidates.map(|bit| base.0 + bit).collect());
            if free.is_empty() {
                continue;
            }
            self.take_up(io, territory, number).await?;
            freed += free.len();
            self.unmark(territory, &merge(free.into_iter().map(Gba).collect()));
            changed.push((number, page));
        }
        let writes = self.encode(territory, &changed);
        io.write_all(&writes).await?;
        self.note_swept(io, territory, number, epoch).await?;
        self.give_up_if_empty(io, territory, kind, number).await?;
        self.trim();
        Ok(freed)
    }

    /// Nothing of this cycle is applied to the extent a second time.
    async fn note_swept(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
        epoch: u64,
    ) -> Result<()> {
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(()) };
        let Some(record) = extent.view.record().cloned() else { return Ok(()) };
        let record = ExtentRecord { sweep_epoch: epoch, ..record };
        let swap = territory.records.swap(io, &extent.view, record).await?;
        extent.keep_up(territory, &swap);
        swap.done(|| format!("{}, extent {number}", io.url())).map(drop)
    }
}
