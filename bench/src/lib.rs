//! A vhost-user-blk front end in user space, and what the load generator needs around it.
//!
//! * [`front_end`] is the guest's side of the wire: shared memory, a split virtqueue with event
//!   index, and the handshake. The whole-system tests drive it too.
//! * [`process`] starts and pins the programs under test; [`server`] is what a comparison needs of
//! * [`load`] runs a workload against one server; [`compare`] alternates between two of them and
//!   reports medians and ratios; [`fio`] measures the file system beneath as their limit.
//!
//! The binary (`cargo run --release -p bench -- --help`) only parses arguments.

pub mod front_end;
pub mod load;
pub mod peer;
pub mod process;
pub mod server;
