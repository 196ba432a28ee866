//! The shared device behind an iSCSI target, in process, through libiscsi.
//!
//! Layers, from the wire up: `ffi` (bindings), `context` (one connection, safe), `worker` (the thread that
//! owns it) with the pure parts `session` (when to connect), `prepare` (what a fresh login says to the
//! LUN), `queue` (fate of each command), `outcome` (what an ending means) and `scsi` (bytes); `link` leads from callers to the thread;
//! `open` and this file are the callers' side.
//!
//! What the store relies on:
//! * A write is never sent twice by this backend. If its outcome is unknown, the caller hears of it only after
//!   a login under the same ISID, when the target has dropped what the old session left in flight. That
//!   the target does so is proven at each open for writing.
//! * The epoch rises before anything is answered that came after a lost session or a reset target.
//! * In exclusive mode no write passes between a login and the renewed reservation.

mod context;
mod ffi;
#[cfg(fuzzing)]
pub mod fuzzing;
mod identity;
mod link;
mod open;
mod outcome;
mod prepare;
mod probe;
mod queue;
mod reinstate;
mod scsi;
mod secret;
mod session;
mod url;
mod worker;

pub use open::open;

use super::{BlockDevice, CawOutcome, DeviceError, DeviceErrorKind, DeviceInfo};
use crate::buf::AlignedBuf;
use async_trait::async_trait;
use bytes::Bytes;
use link::{Link, Reply, outcome};
use outcome::{Class, Failure};
use std::sync::atomic::Ordering;

/// Bytes of one READ or WRITE at most, whatever the target allows.
const IO_MAX: u64 = 1 << 20;
/// Bytes of one UNMAP at most: a target may take long over a large one.
const UNMAP_MAX: u64 = 1 << 30;

/// An open LUN.
#[derive(Debug)]
struct IscsiDevice {
    info: DeviceInfo,
    link: Link,
    read_only: bool,
    /// Bytes of one READ or WRITE; a multiple of 4096.
    io_max: u64,
    /// Bytes of one UNMAP; a multiple of 4096.
    unmap_max: u64,
}

/// What an operation is about, for error messages.
#[derive(Clone, Copy)]
struct Subject {
    operation: &'static str,
    offset: u64,
    len: u64,
}

impl IscsiDevice {
    fn error(&self, subject: Subject, failure: Failure) -> DeviceError {
        DeviceError {
            kind: failure.kind,
            device: self.info.url.clone(),
            operation: subject.operation,
            offset: subject.offset,
            len: subject.len,
            message: failure.message,
        }
    }

    fn check_writable(&self, subject: Subject) -> Result<(), DeviceError> {
        if self.read_only {
            let message = "the device was opened read-only; open it for writing";
            return Err(self.unsupported(subject, message));
        }
        Ok(())
    }

    fn unsupported(&self, subject: Subject, message: &str) -> DeviceError {
        self.error(subject, Failure::new(DeviceErrorKind::Unsupported, message))
    }

    fn lba(&self, offset: u64) -> u64 {
        offset / u64::from(self.info.logical_block)
    }

    /// Blocks of at most [`UNMAP_MAX`] bytes: fits.
    fn blocks(&self, len: u64) -> u32 {
        (len / u64::from(self.info.logical_block)) as u32
    }

    /// Sends one command per chunk of at most `chunk_max` bytes and waits for all of them, also after
    /// one failed: no error is reported while another part may still take effect.
    async fn in_chunks(
        &self,
        subject: Subject,
        chunk_max: u64,
        mut command: impl FnMut(u64, u64) -> (Class, scsi::Cdb, Vec<Bytes>, usize),
    ) -> Result<Vec<Reply>, DeviceError> {
        let mut pending = Vec::new();
        let mut failed = None;
        let mut at = subject.offset;
        let end = subject.offset + subject.len;
        while at < end {
            let len = chunk_max.min(end - at);
            let (class, cdb, out, in_len) = command(at, len);
            match self.link.send(class, cdb, out, in_len).await {
                Ok(outcome) => pending.push(outcome),
                Err(failure) => {
                    failed = Some(failure);
                    break;
                }
            }
            at += len;
        }
        let mut replies = Vec::with_capacity(pending.len());
        for pending in pending {
            match outcome(pending).await {
                Ok(reply) => replies.push(reply),
                Err(failure) => failed = failed.or(Some(failure)),
            }
        }
        match failed {
            Some(failure) => Err(self.error(subject, failure)),
            None => Ok(replies),
        }
    }
}

#[async_trait]
impl BlockDevice for IscsiDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        let subject = Subject { operation: "read", offset, len: len as u64 };
        self.info.check_range(subject.operation, offset, subject.len)?;
        let command = |at, len: u64| {
            let cdb = scsi::read16(self.lba(at), self.blocks(len));
            (Class::Read, cdb, vec![], len as usize)
        };
        let mut replies = self.in_chunks(subject, self.io_max, command).await?;
        if replies.len() == 1
            && let Some(data) = replies.pop().and_then(|reply| reply.data)
        {
            return Ok(data);
        }
        let mut buf = AlignedBuf::zeroed(len);
        let mut rest = &mut buf[..];
        for data in replies.into_iter().filter_map(|reply| reply.data) {
            let (part, tail) = rest.split_at_mut(data.len());
            part.copy_from_slice(&data);
            rest = tail;
        }
        Ok(buf)
    }

    async fn write(&self, offset: u64, data: Vec<Bytes>) -> Result<(), DeviceError> {
        let len = self.info.check_write(offset, &data)?;
        let subject = Subject { operation: "write", offset, len };
        self.check_writable(subject)?;
        let mut pieces = Pieces::new(data);
        let command = |at, len: u64| {
            let cdb = scsi::write16(self.lba(at), self.blocks(len));
            (Class::Write, cdb, pieces.take(len as usize), 0)
        };
        self.in_chunks(subject, self.io_max, command).await.map(drop)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        if self.read_only {
            return Ok(());
        }
        let subject = Subject { operation: "flush", offset: 0, len: 0 };
        let cdb = scsi::synchronize_cache16();
        let flushed = self.link.call(Class::Flush, cdb, vec![], 0).await;
        flushed.map(drop).map_err(|failure| self.error(subject, failure))
    }

    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError> {
        let len = u64::from(self.info.logical_block);
        let subject = Subject { operation: "compare-and-write", offset, len };
        self.check_writable(subject)?;
        self.info.check_caw(offset, &expected, &new)?;
        let cdb = scsi::compare_and_write(self.lba(offset));
        match self.link.call(Class::CompareAndWrite, cdb, vec![expected, new], 0).await {
            Ok(Reply { miscompare: true, .. }) => Ok(CawOutcome::Miscompare),
            Ok(_) => Ok(CawOutcome::Written),
            Err(failure) => Err(self.error(subject, failure)),
        }
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let subject = Subject { operation: "discard", offset, len };
        self.info.check_discard(offset, len)?;
        self.check_writable(subject)?;
        if !self.info.discard {
            return Err(self.unsupported(subject, "this LUN has no UNMAP: make it thin"));
        }
        let command = |at, len| {
            let list = scsi::unmap_list(&[(self.lba(at), self.blocks(len))]);
            (Class::Discard, scsi::unmap(list.len() as u16), vec![Bytes::from(list)], 0)
        };
        self.in_chunks(subject, self.unmap_max, command).await.map(drop)
    }

    fn epoch(&self) -> u64 {
        self.link.shared.epoch.load(Ordering::Acquire)
    }
}

/// Hands out a list of buffers in chunks, without copying.
struct Pieces {
    /// The next piece is the last one here.
    reversed: Vec<Bytes>,
}

impl Pieces {
    fn new(mut data: Vec<Bytes>) -> Self {
        data.reverse();
        Self { reversed: data }
    }

    fn take(&mut self, mut len: usize) -> Vec<Bytes> {
        let mut taken = Vec::new();
        while len > 0
            && let Some(mut piece) = self.reversed.pop()
        {
            if piece.len() > len {
                self.reversed.push(piece.split_off(len));
            }
            len -= piece.len();
            taken.push(piece);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_at_chunk_boundaries_and_none_is_lost() {
        let bytes = Bytes::from((0..=255).collect::<Vec<u8>>());
        let mut pieces =
            Pieces::new(vec![bytes.slice(0..100), Bytes::new(), bytes.slice(100..256)]);
        let chunks: Vec<Vec<u8>> =
            [64, 64, 64, 64].map(|len| pieces.take(len).concat()).into_iter().collect();
        assert!(chunks.iter().all(|chunk| chunk.len() == 64));
        assert_eq!(chunks.concat(), bytes);
        assert!(pieces.take(1).is_empty());
    }
}
