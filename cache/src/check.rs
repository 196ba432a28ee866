//! Offline check of a cache: read-only, every structure and every payload block.

use crate::cache::{Sorted, sort_segments};
use crate::error::CacheError;
use crate::format::record::Entries;
use crate::format::segment::SegmentHeader;
use crate::format::slot::SlotVdi;
use crate::local::{Local, Mode};
use crate::recovery;
use blockstore::crc::crc32c;
use blockstore::types::BLOCK_SIZE;
use serde::Serialize;
use std::path::Path;
use uuid::Uuid;

/// What a check found.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The cache.
    pub cache: Uuid,
    /// The host it belongs to.
    pub host: Uuid,
    /// The store it is bound to.
    pub store: Option<Uuid>,
    /// Bytes of the device that are used.
    pub size: u64,
    /// How many segments there are.
    pub segments: u32,
    /// How many hold something of an attached disk.
    pub segments_used: u32,
    /// Attached disks.
    pub vdis: Vec<VdiReport>,
    /// Everything that is wrong, as sentences.
    pub problems: Vec<String>,
}

/// One attached disk.
#[derive(Clone, Debug, Serialize)]
pub struct VdiReport {
    /// Its name when it was attached.
    pub name: String,
    /// The disk in the store.
    pub uuid: Uuid,
    /// The store's image reached at least this LSN.
    pub committed_lsn: u64,
    /// Last LSN in the log.
    pub last_lsn: u64,
    /// Snapshots in its log that the store did not have at `committed_lsn`.
    pub snapshots_pending: u64,
    /// Segments of its log.
    pub segments: u32,
    /// Payload blocks that were read and compared with their checksums.
    pub blocks_checked: u64,
}

/// Checks the cache at `path`. Problems are in the report; an error means that there is no cache to be checked.
pub async fn check(path: &Path) -> Result<CheckReport, CacheError> {
    let local = Local::open(path, Mode::ReadOnly).await?;
    let superblock = local.superblock().await;
    let slots = local.read_slots().await?;
    let Sorted { mut found, quarantined, .. } =
        sort_segments(&local.geometry, &slots, local.read_headers().await?);
    let mut report = CheckReport {
        cache: superblock.cache,
        host: superblock.host,
        store: superblock.store,
        size: local.geometry.size,
        segments: local.geometry.segments,
        segments_used: found.values().map(|headers| headers.len() as u32).sum(),
        vdis: Vec::new(),
        problems: Vec::new(),
    };
    report.segments_used += quarantined.values().map(|kept| kept.headers.len() as u32).sum::<u32>();
    for vdi in slots.iter().filter_map(|slot| slot.vdi.as_ref()) {
        let headers = found.remove(&vdi.uuid).unwrap_or_default();
        check_vdi(&local, vdi, &headers, &mut report).await;
    }
    Ok(report)
}

async fn check_vdi(
    local: &Local,
    vdi: &SlotVdi,
    headers: &[SegmentHeader],
    report: &mut CheckReport,
) {
    let mut of_vdi = VdiReport {
        name: vdi.name.clone(),
        uuid: vdi.uuid,
        committed_lsn: vdi.committed.0,
        last_lsn: vdi.committed.0,
        snapshots_pending: 0,
        segments: headers.len() as u32,
        blocks_checked: 0,
    };
    match recovery::recover(local, vdi, vdi.committed, headers).await {
        Ok(recovered) => {
            of_vdi.last_lsn = recovered.last_lsn.0;
            of_vdi.snapshots_pending = recovered.snapshots.len() as u64;
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    for header in headers {
        match check_payloads(local, header).await {
            Ok((blocks, problems)) => {
                of_vdi.blocks_checked += blocks;
                report
                    .problems
                    .extend(problems.into_iter().map(|p| format!("VDI {}: {p}", vdi.name)));
            }
            Err(error) => report.problems.push(format!("VDI {}: {error}", vdi.name)),
        }
    }
    report.vdis.push(of_vdi);
}

/// Compares every payload block of a segment with its checksum.
async fn check_payloads(
    local: &Local,
    header: &SegmentHeader,
) -> Result<(u64, Vec<String>), CacheError> {
    let geometry = &local.geometry;
    let found = recovery::read_segment(local, header).await?;
    let used = found.used_blocks as usize * BLOCK_SIZE;
    let bytes = local.read(geometry.segment_offset(header.segment), used).await?;
    let (mut blocks, mut problems) = (0, Vec::new());
    for entry in Entries::new(&found.entries, found.used_blocks).flatten() {
        for n in 0..entry.payload_blocks() {
            let at = (u32::from(entry.payload) + n) as usize * BLOCK_SIZE;
            let (expected, is) = (entry.crc(n), crc32c(&bytes[at..at + BLOCK_SIZE]));
            blocks += 1;
            if expected != is {
                problems.push(format!(
                    "segment {}, block {}: the copy of disk block {} has CRC32C {is:#010x}, its record says {expected:#010x}",
                    header.segment.0,
                    u32::from(entry.payload) + n,
                    entry.lba.0 + u64::from(n)
                ));
            }
        }
    }
    Ok((blocks, problems))
}
