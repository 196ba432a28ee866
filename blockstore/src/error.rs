//! The store's error type: a kind to branch on, the object it concerns, and words for the operator.

use crate::device::DeviceError;
use crate::device::DeviceErrorKind;
use std::fmt;

/// What callers branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The device holds no Ballast store.
    NotAStore,
    /// The device holds something that a format must not destroy unasked.
    Foreign,
    /// The store was written by a newer version.
    NewerVersion,
    /// A record fails its checks.
    Damaged,
    /// A block does not match the checksum that its parent holds; no good copy exists here.
    Corrupt,
    /// The name is taken.
    AlreadyExists,
    /// No such object.
    NotFound,
    /// Another host, or an attachment, holds the object.
    InUse,
    /// The request itself makes no sense (size, name, range, order).
    Invalid,
    /// The store has no free space of the kind needed.
    NoSpace,
    /// The virtual disk is no longer ours: stop committing.
    NotOwner,
    /// The store shows an older state than one it had confirmed: it was rolled back under us.
    RolledBack,
    /// The committed image changed under a reader that holds no lock.
    Changed,
    /// The store was opened read-only.
    ReadOnly,
    /// The store is closing.
    Closing,
    /// The device did not answer within the time a control operation may take.
    Unreachable,
    /// The device failed in a way that retrying does not cure.
    Device,
}

/// A failed operation of the store, with its context.
#[derive(Debug)]
pub struct StoreError {
    /// What callers branch on.
    pub kind: StoreErrorKind,
    /// The object concerned: a store's URL, a virtual disk, a record.
    pub object: String,
    /// What failed and what to do next.
    pub message: String,
    /// The device error underneath, if there is one.
    pub source: Option<Box<DeviceError>>,
}

impl StoreError {
    /// An error about `object`.
    #[must_use]
    pub fn new(
        kind: StoreErrorKind,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, object: object.into(), message: message.into(), source: None }
    }

    /// True if it says something of the blocks in question (a bad sector; no space for them on a thin device), not of the device or
    /// the store as a whole.
    pub(crate) fn is_of_blocks(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Device | StoreErrorKind::NoSpace)
    }

    /// The same error, named after a more telling object.
    #[must_use]
    pub fn about(mut self, object: impl Into<String>) -> Self {
        self.object = object.into();
        self
    }
}

impl From<DeviceError> for StoreError {
    fn from(error: DeviceError) -> Self {
        let kind = match error.kind {
            DeviceErrorKind::Unreachable => StoreErrorKind::Unreachable,
            DeviceErrorKind::NoSpace => StoreErrorKind::NoSpace,
            DeviceErrorKind::Reserved => StoreErrorKind::InUse,
            DeviceErrorKind::Io | DeviceErrorKind::OutOfRange | DeviceErrorKind::Unsupported => {
                StoreErrorKind::Device
            }
        };
        let message = format!(
            "{} of {} bytes at offset {} failed: {}",
            error.operation, error.len, error.offset, error.message
        );
        Self { kind, object: error.device.clone(), message, source: Some(Box::new(error)) }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}

/// Short for results of the store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;
