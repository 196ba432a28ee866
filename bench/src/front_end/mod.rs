//! The guest's side of vhost-user-blk, in user space.
//!
//! A [`Disk`] is what a virtual machine monitor and the guest's driver are together: it connects to
//! a back end's socket, negotiates features, shares one memory region, runs one split virtqueue and
//! submits block requests. It behaves as a Linux guest under QEMU does where that matters to a back
//! end: indirect descriptors and event index when offered, kicks only when asked for, and a wait on
//! the call eventfd (a busy-polling wait is there on request).
//!
//! Every request lives in a *slot*: a number below [`Options::slots`] that owns a header, a status
//! byte and a data buffer in shared memory. A slot takes one request at a time.
//!
//! When the back end dies the `Disk` survives: [`Disk::wait`] reports [`Wake::Disconnected`], and
//! completions that were published before the death can still be taken, since the ring is ours.

mod disk;
mod memory;
mod request;
mod ring;
mod session;

pub use disk::{Disk, Options, Wake};
pub use memory::SharedMemory;
pub use request::{Completion, Config, Request, Status};
pub use ring::{Descriptor, SplitRing};
pub use session::{Session, feature};

#[cfg(test)]
mod tests;
