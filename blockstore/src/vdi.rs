//! An attached virtual disk: reads of its committed image, and commits.
//!
//! One task commits at a time; readers never wait for it. Each reader works on the root that was
//! current when it started, and the blocks of that root are not used again while it reads.

use crate::alloc::Allocator;
use crate::alloc::runs::{Run, merge};
use crate::commit::publish::Prepared;
use crate::commit::{Batch, Committed};
use crate::eras::Stay;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::ExtentType;
use crate::format::node::{Node, height_for};
use crate::format::pointer::Pointer;
use crate::format::vdi::VdiHead;
use crate::io::Io;
use crate::policy::{Policy, PolicyChange};
use crate::root::{Garbage, GarbageSink, Root};
use crate::slot::View;
use crate::snapshots::edit::KnownLeaf;
use crate::store::Core;
use crate::store::write_meta;
use crate::types::{Birth, Generation, Lba, Lsn};
use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use std::sync::Arc;
use uuid::Uuid;

/// What the store holds of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CommittedState {
    /// The image is the disk as of this point of the guest's write order.
    pub lsn: Lsn,
    /// Root of its tree; identifies the image.
    pub root: Pointer,
    /// Levels of the tree.
    pub height: u8,
    /// Bytes.
    pub size_bytes: u64,
    /// The commit counter.
    pub birth: Birth,
    /// The attachment that commits.
    pub attachment: Generation,
    /// The log that extends this image.
    pub log_id: Option<Uuid>,
}

/// An attached virtual disk.
#[derive(Debug)]
pub struct Vdi {
    pub(crate) inner: Arc<VdiInner>,
}

#[derive(Debug)]
pub(crate) struct VdiInner {
    pub core: Arc<Core>,
    pub uuid: Uuid,
    pub name: String,
    /// As noted in the head's immutable block. Held for moments only.
    pub policy: Mutex<Policy>,
    pub root: ArcSwap<Root>,
    pub sink: Arc<dyn GarbageSink>,
    pub control: tokio::sync::Mutex<Control>,
}

/// What only the one committer touches.
#[derive(Debug)]
pub(crate) struct Control {
    /// The head as this attachment last wrote or read it.
    pub view: View<VdiHead>,
    /// The leaf of the snapshots' tree that was written last, so that the next snapshot needs no read.
    pub last_leaf: Option<KnownLeaf>,
    /// Since before a write of the head whose outcome is not known: the store may have a later one than the root at hand, and
    /// what only that root reaches must not be collected.
    pub unsure: Option<Stay>,
    /// Why nothing may be committed any more.
    lost: Option<(StoreErrorKind, String)>,
}

impl Control {
    pub(crate) fn new(view: View<VdiHead>) -> Self {
        Self { view, last_leaf: None, unsure: None, lost: None }
    }

    pub(crate) fn check(&self, vdi: &VdiInner) -> Result<()> {
        match &self.lost {
            None => Ok(()),
            Some((kind, message)) => Err(StoreError::new(*kind, vdi.object(), message.clone())),
        }
    }

    /// Ends this attachment's commits for good.
    pub(crate) fn lose(
        &mut self,
        vdi: &VdiInner,
        kind: StoreErrorKind,
        message: String,
    ) -> StoreError {
        tracing::error!(vdi = %vdi.uuid, "{message}");
        self.lost = Some((kind, message.clone()));
        StoreError::new(kind, vdi.object(), message)
    }
}

impl VdiInner {
    pub(crate) fn object(&self) -> String {
        format!("VDI '{}' ({})", self.name, self.uuid)
    }

    pub(crate) fn invalid(&self, problem: String) -> StoreError {
        StoreError::new(StoreErrorKind::Invalid, self.object(), problem)
    }

    pub(crate) fn named(&self, error: StoreError) -> StoreError {
        let object = format!("{} in {}", self.object(), error.object);
        error.about(object)
    }
}

impl Vdi {
    /// Identity.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.inner.uuid
    }

    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What is committed now.
    #[must_use]
    pub fn committed(&self) -> CommittedState {
        let root = self.inner.root.load();
        let head = &root.head;
        CommittedState {
            lsn: head.committed,
            root: head.root,
            height: head.height,
            size_bytes: head.size_bytes,
            birth: head.birth,
            attachment: head.attachment,
            log_id: head.log_id,
        }
    }

    /// Reads blocks of the committed image, at most [`READ_BLOCKS_MAX`](crate::tree::READ_BLOCKS_MAX)
    /// at once; `None` is a hole, which reads as zeros. Every block was checked against its pointer's
    /// checksum. Waits while the store is unreachable.
    ///
    /// # Errors
    /// `Corrupt`, `Invalid`, `Closing`, or a lasting error of the device.
    pub async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>> {
        let inner = &self.inner;
        // Held until the data is here: no block of this version is used again before.
        let root = inner.root.load_full();
        let read = inner.core.reader.read(&root.head, lba, blocks).await;
        read.map_err(|error| inner.named(error))
    }

    /// Where blocks of the committed image lie, sparse for holes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn resolve(&self, lba: Lba, blocks: u32) -> Result<Vec<Pointer>> {
        let root = self.inner.root.load_full();
        let resolved = self.inner.core.reader.resolve(&root.head, lba, blocks).await;
        resolved.map_err(|error| self.inner.named(error))
    }

    /// Makes the image exactly that of `batch.lsn`, atomically and durably; until then the earlier
    /// one stays in force. Outages and a full store are waited out. Goes on in the background if the
    /// caller stops waiting.
    ///
    /// # Errors
    /// `NotOwner` and `RolledBack` are final for this attachment; `Invalid` for a malformed batch;
    /// `Closing`; `Corrupt` if a node of the present tree is damaged.
    pub async fn commit(&self, batch: Batch) -> Result<Committed> {
        let prepared = self.prepare(batch).await?;
        self.publish(prepared).await
    }

    /// First half of [`commit`](Self::commit): writes the data, visible to nobody. May run while an
    /// earlier batch is being published.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn prepare(&self, batch: Batch) -> Result<Prepared> {
        self.inner.prepare(batch).await
    }

    /// Second half of [`commit`](Self::commit). Call it in the order of the batches.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn publish(&self, prepared: Prepared) -> Result<Committed> {
        self.unstoppable(|inner| async move { inner.publish(prepared).await }).await
    }

    /// Grows the disk. Waits while the store is unreachable.
    ///
    /// # Errors
    /// `Invalid` if it would shrink, and those of [`commit`](Self::commit).
    pub async fn resize(&self, size_bytes: u64) -> Result<()> {
        self.unstoppable(move |inner| async move { inner.resize(size_bytes).await }).await
    }

    /// What was chosen for the disk, as the store notes it.
    #[must_use]
    pub fn policy(&self) -> Policy {
        *self.inner.policy.lock()
    }

    /// Notes a change of policy; returns what is noted then. Waits while the store is unreachable.
    ///
    /// # Errors
    /// Those of [`commit`](Self::commit).
    pub async fn set_policy(&self, change: PolicyChange) -> Result<Policy> {
        self.unstoppable(move |inner| async move { inner.set_policy(change).await }).await
    }

    /// Since when the store has not answered, in milliseconds since 1970; none while it does.
    #[must_use]
    pub fn away_since_ms(&self) -> Option<u64> {
        let health = self.inner.core.io.health();
        (!health.reachable).then_some(health.since_ms)
    }

    /// Gives the disk up: afterwards any host may attach it. `drained_to` is the last LSN of the
    /// caller's log, as proof that nothing is left in it. Waits while the store is unreachable.
    ///
    /// # Errors
    /// `InUse` if the log reaches further than the image, and those of [`commit`](Self::commit).
    pub async fn detach(&self, drained_to: Lsn) -> Result<()> {
        self.unstoppable(move |inner| async move { inner.detach(drained_to).await }).await
    }

    /// Runs an operation as a task that goes on when its caller stops waiting: a head's write that
    /// was given up half way might land after a later one.
    pub(crate) async fn unstoppable<T, F, R>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Arc<VdiInner>) -> R,
        R: Future<Output = Result<T>> + Send + 'static,
    {
        let task = tokio::spawn(operation(Arc::clone(&self.inner)));
        self.inner.core.io.await_task(task).await
    }
}

impl VdiInner {
    async fn resize(&self, size_bytes: u64) -> Result<()> {
        let mut control = self.control.lock().await;
        control.check(self)?;
        self.settle(&mut control).await?;
        loop {
            let base = self.root.load_full();
            let (next, added) =
                grow(&self.core, &self.core.io, &self.object(), &base.head, size_bytes).await?;
            if let Some(since) = self.swap_head(&mut control, next.clone()).await? {
                self.core.allocator()?.settle(&added);
                let next = Root::new(next, Arc::clone(&self.sink));
                self.root.store(Arc::clone(&next));
                base.retire(next, Garbage::default(), since);
                return Ok(());
            }
            self.core.allocator()?.put_back(&added);
        }
    }

    async fn set_policy(&self, change: PolicyChange) -> Result<Policy> {
        let mut control = self.control.lock().await;
        control.check(self)?;
        self.settle(&mut control).await?;
        let present = *self.policy.lock();
        let policy = change.of(present);
        if policy == present {
            return Ok(present);
        }
        loop {
            let base = self.root.load_full();
            let meta = base.head.meta_block(self.name.clone(), policy);
            let meta = write_meta(&self.core, &self.core.io, &meta).await?;
            let next = VdiHead { meta, ..base.head.clone() };
            if let Some(since) = self.swap_head(&mut control, next.clone()).await? {
                self.core.allocator()?.settle(&merge(vec![meta.gba]));
                let next = Root::new(next, Arc::clone(&self.sink));
                self.root.store(Arc::clone(&next));
                let former = Some(base.head.meta).filter(|meta| !meta.is_sparse());
                let blocks = former.iter().map(|meta| meta.gba).collect();
                base.retire(next, Garbage { blocks, ..Garbage::default() }, since);
                *self.policy.lock() = policy;
                return Ok(policy);
            }
        }
    }

    async fn detach(&self, drained_to: Lsn) -> Result<()> {
        let mut control = self.control.lock().await;
        control.check(self)?;
        loop {
            let base = self.root.load_full();
            if base.head.committed < drained_to {
                return Err(StoreError::new(
                    StoreErrorKind::InUse,
                    self.object(),
                    format!(
                        "its log reaches LSN {drained_to}, the store's image only {}; drain it first \
                         ('ballast cache drain')",
                        base.head.committed
                    ),
                ));
            }
            let last_log = base.head.log_id;
            let next = VdiHead {
                owner: None,
                log_id: None,
                last_log,
                attached_ms: 0,
                ..base.head.clone()
            };
            if self.swap_head(&mut control, next).await?.is_some() {
                let message = "the disk was detached".to_owned();
                control.lost = Some((StoreErrorKind::NotOwner, message));
                return Ok(());
            }
        }
    }
}

/// The head of a grown disk, and the nodes that a taller tree needs, which are written; `patience` says how long to wait for
/// room for them, in the store and on its device.
pub(crate) async fn grow(
    core: &Core,
    patience: &Io,
    object: &str,
    head: &VdiHead,
    size_bytes: u64,
) -> Result<(VdiHead, Vec<Run>)> {
    crate::store::check_size(object, size_bytes)?;
    if size_bytes < head.size_bytes {
        return Err(StoreError::new(
            StoreErrorKind::Invalid,
            object,
            format!(
                "it has {} bytes; shrinking to {size_bytes} is not supported, since growing it again \
                 would show old data",
                head.size_bytes
            ),
        ));
    }
    let height = height_for(size_bytes.div_ceil(crate::types::BLOCK_SIZE as u64));
    let levels = height.saturating_sub(head.height);
    let birth = head.birth.plus(1);
    let mut next = VdiHead { size_bytes, height: height.max(head.height), birth, ..head.clone() };
    if levels == 0 || head.root.is_sparse() {
        return Ok((next, Vec::new()));
    }
    let allocator: &Arc<Allocator> = core.allocator()?;
    let purpose = crate::alloc::Purpose::Normal;
    let runs =
        allocator.allocate(patience, ExtentType::Metadata, u64::from(levels), purpose).await?;
    let mut writes = Vec::new();
    for gba in runs.iter().flat_map(|run| run.iter()) {
        let mut node = Node::empty();
        node.set(0, next.root);
        next.root = Pointer { gba, read_only: false, birth, crc: node.crc() };
        writes.push((gba, vec![Bytes::copy_from_slice(node.bytes())]));
    }
    core.write_fresh(patience, object, &writes).await?;
    Ok((next, runs))
}
