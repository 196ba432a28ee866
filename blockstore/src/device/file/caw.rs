//! The thread that carries out compare-and-writes, one after the other, so that neither the ring nor
//! the runtime ever waits for another host's lock.
//!
//! Crash behaviour: the new content is one logical block, which devices write whole or not at all. The
//! lock ends with the process.

use super::Shared;
use super::lock::CawLock;
use super::opening::CawMethod;
use super::ring::CLOSE_WAIT;
use super::sgio::{self, ScsiError};
use crate::buf::AlignedBuf;
use crate::device::{CawOutcome, DeviceErrorKind};
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Compare-and-writes of one device that wait at the thread; further callers wait before it.
const QUEUED_MAX: usize = 32;

/// Why a compare-and-write failed.
pub(super) enum CawError {
    /// At the file, or in the system call.
    Io(io::Error),
    /// The disk's own answer.
    Scsi(ScsiError),
}

/// The caller's side.
#[derive(Debug)]
pub(super) struct CawWorker {
    /// None only while closing.
    jobs: Option<Sender<Job>>,
    permits: Arc<Semaphore>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

struct Job {
    offset: u64,
    expected: Bytes,
    new: Bytes,
    reply: oneshot::Sender<Result<CawOutcome, CawError>>,
    /// Given back when the job has ended.
    _permit: OwnedSemaphorePermit,
}

impl CawWorker {
    /// Starts the thread. The file stays open until the thread ends.
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub(super) fn start(shared: Arc<Shared>, method: CawMethod) -> io::Result<Self> {
        let (jobs, queue) = crossbeam_channel::bounded::<Job>(QUEUED_MAX);
        let (ending, ended) = crossbeam_channel::bounded(0);
        thread::Builder::new().name("ballast-caw".to_owned()).spawn(move || {
            for job in queue {
                let result = carry_out(&shared, method, &job);
                // The caller may have lost interest.
                let _ = job.reply.send(result);
            }
            drop(shared);
            drop(ending);
        })?;
        let permits = Arc::new(Semaphore::new(QUEUED_MAX));
        Ok(Self { jobs: Some(jobs), permits, ended })
    }

    /// Carries out one compare-and-write. It goes on if the returned future is dropped.
    pub(super) async fn submit(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, CawError> {
        let gone = || CawError::Io(io::Error::other("the compare-and-write thread has ended"));
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| gone())?;
        let (reply, result) = oneshot::channel();
        let job = Job { offset, expected, new, reply, _permit: permit };
        // There is room: the channel is as long as there are permits.
        self.jobs.as_ref().ok_or_else(gone)?.try_send(job).map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

impl Drop for CawWorker {
    fn drop(&mut self) {
        self.jobs = None;
        // Disconnected or timed out: either way there is nothing more to do here.
        let _ = self.ended.recv_timeout(CLOSE_WAIT);
    }
}

fn carry_out(shared: &Shared, method: CawMethod, job: &Job) -> Result<CawOutcome, CawError> {
    let (file, expected, new) = (&shared.file, &job.expected, &job.new);
    match method {
        CawMethod::FileLock => under_lock(file, job.offset, expected, new).map_err(|e| {
            shared.note_failure(&e, false);
            CawError::Io(e)
        }),
        CawMethod::Scsi => {
            let result = sgio::compare_and_write(file, job.offset, expected, new, &shared.epoch);
            result.map_err(|e| {
                if e.kind == DeviceErrorKind::Unreachable {
                    shared.raise_epoch();
                }
                CawError::Scsi(e)
            })
        }
    }
}

/// Reads, compares and writes while nobody else can do the same at this place.
fn under_lock(file: &File, offset: u64, expected: &[u8], new: &[u8]) -> io::Result<CawOutcome> {
    let _lock = CawLock::acquire(file, offset, new.len() as u64)?;
    let mut found = AlignedBuf::zeroed(expected.len());
    file.read_exact_at(&mut found, offset)?;
    if found[..] != *expected {
        return Ok(CawOutcome::Miscompare);
    }
    file.write_all_at(&AlignedBuf::copy_of(new), offset)?;
    Ok(CawOutcome::Written)
}
