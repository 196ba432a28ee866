//! The local cache.
pub mod backing;
pub mod disk;
pub mod image;
pub mod link;
