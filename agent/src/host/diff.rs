//! `snap diff`: what differs between two images in the store, by the page.

use super::Host;
use super::schedules::Spared;
use crate::api::diff::{Changed, Diff, DiffRequest, ImageAt, ImageName};
use crate::error::Result;
use blockstore::types::{BLOCK_SIZE, Lba};
use blockstore::{CHANGES_MAX, ImageInfo};

/// Bytes of a block.
const BLOCK: u64 = BLOCK_SIZE as u64;

impl Host {
    /// A page of what differs. What is only in this host's log is drained first; of a disk as it is, all that was
    /// acknowledged before the first page.
    ///
    /// # Errors
    /// No such disk or snapshot; the store is away; one of the images changed while it was read.
    pub async fn diff(&self, request: DiffRequest) -> Result<Diff> {
        let DiffRequest { from, to, offset, limit } = request;
        let (old, _spared_old) = self.uuid_of(&from, offset).await?;
        let (new, _spared_new) = self.uuid_of(&to, offset).await?;
        let limit = if limit == 0 { CHANGES_MAX } else { limit };
        let (old, new) = ((&*old, from.snapshot.as_deref()), (&*new, to.snapshot.as_deref()));
        let first = Lba(offset / BLOCK);
        let found = self.parts.store.get()?.diff(old, new, first, limit).await?;
        let ranges = found.changed.ranges.iter().map(|range| Changed {
            offset: range.first.0 * BLOCK,
            length: range.blocks * BLOCK,
            zeros: range.zeros,
        });
        Ok(Diff {
            from: image(&found.old),
            to: image(&found.new),
            ranges: ranges.collect(),
            next: found.changed.next.map(|block| block.0 * BLOCK),
        })
    }

    /// The disk of an image that is in the store, all of it, and what is to be kept until the image was read.
    async fn uuid_of(&self, image: &ImageName, offset: u64) -> Result<(String, Vec<Spared>)> {
        let vdi = self.named(&image.vdi).await?.1.to_string();
        let mut spared = Vec::new();
        match (&image.snapshot, self.find_served(&vdi)) {
            (Some(snapshot), _) => spared = self.bring_to_store(&vdi, &[snapshot]).await?,
            (None, Some(disk)) if offset == 0 && !disk.is_lost() => {
                let what = format!("disk '{}' cannot be drained", disk.name);
                self.parts.refuse_while_down(&what)?;
                self.drained(&disk).await.map_err(|failure| failure.within(what))?;
            }
            (None, _) => {}
        }
        Ok((vdi, spared))
    }
}

fn image(info: &ImageInfo) -> ImageAt {
    ImageAt { uuid: info.vdi, lsn: info.lsn.0, size: info.size_bytes }
}
