//! What differs between two images in the store: disks as committed, or snapshots, of one disk or of two.

use super::Store;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::root::Root;
use crate::tree::diff::{ChangedPage, Tree};
use crate::types::{Lba, Lsn};
use std::sync::Arc;
use uuid::Uuid;

/// Most ranges in one page.
pub const CHANGES_MAX: usize = 10_000;

/// An image that a difference is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The disk.
    pub vdi: Uuid,
    /// It is the disk as of here.
    pub lsn: Lsn,
    /// Bytes.
    pub size_bytes: u64,
}

/// A page of what differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What is compared with `new`.
    pub old: ImageInfo,
    /// See `old`.
    pub new: ImageInfo,
    /// What is in `new` other than in `old`.
    pub changed: ChangedPage,
}

/// Where an image is.
struct Image {
    info: ImageInfo,
    tree: Tree,
    /// Held while reading, so that commits of this very process reuse nothing under us.
    _pinned: Option<Arc<Root>>,
}

impl Store {
    /// The blocks of image `new` that differ from `old`, from block `from` on, at most `limit` ranges. An image is a disk
    /// (name or UUID), as committed, or one of its snapshots (LSN or label). Costs as much as there is to tell.
    ///
    /// # Errors
    /// `NotFound`; `Changed` if one of them went while it was read: a disk that goes on elsewhere, a snapshot that was deleted;
    /// `Corrupt`; the device's.
    pub async fn diff(
        &self,
        old: (&str, Option<&str>),
        new: (&str, Option<&str>),
        from: Lba,
        limit: usize,
    ) -> Result<Difference> {
        let before = (self.image(old).await?, self.image(new).await?);
        let (a, b) = (&before.0, &before.1);
        let limit = limit.clamp(1, CHANGES_MAX);
        let outcome = self.control_reader().diff(a.tree, b.tree, from, limit).await;
        match outcome {
            Ok(changed) => Ok(Difference { old: a.info, new: b.info, changed }),
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                // Blocks of what is gone are used again.
                let now = (self.image(old).await, self.image(new).await);
                let same = |now: &Result<Image>, before: &Image| {
                    now.as_ref().is_ok_and(|now| now.tree == before.tree)
                };
                if same(&now.0, a) && same(&now.1, b) {
                    return Err(error);
                }
                let words = "one of the two changed while they were compared: compare snapshots, or try again";
                Err(StoreError::new(StoreErrorKind::Changed, self.url(), words))
            }
            Err(error) => Err(error),
        }
    }

    async fn image(&self, (vdi, snapshot): (&str, Option<&str>)) -> Result<Image> {
        let found = self.find_vdi(vdi).await?;
        let uuid = found.head.uuid;
        if let Some(snapshot) = snapshot {
            let snapshot = self.find_snapshot(&uuid.to_string(), snapshot).await?;
            let head = snapshot.as_head(&found.head);
            let info = ImageInfo { vdi: uuid, lsn: snapshot.lsn, size_bytes: head.size_bytes };
            let tree = Tree { root: head.root, height: head.height, blocks: head.blocks() };
            return Ok(Image { info, tree, _pinned: None });
        }
        let pinned = self.attached_here(&found.head);
        let pinned = pinned.map(|inner| inner.root.load_full());
        let head = pinned.as_ref().map_or(&found.head, |root| &root.head);
        let info = ImageInfo { vdi: uuid, lsn: head.committed, size_bytes: head.size_bytes };
        let tree = Tree { root: head.root, height: head.height, blocks: head.blocks() };
        Ok(Image { info, tree, _pinned: pinned })
    }
}
