//! Filling a ring, to the brim or in part: random 4 KiB writes, as many in flight as there are slots.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::front_end::{Disk, Options, Request, Status, Wake};
use crate::load::Random;

/// The ring counts as full when no write was answered for so long.
const FULL_AFTER: Duration = Duration::from_secs(3);

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Filled {
    /// Writes that were answered.
    pub writes: u64,
    /// Where the last of them went.
    pub last_sector: u64,
    /// The number that it begins with, counted from 1 in the order of sending.
    pub last_stamp: u64,
}

/// Writes random blocks until none is answered any more, or `most` were. Each starts with its own number. `answered` is told of
/// each answer how many there were.
///
/// # Errors
/// When a write fails or the agent dies.
pub fn fill(
    socket: &Path,
    disk_bytes: u64,
    most: u64,
    answered: &mut dyn FnMut(u64),
) -> Result<Filled> {
    let mut disk = Disk::connect(socket, &Options::default())?;
    let mut random = Random(0x0f11_5eed);
    let slots = disk.options().slots;
    let mut placed = vec![(0, 0); slots];
    let mut filled = Filled { writes: 0, last_sector: 0, last_stamp: 0 };
    let mut submitted: u64 = 0;
    for slot in 0..slots {
        random.fill(disk.buffer(slot));
    }
    let mut idle: Vec<usize> = (0..slots).collect();
    loop {
        for slot in idle.drain(..) {
            if submitted == most {
                break;
            }
            submitted += 1;
            let sector = random.below(disk_bytes / 4096) * 8;
            placed[slot] = (sector, submitted);
            disk.buffer(slot)[..8].copy_from_slice(&submitted.to_le_bytes());
            disk.submit(slot, &Request::Write { sector, sectors: 8 })?;
        }
        disk.kick()?;
        match disk.wait(FULL_AFTER)? {
            Wake::Completions => {}
            Wake::TimedOut => break,
            Wake::Disconnected => bail!("the agent died while its ring was filled"),
        }
        while let Some(done) = disk.take()? {
            ensure!(done.status == Status::Ok, "a write ended with {:?}", done.status);
            filled.writes += 1;
            answered(filled.writes);
            let (sector, stamp) = placed[done.slot];
            if stamp > filled.last_stamp {
                (filled.last_sector, filled.last_stamp) = (sector, stamp);
            }
            idle.push(done.slot);
        }
        if filled.writes == most {
            break;
        }
    }
    Ok(filled)
}
