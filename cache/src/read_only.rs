//! A disk that is an image in the store and never changes: it is served like any other, and has nothing on the cache device.
//!
//! To the worker it is a [`Disk`] that holds no block and never gets a segment, so that every read is a miss and nothing
//! could be written even if the worker let it through. The task that looks after it does one thing: it answers misses from the image.
//! What was fetched is not kept.
//!
//! Crash behaviour: there is nothing to lose.

use crate::backing::BackingError;
use crate::disk::{AttachedDisk, Disk, Identity, Progress, Start};
use crate::format::geometry::CACHE_SIZE_MIN;
use crate::format::{Geometry, LegSet};
use crate::image::ImagePool;
use crate::index::Index;
use crate::link::{DiskSender, FetchError, FromDisk, ToDisk, pair};
use async_trait::async_trait;
use blockstore::SnapshotImage;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{JoinHandle, JoinSet};
use uuid::Uuid;

/// What never changes, and may be far away.
#[async_trait]
pub trait Image: Send + Sync + fmt::Debug + 'static {
    /// Reads whole blocks; a hole reads as `None` (zeros). Every block was checked against the checksum that its parent
    /// holds. Waits for as long as it takes.
    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError>;
}

#[async_trait]
impl Image for SnapshotImage {
    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        Ok(SnapshotImage::read(self, lba, blocks).await?)
    }
}

/// What answers the disk's reads.
#[derive(Debug)]
pub struct Reader(JoinHandle<()>);

/// The disk that shows `size_bytes` of `image`, for a worker that is told to refuse writes, and what answers its reads.
///
/// # Errors
/// No eventfd could be had.
pub fn open(size_bytes: u64, image: Arc<dyn Image>) -> std::io::Result<(AttachedDisk, Reader)> {
    let (link, sender, from_disk) = pair()?;
    let geometry = Geometry::for_size(CACHE_SIZE_MIN).expect("the smallest cache is one");
    let start = Start {
        identity: Identity { cache: Uuid::nil(), vdi: Uuid::nil(), log_id: 0, epoch: 0 },
        geometry,
        size_bytes,
        index: Index::default(),
        last_lsn: Lsn(0),
        committed: Lsn(0),
        sealed: Vec::new(),
        grants: Vec::new(),
        images: ImagePool::new(0, 0),
        progress: Arc::new(Progress::default()),
    };
    let disk = AttachedDisk {
        disk: Disk::on_legs(start, LegSet::NONE),
        link,
        legs: Vec::new(),
        leg_timeout: Duration::MAX,
    };
    Ok((disk, Reader(tokio::spawn(answer(from_disk, sender, image)))))
}

/// Until the worker is gone, or this is stopped: reads under way end with it.
async fn answer(
    mut from_disk: UnboundedReceiver<FromDisk>,
    sender: DiskSender,
    image: Arc<dyn Image>,
) {
    // As many as the guest's queues hold requests, not more.
    let mut reads = JoinSet::new();
    while let Some(message) = from_disk.recv().await {
        while reads.try_join_next().is_some() {}
        if let FromDisk::Fetch { id, lba, blocks } = message {
            let (image, sender) = (Arc::clone(&image), sender.clone());
            reads.spawn(async move {
                let result = image.read(lba, blocks).await;
                let result = result.map_err(|error| FetchError(error.to_string()));
                sender.send(ToDisk::Fetched { id, result, keep: true });
            });
        }
    }
    reads.shutdown().await;
}

impl Reader {
    /// Ends what is under way. Once this returns nothing reads the image any more. To be called when the worker has ended.
    pub async fn end(self) {
        // Its disk is gone, so that it ends by itself.
        let _ = self.0.await;
    }
}
