//! Errors of the parts, as failures with a kind and the words that the parts found.

use crate::error::{Failure, Kind};
use ballast_vhost::ServerError;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::{StoreError, StoreErrorKind};
use cache::CacheError;

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let kind = match error.kind {
            StoreErrorKind::NotAStore | StoreErrorKind::NotFound => Kind::NotFound,
            StoreErrorKind::Foreign
            | StoreErrorKind::AlreadyExists
            | StoreErrorKind::InUse
            | StoreErrorKind::NotOwner
            | StoreErrorKind::Changed => Kind::Conflict,
            StoreErrorKind::Invalid => Kind::Usage,
            StoreErrorKind::Closing | StoreErrorKind::Unreachable => Kind::Unavailable,
            StoreErrorKind::NewerVersion
            | StoreErrorKind::Damaged
            | StoreErrorKind::Corrupt
            | StoreErrorKind::NoSpace
            | StoreErrorKind::RolledBack
            | StoreErrorKind::ReadOnly
            | StoreErrorKind::Device => Kind::Failed,
        };
        // The message quotes the device error underneath already.
        Self::new(kind, error.to_string())
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let kind = match error.kind {
            DeviceErrorKind::Unreachable => Kind::Unavailable,
            DeviceErrorKind::Reserved => Kind::Conflict,
            DeviceErrorKind::Unsupported => Kind::Usage,
            DeviceErrorKind::NoSpace | DeviceErrorKind::Io | DeviceErrorKind::OutOfRange => {
                Kind::Failed
            }
        };
        let words = match error.operation {
            "open" => format!("{}: {}", error.device, error.message),
            _ => error.to_string(),
        };
        Self::new(kind, words)
    }
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        let kind = match error {
            CacheError::Device(device) => return Self::from(device).within("cache"),
            CacheError::Missing { .. }
            | CacheError::NotACache { .. }
            | CacheError::NotQuarantined { .. } => Kind::NotFound,
            CacheError::TooSmall { .. } => Kind::Usage,
            CacheError::OtherStore { .. }
            | CacheError::OtherMachine { .. }
            | CacheError::NewLeg { .. }
            | CacheError::NoSlot { .. }
            | CacheError::NoSegments { .. }
            | CacheError::Attached { .. }
            | CacheError::Clone { .. }
            | CacheError::NotAttached { .. } => Kind::Conflict,
            _ => Kind::Failed,
        };
        Self::new(kind, crate::error::chain(&error))
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        let kind = match error {
            ServerError::PathTooLong { .. } | ServerError::Options { .. } => Kind::Usage,
            ServerError::NotASocket { .. } | ServerError::InUse { .. } => Kind::Conflict,
            ServerError::Socket { .. } | ServerError::Worker { .. } => Kind::Failed,
        };
        Self::new(kind, crate::error::chain(&error))
    }
}
