//! A disk without a worker: seals what its log still holds, with plain blocking I/O.

use crate::aside;
use crate::disk::{Action, AttachedDisk, OpId};
use crate::link::{FromDisk, ToDisk};
use crate::local::Local;
use blockstore::types::Lsn;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// What is left of a disk whose log was sealed.
#[derive(Debug)]
pub struct Sealed {
    /// What it has to say to its task.
    pub messages: Vec<FromDisk>,
    /// Last LSN that it gave out.
    pub last_lsn: Lsn,
}

/// Rounds without any I/O after which a disk that is not quiet never will be: its worker died amid requests.
const IDLE_ROUNDS_MAX: u32 = 3;

/// How often a disk may stop for a leg that failed: more often than there are legs, and something else is wrong.
const LEGS_LOST_MAX: usize = 4;

/// A log whose last I/O takes so many times longer than a leg is waited for has a leg that hangs.
const SLOW_OPERATIONS: u32 = 3;

/// What is said then: the kernel's calls cannot be called off.
fn silent() -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "a leg of the cache does not answer; what is not sealed is found at the next start",
    )
}

/// Why there are no snapshots any more.
const STOPPING: &str = "the disk is going out of service";

/// Runs a disk until its log is sealed and quiet. The unsealed tail, should this fail, is found by the next recovery:
/// nothing acknowledged is lost. A leg that fails meanwhile is put out of the cache, as with a worker.
pub async fn seal(mut attached: AttachedDisk, local: &Local) -> std::io::Result<Sealed> {
    attached.disk.refuse_snapshots(STOPPING);
    attached.disk.on_message(ToDisk::Roll { id: 0 });
    let mut messages = Vec::new();
    for _ in 0..LEGS_LOST_MAX {
        let sealing = aside::run(move || seal_blocking(attached));
        let sealed = match local.members().len() {
            // The last leg is waited for.
            0 | 1 => sealing.await,
            _ => tokio::time::timeout(local.leg_timeout() * SLOW_OPERATIONS, sealing)
                .await
                .map_err(|_| silent())?,
        };
        let (back, said, sealed) = sealed.map_err(std::io::Error::other)?;
        attached = back;
        let mut lost = false;
        for message in said {
            match message {
                FromDisk::LegFailed { leg, joining, reason } => {
                    // The answer is on the link.
                    local.leg_failed(leg, joining, &reason).await;
                    lost = true;
                }
                other => messages.push(other),
            }
        }
        if let Some(last_lsn) = sealed {
            return Ok(Sealed { messages, last_lsn });
        }
        if !lost {
            break;
        }
    }
    Err(std::io::Error::other("the disk's worker died amid local I/O"))
}

/// Runs the disk as far as it goes without an answer from outside. With its last LSN if its log is sealed.
fn seal_blocking(mut attached: AttachedDisk) -> (AttachedDisk, Vec<FromDisk>, Option<Lsn>) {
    let mut messages = Vec::new();
    let mut idle_rounds = 0;
    loop {
        while let Some(message) = attached.link.try_recv() {
            match message {
                ToDisk::Fetched { .. } | ToDisk::FailWaiting { .. } => {}
                // Nothing is staged behind what is being sealed.
                ToDisk::Snapshot { id, .. } => {
                    let result = Err(STOPPING.into());
                    messages.push(FromDisk::SnapshotTaken { id, result });
                }
                message => attached.on_message(message),
            }
        }
        let worked = run_once(&mut attached, &mut messages);
        idle_rounds = if worked { 0 } else { idle_rounds + 1 };
        attached.disk.completions();
        if attached.disk.is_quiet() {
            let unused = attached.disk.take_unused_grants();
            messages.extend(unused.into_iter().map(|grant| FromDisk::Unused { segment: grant.id }));
            let last_lsn = attached.disk.staged_lsn();
            return (attached, messages, Some(last_lsn));
        }
        if idle_rounds > IDLE_ROUNDS_MAX {
            return (attached, messages, None);
        }
    }
}

/// Carries out what the disk wants right now; false if that was no I/O.
pub fn run_once(attached: &mut AttachedDisk, messages: &mut Vec<FromDisk>) -> bool {
    let mut actions = Vec::new();
    attached.disk.poll(&mut actions);
    let worked = actions.iter().any(|action| !matches!(action, Action::Send(_)));
    for action in actions {
        match action {
            Action::Write { op, leg, offset, image, start, len } => {
                let file = &attached.legs[usize::from(leg)];
                let result = file.write_all_at(image.bytes(start, len), offset);
                done(attached, op, result);
            }
            Action::Flush { op, leg } => {
                let result = File::sync_data(&attached.legs[usize::from(leg)]);
                done(attached, op, result);
            }
            Action::Send(message) => messages.push(message),
        }
    }
    worked
}

fn done(attached: &mut AttachedDisk, op: OpId, result: std::io::Result<()>) {
    let result = result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
    attached.disk.io_done(op, result);
}
