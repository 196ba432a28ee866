//! Reading the radix tree and the blocks below it, every one checked against its parent's checksum.

pub(crate) mod diff;
pub(crate) mod reclaim;
mod walk;

pub use diff::{ChangedPage, ChangedRange};
pub use walk::{Extents, READ_BLOCKS_MAX};

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::geometry::Geometry;
use crate::format::node::Node;
use crate::format::pointer::Pointer;
use crate::format::vdi::VdiHead;
use crate::io::Io;
use crate::node_cache::{Lookup, NodeCache};
use crate::sabotage::{self, Bug};
use crate::types::{BLOCK_SIZE, Gba, Lba};
use bytes::Bytes;
use std::sync::Arc;

/// Longest device read or write, in blocks: 1 MiB.
pub(crate) const RUN_BLOCKS_MAX: u64 = 256;

/// Reads checked blocks and nodes.
#[derive(Clone, Debug)]
pub struct Reader {
    pub(crate) io: Io,
    pub(crate) geometry: Geometry,
    pub(crate) nodes: Arc<NodeCache>,
}

impl Reader {
    /// Where things lie in the store.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Reads the blocks that the pointers name; results in the same order. Neighbours on the device
    /// are read together. Pointers must not be sparse.
    ///
    /// # Errors
    /// `Corrupt` if a block does not match its pointer after a second look, and the device's.
    pub async fn read_blocks(&self, pointers: &[Pointer]) -> Result<Vec<Bytes>> {
        for pointer in pointers {
            self.check_address(pointer)?;
        }
        let mut blocks = self.read_unchecked(pointers).await?;
        for (pointer, block) in pointers.iter().zip(&mut blocks) {
            if !pointer.matches(block) && !sabotage::on(Bug::IgnoreBlockCrc) {
                *block = self.read_again(pointer).await?;
            }
        }
        Ok(blocks)
    }

    /// As [`read_blocks`](Self::read_blocks), and tells of each block by itself whether it is what its pointer says.
    ///
    /// # Errors
    /// The device's. `Corrupt` is in the place of the block.
    pub async fn judge_blocks(&self, pointers: &[Pointer]) -> Result<Vec<Result<Bytes>>> {
        let addresses: Vec<Result<()>> = pointers.iter().map(|p| self.check_address(p)).collect();
        let placed = pointers.iter().zip(&addresses).filter(|(_, address)| address.is_ok());
        let placed: Vec<Pointer> = placed.map(|(pointer, _)| *pointer).collect();
        let mut blocks = self.read_unchecked(&placed).await?.into_iter();
        let mut judged = Vec::with_capacity(pointers.len());
        for (pointer, address) in pointers.iter().zip(addresses) {
            if let Err(misplaced) = address {
                judged.push(Err(misplaced));
                continue;
            }
            let block = blocks.next().unwrap_or_default();
            if pointer.matches(&block) {
                judged.push(Ok(block));
                continue;
            }
            match self.read_again(pointer).await {
                Err(error) if error.kind != StoreErrorKind::Corrupt => return Err(error),
                second => judged.push(second),
            }
        }
        Ok(judged)
    }

    /// Reads blocks at the addresses of pointers, whatever they hold; results in the same order.
    async fn read_unchecked(&self, pointers: &[Pointer]) -> Result<Vec<Bytes>> {
        let mut order: Vec<usize> = (0..pointers.len()).collect();
        order.sort_unstable_by_key(|&index| pointers[index].gba);
        let mut runs: Vec<(Gba, u64)> = Vec::new();
        let mut places = vec![(0, 0); pointers.len()];
        for &index in &order {
            let gba = pointers[index].gba;
            match runs.last_mut() {
                // The same block may be asked for twice.
                Some((start, blocks))
                    if gba.0 - start.0 <= *blocks && gba.0 - start.0 < RUN_BLOCKS_MAX =>
                {
                    *blocks = (*blocks).max(gba.0 - start.0 + 1);
                }
                _ => runs.push((gba, 1)),
            }
            let (start, _) = runs[runs.len() - 1];
            places[index] = (runs.len() - 1, (gba.0 - start.0) as usize);
        }
        let buffers = self.io.read_all(&runs).await?;
        let block = |(run, offset): (usize, usize)| {
            Bytes::slice(&buffers[run], offset * BLOCK_SIZE..(offset + 1) * BLOCK_SIZE)
        };
        Ok(places.into_iter().map(block).collect())
    }

    /// A second look at a block that did not match: the first may have been a fault on the way.
    async fn read_again(&self, pointer: &Pointer) -> Result<Bytes> {
        let block = self.io.read(pointer.gba, 1).await?.freeze();
        if pointer.matches(&block) {
            tracing::warn!(gba = %pointer.gba, "a block matched its checksum only when read again");
            return Ok(block);
        }
        let found = crate::crc::crc32c(&block);
        Err(StoreError::new(
            StoreErrorKind::Corrupt,
            format!("{}, block {}", self.io.url(), pointer.gba),
            format!(
                "checksum at byte offset {} is {found:08x}, expected {:08x} (birth {}); the block is \
                 damaged on the device",
                pointer.gba.byte_offset(),
                pointer.crc,
                pointer.birth
            ),
        ))
    }

    /// Reads blocks of a disk's image as `head` has it, at most [`READ_BLOCKS_MAX`] at once; `None` is a hole.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve) and [`read_blocks`](Self::read_blocks).
    pub(crate) async fn read(
        &self,
        head: &VdiHead,
        lba: Lba,
        blocks: u32,
    ) -> Result<Vec<Option<Bytes>>> {
        let pointers = self.resolve(head, lba, blocks).await?;
        let stored: Vec<Pointer> = pointers.iter().copied().filter(|p| !p.is_sparse()).collect();
        let mut data = self.read_blocks(&stored).await?.into_iter();
        let block = |p: &Pointer| if p.is_sparse() { None } else { data.next() };
        Ok(pointers.iter().map(block).collect())
    }

    fn check_address(&self, pointer: &Pointer) -> Result<()> {
        if self.geometry.is_allocatable(pointer.gba) {
            return Ok(());
        }
        Err(StoreError::new(
            StoreErrorKind::Corrupt,
            self.io.url().to_owned(),
            format!("a pointer names block {}, which no tree block can be", pointer.gba),
        ))
    }

    /// Reads nodes through the node cache; results in the same order.
    ///
    /// # Errors
    /// As [`read_blocks`](Self::read_blocks).
    pub async fn nodes(&self, pointers: &[Pointer]) -> Result<Vec<Arc<Node>>> {
        let mut found: Vec<Option<Arc<Node>>> = vec![None; pointers.len()];
        loop {
            let (mut to_load, mut guards, mut waits) = (Vec::new(), Vec::new(), Vec::new());
            for (index, pointer) in pointers.iter().enumerate() {
                if found[index].is_some() {
                    continue;
                }
                match self.nodes.lookup(*pointer) {
                    Lookup::Hit(node) => found[index] = Some(node),
                    Lookup::Load(guard) => {
                        to_load.push(index);
                        guards.push(guard);
                    }
                    Lookup::Wait(done) => waits.push(done),
                }
            }
            if to_load.is_empty() && waits.is_empty() {
                return Ok(found.into_iter().flatten().collect());
            }
            let missing: Vec<Pointer> = to_load.iter().map(|&index| pointers[index]).collect();
            let loaded = self.read_nodes(&missing).await?;
            for (index, node) in to_load.into_iter().zip(loaded) {
                self.nodes.insert(pointers[index], Arc::clone(&node));
                found[index] = Some(node);
            }
            drop(guards);
            for done in waits {
                // Closed when the other load has ended; then look again.
                let _ = done.acquire().await;
            }
        }
    }

    /// Reads nodes past the cache, for walks over everything.
    ///
    /// # Errors
    /// As [`read_blocks`](Self::read_blocks).
    pub async fn read_nodes(&self, pointers: &[Pointer]) -> Result<Vec<Arc<Node>>> {
        let blocks = self.read_blocks(pointers).await?;
        let decoded = pointers.iter().zip(blocks).map(|(pointer, block)| {
            Node::decode(&block).map(Arc::new).map_err(|damage| {
                StoreError::new(
                    StoreErrorKind::Corrupt,
                    format!("{}, node at block {}", self.io.url(), pointer.gba),
                    format!(
                        "{damage}, though its checksum matches; was it written by a newer version?"
                    ),
                )
            })
        });
        decoded.collect()
    }
}
