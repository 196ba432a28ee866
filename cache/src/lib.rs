//! The local cache.
pub mod backing;
pub mod disk;
pub mod error;
pub mod format;
pub mod image;
pub mod index;
pub mod link;
pub mod local;
pub mod pool;
pub mod recovery;
