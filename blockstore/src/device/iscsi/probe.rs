//! What a LUN can do, found out by doing it: targets claim what they lack (one claims COMPARE AND WRITE in
//! its VPD pages and rejects the command).

use super::link::{Link, Reply};
use super::outcome::{Class, Failure};
use super::prepare::Facts;
use super::scsi::{self, BlockLimits};
use crate::buf::AlignedBuf;
use crate::device::DeviceErrorKind;
use bytes::Bytes;
use std::time::Duration;

/// A probe is repeated this often after the target cut it off or another host changed the block.
const TRIES: u32 = 8;
const PAUSE: Duration = Duration::from_millis(50);

/// Limits of VPD page B0, all zero if the target has none.
pub async fn block_limits(link: &Link) -> Result<BlockLimits, Failure> {
    let cdb = scsi::inquiry_vpd(0xb0);
    match call(link, Class::Query, cdb, vec![], scsi::VPD_LEN).await {
        Ok(Reply { data: Some(page), missing, .. }) => {
            Ok(BlockLimits::parse(&page[..page.len().saturating_sub(missing)]))
        }
        Ok(_) => Ok(BlockLimits::default()),
        Err(failure) if failure.kind == DeviceErrorKind::Unreachable => Err(failure),
        Err(_) => Ok(BlockLimits::default()),
    }
}

/// Whether COMPARE AND WRITE works: the last block is replaced by its own content, and a comparison
/// with something else must fail. Another host may be doing the same: that is a miscompare, and tried again.
pub async fn compare_and_write(link: &Link, facts: &Facts) -> Result<bool, Failure> {
    let lba = facts.capacity.blocks.saturating_sub(1);
    for _ in 0..TRIES {
        let block = read_block(link, facts, lba).await?;
        let wrong: Vec<u8> = block.iter().map(|byte| !byte).collect();
        let (block, wrong) = (block.freeze(), Bytes::from(wrong));
        let cdb = scsi::compare_and_write(lba);
        let class = Class::CompareAndWrite;
        match call(link, class, cdb, vec![block.clone(), block.clone()], 0).await {
            Ok(Reply { miscompare: true, .. }) => continue,
            Ok(_) => {}
            Err(failure) if is_missing(&failure) => return Ok(false),
            Err(failure) => return Err(failure),
        }
        return match call(link, class, cdb, vec![wrong, block], 0).await {
            Ok(Reply { miscompare, .. }) => Ok(miscompare),
            Err(failure) if is_missing(&failure) => Ok(false),
            Err(failure) => Err(failure),
        };
    }
    // Each time something else than was just read: compared, but not with the medium.
    Ok(false)
}

/// Whether UNMAP is there: the target does not deny it in VPD page B2, and takes an empty list of ranges, which changes
/// nothing.
pub async fn unmap(link: &Link) -> Result<bool, Failure> {
    let told = match call(link, Class::Query, scsi::inquiry_vpd(0xb2), vec![], scsi::VPD_LEN).await
    {
        Ok(Reply { data: Some(page), missing, .. }) => {
            scsi::parse_unmap_supported(&page[..page.len().saturating_sub(missing)])
        }
        Ok(_) => None,
        Err(failure) if failure.kind == DeviceErrorKind::Unreachable => return Err(failure),
        Err(_) => None,
    };
    if told == Some(false) {
        return Ok(false);
    }
    let list = Bytes::from(scsi::unmap_list(&[]));
    let cdb = scsi::unmap(list.len() as u16);
    match call(link, Class::Query, cdb, vec![list], 0).await {
        Ok(_) => Ok(true),
        Err(failure) if is_missing(&failure) => Ok(false),
        Err(failure) => Err(failure),
    }
}

async fn read_block(link: &Link, facts: &Facts, lba: u64) -> Result<AlignedBuf, Failure> {
    let len = facts.capacity.block_len as usize;
    let reply = call(link, Class::Read, scsi::read16(lba, 1), vec![], len).await?;
    Ok(reply.data.unwrap_or_else(|| AlignedBuf::zeroed(len)))
}

fn is_missing(failure: &Failure) -> bool {
    matches!(failure.kind, DeviceErrorKind::Unsupported | DeviceErrorKind::Io)
}

async fn call(
    link: &Link,
    class: Class,
    cdb: scsi::Cdb,
    out: Vec<Bytes>,
    in_len: usize,
) -> Result<Reply, Failure> {
    let mut tries = 1;
    loop {
        match link.call(class, cdb, out.clone(), in_len).await {
            Err(failure) if failure.kind == DeviceErrorKind::Unreachable && tries < TRIES => {
                tries += 1;
                tokio::time::sleep(PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}
