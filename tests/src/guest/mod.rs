//! Real Linux guests in QEMU, on disks that a vhost-user back end serves.
//!
//! [`Guest::boot`] starts a Debian kernel with a busybox initramfs under QEMU, runs a shell job in
//! it and reports what the job says. The image is made by `scripts/setup test` in `.deps/guest`;
//! see `scripts/guest-init` for what a job may use (`result KEY VALUE`, `await WORD`, `disk N`, and
//! tools).
//!
//! Where to start reading: [`run`] is the rig's surface, [`qemu`] the command line, [`job`] how the
//! job travels, [`console`] how results come back, [`workload`] what guests write and check.
//!
//! Invariants:
//! * A guest has no disk but those named in [`GuestOptions::disks`] and the read-only tools disk.
//! * Everything a rig starts ends with it: by [`Drop`], by the watchdog of the guest's time-out,
//!   or, if the rig's own process dies, by the kernel (parent-death signal).
//! * Only a job that ended with exit status 0 and said so counts as passed. QEMU's own exit status
//!   says nothing.

pub mod accelerator;
pub mod console;
pub mod image;
pub mod job;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod run;
pub mod san;
pub mod workload;

pub use image::GuestImage;
pub use process::OwnedProcess;
pub use qemu::{Accelerator, QemuVersion};
pub use run::{Guest, GuestOptions, GuestReport};
pub use san::{San, StorePlace};
pub use workload::{Promises, Writer};
