//! The local cache.
pub mod backing;
mod cache;
pub mod disk;
pub mod error;
pub mod flusher;
pub mod format;
pub mod image;
pub mod index;
pub mod link;
pub mod local;
pub mod pool;
pub mod recovery;
pub mod release;
mod vdi;

pub use cache::{
    AttachedRecord, Cache, CacheIdentity, CacheOptions, CacheStatus, VdiIdentity,
};
pub use error::CacheError;
pub use vdi::{Phase, VdiStatus};
