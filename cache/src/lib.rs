//! The local cache.
pub mod backing;
pub mod disk;
pub mod format;
pub mod image;
pub mod index;
pub mod link;
