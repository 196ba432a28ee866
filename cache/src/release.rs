//! A disk without a worker: seals what its log still holds, with plain blocking I/O.

use crate::disk::{Action, AttachedDisk, OpId};
use crate::link::{FromDisk, ToDisk};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Runs a disk until its log is sealed and quiet. Returns what it has to say to its task. The unsealed tail, should this
/// fail, is found by the next recovery: nothing acknowledged is lost.
pub async fn seal(attached: AttachedDisk) -> std::io::Result<Vec<FromDisk>> {
    tokio::task::spawn_blocking(move || seal_blocking(attached))
        .await
        .map_err(std::io::Error::other)?
}

fn seal_blocking(mut attached: AttachedDisk) -> std::io::Result<Vec<FromDisk>> {
    while let Some(message) = attached.link.try_recv() {
        if !matches!(message, ToDisk::Fetched { .. }) {
            attached.disk.on_message(message);
        }
    }
    attached.disk.on_message(ToDisk::Roll { id: 0 });
    let mut messages = Vec::new();
    loop {
        run_once(&mut attached, &mut messages);
        attached.disk.completions();
        if attached.disk.is_quiet() {
            let unused = attached.disk.take_unused_grants();
            messages.extend(unused.into_iter().map(|grant| FromDisk::Unused { segment: grant.id }));
            return Ok(messages);
        }
    }
}

/// Carries out what the disk wants right now.
pub fn run_once(attached: &mut AttachedDisk, messages: &mut Vec<FromDisk>) {
    let mut actions = Vec::new();
    attached.disk.poll(&mut actions);
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
}

fn done(attached: &mut AttachedDisk, op: OpId, result: std::io::Result<()>) {
    let result = result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
    attached.disk.io_done(op, result);
}
